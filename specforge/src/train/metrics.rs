//! Sums and counts between two log lines. Sums stay on the device until they are read.

use serde::de::DeserializeOwned;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::OpenWindow;
use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::{DraftModel, Tally};
use crate::error::{Error, Result};

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

    /// What a checkpoint keeps of a window in which no line was logged yet: one entry for each rank, none where no step was
    /// taken. Every rank must call this.
    pub fn state(&self, group: &ProcessGroup) -> Result<Vec<OpenWindow>> {
        if self.steps == 0 {
            return Ok(Vec::new());
        }
        let objective = self.objective.as_ref().map_or(0.0, |objective| objective.double_value(&[]));
        let sums = match &self.sums {
            Some(sums) => Vec::<f64>::try_from(sums.f_to_device(Device::Cpu)?)?,
            None => Vec::new(),
        };
        // JSON has no NaN.
        let known = |value: f64| Some(value).filter(|value| value.is_finite());
        let own = OpenWindow {
            steps: self.steps,
            objective: known(objective),
            sums: sums.into_iter().map(known).collect(),
            counts: self.counts.clone(),
        };
        group.all_gather_bytes(json!(own).to_string().as_bytes())?.iter().map(|bytes| read(bytes)).collect()
    }

    /// A window as it was when `states` were kept; those of the first rank count. With another number of ranks than then,
    /// the first one takes the sums of all. Every rank must call this.
    pub fn restore(states: &[OpenWindow], device: Device, group: &ProcessGroup) -> Result<Self> {
        let states: Vec<OpenWindow> = read(&group.broadcast_bytes(json!(states).to_string().as_bytes(), 0)?)?;
        let Some(steps) = states.first().map(|state| state.steps) else {
            return Ok(Self::default());
        };
        let own: &[OpenWindow] = match states.len() == group.world_size() {
            true => &states[group.rank()..=group.rank()],
            false if group.is_first() => &states[..],
            false => &[],
        };
        let mut window = Self { steps, ..Self::default() };
        let on_device = |values: &[Option<f64>]| {
            let values: Vec<f64> = values.iter().map(|value| value.unwrap_or(f64::NAN)).collect();
            Tensor::from_slice(&values).f_to_device(device)
        };
        for state in own.iter().filter(|state| !state.sums.is_empty()) {
            let objective = on_device(&[state.objective])?.f_squeeze()?;
            window.add(&Tally { objective, sums: on_device(&state.sums)?, counts: state.counts.clone() });
        }
        Ok(window)
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

/// What another rank wrote as JSON.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::Failed(format!("the ranks cannot exchange what they logged: {error}")))
}
