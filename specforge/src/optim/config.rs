//! The `optim` section of a run's configuration.

use serde::{Deserialize, Serialize};

use super::muon::MuonConfig;
use super::parameter::ParameterSlot;
use super::pattern;
use super::schedule::ScheduleConfig;
use crate::draft::Parameter;
use crate::error::{Error, Result};

/// Settings of the optimizer.
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
    /// Updates matrices by Muon. `null` leaves all to AdamW.
    pub muon: Option<MuonConfig>,
    /// Decay of a moving average of the parameters, which is what is measured and saved. `null` keeps none.
    pub average: Option<f64>,
    /// How the learning rate moves.
    pub schedule: ScheduleConfig,
    /// Parameters with a learning rate of their own. Of several entries that name a parameter, the first counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupConfig>,
}

/// Parameters that share a learning rate of their own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Their names; `*` stands for anything.
    pub parameters: String,
    /// Multiplies their learning rate.
    pub rate: f64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_gradient_norm: Some(1.0),
            muon: None,
            average: None,
            schedule: ScheduleConfig::default(),
            groups: Vec::new(),
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
        self.muon.as_ref().map_or(Ok(()), MuonConfig::validate)?;
        if let Some(decay) = self.average {
            expect((0.0..1.0).contains(&decay), "average", "a number from 0 to below 1, or null for none", decay)?;
        }
        for (index, group) in self.groups.iter().enumerate() {
            expect(positive(group.rate), &format!("groups[{index}].rate"), "a number above 0", group.rate)?;
        }
        self.schedule.validate()
    }

    /// The parameters of a draft as the optimizer takes them: each with the draft's own group, and the rate of the entry of
    /// `groups` that names it, and by Muon where `muon` says so. An entry that no parameter comes to is refused.
    pub fn slots(&self, parameters: &[Parameter]) -> Result<Vec<ParameterSlot>> {
        let mut used = vec![false; self.groups.len()];
        let slot = |parameter: &Parameter| {
            let mut slot = ParameterSlot::from(parameter);
            if let Some(index) = self.groups.iter().position(|group| pattern::names(&group.parameters, &parameter.name))
            {
                used[index] = true;
                slot.group.rate *= self.groups[index].rate;
            }
            slot.muon = self.muon.as_ref().is_some_and(|muon| muon.has(&parameter.name, &parameter.value.size()));
            slot
        };
        let slots: Vec<ParameterSlot> = parameters.iter().map(slot).collect();
        let names: Vec<&str> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        if self.muon.is_some() && !slots.iter().any(|slot| slot.muon) {
            return Err(Error::config("optim.muon.parameters", "names no matrix of this draft")
                .with_hint(format!("there are {}", names.join(", "))));
        }
        let Some(index) = used.iter().position(|used| !used) else {
            return Ok(slots);
        };
        let problem = format!("no parameter is left for `{}`", self.groups[index].parameters);
        Err(Error::config(format!("optim.groups[{index}].parameters"), problem)
            .with_hint(format!("the first entry that names a parameter has it; there are {}", names.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn the_first_group_that_names_a_parameter_multiplies_its_rate_and_idle_ones_are_refused() {
        let options = (Kind::Float, Device::Cpu);
        let parameters = [
            Parameter::new("a.weight", Tensor::zeros([2, 2], options)),
            Parameter::new("a.bias", Tensor::zeros([2], options)).with_rate(3.0),
            Parameter::new("b.weight", Tensor::zeros([2, 2], options)),
        ];
        let group = |parameters: &str, rate| GroupConfig { parameters: parameters.to_owned(), rate };
        let with = |groups: Vec<GroupConfig>| OptimConfig { groups, ..OptimConfig::default() };
        let slots = with(vec![group("*.bias", 0.5), group("a.*", 0.1)]).slots(&parameters).unwrap();
        assert_eq!(slots.iter().map(|slot| slot.group.rate).collect::<Vec<_>>(), [0.1, 1.5, 1.0]);
        assert_eq!(slots.iter().map(|slot| slot.group.decay).collect::<Vec<_>>(), [true, false, true]);
        for idle in [group("c.*", 1.0), group("a.bias", 1.0)] {
            let error = with(vec![group("a.*", 1.0), idle]).slots(&parameters).unwrap_err();
            assert!(error.to_string().contains("`optim.groups[1].parameters`"), "{error}");
            assert!(error.hint().unwrap().contains("a.weight, a.bias, b.weight"));
        }
        let error = with(vec![group("*", 0.0)]).validate().unwrap_err().to_string();
        assert!(error.contains("`optim.groups[0].rate`"), "{error}");
    }

    #[test]
    fn defaults_pass_and_nonsense_is_refused_with_its_key() {
        OptimConfig::default().validate().unwrap();
        for (text, key) in [
            (r#"{"learning_rate": 0}"#, "`optim.learning_rate`"),
            (r#"{"betas": [0.9, 1.0]}"#, "`optim.betas`"),
            (r#"{"epsilon": 0.0}"#, "`optim.epsilon`"),
            (r#"{"weight_decay": -0.1}"#, "`optim.weight_decay`"),
            (r#"{"max_gradient_norm": 0}"#, "`optim.max_gradient_norm`"),
            (r#"{"muon": {"momentum": 1.0}}"#, "`optim.muon.momentum`"),
            (r#"{"muon": {"iterations": 0}}"#, "`optim.muon.iterations`"),
            (r#"{"average": 1.0}"#, "`optim.average`"),
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
