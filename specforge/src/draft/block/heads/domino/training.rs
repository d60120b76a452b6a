//! Domino's loss: that of the corrected logits and, while the run is young, of the backbone's own.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::super::{BlockHead, Tensors, grid, metrics};
use super::{Domino, DominoConfig};
use crate::draft::block::chunk::{Chunk, ChunkLoss};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::draft::block::losses::{FirstErrorFocal, Objective, Weighting};
use crate::error::Result;

/// Metrics of the backbone's own logits.
const BASE_METRICS: [&str; 2] = ["base_accuracy", "base_acceptance_length"];

/// Which of the two losses learn until the first error only, where `weights` say so (accept until fail).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// Both, until the first error of the corrected logits.
    #[default]
    Shared,
    /// That of the backbone's own logits, until their first error.
    Base,
    /// That of the corrected logits.
    Final,
}

/// Names of the averages.
pub(super) fn metrics(config: &BlockConfig) -> Vec<String> {
    let mut names = metrics::names(config.layout(), config.block_size);
    if config.wants_teacher() {
        names.extend(grid::ACCEPTANCE.map(str::to_owned));
    }
    names.extend(BASE_METRICS.map(str::to_owned));
    names
}

/// Domino's head in training.
#[derive(Debug)]
pub struct DominoHead {
    domino: Domino,
    own: DominoConfig,
    shape: BlockShape,
    /// Whether the target's predictions are there.
    teacher: bool,
    objective: Objective,
    /// The same without what depends on errors.
    full: Objective,
    focal: Option<FirstErrorFocal>,
}

impl DominoHead {
    /// The head on tensors that are found by name.
    pub fn new(config: &BlockConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        let own = DominoConfig::read(config)?;
        let objective = Objective::of(config)?;
        let mut full = objective.clone();
        full.weights = full.weights.without_support();
        full.place = 1;
        let domino = Domino::new(&own, shape, tensors)?;
        Ok(Self {
            domino,
            own,
            shape: shape.clone(),
            teacher: config.wants_teacher(),
            objective,
            full,
            focal: config.first_error_focal,
        })
    }

    /// Corrected logits and the backbone's own of the supervised slots, `[C, V]`, with a graph.
    pub fn outputs(&self, chunk: &Chunk<'_>) -> Result<(Tensor, Tensor)> {
        let rows = chunk.pick(&chunk.slots()); // [C, H]
        let states = chunk.pick(&self.domino.states(chunk.embedding, &chunk.previous())?); // [C, g]
        let latents = self.domino.latents(&rows, &states); // [C, m]
        // Without a latent there is no bias.
        let latents = &latents * self.domino.corrected(&chunk.places, self.shape.slots(), latents.kind());
        let base = chunk.logits(&rows)?; // [C, V]
        Ok((&base + self.domino.bias(&latents).to_kind(base.kind()), base))
    }

    /// The objective of the corrected logits and that of the backbone's own.
    fn objectives(&self) -> (&Objective, &Objective) {
        match self.own.support {
            Support::Shared => (&self.objective, &self.objective),
            Support::Base => (&self.full, &self.objective),
            Support::Final => (&self.objective, &self.full),
        }
    }
}

impl BlockHead for DominoHead {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        let mut counts = metrics::counts(&self.shape, supervised);
        if self.teacher {
            counts.extend(grid::acceptance_counts(supervised));
        }
        counts.extend([grid::count_rows(supervised), grid::count_blocks(supervised)]);
        counts
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.objective.count(supervised), self.full.count(supervised)]
    }

    fn measures(&self) -> bool {
        self.objective.measures() || self.full.measures() || self.focal.is_some()
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let (logits, base) = self.outputs(chunk)?;
        let share = self.own.base_share(chunk.progress);
        let (of_final, of_base) = self.objectives();
        let (mut term, values) = of_final.term(chunk, &logits)?;
        term.factor = 1.0 - share;
        let mut loss = ChunkLoss { terms: vec![term], metrics: metrics::sums(chunk, &values.losses, &values.hits) };
        if self.teacher {
            loss.metrics.extend(grid::acceptance_sums(chunk, &values).into_iter().flatten());
        }
        if let Some(focal) = &self.focal {
            loss.terms.push(self.objective.focal(focal, chunk, &logits)?);
        }
        if share > 0.0 {
            let rows = of_base.rows(chunk, &base)?;
            let shared = self.own.support == Support::Shared && matches!(of_base.weights, Weighting::Auf { .. });
            let weights = if shared { values.weights } else { of_base.weights(chunk, &rows)? };
            let (mut term, _) = of_base.weighted(chunk, &rows, weights, None)?;
            term.factor = share;
            loss.terms.push(term);
        }
        let hits = base.argmax(-1, false).eq_tensor(&values.labels); // [C]
        loss.metrics.extend([grid::total(&hits), grid::lengths(chunk, &hits)]);
        Ok(loss)
    }
}
