//! What a row of a P-EAGLE draft loses: a loss that [`distillation`] has compiled loops for, or any sum of those of
//! [`losses`](crate::draft::losses).
//!
//! | `draft.loss` | computed by |
//! | --- | --- |
//! | `cross_entropy`, `kl`, `reverse_kl`, `total_variation`, `lk_alpha`, `lk_lambda` | [`distillation::distill`], with their meaning there |
//! | any other name of `draft/losses`, `{"ce": 0.1, "tv": 0.9}` | [`distillation::compound`] |
//!
//! Whichever it is, a row has a loss if the draft can name its right token. Two names mean one thing in each of the lists,
//! and are taken in the first one's meaning alone; in a sum they are refused.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use crate::draft::distillation::{
    self, CompoundObjective, DistillationLoss, Objective, RowOutcomes, Soft, Weighting, distill, distill_compound,
};
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::loss::{Projection, Rows};
use crate::draft::losses::{Compound, RowLoss};
use crate::error::Result;

/// Objective of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum PeagleLoss {
    /// A loss of [`distillation::distill`].
    Compiled(DistillationLoss),
    /// A sum of others.
    Compound(Compound),
}

/// Sizes of logits that autograd keeps beside those of the compiled loops, as a multiple of theirs.
const GRAPH: usize = 3;

impl PeagleLoss {
    /// Whether it looks at a right token, which may be the text's or the target's.
    pub fn wants_label(&self) -> bool {
        match self {
            Self::Compiled(_) => false,
            Self::Compound(sum) => sum.terms().iter().any(|(loss, factor)| *factor != 0.0 && !loss.wants_teacher()),
        }
    }

    /// The loss that the compiled loops know, if they know it: on the target's whole vocabulary, one more.
    pub(super) fn compiled(&self, own_vocabulary: bool) -> Option<DistillationLoss> {
        match self {
            Self::Compiled(loss) => Some(*loss),
            Self::Compound(sum) if !own_vocabulary && sum.terms() == [(RowLoss::Tv, 1.0)] => {
                Some(DistillationLoss::TotalVariation)
            }
            Self::Compound(_) => None,
        }
    }

    /// Target positions of a chunk whose logits take at most `bytes`. Where a memory knows the rest, those are of the draft's
    /// vocabulary alone.
    pub(super) fn positions_per_chunk(&self, bytes: usize, depths: usize, size: &Eagle3Shape, knows: bool) -> i64 {
        let graph = match self.compiled(size.draft_vocab_size != size.vocab_size) {
            Some(_) => 1,
            None => GRAPH,
        };
        let of_target = if knows { size.draft_vocab_size } else { size.vocab_size };
        distillation::positions_per_chunk(bytes, graph * depths, of_target, size.draft_vocab_size)
    }
}

/// Rows' losses; with a lift, their gradients too. `lambda` are the two numbers of `lk_lambda`; `tokens` are the text's, `[M]`, where the configuration asks for them.
pub(super) fn score(
    (loss, lambda): (&PeagleLoss, (f64, f64)),
    positions_per_chunk: i64,
    rows: Rows<'_, Soft<'_>>,
    tokens: Option<&Tensor>,
    projection: &mut Projection<'_>,
    lift: Option<f64>,
) -> Result<RowOutcomes> {
    match (loss, loss.compiled(rows.targets.teacher.vocabulary.is_some())) {
        (PeagleLoss::Compound(loss), None) => {
            distill_compound(rows, projection, CompoundObjective { loss, tokens, positions_per_chunk }, lift)
        }
        (_, compiled) => {
            let loss = compiled.unwrap_or_default();
            let objective = Objective { loss, lambda, positions_per_chunk };
            let weighting = lift.map(|lift| Weighting { parity: None, lift });
            distill(rows, projection, objective, weighting.as_ref())
        }
    }
}

impl TryFrom<Value> for PeagleLoss {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        if value.is_string()
            && let Ok(loss) = DistillationLoss::deserialize(&value)
        {
            return Ok(Self::Compiled(loss));
        }
        let sum = Compound::try_from(value).map_err(|problem| {
            format!("{problem}; or alone, cross_entropy, total_variation, lk_alpha or lk_lambda as EAGLE-3 has them")
        })?;
        for (loss, _) in sum.terms() {
            let hint = match loss {
                RowLoss::LkAlpha => {
                    "write `ce` for the cross-entropy with one token, `log_overlap` for -log acceptance"
                }
                RowLoss::LkLambda(_) => "in a sum, `lk_hybrid` is what gives way to the rejection probability",
                _ => continue,
            };
            return Err(format!("`{}` means something else here than in block drafters: {hint}", loss.name()));
        }
        Ok(match sum.terms() {
            [(RowLoss::SoftCe, 1.0)] => Self::Compiled(DistillationLoss::CrossEntropy),
            [(RowLoss::Kl, 1.0)] => Self::Compiled(DistillationLoss::Kl),
            [(RowLoss::ReverseKl, 1.0)] => Self::Compiled(DistillationLoss::ReverseKl),
            _ => Self::Compound(sum),
        })
    }
}

impl From<PeagleLoss> for Value {
    fn from(loss: PeagleLoss) -> Self {
        match loss {
            PeagleLoss::Compiled(loss) => serde_json::json!(loss),
            PeagleLoss::Compound(sum) => sum.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_spellings_are_read_and_written() {
        let read = |value: Value| serde_json::from_value::<PeagleLoss>(value);
        for (value, written) in [
            (json!("kl"), json!("kl")),
            (json!("kl_div"), json!("kl")),
            (json!({"kl": 1}), json!("kl")),
            (json!("rkl"), json!("reverse_kl")),
            (json!("soft_ce"), json!("cross_entropy")),
            (json!("lk_alpha"), json!("lk_alpha")),
            (json!("ce"), json!("ce")),
            (json!({"tv": 1.0}), json!("tv")),
            (json!({"ce": 0.1, "tv": 0.9}), json!({"ce": 0.1, "tv": 0.9})),
        ] {
            let loss = read(value.clone()).unwrap();
            assert_eq!(json!(loss), written, "{value}");
            assert_eq!(read(written).unwrap(), loss, "{value}");
        }
        assert!(read(json!("ce")).unwrap().wants_label() && !read(json!("jsd")).unwrap().wants_label());
        for value in [json!("cosine"), json!({"lk_alpha": 0.5, "kl": 0.5}), json!({"lk_lambda": 1}), json!(3)] {
            let problem = read(value.clone()).unwrap_err().to_string();
            assert!(problem.contains("lk_"), "{value}: {problem}");
        }
    }
}
