//! What rows that learn from the target's distribution are asked for, and the tables of a draft's own vocabulary.
//! `distillation` has the formulas.
//!
//! Shape legend: `M` rows, `V` vocabulary of the target, `DV` of the draft.

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::device;
use crate::error::Result;
use crate::vocab::VocabMap;

/// Objective of a row. `csrc/vocabulary_loss.cpp` and `csrc/vocabulary_loss.cu` count them in this order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DistillationLoss {
    /// Cross-entropy with the target's distribution on the draft's vocabulary.
    #[default]
    CrossEntropy,
    /// Kullback-Leibler divergence from the target.
    Kl,
    /// Kullback-Leibler divergence from the draft.
    ReverseKl,
    /// Probability of a rejection.
    TotalVariation,
    /// Negative logarithm of the acceptance.
    LkAlpha,
    /// Cross-entropy that gives way to the rejection probability as the acceptance grows.
    LkLambda,
}

/// The two tables of a draft's vocabulary on the device.
#[derive(Debug)]
pub struct DraftVocabulary {
    /// `[DV]`
    pub target_ids: Tensor,
    /// `[V]`
    pub draft_ids: Tensor,
}

impl DraftVocabulary {
    /// The tables of a map.
    pub fn new(map: &VocabMap, device: Device) -> Result<Self> {
        let draft_ids: Vec<i64> = (0..map.target_size()).map(|id| map.draft_id(id).unwrap_or(-1)).collect();
        let upload = |ids: &[i64]| device::upload(ids, device);
        Ok(Self { target_ids: upload(map.target_ids())?, draft_ids: upload(&draft_ids)? })
    }
}

/// How the sum of weighted losses becomes the objective that gradients are of.
#[derive(Debug)]
pub struct Weighting {
    /// For losses with `alpha` as SpecForge divides them: the factor of each row's part that depends on `alpha`, and for
    /// `lk_lambda` the acceptance that decides its weight, the same for all rows of a step. `[M]` each.
    pub parity: Option<[Tensor; 2]>,
    /// All factors are multiplied by this power of two before a slope is rounded to the rows' type; see `draft::lift`.
    pub lift: f64,
}

/// Objective, chunking and the two constants of `lk_lambda`.
#[derive(Debug, Clone, Copy)]
pub struct Objective {
    /// Loss of a row.
    pub loss: DistillationLoss,
    /// `lk_scale` and `lk_decay`.
    pub lambda: (f64, f64),
    /// Target positions of a chunk.
    pub positions_per_chunk: i64,
}
