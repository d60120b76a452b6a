//! An independent, smaller model of the same vocabulary as a draft.
//!
//! Leviathan et al. 2023, <https://arxiv.org/abs/2211.17192>; trees of its guesses as in `dynamic_tree`. While guessing it
//! has run everything committed and, level by level, the guesses it looks behind. After a round its cache keeps what came
//! true of them; the rest of what was committed is run with the next root, in one pass.
//!
//! Shape legend: `B` rows, `T` new tokens or guesses of each, `V` vocabulary.

use tch::{Device, Tensor};

use super::branches::Branches;
use super::dynamic_tree::{DynamicTree, Expand, Names, grow};
use super::{Branch, Context, DraftSampling, Drafter, Joining, Progress};
use crate::data::ChatTokenizer;
use crate::decode::policy::Proposal;
use crate::decode::prefill::Passes;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, LayerKind, LogitRows, TargetInfo, TargetModel};
use crate::nn::{AttentionMask, KvCache};

/// Drafts with a model of its own.
pub struct ModelDrafter<'a> {
    model: Box<dyn TargetModel + 'a>,
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
    /// The guesses of the last round, behind everything committed before it.
    branches: Branches,
    /// Tokens in the cache that are committed.
    pub(super) known: Vec<i64>,
}

impl<'a> ModelDrafter<'a> {
    /// A drafter for a target of these sizes.
    pub fn new(
        model: Box<dyn TargetModel + 'a>,
        target: &TargetInfo,
        tree: DynamicTree,
        sampling: DraftSampling,
    ) -> Result<Self> {
        tree.check()?;
        sampling.check()?;
        let (own, theirs) = (model.info().vocab_size, target.vocab_size);
        if own != theirs {
            return Err(Error::Failed(format!(
                "the draft model has {own} tokens, the target {theirs}: a draft model needs the target's vocabulary"
            )));
        }
        if model.info().layers.contains(&LayerKind::State) {
            return Err(Error::Failed(
                "the draft model has layers with a state, which cannot be taken back level by level".to_owned(),
            ));
        }
        let names = Names::new(theirs, None);
        Ok(Self { model, names, tree, sampling, passes: Passes::default(), rows: None })
    }

    /// Refuses a draft model whose tokens mean something else than the target's.
    pub fn check_tokenizers(target: &ChatTokenizer, draft: &ChatTokenizer) -> Result<()> {
        match target.vocabulary_hash() == draft.vocabulary_hash() {
            true => Ok(()),
            false => Err(Error::Failed(
                "the draft model has another tokenizer than the target: its tokens mean something else".to_owned(),
            )),
        }
    }

    /// The cache, row `i` that of the `i`-th running request.
    pub fn cache(&self) -> Option<&KvCache> {
        self.rows.as_ref().map(|rows| &rows.cache)
    }
}

/// Runs tokens, of different counts, behind those in the cache. Returns logits of the last of each row, `[B, V]`, where
/// they are wanted.
fn run(model: &dyn TargetModel, cache: &mut KvCache, tokens: &[&[u32]], wanted: bool) -> Result<Option<Tensor>> {
    let device = model.device();
    let counts: Vec<i64> = tokens.iter().map(|tokens| tokens.len() as i64).collect();
    let most = counts.iter().copied().max().unwrap_or(0);
    if most == 0 {
        return Ok(None);
    }
    let (mut ids, mut positions) = (Vec::new(), Vec::new());
    for (tokens, &length) in tokens.iter().zip(cache.lengths()) {
        ids.extend((0..most as usize).map(|place| i64::from(tokens.get(place).copied().unwrap_or(0))));
        positions.extend((0..most).map(|place| length + place));
    }
    let shaped = |values: &[i64], device: Device| device::send(&Tensor::from_slice(values).view([-1, most]), device);
    let (ids, positions) = (shaped(&ids, device), shaped(&positions, device)); // [B, T]
    let ends: Vec<i64> = counts.iter().zip(0..).map(|(count, row)| row * most + count - 1).collect();
    let ends = device::upload(&ends, device)?;
    let logits = if wanted { LogitRows::Rows(&ends) } else { LogitRows::None };
    // Padding is on the right: causal order hides it, and the cache does not keep it.
    let input = ForwardInput { ids: &ids, positions: &positions, mask: &AttentionMask::Causal, capture: &[], logits };
    let output = model.forward(&input, Some(&mut *cache))?;
    cache.advance(&counts);
    Ok(output.logits)
}

fn no_logits() -> Error {
    Error::Failed("the draft model returned no logits although they were asked for".to_owned())
}

