//! A P-EAGLE draft at work: one pass a round, however many tokens it guesses.
//!
//! Of `n` committed tokens its cache holds `n - 1` rows, as an EAGLE-3 draft's. After every round one pass takes the rows of
//! what was committed, whose features are the target's own, and behind them rows that read the mask: row `d` of these, and
//! the last known one for `d = 0`, says what is likely `d` tokens behind the next one, whatever stands between. What the mask
//! rows leave in the cache is forgotten at once. As nothing depends on what is guessed, every tree is known after that pass;
//! the children of all guesses of a level are ranked alike.
//!
//! Shape legend: `B` rows, `T` guesses of a level, `H` the draft's hidden size, `TH` the target's, `N` guesses behind each
//! other, `DV` draft vocabulary.

use tch::{Device, Kind, Tensor};

use super::dynamic_tree::{DynamicTree, Expand, Names, grow};
use super::{
    Asked, Branch, Context, DraftSampling, Drafter, DrafterKind, Guesser, Joining, Progress, Trees, tree_text,
};
use crate::decode::policy::Proposal;
use crate::decode::prefill::Passes;
use crate::device;
use crate::draft::peagle::PeagleShape;
use crate::draft::peagle::network::PeagleNetwork;
use crate::draft::{Parameter, ParameterGroup};
use crate::error::{Error, Result};
use crate::export;
use crate::models::TargetModel;
use crate::nn::{KvCache, compact};
use crate::vocab::VocabMap;

/// Row of the table of drafters.
pub const KIND: DrafterKind = DrafterKind {
    algorithm: crate::draft::peagle::ALGORITHM.name,
    formats: &[export::peagle::FORMAT.name],
    from_checkpoint: |trained, asked| {
        let shape = PeagleShape::from_description(trained.description)
            .map_err(|problem| Error::Failed(format!("the checkpoint is none of a P-EAGLE draft: {problem}")))?;
        let tensors = trained.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        guesser(PeagleParts { shape, tensors, vocabulary: trained.vocabulary.clone() }, asked, Vec::new())
    },
    from_export: |folder, asked| {
        let export::peagle::Imported { shape, tensors, vocabulary, warnings } =
            export::peagle::read(folder, Some(asked.target.info().num_layers()))?;
        guesser(PeagleParts { shape, tensors, vocabulary }, asked, warnings)
    },
    default_tree: WHOLE_CHAIN,
    trees: Trees::Dynamic,
};

/// A chain of a guess of every depth that was trained.
const WHOLE_CHAIN: &str = "chain";

fn guesser<'a>(parts: PeagleParts, asked: Asked<'a, '_>, mut notes: Vec<String>) -> Result<Guesser<'a>> {
    let trained = parts.shape.num_depths;
    let (tree, text) = match asked.tree {
        WHOLE_CHAIN => tree_text::dynamic(&format!("chain:{trained}"))?,
        named => tree_text::dynamic(named)?,
    };
    if tree.depth > trained {
        let depth = tree.depth;
        notes.push(format!("the tree is {depth} deep, the draft was trained for {trained} guesses behind each other"));
    }
    let drafter = PeagleDrafter::new(parts, asked.target, tree, asked.sampling)?;
    Ok(Guesser { drafter: Box::new(drafter), tree: text, notes, method: None })
}

/// What a P-EAGLE draft is made of.
#[derive(Debug)]
pub struct PeagleParts {
    /// Its architecture.
    pub shape: PeagleShape,
    /// Tensors under the names of training.
    pub tensors: Vec<(String, Tensor)>,
    /// Its own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
}

/// Drafts with a P-EAGLE network.
pub struct PeagleDrafter {
    network: PeagleNetwork,
    capture: Vec<usize>,
    names: Names,
    tree: DynamicTree,
    sampling: DraftSampling,
    /// How prompts are cut.
    pub(super) passes: Passes,
    pub(super) rows: Option<Rows>,
}

/// What is kept of the running rows.
pub(super) struct Rows {
    pub(super) cache: KvCache,
    /// Outputs of the last known row and of the mask's, before any norm: `[B, N, H]`.
    pub(super) outputs: Tensor,
}

