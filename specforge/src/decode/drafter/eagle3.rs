//! An EAGLE-3 draft at work.
//!
//! Of `n` committed tokens its cache holds `n - 1` rows: row `t` reads the target's features of token `t` and the embedding
//! of token `t + 1`. After every round the rows of what was committed are computed from the target's own features, never
//! from the draft's guesses of them, so that the cache is that of a fresh prefill. The last row's output is where the next
//! tree starts; what a guess reads instead of a feature is its parent's output.
//!
//! Shape legend: `B` rows, `T` new rows or guesses of each, `R` new rows of all, `H` the draft's hidden size, `TH` the
//! target's.

use tch::{Device, Kind, Tensor};

use super::branches::Branches;
use super::dynamic_tree::{DynamicTree, Expand, Names, grow};
use super::{
    Asked, Branch, Context, DraftSampling, Drafter, DrafterKind, Guesser, Joining, Progress, Trees, tree_text,
};
use crate::decode::policy::Proposal;
use crate::decode::prefill::Passes;
use crate::device;
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::eagle3::layers::Network;
use crate::draft::{DraftModel, Parameter, ParameterGroup, vocabulary};
use crate::error::{Error, Result};
use crate::export::{self, eagle3::Imported};
use crate::models::TargetModel;
use crate::nn::{AttentionMask, KvCache, compact};
use crate::vocab::VocabMap;

/// Row of the table of drafters.
pub const KIND: DrafterKind = DrafterKind {
    algorithm: crate::draft::eagle3::ALGORITHM.name,
    formats: &[export::eagle3::RAW.name, export::eagle3::SPECULATORS.name, export::eagle3::GGUF.name],
    from_checkpoint: |trained, asked| {
        let shape = Eagle3Shape::from_description(trained.description)
            .map_err(|problem| Error::Failed(format!("the checkpoint is none of an EAGLE-3 draft: {problem}")))?;
        let tensors = trained.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let parts = Eagle3Parts { shape, tensors, vocabulary: trained.vocabulary.clone(), embedding: None };
        guesser(parts, asked, Vec::new())
    },
    from_export: |folder, asked| {
        let mut imported = export::eagle3::read(folder, Some(asked.target.info().num_layers()))?;
        let mut notes = std::mem::take(&mut imported.warnings);
        if let Some(own) = imported.embedding.take()
            && export::eagle3::is_other_embedding(&own, &asked.target.embedding().table)?
        {
            notes.push("the draft has an embedding that is not the target's: the draft's own is used".to_owned());
            imported.embedding = Some(own);
        }
        guesser(Eagle3Parts::from(imported), asked, notes)
    },
    default_tree: tree_text::DEFAULT,
    trees: Trees::Dynamic,
};

fn guesser<'a>(parts: Eagle3Parts, asked: Asked<'a, '_>, notes: Vec<String>) -> Result<Guesser<'a>> {
    let (tree, text) = tree_text::dynamic(asked.tree)?;
    let drafter = Eagle3Drafter::new(parts, asked.target, tree, asked.sampling)?;
    Ok(Guesser { drafter: Box::new(drafter), tree: text, notes, method: None })
}

/// What an EAGLE-3 draft is made of.
#[derive(Debug)]
pub struct Eagle3Parts {
    /// Its architecture.
    pub shape: Eagle3Shape,
    /// Tensors under the names of training.
    pub tensors: Vec<(String, Tensor)>,
    /// Its own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<VocabMap>,
    /// Its own embedding, where it has one although it is as wide as the target.
    pub embedding: Option<Tensor>,
}

impl From<Imported> for Eagle3Parts {
    fn from(Imported { shape, tensors, vocabulary, embedding, .. }: Imported) -> Self {
        Self { shape, tensors, vocabulary, embedding }
    }
}

impl Eagle3Parts {
    /// Those of a draft in training, of which nothing is copied: what is trained is what drafts. `None` for a draft of
    /// another algorithm.
    pub fn of_training(draft: &dyn DraftModel) -> Result<Option<Self>> {
        if draft.algorithm().name != crate::draft::eagle3::ALGORITHM.name {
            return Ok(None);
        }
        let shape = Eagle3Shape::from_description(&draft.description())
            .map_err(|problem| Error::Failed(format!("the shape of the draft in training: {problem}")))?;
        let parameters = draft.parameters().iter();
        let tensors = parameters.map(|parameter| (parameter.name.clone(), parameter.value.detach())).collect();
        Ok(Some(Self { shape, tensors, vocabulary: vocabulary::from_tensors(&draft.buffers())?, embedding: None }))
    }
}

/// Drafts with an EAGLE-3 network.
pub struct Eagle3Drafter {
    network: Network,
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
    /// The last row's output before any norm, `[B, H]`.
    pub(super) last: Tensor,
}

