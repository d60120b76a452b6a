//! LiLiCorr in training: what each step's scores lose, behind the true candidate of the slot before.
//!
//! A slot has a loss where its whole block is supervised, and its token and all tokens before it are among the candidates.
//! Log-probabilities of candidates are live, so that the terms train the backbone too.
//!
//! Shape legend: as in `chunk.rs`, and `R` slots that are not supervised, `K` candidates.

use tch::{Kind, Tensor};

use super::super::every_slot::EverySlot;
use super::super::lattice::{Candidates, Lattice, pick};
use super::super::prefix::{slots, total};
use super::super::{BlockHead, Tensors, metrics};
use super::{Lilicorr, LilicorrConfig, LilicorrDenominator};
use crate::draft::block::chunk::{Chunk, ChunkLoss, Denominator, Term};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::draft::block::losses::{FirstErrorFocal, Objective};
use crate::error::{Error, Result};

/// Place of the count of slots in whole blocks among [`BlockHead::counts`].
const WHOLE: usize = 1;

pub(super) fn build(config: &BlockConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Box<dyn BlockHead>> {
    let own = LilicorrConfig::of(config, shape)?;
    let scorer = Lilicorr::new(&own, shape, tensors)?;
    let (base, focal) = (Objective::of(config)?, config.first_error_focal);
    Ok(Box::new(LilicorrHead { scorer, own, base, focal, shape: shape.clone() }))
}

struct LilicorrHead {
    scorer: Lilicorr,
    own: LilicorrConfig,
    /// The term of the backbone's logits.
    base: Objective,
    focal: Option<FirstErrorFocal>,
    shape: BlockShape,
}

/// The lattice of a chunk, and where the text runs through it.
struct Scored {
    candidates: Candidates,
    lattice: Lattice,
    /// `[n, S]` places of the text's tokens among the candidates.
    places: Tensor,
    /// `[n, S]` booleans: the text's token is a candidate.
    found: Tensor,
    /// `[n, S]` booleans: and so are all tokens before it.
    reached: Tensor,
    /// `[n, S, K]` the target's logits of the candidates, in supervised slots.
    teacher: Option<Tensor>,
}

impl LilicorrHead {
    /// Candidates look at all slots of their block, so that those that are not supervised are there too.
    fn score(&self, chunk: &Chunk<'_>, logits: &Tensor) -> Result<Scored> {
        let context = chunk.context.as_ref().ok_or_else(|| {
            Error::Failed("LiLiCorr reads what stands before the anchor, and the chunk does not have it".to_owned())
        })?;
        let every = EverySlot::of(chunk);
        let likeliest = |logits: &Tensor| {
            let candidates = Candidates::likeliest(logits, self.own.lilicorr_candidate_topk);
            let log_q = &candidates.logits - logits.logsumexp([-1].as_slice(), true);
            (candidates, log_q)
        };
        let (own, own_log_q) = likeliest(logits); // [C, K]
        let (others, others_log_q) = likeliest(&every.logits(chunk)?); // [R, K]
        let teacher = chunk.teacher.as_ref().filter(|_| self.own.reads_teacher()).map(|teacher| {
            let teacher = teacher.detach().gather(1, &own.ids, false).to_kind(logits.kind());
            every.join(&teacher, &others.logits.zeros_like())
        });
        let candidates =
            Candidates { ids: every.join(&own.ids, &others.ids), logits: every.join(&own.logits, &others.logits) }; // [n, S, K]
        let log_q = every.join(&own_log_q, &others_log_q);
        let lattice = self.scorer.lattice(&candidates, &log_q, &chunk.slots(), context, chunk.embedding);
        let (places, found) = candidates.find(&chunk.labels());
        let reached = found.to_kind(Kind::Int64).cumprod(1, Kind::Int64).eq(1);
        Ok(Scored { candidates, lattice, places, found, reached, teacher })
    }

    /// `[n, S]` losses of all slots, with their factors: cross-entropy, hinge, penalty and calibration, those that count.
    fn losses(&self, scored: &Scored, scores: &Tensor) -> Result<Vec<(f64, Tensor)>> {
        let own = &self.own;
        let log_scores = scores.log_softmax(-1, scores.kind()); // [n, S, K]
        let place = scored.places.unsqueeze(-1);
        let over_candidates = |values: Tensor| values.sum_dim_intlist([-1i64].as_slice(), false, None::<Kind>);
        let teacher = || {
            let missing = "LiLiCorr's penalty and calibration read the target's predictions, and they are not here";
            scored.teacher.as_ref().ok_or_else(|| Error::Failed(missing.to_owned()))
        };
        let mut losses = vec![(own.ce_weight, -pick(&log_scores, &scored.places))];
        // One candidate alone has no other to lead.
        if own.margin_weight > 0.0 && own.lilicorr_candidate_topk > 1 {
            let (rival, _) = scores.scatter_value(-1, &place, f64::NEG_INFINITY).max_dim(-1, false); // [n, S]
            let lead = pick(scores, &scored.places) - rival;
            losses.push((own.margin_weight, (own.margin - lead).relu()));
        }
        if own.penalty_weight > 0.0 {
            let teacher = teacher()?;
            let behind = (teacher.gather(-1, &place, false) - teacher).relu().to_kind(scores.kind()); // [n, S, K]
            losses.push((own.penalty_weight, over_candidates(log_scores.exp() * behind)));
        }
        if own.calibration_weight > 0.0 {
            let log_teacher = teacher()?.log_softmax(-1, scores.kind());
            let difference = &log_teacher - &log_scores;
            losses.push((own.calibration_weight, over_candidates(log_teacher.exp() * difference)));
        }
        Ok(losses)
    }
}

impl BlockHead for LilicorrHead {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        let whole = whole(supervised);
        let in_whole = whole * self.shape.slots() as f64;
        let own = vec![slots(supervised), in_whole, in_whole, whole, whole, whole];
        [metrics::counts(&self.shape, supervised), own].concat()
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.base.count(supervised), whole(supervised) * self.shape.slots() as f64]
    }

    fn measures(&self) -> bool {
        self.own.denominator == LilicorrDenominator::Reached || self.base.measures() || self.focal.is_some()
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let logits = chunk.logits(&chunk.pick(&chunk.slots()))?; // [C, V]
        let (base, values) = self.base.term(chunk, &logits)?;
        let focal = self.focal.as_ref().map(|focal| self.base.focal(focal, chunk, &logits)).transpose()?;
        let mut terms: Vec<Term> = [base].into_iter().chain(focal).collect();

        let scored = self.score(chunk, &logits)?;
        let scores = scored.lattice.along(&scored.places); // [n, S, K]
        let whole = chunk.supervised.all_dim(1, true); // [n, 1]
        let learns = scored.reached.logical_and(&whole); // [n, S]
        let reached = total(&learns);
        let losses = self.losses(&scored, &scores)?;
        let mask = learns.to_kind(scores.kind());
        let cross_entropy = total(&(&losses[0].1 * &mask));
        terms.extend(losses.into_iter().filter(|(factor, _)| *factor > 0.0).map(|(factor, losses)| Term {
            factor,
            sum: (losses * &mask).sum(Kind::Double),
            denominator: match self.own.denominator {
                LilicorrDenominator::Slots => Denominator::Planned(WHOLE),
                LilicorrDenominator::Reached => Denominator::Measured(reached.shallow_clone()),
            },
        }));

        let prefix = |right: &Tensor| {
            let right = right.logical_and(&whole).to_kind(Kind::Double); // [n, S]
            right.cumprod(1, Kind::Double).sum(Kind::Double)
        };
        let labels = chunk.labels();
        let walk = tch::no_grad(|| scored.lattice.walk());
        let right = walk.tokens.eq_tensor(&labels); // [n, S]
        let own = vec![
            total(&values.hits),
            cross_entropy,
            reached,
            prefix(&right),
            prefix(&scored.candidates.ids.select(2, 0).eq_tensor(&labels)),
            prefix(&scored.found),
        ];
        let mut metrics = metrics::sums(chunk, &values.losses, &chunk.pick(&right));
        metrics.extend(own);
        Ok(ChunkLoss { terms, metrics })
    }
}

/// Number of blocks that are supervised throughout.
fn whole(supervised: &[Vec<bool>]) -> f64 {
    supervised.iter().filter(|block| block.iter().all(|&on| on)).count() as f64
}