impl PeagleDrafter {
    /// A drafter for a target. The network takes the target's element type and device; tensors that have both are shared.
    pub fn new(
        PeagleParts { shape, tensors, vocabulary }: PeagleParts,
        target: &dyn TargetModel,
        tree: DynamicTree,
        sampling: DraftSampling,
    ) -> Result<Self> {
        tree.check()?;
        sampling.check()?;
        let dimensions = target.info();
        let size = &shape.network;
        for (what, own, theirs) in [
            ("tokens", size.vocab_size, dimensions.vocab_size),
            ("hidden values", size.target_hidden_size, dimensions.hidden_size),
        ] {
            if own != theirs {
                let problem =
                    format!("the draft is for another target: for one of {own} {what}, this one has {theirs}");
                return Err(Error::Failed(problem));
            }
        }
        if let Some(layer) = size.capture.iter().find(|&&layer| layer > dimensions.num_layers()) {
            let layers = dimensions.num_layers();
            return Err(Error::Failed(format!(
                "the draft reads hidden state {layer}, this target has {layers} layers"
            )));
        }
        let mapped = vocabulary.as_ref().map_or(size.vocab_size, VocabMap::draft_size);
        if mapped != size.draft_vocab_size {
            let problem = format!("the draft names {} tokens, its vocabulary map {mapped}", size.draft_vocab_size);
            return Err(Error::Failed(problem));
        }
        let (kind, device) = (target.kind(), target.device());
        let parameters = parameters(&shape, tensors, kind, device)?;
        let network = PeagleNetwork::new(&shape, &parameters, device)?;
        let names = Names::new(size.vocab_size, vocabulary.map(|map| map.target_ids().to_vec()));
        let capture = shape.network.capture;
        Ok(Self { network, capture, names, tree, sampling, passes: Passes::default(), rows: None })
    }

    /// Rows of the mask in a pass.
    fn masks(&self) -> i64 {
        self.tree.depth as i64 - 1
    }

    /// Runs new rows of known tokens, of different counts, behind those in `cache`, and `masks` rows of the mask behind each.
    /// `tokens` stand behind the tokens of the features. Returns `[B, 1 + masks, H]`.
    fn pass(&self, cache: &mut KvCache, tokens: &[&[u32]], features: &[&[Tensor]], masks: i64) -> Result<Tensor> {
        let device = self.network.head().device();
        let counts: Vec<i64> = tokens.iter().map(|tokens| tokens.len() as i64).collect();
        for (row, &count) in features.iter().zip(&counts) {
            let sizes: Vec<Vec<i64>> = row.iter().map(Tensor::size).collect();
            if sizes.len() != self.capture.len() || sizes.iter().any(|size| size[0] != count) {
                let wanted = self.capture.len();
                let problem = format!("features for {count} tokens of {wanted} layers were expected, got {sizes:?}");
                return Err(Error::Failed(problem));
            }
        }
        let captured: Vec<Tensor> = (0..self.capture.len())
            .map(|layer| {
                let parts: Vec<&Tensor> = features.iter().map(|row| &row[layer]).collect();
                Tensor::cat(&parts, 0).to_device(device) // [all new rows, TH]
            })
            .collect();
        let projected = self.network.project_hidden_states(&captured)?.split_with_sizes(&counts, 0); // [count, H] each
        let ids: Vec<Vec<i64>> = tokens.iter().map(|row| row.iter().map(|&token| i64::from(token)).collect()).collect();
        self.network.draft(&projected, &ids, masks, cache)
    }
}

/// The tensors that the shape asks for, and no others.
fn parameters(
    shape: &PeagleShape,
    tensors: Vec<(String, Tensor)>,
    kind: Kind,
    device: Device,
) -> Result<Vec<Parameter>> {
    let mut parameters = Vec::new();
    for (name, want) in shape.tensors() {
        let Some((_, value)) = tensors.iter().find(|(other, _)| *other == name) else {
            return Err(Error::Failed(format!("the draft has no tensor `{name}` {want:?}")));
        };
        if value.size() != want {
            let got = value.size();
            return Err(Error::Failed(format!("draft tensor `{name}`: expected {want:?}, got {got:?}")));
        }
        let value = compact(value.detach().f_to_device(device)?.f_to_kind(kind)?)?;
        let group = ParameterGroup::of_shape(&want);
        parameters.push(Parameter { name, value, group });
    }
    Ok(parameters)
}

