//! Sums and counts between two log lines. Sums stay on the device until they are read.

use tch::{Kind, Tensor};

use crate::draft::{DraftModel, Tally};

/// Running sums of a draft's metrics.
#[derive(Debug, Default)]
pub struct Window {
    sums: Option<Tensor>,
    objective: Option<Tensor>,
    counts: Vec<f64>,
    steps: u64,
}

impl Window {
    /// Adds one micro-batch.
    pub fn add(&mut self, tally: &Tally) {
        let plus = |total: Option<Tensor>, value: &Tensor| match total {
            Some(total) => total + value,
            None => value.shallow_clone(),
        };
        self.sums = Some(plus(self.sums.take(), &tally.sums));
        self.objective = Some(plus(self.objective.take(), &tally.objective));
        self.counts.resize(tally.counts.len(), 0.0);
        self.counts.iter_mut().zip(&tally.counts).for_each(|(total, count)| *total += count);
    }

    /// Marks the end of an optimizer step: the objective is averaged over steps.
    pub fn end_step(&mut self) {
        self.steps += 1;
    }

    /// Reads the averages from the device and starts a new window: `loss`, every metric, and derived figures.
    /// A metric without a row in the window is left out.
    pub fn take(&mut self, draft: &dyn DraftModel) -> Vec<(String, f64)> {
        let window = std::mem::take(self);
        let (Some(sums), Some(objective)) = (window.sums, window.objective) else {
            return Vec::new();
        };
        let sums: Vec<f64> = Vec::try_from(sums.to_kind(Kind::Double)).expect("sums are one axis of float64");
        let averages: Vec<f64> = sums.iter().zip(&window.counts).map(|(sum, count)| sum / count.max(1.0)).collect();
        let mut values = vec![("loss".to_owned(), objective.double_value(&[]) / window.steps.max(1) as f64)];
        let named = draft.metrics().into_iter().zip(&averages).zip(&window.counts);
        values.extend(named.filter(|(_, count)| **count > 0.0).map(|((name, average), _)| (name, *average)));
        values.extend(draft.summary(&averages));
        values
    }
}
