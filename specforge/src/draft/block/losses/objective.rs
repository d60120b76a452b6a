//! A term of a head's objective: which loss, which labels, which weights, and what it is divided by.

use tch::{Kind, Tensor};

use super::denominators::Denominators;
use super::weighting::Weighting;
use super::{Compound, FirstErrorFocal, Labels, Rows};
use crate::draft::block::chunk::{Chunk, Term};
use crate::draft::block::config::BlockConfig;
use crate::error::{Error, Result};

/// How logits of a chunk's supervised slots become a term.
///
/// ```text
/// let (term, values) = objective.term(chunk, &logits)?;
/// ```
///
/// does all of it. A head with several logits of the same slots takes the steps itself: [`Objective::rows`] and
/// [`Objective::weights`] of those that decide what slots count, and [`Objective::weigh`] of those that learn.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    /// Loss of a row.
    pub loss: Compound,
    /// The right token.
    pub labels: Labels,
    /// What rows count.
    pub weights: Weighting,
    /// What the sum is divided by.
    pub denominators: Denominators,
    /// Place of its count among [`super::super::heads::BlockHead::counts`].
    pub place: usize,
}

/// What is known of the supervised slots of a chunk besides their term; nothing has a graph.
#[derive(Debug)]
pub struct RowValues {
    /// `[C]` the right tokens.
    pub labels: Tensor,
    /// `[C]` values of the loss.
    pub losses: Tensor,
    /// `[C]` cross-entropy with the right token, whatever the loss is.
    pub cross_entropy: Tensor,
    /// `[C]` booleans: the likeliest token is the right one.
    pub hits: Tensor,
    /// `[C]` probability that a token sampled from the draft is accepted, where the target's distribution is there.
    pub acceptance: Option<Tensor>,
    /// `[n, S]` what slots counted.
    pub weights: Tensor,
}

impl Objective {
    /// Refuses parts that do not go together. Its count is the head's first; see [`Objective::place`].
    pub fn new(loss: Compound, labels: Labels, weights: Weighting, denominators: Denominators) -> Result<Self> {
        weights.check("draft.weights")?;
        if weights.wants_teacher() && !loss.wants_teacher() {
            let names: Vec<&str> = loss.terms().iter().map(|(loss, _)| loss.name()).collect();
            let problem = format!(
                "`d_pard` weighs rows by how far the target's distribution and the draft's overlap, and the loss, {}, \
                 looks at one token alone",
                names.join(" + ")
            );
            let hint = "use `d_pace`, which weighs by that token's probability, or a loss such as `renyi` or `kl`";
            return Err(Error::config("draft.weights", problem).with_hint(hint));
        }
        Ok(Self { loss, labels, weights, denominators, place: 0 })
    }

    /// What a configuration says of its logits.
    pub fn of(config: &BlockConfig) -> Result<Self> {
        if let Some(focal) = &config.first_error_focal {
            focal.check("draft.first_error_focal")?;
        }
        Self::new(config.loss.clone(), config.labels, config.weights, config.denominators)
    }

    /// Whether the target's own predictions are wanted.
    pub fn wants_teacher(&self) -> bool {
        self.loss.wants_teacher() || self.weights.wants_teacher() || self.labels == Labels::Teacher
    }

    /// Whether its terms are divided by what only the device knows.
    pub fn measures(&self) -> bool {
        self.denominators.is_measured(self.weights) || self.loss.wants_mean()
    }

    /// Its count of blocks whose supervised slots are given, `[blocks][S]`: what planned terms are divided by.
    pub fn count(&self, supervised: &[Vec<bool>]) -> f64 {
        self.denominators.count(self.weights, supervised)
    }

    /// The chunk's supervised slots with these logits, `[C, DV]`.
    pub fn rows(&self, chunk: &Chunk<'_>, logits: &Tensor) -> Result<Rows> {
        Rows::new(logits, chunk.teacher.as_ref(), &right_tokens(chunk, self.labels)?)
    }

    /// `[n, S]` what slots count by these rows.
    pub fn weights(&self, chunk: &Chunk<'_>, rows: &Rows) -> Result<Tensor> {
        tch::no_grad(|| self.weights.weights(chunk, rows))
    }

    /// Logits of all supervised slots, `[C, DV]`, as a term of factor 1.
    pub fn term(&self, chunk: &Chunk<'_>, logits: &Tensor) -> Result<(Term, RowValues)> {
        let rows = self.rows(chunk, logits)?;
        let weights = self.weights(chunk, &rows)?;
        self.weighted(chunk, &rows, weights, None)
    }

    /// The same with rows and weights `[n, S]` that are there; the weights may be those of other logits. What `mean_truth`
    /// is, [`Rows::values`] says.
    pub fn weighted(
        &self,
        chunk: &Chunk<'_>,
        rows: &Rows,
        weights: Tensor,
        mean_truth: Option<&Tensor>,
    ) -> Result<(Term, RowValues)> {
        let of_batch = match (mean_truth, chunk.whole) {
            (None, Some(whole)) if self.loss.wants_mean() => whole.mean(&rows.truth()),
            (given, _) => given.map(Tensor::shallow_clone),
        };
        let losses = self.loss.of_rows(rows, of_batch.as_ref())?;
        let term = self.weigh(chunk, &losses, &weights);
        let values = RowValues {
            labels: rows.labels.shallow_clone(),
            losses: losses.detach(),
            cross_entropy: -rows.log_truth(),
            hits: rows.hits().shallow_clone(),
            acceptance: rows.acceptance(),
            weights,
        };
        Ok((term, values))
    }

    /// Values `[C]` of any loss with weights `[n, S]` as a term of factor 1, divided as this objective divides.
    pub fn weigh(&self, chunk: &Chunk<'_>, values: &Tensor, weights: &Tensor) -> Term {
        let denominator = self.denominators.of(self.weights, chunk, weights, self.place);
        let weights = self.denominators.shared(chunk, weights.detach());
        Term { factor: 1.0, sum: (values * chunk.pick(&weights)).sum(Kind::Double), denominator }
    }

    /// The extra term for the first error of each block; see [`FirstErrorFocal`].
    pub fn focal(&self, focal: &FirstErrorFocal, chunk: &Chunk<'_>, logits: &Tensor) -> Result<Term> {
        let labels = right_tokens(chunk, focal.labels.unwrap_or(self.labels))?;
        focal.term(chunk, &Rows::new(logits, None, &labels)?)
    }
}

/// `[C]` the right tokens of the supervised slots.
pub(super) fn right_tokens(chunk: &Chunk<'_>, labels: Labels) -> Result<Tensor> {
    match (labels, &chunk.teacher) {
        (Labels::Data, _) => Ok(chunk.pick(&chunk.labels())),
        (Labels::Teacher, Some(teacher)) => Ok(teacher.argmax(-1, false)),
        (Labels::Teacher, None) => {
            let problem = "labels are what the target would have chosen, and its predictions are not here";
            Err(Error::Failed(problem.to_owned()))
        }
    }
}
