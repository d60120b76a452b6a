//! Sums and counts between two log lines. Sums stay on the device until they are read.

use tch::{Kind, Tensor};

use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::{DraftModel, Tally};
use crate::error::Result;

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

    /// Optimizer steps since the window began.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Reads the averages over all ranks from the device and starts a new window: `loss`, every metric, and derived
    /// figures. A metric without a row in the window is left out. Every rank must call this, whatever it has added.
    pub fn take(&mut self, draft: &dyn DraftModel, group: &ProcessGroup) -> Result<Vec<(String, f64)>> {
        let window = std::mem::take(self);
        let names = draft.metrics();
        let device = draft.parameters()[0].value.device();
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Double, device));
        let sums = window.sums.map_or_else(|| zeros(&[names.len() as i64]), Ok)?;
        let objective = window.objective.map_or_else(|| zeros(&[]), Ok)?;
        let on_device = Tensor::f_cat(&[objective.f_view([1])?, sums], 0)?.f_to_kind(Kind::Double)?; // [1 + M]
        group.all_reduce(&on_device, ReduceOp::Sum)?;
        let mut counts = window.counts;
        counts.resize(names.len(), 0.0);
        let counts = Tensor::from_slice(&counts);
        group.all_reduce(&counts, ReduceOp::Sum)?;
        let (sums, counts) = (Vec::<f64>::try_from(on_device)?, Vec::<f64>::try_from(counts)?);
        let averages: Vec<f64> = sums[1..].iter().zip(&counts).map(|(sum, count)| sum / count.max(1.0)).collect();
        let mut values = vec![("loss".to_owned(), sums[0] / window.steps.max(1) as f64)];
        let named = names.into_iter().zip(&averages).zip(&counts);
        values.extend(named.filter(|(_, count)| **count > 0.0).map(|((name, average), _)| (name, *average)));
        values.extend(draft.summary(&averages));
        Ok(values)
    }
}
