//! Medusa heads as they guess: loaded once, run on one hidden state a row, ranked.
//!
//! Shape legend: `B` rows, `K` heads that are run, `H` hidden size, `DV` vocabulary of the heads, `C` guesses of a head.

use std::path::Path;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::super::{DraftSampling, to_host};
use crate::decode::policy::DrawnFrom;
use crate::device;
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::draft::vocabulary;
use crate::error::{Error, Result};
use crate::export;
use crate::models::TargetModel;
use crate::nn::linear::linear;
use crate::nn::{self, noise};
use crate::vocab::VocabMap;

/// Noise domain of the draws of [`DraftSampling::Drawn`].
const DRAWS: u64 = 33;

/// Heads on the device and in the element type of their target.
#[derive(Debug)]
pub struct MedusaHeads {
    heads: Vec<Head>,
    /// The target's own projection onto `DV` tokens, where heads share it.
    shared: Option<nn::Head>,
    vocabulary: Option<VocabMap>,
    /// `[DV]` the target's name of each token, on the device.
    tokens: Tensor,
    /// `V`
    vocab_size: i64,
    kind: Kind,
    device: Device,
    /// Index of the hidden state that heads read.
    layer: usize,
}

#[derive(Debug)]
struct Head {
    /// Weights and biases of the residual blocks, `[H, H]` and `[H]`.
    blocks: Vec<(Tensor, Tensor)>,
    /// The head's own projection, `[DV, H]`.
    projection: Option<Tensor>,
}

/// A place of a text that is guessed at.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Position of the first guess; head `k` guesses `k` behind it.
    pub position: usize,
    /// The request's own part of every seed.
    pub key: u64,
    /// Temperature of the target's choices; 0 is greedy.
    pub temperature: f64,
}

/// Guesses of one head for one row, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Guesses {
    /// Target ids.
    pub tokens: Vec<u32>,
    /// Log-probability of each, at the temperature they were picked at.
    pub log_probabilities: Vec<f64>,
    /// What they were drawn from, where they were.
    pub drawn_from: Option<DrawnFrom>,
}

impl MedusaHeads {
    /// Reads an exported folder of either layout.
    pub fn read(path: &Path, target: &dyn TargetModel) -> Result<Self> {
        let heads = export::medusa::read(path)?;
        Self::new(&heads.config, &heads.tensors, heads.vocabulary.as_ref(), target)
            .map_err(|error| Error::bad_file(path, error.to_string()))
    }

    /// Heads from tensors under the names training uses; those of a draft in training may be handed over as they are.
    pub fn new(
        config: &MedusaConfig,
        tensors: &[(String, Tensor)],
        vocabulary: Option<&VocabMap>,
        target: &dyn TargetModel,
    ) -> Result<Self> {
        let (dimensions, kind, device) = (target.info(), target.kind(), target.device());
        let (hidden, vocab_size) = (dimensions.hidden_size, dimensions.vocab_size);
        if let Some(map) = vocabulary.filter(|map| map.target_size() != vocab_size) {
            let problem = format!("the heads' vocabulary is of a target with {} tokens", map.target_size());
            return Err(Error::Failed(format!("{problem}; this one has {vocab_size}")));
        }
        let find = |name: String, shape: &[i64]| {
            let (_, tensor) = tensors
                .iter()
                .find(|(other, _)| *other == name)
                .ok_or_else(|| Error::Failed(format!("the heads hold no tensor `{name}`")))?;
            if tensor.size() != shape {
                let got = tensor.size();
                return Err(Error::Failed(format!("`{name}`: the target asks for shape {shape:?}, got {got:?}")));
            }
            Ok(tensor.detach().f_to_device(device)?.f_to_kind(kind)?)
        };
        let draft_size = vocabulary.map_or(vocab_size, VocabMap::draft_size);
        let mut heads = Vec::with_capacity(config.num_heads);
        for head in 0..config.num_heads {
            let block = |layer: usize| {
                // Tied blocks are there once.
                let tied = config.share_layers && !tensors.iter().any(|(name, _)| *name == block_name(head, layer));
                let name = block_name(head, if tied { 0 } else { layer });
                let bias = name.replace("weight", "bias");
                Ok((find(name, &[hidden, hidden])?, find(bias, &[hidden])?))
            };
            let blocks = (0..config.num_layers).map(block).collect::<Result<Vec<_>>>()?;
            let own = || find(format!("{head}.{}.weight", config.num_layers), &[draft_size, hidden]);
            let projection = (config.projection == HeadProjection::Own).then(own).transpose()?;
            heads.push(Head { blocks, projection });
        }
        let shared = match (config.projection, vocabulary) {
            (HeadProjection::Own, _) => None,
            (HeadProjection::Shared, None) => Some(target.head().to(kind, device)?),
            (HeadProjection::Shared, Some(map)) => Some(vocabulary::gather_rows(target.head(), map)?),
        };
        let tokens = match vocabulary {
            Some(map) => device::upload(map.target_ids(), device)?,
            None => Tensor::f_arange(vocab_size, (Kind::Int64, device))?,
        };
        let (vocabulary, layer) = (vocabulary.cloned(), dimensions.num_layers());
        Ok(Self { tokens, heads, shared, vocabulary, vocab_size, kind, device, layer })
    }

