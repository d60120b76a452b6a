//! What a decoding step costs by the number of tokens it verifies: SGLang's SPS ("steps per second") files, of two forms.
//!
//! Reference: SGLang 0.5.23, `speculative/dspark_components`. The forms differ in more than their keys: a table looks up the
//! largest probe that is not above the number of tokens, the additive form interpolates between probes. A table of one probe
//! says that nothing was measured.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;
use crate::strict;

/// Steps a second by the tokens of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepTable {
    /// Tokens verified in a step, all requests together; strictly increasing.
    pub sample_batch_tokens: Vec<u64>,
    /// Steps a second with so many.
    pub sample_steps_per_sec: Vec<f64>,
    /// Tokens of the largest step there can be.
    pub max_batch_tokens: u64,
}

/// Seconds of a step as a sum: `bias + alpha(requests) + theta(tokens)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Additive {
    /// Seconds that every step takes; positive.
    pub bias_seconds: f64,
    /// Numbers of requests; strictly increasing.
    pub bs_probes: Vec<u64>,
    /// Seconds that so many requests add.
    pub alpha_seconds: Vec<f64>,
    /// Tokens verified in a step, all requests together; strictly increasing.
    pub m_probes: Vec<u64>,
    /// Seconds that so many tokens add.
    pub theta_seconds: Vec<f64>,
}

/// What a step costs, in either form.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum StepCosts {
    /// A table that is looked up.
    Table(StepTable),
    /// A sum that is interpolated.
    Additive(Additive),
}

impl StepCosts {
    /// Reads a file of either form.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let refuse = |problem: String| {
            Error::bad_file(path, problem).with_hint("write it anew with `specforge eval --calibrate`".to_owned())
        };
        let value: Value = strict::from_json(&text).map_err(refuse)?;
        // As the reference tells the two apart.
        let costs = match value.get("bias_seconds") {
            Some(_) => strict::from_json(&text).map(Self::Additive),
            None => strict::from_json(&text).map(Self::Table),
        };
        let costs = costs.map_err(refuse)?;
        costs.check().map_err(refuse)?;
        Ok(costs)
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check().map_err(|problem| Error::bad_file(path, problem))?;
        files::write_json(path, self)
    }

    /// Whether nothing was measured: then everything is verified.
    pub fn is_unmeasured(&self) -> bool {
        matches!(self, Self::Table(table) if table.sample_batch_tokens.len() <= 1)
    }

    /// Tokens a second of a step that verifies `guesses` drafted tokens of `requests` and is expected to commit `tokens`.
    pub(super) fn tokens_per_second(&self, requests: usize, guesses: usize, tokens: f64) -> f64 {
        match self {
            // One multiplication or division as the reference has them, so that equal values stay equal.
            Self::Table(table) => tokens * table.steps_per_second(requests + guesses),
            Self::Additive(sum) => tokens / sum.seconds(requests, guesses),
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Self::Table(table) => table.check(),
            Self::Additive(sum) => sum.check(),
        }
    }
}

impl StepTable {
    /// Steps a second at the largest probe that is not above so many tokens; at the first one below it.
    pub fn steps_per_second(&self, tokens: usize) -> f64 {
        let probe = above(&self.sample_batch_tokens, tokens as f64).saturating_sub(1);
        self.sample_steps_per_sec.get(probe).copied().unwrap_or(f64::NAN)
    }

    fn check(&self) -> Result<(), String> {
        let Self { sample_batch_tokens: probes, sample_steps_per_sec: steps, max_batch_tokens } = self;
        check_probes(("sample_batch_tokens", probes), ("sample_steps_per_sec", steps))?;
        if let Some(index) = steps.iter().position(|value| *value <= 0.0) {
            return Err(format!("`sample_steps_per_sec[{index}]`: expected a positive number, got {}", steps[index]));
        }
        match probes.last() {
            Some(last) if max_batch_tokens < last => Err(format!(
                "`max_batch_tokens`: expected at least {last}, the largest of `sample_batch_tokens`, got {max_batch_tokens}"
            )),
            _ => Ok(()),
        }
    }
}

impl Additive {
    /// Seconds of a step that verifies `guesses` drafted tokens of `requests`.
    pub fn seconds(&self, requests: usize, guesses: usize) -> f64 {
        let base = self.bias_seconds + self.of_requests(requests as f64);
        base + self.of_tokens((requests + guesses) as f64)
    }

    /// Outside the probes the nearest one's value as it is.
    fn of_requests(&self, requests: f64) -> f64 {
        let (probes, values) = (&self.bs_probes, &self.alpha_seconds);
        let hi = above(probes, requests);
        match hi {
            0 => values[0],
            _ if hi == probes.len() => values[hi - 1],
            _ => {
                let [low, high] = [hi - 1, hi].map(|at| probes[at] as f64);
                let share = (requests - low) / (high - low);
                values[hi - 1] + share * (values[hi] - values[hi - 1])
            }
        }
    }

    /// Outside the probes the nearest one's value, but through the same interpolation: the reference rounds so.
    fn of_tokens(&self, tokens: f64) -> f64 {
        let (probes, values) = (&self.m_probes, &self.theta_seconds);
        let last = probes.len() - 1;
        if last == 0 {
            return values[0];
        }
        let tokens = tokens.max(probes[0] as f64).min(probes[last] as f64);
        let hi = above(probes, tokens).clamp(1, last);
        let [low, high] = [hi - 1, hi].map(|at| probes[at] as f64);
        let share = (tokens - low) / (high - low);
        values[hi - 1] + share * (values[hi] - values[hi - 1])
    }

    fn check(&self) -> Result<(), String> {
        let bias = self.bias_seconds;
        if !(bias.is_finite() && bias > 0.0) {
            return Err(format!("`bias_seconds`: expected a positive number, got {bias}"));
        }
        check_probes(("bs_probes", &self.bs_probes), ("alpha_seconds", &self.alpha_seconds))?;
        check_probes(("m_probes", &self.m_probes), ("theta_seconds", &self.theta_seconds))?;
        let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        let shortest = bias + least(&self.alpha_seconds) + least(&self.theta_seconds);
        match shortest > 0.0 {
            true => Ok(()),
            false => Err(format!(
                "`alpha_seconds` and `theta_seconds`: expected steps of more than 0 s, got one of {shortest} s"
            )),
        }
    }
}

/// Number of probes that are not above a value.
fn above(probes: &[u64], value: f64) -> usize {
    probes.partition_point(|&probe| probe as f64 <= value)
}

/// Probes are strictly increasing numbers from 1 on, with a finite value each.
fn check_probes((key, probes): (&str, &[u64]), (value_key, values): (&str, &[f64])) -> Result<(), String> {
    if probes.is_empty() {
        return Err(format!("`{key}`: expected at least one probe, got none"));
    }
    if probes.len() != values.len() {
        let (want, got) = (probes.len(), values.len());
        return Err(format!("`{value_key}`: expected {want} values, as many as `{key}`, got {got}"));
    }
    if probes[0] == 0 {
        return Err(format!("`{key}[0]`: expected at least 1, got 0"));
    }
    if let Some(index) = (1..probes.len()).find(|&index| probes[index] <= probes[index - 1]) {
        let (before, got) = (probes[index - 1], probes[index]);
        return Err(format!("`{key}[{index}]`: expected more than {before}, the probe before it, got {got}"));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(format!("`{value_key}[{index}]`: expected a finite number, got {}", values[index])),
        None => Ok(()),
    }
}
