//! Sums and counts between two log lines. Sums stay on the device until they are read.

use serde::de::DeserializeOwned;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::gradient_noise::{FirstGradient, GradientNoise};
use crate::checkpoint::OpenWindow;
use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::{DraftModel, Tally};
use crate::error::{Error, Result};
use crate::optim::StepReport;

/// Running sums of a draft's metrics.
#[derive(Debug, Default)]
pub struct Window {
    sums: Option<Tensor>,
    objective: Option<Tensor>,
    counts: Vec<f64>,
    steps: u64,
    /// Whether a step was taken out again.
    is_short: bool,
    /// `[4]` float64 of the gradients' norms: the last one, the sum, the largest, and how many there were. The same on every
    /// rank.
    norms: Option<Tensor>,
    /// Where it is asked for.
    noise: Option<GradientNoise>,
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

    /// Adds an optimizer step with its micro-batches on this rank: the objective is averaged over steps. A step that changed
    /// nothing adds only its rows, which nobody knows yet without waiting for the device: see [`Window::take_out`].
    pub fn end_step(&mut self, tallies: &[Tally], report: &StepReport) -> Result<()> {
        let refused = report.refused.f_to_kind(Kind::Bool)?;
        for Tally { objective, sums, counts } in tallies {
            let [objective, sums] = [objective, sums].map(|values| values.f_masked_fill(&refused, 0.0));
            self.add(&Tally { objective: objective?, sums: sums?, counts: counts.clone() });
        }
        self.steps += 1;
        let norm = report.gradient_norm.f_to_kind(Kind::Double)?;
        let before = match self.norms.take() {
            Some(norms) => norms,
            None => Tensor::f_zeros([4], (Kind::Double, norm.device()))?,
        };
        let (sum, largest, count) =
            (before.f_get(1)? + &norm, before.f_get(2)?.f_maximum(&norm)?, before.f_get(3)? + 1.0);
        let after = Tensor::f_stack(&[norm, sum, largest, count], 0)?; // [4]
        self.norms = Some(before.f_where_self(&refused, &after)?);
        Ok(())
    }

    /// Adds the gradient of the first micro-batch of a step of so many tokens that [`Window::end_step`] has ended.
    pub(super) fn add_noise(&mut self, first: &FirstGradient, tokens: u64, report: &StepReport) -> Result<()> {
        self.noise.as_mut().map_or(Ok(()), |noise| noise.add(first, tokens, report))
    }

    /// Takes a step out again that changed nothing, with this rank's rows of each metric.
    pub fn take_out(&mut self, rows: &[f64]) {
        self.counts.iter_mut().zip(rows).for_each(|(total, count)| *total -= count);
        self.steps = self.steps.saturating_sub(1);
        self.is_short = true;
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
        let norms =
            self.norms.as_ref().map(|norms| Vec::<f64>::try_from(norms.f_to_device(Device::Cpu)?)).transpose()?;
        // JSON has no NaN.
        let known = |value: f64| Some(value).filter(|value| value.is_finite());
        let own = OpenWindow {
            steps: self.steps,
            objective: known(objective),
            sums: sums.into_iter().map(known).collect(),
            counts: self.counts.clone(),
            gradient_norms: norms.unwrap_or_default(),
            gradient_noise: self.noise.as_ref().map_or(Ok(Vec::new()), GradientNoise::state)?,
        };
        group.all_gather_bytes(json!(own).to_string().as_bytes())?.iter().map(|bytes| read(bytes)).collect()
    }

    /// A window as it was when `states` were kept; those of the first rank count. With another number of ranks than then,
    /// the first one takes the sums of all. `measures_noise`: also that of the gradients. Every rank must call this.
    pub fn restore(states: &[OpenWindow], measures_noise: bool, device: Device, group: &ProcessGroup) -> Result<Self> {
        let states: Vec<OpenWindow> = read(&group.broadcast_bytes(json!(states).to_string().as_bytes(), 0)?)?;
        let Some(steps) = states.first().map(|state| state.steps) else {
            let noise = measures_noise.then(GradientNoise::default);
            return Ok(Self { noise, ..Self::default() });
        };
        let own: &[OpenWindow] = match states.len() == group.world_size() {
            true => &states[group.rank()..=group.rank()],
            false if group.is_first() => &states[..],
            false => &[],
        };
        let norms = states.first().map(|state| state.gradient_norms.as_slice()).filter(|norms| norms.len() == 4);
        let norms = norms.map(|norms| Tensor::from_slice(norms).f_to_device(device)).transpose()?;
        let noise: Vec<&[f64]> = own.iter().map(|state| state.gradient_noise.as_slice()).collect();
        let noise = measures_noise.then(|| GradientNoise::restore(&noise, device)).transpose()?;
        let mut window = Self { steps, norms, noise, ..Self::default() };
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
    /// figures; of training steps the gradients' norms too. A metric without a row in the window is left out, and everything
    /// is where no step changed anything. Every rank must call this, whatever it has added.
    pub fn take(&mut self, draft: &dyn DraftModel, group: &ProcessGroup) -> Result<Vec<(String, f64)>> {
        let mut window = std::mem::take(self);
        self.noise = window.noise.as_ref().map(|_| GradientNoise::default());
        let names = draft.metrics();
        let device = draft.parameters()[0].value.device();
        let noise = window.noise.as_mut().map_or(Ok(None), |noise| noise.take(device, group))?;
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
        if window.steps == 0 && window.is_short {
            return Ok(Vec::new());
        }
        let averages: Vec<f64> = sums[1..].iter().zip(&counts).map(|(sum, count)| sum / count.max(1.0)).collect();
        let mut values = vec![("loss".to_owned(), sums[0] / window.steps.max(1) as f64)];
        let named = names.into_iter().zip(&averages).zip(&counts);
        values.extend(named.filter(|(_, count)| **count > 0.0).map(|((name, average), _)| (name, *average)));
        values.extend(draft.summary(&averages));
        let norms = window.norms.map_or(Ok(Vec::new()), Vec::<f64>::try_from)?;
        if let &[last, sum, largest, count] = norms.as_slice()
            && count > 0.0
        {
            let named = [("", last), ("_mean", sum / count), ("_max", largest)];
            values.extend(named.map(|(part, value)| (format!("gradient_norm{part}"), value)));
        }
        values.extend(noise.map(|tokens| ("gradient_noise_tokens".to_owned(), tokens)));
        Ok(values)
    }
}

/// What another rank wrote as JSON.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::Failed(format!("the ranks cannot exchange what they logged: {error}")))
}