    /// Number of heads.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// Whether there is no head.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Hidden state of the target that heads read, by Hugging Face's index: the last one, normed.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Logits of the first `depth` heads on hidden states `[B, H]`: `[K, B, DV]`.
    fn compute_logits(&self, states: &Tensor, depth: usize) -> Tensor {
        let states = states.to_device(self.device).to_kind(self.kind);
        let heads = &self.heads[..depth];
        let backbone = |head: &Head| {
            head.blocks
                .iter()
                .fold(states.shallow_clone(), |x, (weight, bias)| &x + linear(&x, weight, Some(bias)).silu())
        };
        match &self.shared {
            // One product for all heads: the projection is read once.
            Some(shared) => shared.logits(&Tensor::stack(&heads.iter().map(backbone).collect::<Vec<_>>(), 0)),
            None => {
                // Every projection is another matrix and is read once in any case.
                let project = |head: &Head| match &head.projection {
                    Some(own) => linear(&backbone(head), own, None),
                    None => backbone(head),
                };
                Tensor::stack(&heads.iter().map(project).collect::<Vec<_>>(), 0)
            }
        }
    }

    /// The `count` best guesses of the first `depth` heads for every row of hidden states `[B, H]`, one list of heads a
    /// row. Heads whose logits are no numbers guess nothing.
    pub fn guess(
        &self,
        states: &Tensor,
        depth: usize,
        count: usize,
        sampling: DraftSampling,
        places: &[Place],
    ) -> Result<Vec<Vec<Guesses>>> {
        let _guard = tch::no_grad_guard();
        let depth = depth.min(self.len());
        if depth == 0 {
            return Ok(vec![Vec::new(); places.len()]);
        }
        let logits = self.compute_logits(states, depth); // [K, B, DV]
        let logits = if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) };
        match sampling {
            DraftSampling::Greedy | DraftSampling::Sure => self.most_likely(&logits, count, places.len()),
            DraftSampling::Keyed { temperature, seed } => {
                self.noisy(&logits, count, (temperature, seed, noise::TEXT), places)
            }
            DraftSampling::KeyedByRow { seed } => self.by_row(&logits, count, seed, places),
            DraftSampling::Drawn { temperature, seed } => {
                self.noisy(&logits, count, (temperature, seed, DRAWS), places)
            }
        }
    }

    /// Greedy rows by the most likely tokens, the others with their own temperatures. Logits are `[K, B, DV]`.
    fn by_row(&self, logits: &Tensor, count: usize, seed: u64, places: &[Place]) -> Result<Vec<Vec<Guesses>>> {
        let (sampled, greedy): (Vec<usize>, Vec<usize>) =
            (0..places.len()).partition(|&row| places[row].temperature > 0.0);
        let own = |rows: &[usize]| -> Result<Tensor> {
            let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            Ok(logits.f_index_select(1, &device::upload(&index, logits.device())?)?) // [K, b, DV]
        };
        let mut guesses = vec![Vec::new(); places.len()];
        if !greedy.is_empty() {
            let found = self.most_likely(&own(&greedy)?, count, greedy.len())?;
            greedy.iter().zip(found).for_each(|(&row, found)| guesses[row] = found);
        }
        if !sampled.is_empty() {
            let places: Vec<Place> = sampled.iter().map(|&row| places[row]).collect();
            let temperatures: Vec<f64> = places.iter().map(|place| place.temperature).collect();
            let temperatures = device::send(&Tensor::from_slice(&temperatures), logits.device()).f_unsqueeze(1)?; // [b, 1]
            let scaled = own(&sampled)?.to_kind(Kind::Double).f_div(&temperatures)?;
            let found = self.noisy(&scaled, count, (1.0, seed, noise::TEXT), &places)?;
            sampled.iter().zip(found).for_each(|(&row, found)| guesses[row] = found);
        }
        Ok(guesses)
    }

    fn most_likely(&self, logits: &Tensor, count: usize, rows: usize) -> Result<Vec<Vec<Guesses>>> {
        let count = (count as i64).min(logits.size()[2]);
        let (values, ids) = logits.f_topk(count, -1, true, true)?; // [K, B, C]
        self.ranked(&(values - logits.logsumexp([-1i64].as_slice(), true)), &ids, rows)
    }

    /// Guesses from the log-probabilities and ids `[K, B, C]` of the best, largest first.
    fn ranked(&self, values: &Tensor, ids: &Tensor, rows: usize) -> Result<Vec<Vec<Guesses>>> {
        let [heads, _, count] = <[i64; 3]>::try_from(ids.size())
            .map_err(|shape| Error::Failed(format!("guesses of heads: expected three axes, got {shape:?}")))?
            .map(|size| size as usize);
        let (values, ids) = to_host(values, ids)?;
        let guesses = |row: usize, head: usize| {
            let at = (head * rows + row) * count;
            // Largest first, what is no number before all.
            let possible = values[at..at + count].iter().take_while(|value| value.is_finite());
            let log_probabilities: Vec<f64> = possible.copied().collect();
            let tokens = ids[at..at + log_probabilities.len()].iter().map(|&id| self.target_id(id as usize)).collect();
            Guesses { tokens, log_probabilities, drawn_from: None }
        };
        Ok((0..rows).map(|row| (0..heads).map(|head| guesses(row, head)).collect()).collect())
    }

    fn noisy(
        &self,
        logits: &Tensor,
        count: usize,
        (temperature, seed, domain): (f64, u64, u64),
        places: &[Place],
    ) -> Result<Vec<Vec<Guesses>>> {
        let [heads, _, names] = <[i64; 3]>::try_from(logits.size())
            .map_err(|shape| Error::Failed(format!("logits of heads: expected three axes, got {shape:?}")))?;
        let log_probabilities = (logits.to_kind(Kind::Double) / temperature).log_softmax(-1, Kind::Double);
        // Probabilities by the target's ids, [K, B, V].
        let spread = || -> Result<Tensor> {
            let probabilities = log_probabilities.exp();
            if self.vocabulary.is_none() {
                return Ok(probabilities);
            }
            let all = Tensor::f_zeros([heads, places.len() as i64, self.vocab_size], (Kind::Double, logits.device()))?;
            Ok(all.f_index_copy(2, &self.tokens, &probabilities)?)
        };
        let origins = (domain == DRAWS).then(spread).transpose()?;
        let origin =
            |head: usize, row: usize| origins.as_ref().map(|origins| Rc::new(origins.get(head as i64).get(row as i64)));
        if logits.device() != Device::Cpu {
            // Ranked where the rows are: nothing as long as a vocabulary travels.
            let at = |head: u64| {
                let place = move |place: &Place| (seed.wrapping_add(place.key), place.position as u64 + head);
                places.iter().map(place)
            };
            let all: Vec<noise::Place> = (0..heads as u64).flat_map(at).collect(); // K * B
            let noise = noise::gumbel_rows(domain, &all, &self.tokens).view_as(&log_probabilities);
            let (_, ids) = (noise + &log_probabilities).f_topk((count as i64).min(names), -1, true, true)?; // [K, B, C]
            let mut guesses = self.ranked(&log_probabilities.f_gather(-1, &ids, false)?, &ids, places.len())?;
            for (row, heads) in guesses.iter_mut().enumerate() {
                for (head, guesses) in heads.iter_mut().enumerate().filter(|(_, guesses)| !guesses.tokens.is_empty()) {
                    guesses.drawn_from = origin(head, row);
                }
            }
            return Ok(guesses);
        }
        let flat = Vec::<f64>::try_from(log_probabilities.reshape([-1]).to_device(Device::Cpu))?;
        let guesses = |row: usize, place: &Place, head: usize| {
            let line = &flat[(head * places.len() + row) * names as usize..][..names as usize];
            let (seed, position) = (seed.wrapping_add(place.key), (place.position + head) as u64);
            let names = self.vocabulary.as_ref().map(VocabMap::target_ids);
            let tokens = noise::gumbel_top((seed, domain, position), names, line, count);
            let of = |token: &u32| line[self.draft_id(*token)];
            let log_probabilities = tokens.iter().map(of).collect();
            let drawn_from = if tokens.is_empty() { None } else { origin(head, row) };
            Guesses { tokens, log_probabilities, drawn_from }
        };
        let row = |(row, place)| (0..heads as usize).map(|head| guesses(row, place, head)).collect();
        Ok(places.iter().enumerate().map(row).collect())
    }

    fn target_id(&self, id: usize) -> u32 {
        self.vocabulary.as_ref().map_or(id as u32, |map| map.target_ids()[id] as u32)
    }

    /// Place in a head's logits of a token it named.
    fn draft_id(&self, token: u32) -> usize {
        let draft_id = |map: &VocabMap| map.draft_id(i64::from(token)).map(|id| id as usize);
        self.vocabulary.as_ref().and_then(draft_id).unwrap_or(token as usize)
    }
}

fn block_name(head: usize, layer: usize) -> String {
    format!("{head}.{layer}.linear.weight")
}
