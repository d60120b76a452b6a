//! XPress in training: one pass behind true tokens, a few behind the refiner's own, and the base logits themselves.
//!
//! The passes over its own tokens are those of the Jacobi iteration that drafts; what they read is chosen without a gradient.
//! The base logits have a term of their own because every iteration begins with them.
//!
//! Shape legend: as in `chunk.rs`, and `r` rank.

use tch::Tensor;

use super::super::every_slot::EverySlot;
use super::super::prefix::{begun, runs, slots, total};
use super::super::{BlockHead, Tensors, metrics};
use super::{Before, Xpress, XpressConfig};
use crate::draft::block::chunk::{Chunk, ChunkLoss, Term};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::draft::block::losses::{FirstErrorFocal, Objective, RowValues, Weighting};
use crate::error::Result;

/// Place of the count of the base logits' own term among [`BlockHead::counts`].
const BASE: usize = 1;

pub(super) fn build(config: &BlockConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Box<dyn BlockHead>> {
    let own = XpressConfig::read(config)?;
    let objective = Objective::of(config)?;
    let weights = if own.base_unweighted { Weighting::Even } else { objective.weights };
    let base = Objective { weights, place: BASE, ..objective.clone() };
    let refiner = Xpress::new(shape, tensors)?;
    Ok(Box::new(XpressHead { refiner, own, objective, base, focal: config.first_error_focal, shape: shape.clone() }))
}

struct XpressHead {
    refiner: Xpress,
    own: XpressConfig,
    /// The term of refined logits.
    objective: Objective,
    /// The term of base logits.
    base: Objective,
    focal: Option<FirstErrorFocal>,
    shape: BlockShape,
}

/// Base logits of the slots of a chunk.
struct Base {
    slots: EverySlot,
    /// `[C, DV]` of the supervised ones.
    logits: Tensor,
    /// `[R, DV]` of the others, without a graph: they have no loss, and later slots read their tokens.
    others: Tensor,
}

impl Base {
    fn new(chunk: &Chunk<'_>) -> Result<Self> {
        let slots = EverySlot::of(chunk);
        let logits = chunk.logits(&chunk.pick(&chunk.slots()))?;
        Ok(Self { others: slots.logits(chunk)?, slots, logits })
    }

    /// Logits of the supervised slots with what states `[n, S, r]` add to them, `[C, DV]`.
    fn refined(&self, chunk: &Chunk<'_>, refiner: &Xpress, states: &Tensor) -> Tensor {
        &self.logits + refiner.bias(&chunk.pick(states)).to_kind(self.logits.kind())
    }

    /// `[n, S]` the likeliest tokens of the target's vocabulary, of supervised slots by these logits, `[C, DV]`, and of the others with what the states
    /// add to theirs.
    fn chosen(&self, chunk: &Chunk<'_>, logits: &Tensor, refiner: &Xpress, states: Option<&Tensor>) -> Tensor {
        tch::no_grad(|| {
            let others = match states {
                Some(states) => &self.others + refiner.bias(&self.slots.pick(states)).to_kind(self.others.kind()),
                None => self.others.shallow_clone(),
            };
            let ids = self.slots.join(&logits.argmax(-1, false), &others.argmax(-1, false));
            match chunk.vocabulary {
                Some(own) => own.target_ids.index_select(0, &ids.flatten(0, 1)).view_as(&ids),
                None => ids,
            }
        })
    }
}

impl XpressHead {
    /// The terms, and what is known of the slots by base and by refined logits.
    fn terms(&self, chunk: &Chunk<'_>) -> Result<(Vec<Term>, [RowValues; 2])> {
        let base = Base::new(chunk)?;
        let before = Before { anchor: &chunk.tokens.select(1, 0), earlier: &chunk.before };
        let cache = self.refiner.cache(&chunk.hidden); // [n, B, 2 r]
        let states = |tokens: &Tensor| self.refiner.states(&cache, &self.refiner.previous(before, tokens)); // [n, S, r]

        let text = chunk.tokens.narrow(1, 1, chunk.shape.slots()); // [n, S]
        let logits = base.refined(chunk, &self.refiner, &states(&text));
        let (term, refined) = self.objective.term(chunk, &logits)?;
        let focal = self.focal.as_ref().map(|focal| self.objective.focal(focal, chunk, &logits)).transpose()?;
        let mut terms: Vec<Term> = [term].into_iter().chain(focal).collect();

        let passes = self.own.free_passes();
        let mut tokens = (passes > 0).then(|| base.chosen(chunk, &base.logits, &self.refiner, None)); // [n, S]
        for pass in 0..passes {
            let Some(read) = &tokens else { break };
            let states = states(read);
            let logits = base.refined(chunk, &self.refiner, &states);
            let (mut term, _) = self.objective.term(chunk, &logits)?;
            term.factor *= self.own.consistency_weight / passes as f64;
            terms.push(term);
            tokens = (pass + 1 < passes).then(|| base.chosen(chunk, &logits, &self.refiner, Some(&states)));
        }

        let (mut term, of_base) = self.base.term(chunk, &base.logits)?;
        term.factor *= self.own.base_weight;
        if self.own.base_weight > 0.0 {
            terms.push(term);
        }
        Ok((terms, [of_base, refined]))
    }
}

impl BlockHead for XpressHead {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        let (slots, begun) = (slots(supervised), begun(supervised));
        [metrics::counts(&self.shape, supervised), vec![slots, slots, begun]].concat()
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.objective.count(supervised), self.base.count(supervised)]
    }

    fn measures(&self) -> bool {
        self.objective.measures() || self.base.measures() || self.focal.is_some()
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let (terms, [base, refined]) = self.terms(chunk)?;
        let own = vec![total(&base.losses), total(&base.hits), runs(chunk, &base.hits)];
        let mut metrics = metrics::sums(chunk, &refined.losses, &refined.hits);
        metrics.extend(own);
        Ok(ChunkLoss { terms, metrics })
    }
}
