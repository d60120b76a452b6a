//! DSpark's loss: that of the corrected logits, and the confidence's.

use tch::{Kind, Tensor};

use super::super::{BlockHead, Tensors, grid, metrics};
use super::{Markov, MarkovConfig};
use crate::draft::block::chunk::{Chunk, ChunkLoss, Term};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::draft::block::losses::{
    Compound, Denominators, FirstErrorFocal, Labels, Objective, RowValues, Weighting, confidence, credit,
};
use crate::error::{Error, Result};

/// Names of the confidence's metrics: the mean of its loss; of its distance from the acceptance; of itself; and, over the
/// slots, of how far the product of a block's confidences up to a slot is above that of its acceptances, which is what a
/// block is cut by.
const CONFIDENCE_METRICS: [&str; 4] =
    ["confidence_loss", "confidence_error", "confidence_mean", "confidence_chain_bias"];

/// Names of the averages.
pub(super) fn metrics(config: &BlockConfig, own: &MarkovConfig) -> Result<Vec<String>> {
    let mut names = metrics::names(config.layout(), config.block_size);
    if config.wants_teacher() {
        names.extend(grid::ACCEPTANCE.map(str::to_owned));
    }
    if own.confidence_head {
        names.extend(CONFIDENCE_METRICS.map(str::to_owned));
    }
    Ok(names)
}

/// DSpark's heads in training.
#[derive(Debug)]
pub struct DSpark {
    markov: Markov,
    own: MarkovConfig,
    shape: BlockShape,
    /// Whether the target's predictions are there.
    teacher: bool,
    objective: Objective,
    focal: Option<FirstErrorFocal>,
    /// What divides and weighs the confidence's loss.
    confidence: Objective,
}

impl DSpark {
    /// The heads on tensors that are found by name.
    pub fn new(config: &BlockConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Self> {
        let own = MarkovConfig::read(config)?;
        let gamma = match (own.confidence_gamma, config.weights) {
            (Some(gamma), _) | (None, Weighting::Fixed { gamma }) => Some(gamma),
            (None, _) => None,
        };
        let weights = gamma.map_or(Weighting::Even, |gamma| Weighting::Fixed { gamma });
        let denominators = match (own.confidence_reach, config.denominators) {
            // The weights are the draft's own, and nothing that the plan knows.
            (true, Denominators::Auto | Denominators::Weights) => Denominators::Rows,
            (_, given) => given,
        };
        let mut confidence = Objective::new(Compound::default(), Labels::Data, weights, denominators)?;
        confidence.place = 1;
        Ok(Self {
            markov: Markov::new(&own, shape, tensors)?,
            own,
            shape: shape.clone(),
            teacher: config.wants_teacher(),
            objective: Objective::of(config)?,
            focal: config.first_error_focal,
            confidence,
        })
    }

    /// Corrected logits `[C, DV]` and confidences `[C]` of the supervised slots, with a graph.
    pub fn outputs(&self, chunk: &Chunk<'_>) -> Result<(Tensor, Option<Tensor>)> {
        let rows = chunk.pick(&chunk.slots()); // [C, H]
        let (latents, embedded) = if self.markov.is_recurrent() {
            let (latents, embedded) = self.markov.slot_latents(&chunk.hidden, &chunk.previous())?;
            (chunk.pick(&latents), chunk.pick(&embedded)) // [C, r]
        } else {
            let embedded = self.markov.embed(&chunk.pick(&chunk.previous()))?; // [C, r]
            (self.markov.latents(&rows, &embedded), embedded)
        };
        let base = chunk.logits(&rows)?; // [C, DV]
        let logits = &base + self.markov.bias(&latents).to_kind(base.kind());
        let read = if self.own.detach_confidence { rows.detach() } else { rows };
        let sure = self.markov.confidence(&read, &embedded).map(|sure| sure.to_kind(base.kind()));
        Ok((logits, sure))
    }

    /// The term of confidences `[C]`, and its metrics' sums.
    fn confidence_term(&self, chunk: &Chunk<'_>, sure: &Tensor, values: &RowValues) -> Result<(Term, Vec<Tensor>)> {
        let acceptance = values.acceptance.as_ref().ok_or_else(|| {
            let problem =
                "the confidence learns how likely a token is accepted, and the target's predictions are not here";
            Error::Failed(problem.to_owned())
        })?;
        let losses = confidence(sure, acceptance); // [C]
        let gamma = match self.confidence.weights {
            Weighting::Fixed { gamma } => Some(gamma),
            _ => None,
        };
        let mut weights = chunk.supervised.to_kind(losses.kind()); // [n, S]
        if let Some(gamma) = gamma {
            weights *= credit::decay(self.shape.slots(), gamma, &losses.detach());
        }
        if self.own.confidence_reach {
            weights *= credit::reach(&chunk.spread(acceptance, 1.0), &chunk.supervised);
        }
        let mut term = self.confidence.weigh(chunk, &losses, &weights);
        term.factor = self.own.confidence_weight;

        let sure = sure.detach().sigmoid();
        let bias = (grid::chains(chunk, &sure) - grid::chains(chunk, acceptance)) * &chunk.supervised;
        let sums = vec![
            grid::total(&losses),
            grid::total(&(&sure - acceptance).abs()),
            grid::total(&sure),
            bias.sum(Kind::Double),
        ];
        Ok((term, sums))
    }
}

impl BlockHead for DSpark {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        let mut counts = metrics::counts(&self.shape, supervised);
        if self.teacher {
            counts.extend(grid::acceptance_counts(supervised));
        }
        if self.markov.has_confidence() {
            counts.extend([grid::count_rows(supervised); CONFIDENCE_METRICS.len()]);
        }
        counts
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.objective.count(supervised), self.confidence.count(supervised)]
    }

    fn measures(&self) -> bool {
        self.objective.measures()
            || self.focal.is_some()
            || (self.markov.has_confidence() && self.confidence.measures())
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let (logits, sure) = self.outputs(chunk)?;
        let (term, values) = self.objective.term(chunk, &logits)?;
        let mut loss = ChunkLoss { terms: vec![term], metrics: metrics::sums(chunk, &values.losses, &values.hits) };
        if self.teacher {
            loss.metrics.extend(grid::acceptance_sums(chunk, &values).into_iter().flatten());
        }
        if let Some(focal) = &self.focal {
            loss.terms.push(self.objective.focal(focal, chunk, &logits)?);
        }
        if let Some(sure) = sure {
            let (term, sums) = self.confidence_term(chunk, &sure, &values)?;
            loss.terms.push(term);
            loss.metrics.extend(sums);
        }
        Ok(loss)
    }
}
