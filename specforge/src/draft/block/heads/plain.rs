//! DFlash: no head at all. Every slot takes the token that the target's projection makes of its row.
//!
//! <https://arxiv.org/abs/2602.06036>; D-PACE and the other weights are the losses' business.

use serde_json::json;

use super::{BlockHead, HeadKind, metrics};
use crate::draft::block::chunk::{Chunk, ChunkLoss};
use crate::draft::block::config::{BlockShape, Layout};
use crate::draft::block::losses::{FirstErrorFocal, Objective};
use crate::error::Result;

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "dflash",
    summary: "a block in one pass from the target's features (DFlash, 2026)",
    layout: Layout::FillIn,
    defaults: || json!({}),
    check: |config| super::no_own_keys(config),
    metrics: |config| Ok(metrics::names(config.layout(), config.block_size)),
    wants_teacher: |_| false,
    follows_length: |_| false,
    tensors: |_, _| Ok(Vec::new()),
    build: |config, shape, _| {
        let (objective, focal) = (Objective::of(config)?, config.first_error_focal);
        Ok(Box::new(Plain { objective, focal, shape: shape.clone() }))
    },
    reads_context: false,
    samples: crate::draft::block::samples::samples,
};

struct Plain {
    objective: Objective,
    focal: Option<FirstErrorFocal>,
    shape: BlockShape,
}

impl BlockHead for Plain {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        metrics::counts(&self.shape, supervised)
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.objective.count(supervised)]
    }

    fn measures(&self) -> bool {
        self.objective.measures() || self.focal.is_some()
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let logits = chunk.logits(&chunk.pick(&chunk.slots()))?; // [C, DV]
        let (term, rows) = self.objective.term(chunk, &logits)?;
        let focal = self.focal.as_ref().map(|focal| self.objective.focal(focal, chunk, &logits)).transpose()?;
        let terms = std::iter::once(term).chain(focal).collect();
        Ok(ChunkLoss { terms, metrics: metrics::sums(chunk, &rows.losses, &rows.hits) })
    }
}