impl Eagle3Drafter {
    /// A drafter for a target. The network takes the target's element type and device; tensors that have both are shared.
    pub fn new(
        parts: Eagle3Parts,
        target: &dyn TargetModel,
        tree: DynamicTree,
        sampling: DraftSampling,
    ) -> Result<Self> {
        let dimensions = target.info();
        let shape = &parts.shape;
        for (what, own, theirs) in [
            ("tokens", shape.vocab_size, dimensions.vocab_size),
            ("hidden values", shape.target_hidden_size, dimensions.hidden_size),
        ] {
            if own != theirs {
                let problem =
                    format!("the draft is for another target: for one of {own} {what}, this one has {theirs}");
                return Err(Error::Failed(problem));
            }
        }
        if let Some(layer) = shape.capture.iter().find(|&&layer| layer > dimensions.num_layers()) {
            let layers = dimensions.num_layers();
            let problem = format!("the draft reads hidden state {layer}, this target has {layers} layers");
            return Err(Error::Failed(problem));
        }
        let (kind, device) = (target.kind(), target.device());
        let embedding = match &parts.embedding {
            Some(own) if own.size() != target.embedding().table.size() => {
                let (want, got) = (target.embedding().table.size(), own.size());
                return Err(Error::Failed(format!("the draft's embedding: expected {want:?}, got {got:?}")));
            }
            Some(own) => own.f_to_device(device)?.f_to_kind(kind)?,
            None => target.embedding().table.shallow_clone(),
        };
        Self::with_embedding(parts, &embedding, (kind, device), tree, sampling)
    }

    /// The same, given the embedding that the draft reads: mostly the target's, `[V, TH]`.
    pub fn with_embedding(
        Eagle3Parts { shape, tensors, vocabulary, .. }: Eagle3Parts,
        embedding: &Tensor,
        (kind, device): (Kind, Device),
        tree: DynamicTree,
        sampling: DraftSampling,
    ) -> Result<Self> {
        tree.check()?;
        sampling.check()?;
        let mapped = vocabulary.as_ref().map_or(shape.vocab_size, VocabMap::draft_size);
        if mapped != shape.draft_vocab_size {
            let problem = format!("the draft names {} tokens, its vocabulary map {mapped}", shape.draft_vocab_size);
            return Err(Error::Failed(problem));
        }
        let mut parameters = Vec::new();
        let wanted = shape.tensors();
        // Nothing counts that the shape does not ask for.
        for (name, value) in tensors.into_iter().filter(|(name, _)| wanted.iter().any(|(want, _)| want == name)) {
            let value = compact(value.detach().f_to_device(device)?.f_to_kind(kind)?)?;
            let group = ParameterGroup::of_shape(&value.size());
            parameters.push(Parameter { name, value, group });
        }
        for (name, want) in wanted {
            let found = parameters.iter().find(|parameter| parameter.name == name);
            match found.map(|parameter| parameter.value.size()) {
                Some(got) if got == want => {}
                Some(got) => {
                    return Err(Error::Failed(format!("draft tensor `{name}`: expected {want:?}, got {got:?}")));
                }
                None => return Err(Error::Failed(format!("the draft has no tensor `{name}` {want:?}"))),
            }
        }
        let network = Network::new(&shape, &parameters, &embedding.f_to_device(device)?.detach(), device)?;
        let target_ids = vocabulary.map(|map| map.target_ids().to_vec());
        let names = Names::new(shape.vocab_size, target_ids);
        Ok(Self { network, capture: shape.capture, names, tree, sampling, passes: Passes::default(), rows: None })
    }

    /// The cache, row `i` that of the `i`-th running request.
    pub fn cache(&self) -> Option<&KvCache> {
        self.rows.as_ref().map(|rows| &rows.cache)
    }

    /// Runs new rows of known tokens, of different counts, behind those in `cache`, and returns the last one's output of
    /// each, `[B, H]`. `tokens` stand behind the tokens of the features.
    fn refresh(&self, cache: &mut KvCache, tokens: &[&[u32]], features: &[&[Tensor]]) -> Result<Tensor> {
        let device = self.network.head().device();
        let counts: Vec<i64> = tokens.iter().map(|tokens| tokens.len() as i64).collect();
        let most = counts.iter().copied().max().unwrap_or(0) as usize;
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
                Tensor::cat(&parts, 0).to_device(device) // [R, TH]
            })
            .collect();
        let projected = self.network.project_hidden_states(&captured)?.split_with_sizes(&counts, 0); // [count, H] each
        let features = Tensor::pad_sequence(&projected, true, 0.0, "right"); // [B, T, H]
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        for (tokens, &length) in tokens.iter().zip(cache.lengths()) {
            ids.extend((0..most).map(|place| i64::from(tokens.get(place).copied().unwrap_or(0))));
            positions.extend((0..most as i64).map(|place| length + place));
        }
        let shaped = |values: &[i64]| device::send(&Tensor::from_slice(values).view([-1, most as i64]), device);
        // Padding is on the right: causal order hides it, and the cache does not keep it.
        let hidden = self.network.forward_cached(
            &features,
            &shaped(&ids),
            &shaped(&positions),
            &AttentionMask::Causal,
            cache,
        )?; // [B, T, H]
        cache.advance(&counts);
        let ends: Vec<i64> = counts.iter().zip(0..).map(|(count, row)| row * most as i64 + count - 1).collect();
        Ok(hidden.flatten(0, 1).index_select(0, &device::upload(&ends, device)?)) // [B, H]
    }
}