impl Drafter for PeagleDrafter {
    fn capture(&self) -> Vec<usize> {
        self.capture.clone()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let tokens: Vec<&[u32]> = rows.iter().map(|row| &row.tokens[1..]).collect();
        let longest = tokens.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        let mut cache = self.network.new_cache(rows.len() as i64, longest as i64 + self.masks());
        let mut outputs = None;
        for piece in self.passes.pieces(longest) {
            // A prompt of more than one piece is alone; of a group every prompt is in its one piece.
            let own: Vec<&[u32]> =
                tokens.iter().map(|tokens| &tokens[piece.start..piece.end.min(tokens.len())]).collect();
            let features: Vec<Vec<Tensor>> = (rows.iter().zip(&own))
                .map(|(row, own)| (row.features.iter(), own.len() as i64))
                .map(|(layers, count)| layers.map(|layer| layer.narrow(0, piece.start as i64, count)).collect())
                .collect();
            let features: Vec<&[Tensor]> = features.iter().map(Vec::as_slice).collect();
            // Guesses stand behind the whole prompt.
            let masks = if piece.end >= longest { self.masks() } else { 0 };
            outputs = Some(self.pass(&mut cache, &own, &features, masks)?); // [B, N, H]
        }
        let outputs = outputs.ok_or_else(|| Error::Failed("the engine handed the draft an empty prompt".to_owned()))?;
        self.rows = Some(match self.rows.take() {
            None => Rows { cache, outputs },
            Some(mut running) => {
                running.cache.append_rows(cache);
                Rows { cache: running.cache, outputs: Tensor::cat(&[running.outputs, outputs], 0) }
            }
        });
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let _guard = tch::no_grad_guard();
        let Some(running) = self.rows.as_ref().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows it shall guess for", rows.len())));
        };
        let mut levels = Levels { network: &self.network, outputs: &running.outputs, depth: 0 };
        grow(&self.tree, self.sampling, &self.names, rows, &mut levels)
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(mut running) = self.rows.take().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows that went on", rows.len())));
        };
        let tokens: Vec<&[u32]> = rows.iter().map(|row| &row.tokens[row.tokens.len() - row.new..]).collect();
        let features: Vec<&[Tensor]> = rows.iter().map(|row| row.features.as_slice()).collect();
        running.outputs = self.pass(&mut running.cache, &tokens, &features, self.masks())?;
        self.rows = Some(running);
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        let kept: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.rows = self.rows.take().filter(|_| !kept.is_empty()).map(|mut running| {
            running.cache.select_rows(&kept);
            let index = device::send(&Tensor::from_slice(&kept), running.outputs.device());
            Rows { outputs: running.outputs.index_select(0, &index), cache: running.cache }
        });
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.rows.as_ref().map_or_else(Vec::new, |rows| rows.cache.lengths().to_vec())
    }
}

/// What comes at each depth, as a tree asks for it.
struct Levels<'a> {
    network: &'a PeagleNetwork,
    outputs: &'a Tensor,
    depth: i64,
}

impl Levels<'_> {
    /// Logits of the next depth, `[B, DV]`.
    fn next(&mut self) -> Tensor {
        self.depth += 1;
        self.network.logits(&self.outputs.select(1, self.depth - 1))
    }
}

impl Expand for Levels<'_> {
    fn start(&mut self) -> Result<Tensor> {
        Ok(self.next())
    }

    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor> {
        let width = frontier.iter().map(Vec::len).max().unwrap_or(0) as i64;
        let logits = self.next().unsqueeze(1); // [B, 1, DV]
        Ok(logits.f_expand([-1, width, -1], false)?) // [B, T, DV]
    }
}
