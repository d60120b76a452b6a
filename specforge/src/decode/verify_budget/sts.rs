//! Sequential temperature scaling: one temperature for each drafted token, fitted from the first on.
//!
//! Reference: SGLang 0.5.23, `benchmark/dspark_sts_fit.py`. A slot's temperature is the one of 41 under which the survivals
//! up to that slot, with what was fitted before, have the smallest expected calibration error (ECE) against what was really
//! accepted. Computed in float64 with libtorch's own operations, so that near ties fall as they do in the reference; the
//! grid is float32, and so are the temperatures.
//!
//! Shape legend: `n` samples, `g` drafted tokens of each.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::files;
use crate::strict;

/// Bins of the calibration error.
pub const BINS: i64 = 15;
/// Temperatures that are tried.
const GRID: i64 = 41;
/// Probabilities are kept this far from 0 and 1.
const EPS: f64 = 1e-8;

/// Fitted temperatures, and how much they help. The file is the one that SGLang reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Divides the raw confidence of each slot.
    pub temperatures: Vec<f64>,
    /// What it was fitted to.
    #[serde(default)]
    pub dataset: String,
    /// Verified chains that it was fitted to.
    #[serde(default)]
    pub num_samples: u64,
    /// Calibration error of each slot's survival with all temperatures 1; may be empty.
    #[serde(default)]
    pub ece_before: Vec<f64>,
    /// The same with the fitted ones.
    #[serde(default)]
    pub ece_after: Vec<f64>,
}

impl Calibration {
    /// Reads a file; `slots` is the number of drafted tokens that it must have temperatures for.
    pub fn read(path: &Path, slots: Option<usize>) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let refuse = |problem: String| {
            Error::bad_file(path, problem).with_hint("write it anew with `specforge eval --calibrate`".to_owned())
        };
        let calibration: Self = strict::from_json(&text).map_err(refuse)?;
        calibration.check(slots).map_err(refuse)?;
        Ok(calibration)
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check(None).map_err(|problem| Error::bad_file(path, problem))?;
        files::write_json(path, self)
    }

    fn check(&self, slots: Option<usize>) -> Result<(), String> {
        check_temperatures(&self.temperatures)?;
        let count = self.temperatures.len();
        if let Some(slots) = slots.filter(|&slots| slots != count) {
            return Err(format!("`temperatures`: expected {slots}, as many as tokens are drafted, got {count}"));
        }
        for (key, values) in [("ece_before", &self.ece_before), ("ece_after", &self.ece_after)] {
            if !values.is_empty() && values.len() != count {
                let got = values.len();
                return Err(format!("`{key}`: expected {count} values, as many as `temperatures`, got {got}"));
            }
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(format!("`{key}[{index}]`: expected a finite number, got {}", values[index]));
            }
        }
        Ok(())
    }
}

/// Refuses temperatures that nothing can be divided by.
pub(super) fn check_temperatures(temperatures: &[f64]) -> Result<(), String> {
    if temperatures.is_empty() {
        return Err("`temperatures`: expected at least one, got none".to_owned());
    }
    // What is no positive number in float32 is none where it is used.
    match temperatures.iter().position(|&value| !((value as f32).is_finite() && value as f32 > 0.0)) {
        Some(index) => Err(format!("`temperatures[{index}]`: expected a positive number, got {}", temperatures[index])),
        None => Ok(()),
    }
}

/// Temperatures from 0.1 to 10 in equal ratios; float32 values.
fn grid() -> Result<Vec<f64>> {
    let grid = Tensor::f_logspace(-1.0, 1.0, GRID, 10.0, (Kind::Float, Device::Cpu))?;
    Ok(Vec::try_from(grid.to_kind(Kind::Double))?)
}

/// Expected calibration error of probabilities `[n]` against what came true `[n]`, both float64: the distance of the two
/// averages in each of so many bins of equal width, weighted by what is in it.
pub fn calibration_error(probabilities: &Tensor, came_true: &Tensor, bins: i64) -> Result<f64> {
    let probabilities = probabilities.clamp(EPS, 1.0 - EPS);
    let total = probabilities.numel() as f64;
    let bin = (&probabilities * bins).to_kind(Kind::Int64).clamp(0, bins - 1);
    let zeros = || Tensor::zeros([bins], (Kind::Double, Device::Cpu));
    let sum = |values: &Tensor| zeros().f_scatter_add(0, &bin, values);
    let count = sum(&probabilities.ones_like())?;
    let counted = count.clamp_min(1.0);
    let error = (sum(&probabilities)? / &counted - sum(came_true)? / &counted).abs(); // [bins]
    Ok((error * count).sum(Kind::Double).double_value(&[]) / total)
}

/// Fits temperatures to raw confidences `[n, g]` and marks `[n, g]`, 1 where the drafted token was accepted and 0 where not.
/// The caller says what the data were.
pub fn fit(raw: &Tensor, accepted: &Tensor, dataset: &str) -> Result<Calibration> {
    let (samples, slots) = raw.size2()?;
    if samples == 0 || slots == 0 {
        return Err(Error::Failed(
            "no verified chain of drafted tokens: there is nothing to calibrate with".to_owned(),
        ));
    }
    if accepted.size() != raw.size() {
        let (want, got) = (raw.size(), accepted.size());
        return Err(Error::Failed(format!(
            "accepted tokens: expected the shape of the confidences, {want:?}, got {got:?}"
        )));
    }
    let cpu = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double);
    let (raw, accepted) = (cpu(raw), cpu(accepted));
    if raw.isfinite().all().int64_value(&[]) == 0 {
        return Err(Error::Failed(
            "the draft's confidences are not numbers: there is nothing to calibrate with".to_owned(),
        ));
    }
    let grid = grid()?;
    let mut fitted = Calibration {
        temperatures: Vec::new(),
        dataset: dataset.to_owned(),
        num_samples: samples as u64,
        ece_before: Vec::new(),
        ece_after: Vec::new(),
    };
    let mut as_it_is = Tensor::ones([samples], (Kind::Double, Device::Cpu)); // survival with temperatures of 1
    let mut so_far = as_it_is.shallow_clone(); // survival with the fitted ones
    for slot in 0..slots {
        let (raw, accepted) = (raw.select(1, slot), accepted.select(1, slot)); // [n]
        as_it_is = &as_it_is * raw.sigmoid();
        fitted.ece_before.push(calibration_error(&as_it_is, &accepted, BINS)?);
        let mut best: Option<(f64, f64, Tensor)> = None;
        for &temperature in &grid {
            let survival = &so_far * (&raw / temperature).sigmoid();
            let error = calibration_error(&survival, &accepted, BINS)?;
            if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                best = Some((error, temperature, survival));
            }
        }
        let Some((error, temperature, survival)) = best else { continue };
        fitted.ece_after.push(error);
        fitted.temperatures.push(temperature);
        so_far = survival;
    }
    Ok(fitted)
}