impl Drafter for Eagle3Drafter {
    fn capture(&self) -> Vec<usize> {
        self.capture.clone()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let tokens: Vec<&[u32]> = rows.iter().map(|row| &row.tokens[1..]).collect();
        let features: Vec<&[Tensor]> = rows.iter().map(|row| row.features.as_slice()).collect();
        let longest = tokens.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        let mut cache = self.network.new_cache(rows.len() as i64, longest as i64);
        let mut last = None;
        for piece in self.passes.pieces(longest) {
            // A prompt of more than one piece is alone; of a group every prompt is in its one piece.
            let part = |tokens: &&'_ [u32]| piece.start..piece.end.min(tokens.len());
            let own: Vec<&[u32]> = tokens.iter().map(|tokens| &tokens[part(tokens)]).collect();
            let features: Vec<Vec<Tensor>> = (features.iter().zip(&own))
                .map(|(layers, own)| layers.iter().map(|layer| layer.narrow(0, piece.start as i64, own.len() as i64)))
                .map(Iterator::collect)
                .collect();
            let features: Vec<&[Tensor]> = features.iter().map(Vec::as_slice).collect();
            last = Some(self.refresh(&mut cache, &own, &features)?); // [B, H]
        }
        let last = last.ok_or_else(|| Error::Failed("the engine handed the draft an empty prompt".to_owned()))?;
        self.rows = Some(match self.rows.take() {
            None => Rows { cache, last },
            Some(mut running) => {
                running.cache.append_rows(cache);
                Rows { cache: running.cache, last: Tensor::cat(&[running.last, last], 0) }
            }
        });
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let _guard = tch::no_grad_guard();
        let Some(running) = self.rows.as_mut().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows it shall guess for", rows.len())));
        };
        let base = running.cache.lengths().to_vec();
        let behind = running.last.unsqueeze(1); // [B, 1, H]
        let branches = Branches::behind(&base);
        let mut pass = Pass { network: &self.network, cache: &mut running.cache, branches, behind };
        let proposals = grow(&self.tree, self.sampling, &self.names, rows, &mut pass);
        running.cache.truncate(&base);
        proposals
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(mut running) = self.rows.take().filter(|running| running.cache.rows() == rows.len() as i64) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows that went on", rows.len())));
        };
        let tokens: Vec<&[u32]> = rows.iter().map(|row| &row.tokens[row.tokens.len() - row.new..]).collect();
        let features: Vec<&[Tensor]> = rows.iter().map(|row| row.features.as_slice()).collect();
        running.last = self.refresh(&mut running.cache, &tokens, &features)?;
        self.rows = Some(running);
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        let kept: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.rows = self.rows.take().filter(|_| !kept.is_empty()).map(|mut running| {
            running.cache.select_rows(&kept);
            let index = device::send(&Tensor::from_slice(&kept), running.last.device());
            Rows { last: running.last.index_select(0, &index), cache: running.cache }
        });
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.cache().map_or_else(Vec::new, |cache| cache.lengths().to_vec())
    }
}

/// A tree on its way.
struct Pass<'a> {
    network: &'a Network,
    cache: &'a mut KvCache,
    branches: Branches,
    /// Output of the last row, and then of the guesses of the level before, `[B, T, H]`.
    behind: Tensor,
}

impl Expand for Pass<'_> {
    fn start(&mut self) -> Result<Tensor> {
        Ok(self.network.logits(&self.behind.squeeze_dim(1))) // [B, DV]
    }

    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor> {
        let level = self.branches.level(frontier, self.behind.device())?;
        let parents = level.parents.unsqueeze(-1).expand([-1, -1, self.behind.size()[2]], false); // [B, T, H]
        let features = self.network.fed_back(&self.behind.gather(1, &parents, false)); // [B, T, H]
        self.behind = self.network.forward_cached(&features, &level.ids, &level.positions, &level.mask, self.cache)?; // [B, T, H]
        self.cache.advance(&vec![level.width; frontier.len()]);
        Ok(self.network.logits(&self.behind)) // [B, T, DV]
    }
}