impl Drafter for ModelDrafter<'_> {
    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let prompts: Vec<&[u32]> = rows.iter().map(|row| &row.tokens[..row.tokens.len() - 1]).collect();
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let mut cache = self.model.new_cache(rows.len() as i64, longest as i64);
        for piece in self.passes.pieces(longest) {
            // A prompt of more than one piece is alone; of a group every prompt is in its one piece.
            let own: Vec<&[u32]> =
                prompts.iter().map(|prompt| &prompt[piece.start..piece.end.min(prompt.len())]).collect();
            run(self.model.as_ref(), &mut cache, &own, false)?;
        }
        let mut known: Vec<i64> = self.rows.as_ref().map_or_else(Vec::new, |running| running.known.clone());
        known.extend(cache.lengths());
        let cache = match self.rows.take() {
            None => cache,
            Some(mut running) => {
                running.cache.append_rows(cache);
                running.cache
            }
        };
        self.rows = Some(Rows { branches: Branches::behind(&known), known, cache });
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let _guard = tch::no_grad_guard();
        let Some(running) = self.rows.as_mut().filter(|running| running.known.len() == rows.len()) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows it shall guess for", rows.len())));
        };
        let missing: Vec<&[u32]> =
            rows.iter().zip(&running.known).map(|(row, &known)| &row.tokens[known as usize..]).collect();
        let start = run(self.model.as_ref(), &mut running.cache, &missing, true)?.ok_or_else(no_logits)?; // [B, V]
        running.known = running.cache.lengths().iter().map(|length| length - 1).collect();
        let branches = Branches::behind(running.cache.lengths());
        let mut pass = Pass { model: self.model.as_ref(), cache: &mut running.cache, branches, start };
        let proposals = grow(&self.tree, self.sampling, &self.names, rows, &mut pass);
        running.branches = pass.branches;
        proposals
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Some(running) = self.rows.as_mut().filter(|running| running.known.len() == rows.len()) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows that went on", rows.len())));
        };
        let mut places = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            // The last committed token is the next root, also where it was guessed and run.
            let fresh = &row.tokens[row.tokens.len() - row.new..row.tokens.len() - 1];
            places.push(running.branches.came_true(index, fresh));
        }
        let base = running.branches.base().to_vec();
        running.cache.keep_behind(&base, &places);
        running.known = running.cache.lengths().to_vec();
        running.branches = Branches::behind(&running.known);
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        let kept: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.rows = self.rows.take().filter(|_| !kept.is_empty()).map(|mut running| {
            running.cache.select_rows(&kept);
            running.known = rows.iter().map(|&row| running.known[row]).collect();
            running.branches.retain(rows);
            running
        });
    }

    fn can_rewind(&self) -> bool {
        true
    }

    fn rewind(&mut self, lengths: &[usize]) -> Result<()> {
        let Some(running) = self.rows.as_mut().filter(|running| running.known.len() == lengths.len()) else {
            return Err(Error::Failed(format!("the draft does not know the {} rows that go back", lengths.len())));
        };
        // The last token of what is left is the next root, and is run again with the next tree.
        let kept: Vec<i64> = (running.branches.base().iter().zip(lengths))
            .map(|(&run, &length)| run.min(length as i64 - 1).max(0))
            .collect();
        running.cache.truncate(&kept);
        running.branches = Branches::behind(&kept);
        running.known = kept;
        Ok(())
    }

    /// Committed tokens that it has run, the next root not counted.
    fn cache_lengths(&self) -> Vec<i64> {
        self.rows.as_ref().map_or_else(Vec::new, |running| running.known.clone())
    }
}

/// A tree on its way.
struct Pass<'a> {
    model: &'a dyn TargetModel,
    cache: &'a mut KvCache,
    branches: Branches,
    /// Logits behind the root, `[B, V]`.
    start: Tensor,
}

impl Expand for Pass<'_> {
    fn start(&mut self) -> Result<Tensor> {
        Ok(self.start.shallow_clone())
    }

    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor> {
        let level = self.branches.level(frontier, self.start.device())?;
        let input = ForwardInput {
            ids: &level.ids,
            positions: &level.positions,
            mask: &level.mask,
            capture: &[],
            logits: LogitRows::All,
        };
        let logits = self.model.forward(&input, Some(&mut *self.cache))?.logits.ok_or_else(no_logits)?; // [B * T, V]
        self.cache.advance(&vec![level.width; frontier.len()]);
        Ok(logits.view([frontier.len() as i64, level.width, -1])) // [B, T, V]
    }
}
