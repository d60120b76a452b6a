//! The `optim` section of a run's configuration.

use serde::{Deserialize, Serialize};

use super::schedule::ScheduleConfig;
use crate::error::{Error, Result};

/// Settings of AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimConfig {
    /// Highest learning rate of the run.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; biases and norms never decay.
    pub weight_decay: f64,
    /// Gradients with a larger global norm are scaled down to it. `null` never clips.
    pub max_gradient_norm: Option<f64>,
    /// How the learning rate moves.
    pub schedule: ScheduleConfig,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_gradient_norm: Some(1.0),
            schedule: ScheduleConfig::default(),
        }
    }
}

impl OptimConfig {
    /// Refuses what no run can mean.
    pub fn validate(&self) -> Result<()> {
        let expect = |holds: bool, key: &str, expected: &str, got: f64| {
            if holds {
                Ok(())
            } else {
                Err(Error::config(format!("optim.{key}"), format!("expected {expected}, got {got}")))
            }
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        expect(positive(self.learning_rate), "learning_rate", "a number above 0", self.learning_rate)?;
        for beta in self.betas {
            expect((0.0..1.0).contains(&beta), "betas", "two numbers from 0 to below 1", beta)?;
        }
        expect(positive(self.epsilon), "epsilon", "a number above 0", self.epsilon)?;
        let decay = self.weight_decay;
        expect(decay.is_finite() && decay >= 0.0, "weight_decay", "a number of at least 0", decay)?;
        if let Some(norm) = self.max_gradient_norm {
            expect(positive(norm), "max_gradient_norm", "a number above 0, or null to never clip", norm)?;
        }
        self.schedule.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_and_nonsense_is_refused_with_its_key() {
        OptimConfig::default().validate().unwrap();
        for (text, key) in [
            (r#"{"learning_rate": 0}"#, "`optim.learning_rate`"),
            (r#"{"betas": [0.9, 1.0]}"#, "`optim.betas`"),
            (r#"{"epsilon": 0.0}"#, "`optim.epsilon`"),
            (r#"{"weight_decay": -0.1}"#, "`optim.weight_decay`"),
            (r#"{"max_gradient_norm": 0}"#, "`optim.max_gradient_norm`"),
            (r#"{"schedule": {"min_ratio": 2}}"#, "`optim.schedule.min_ratio`"),
        ] {
            let config: OptimConfig = serde_json::from_str(text).unwrap();
            assert!(config.validate().unwrap_err().to_string().contains(key), "{text}");
        }
        assert!(serde_json::from_str::<OptimConfig>(r#"{"lr": 1e-4}"#).is_err());
        let never: OptimConfig = serde_json::from_str(r#"{"max_gradient_norm": null}"#).unwrap();
        assert_eq!(never.max_gradient_norm, None);
    }
}
