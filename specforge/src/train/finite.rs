//! Steps that could not be taken because a loss or a gradient was not finite: which documents they were, how many a run
//! passes over, and that they leave nothing in its figures.

use crate::error::{Error, Result};
use crate::optim::Optimizer;

/// What is known of the steps since the device was last asked.
#[derive(Debug)]
pub(super) struct FiniteSteps {
    /// Steps that may be passed over, in the whole run.
    most: u64,
    /// Those that were.
    skipped: u64,
    /// How many of the optimizer's list are counted in there.
    listed: usize,
    unchecked: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    number: u64,
    documents: Vec<String>,
    /// This rank's rows of each metric.
    counts: Vec<f64>,
}

/// Document names quoted in a message.
const NAMES_SHOWN: usize = 6;

impl FiniteSteps {
    /// A run that may pass over `most` steps, and did so with `skipped` before.
    pub(super) fn new(most: u64, skipped: u64) -> Self {
        Self { most, skipped, listed: 0, unchecked: Vec::new() }
    }

    /// Steps that were passed over so far.
    pub(super) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Notes a step that was asked for.
    pub(super) fn note(&mut self, number: u64, documents: Vec<String>, counts: Vec<f64>) {
        self.unchecked.push(Step { number, documents, counts });
    }

    /// Asks the device. An error if a step was one too many to pass over; parameters are then those before it. `skipped` is
    /// told of each one that was passed over since the device was last asked: a line for people, and the step's rows on this
    /// rank, which count for nothing.
    pub(super) fn check(&mut self, optimizer: &Optimizer<'_>, mut skipped: impl FnMut(&str, &[f64])) -> Result<()> {
        let found = optimizer.non_finite()?;
        for bad in &found.skipped[self.listed..] {
            self.skipped += 1;
            let (step, what, count, most, batch) = (bad.step, bad.what, self.skipped, self.most, self.batch(bad.step));
            let line =
                format!("warning: step {step}: {what} is not finite; skipped, {count} of {most}. Batch: {batch}");
            let noted = self.unchecked.iter().find(|noted| noted.number == step);
            skipped(&line, noted.map_or(&[][..], |noted| noted.counts.as_slice()));
        }
        self.listed = found.skipped.len();
        if let Some(bad) = found.fatal {
            return Err(Error::NonFinite { step: bad.step, what: bad.what.to_owned(), batch: self.batch(bad.step) });
        }
        self.unchecked.clear();
        Ok(())
    }

    /// Names of a step's documents.
    fn batch(&self, step: u64) -> String {
        let documents =
            self.unchecked.iter().find(|noted| noted.number == step).map(|noted| noted.documents.as_slice());
        let names = documents.unwrap_or_default();
        let mut batch = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        if names.len() > NAMES_SHOWN {
            batch.push_str(&format!(" and {} more documents", names.len() - NAMES_SHOWN));
        }
        batch
    }
}
