//! What a draft trains: its tensors, and how each of them is updated.

use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Stands before the name of a tensor that is the target's.
const OF_TARGET: &str = "target.";

/// A trainable tensor. Order of creation is the order everywhere: optimizer, checkpoint, reduction.
#[derive(Debug)]
pub struct Parameter {
    /// Name in checkpoints and exports.
    pub name: String,
    /// Value in the compute type, a leaf that requires gradients.
    pub value: Tensor,
    /// How it is updated.
    pub group: ParameterGroup,
}

impl Parameter {
    /// A parameter that begins with these values, which are its own from now on, and is updated as its shape suggests.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        let group = ParameterGroup::of_shape(&value.size());
        Self { name: name.into(), value: value.detach().set_requires_grad(true), group }
    }

    /// A parameter that stands for the target's tensor of this name.
    pub fn of_target(name: &str, value: Tensor) -> Self {
        Self::new(format!("{OF_TARGET}{name}"), value)
    }

    /// The same with another learning rate: so many times that of the run.
    #[must_use]
    pub fn with_rate(mut self, rate: f64) -> Self {
        self.group.rate = rate;
        self
    }

    /// Name of the target's tensor that a tensor of this name stands for, where it does: what an export calls it.
    pub fn target_name(name: &str) -> Option<&str> {
        name.strip_prefix(OF_TARGET)
    }
}

/// How the optimizer treats a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Whether weight decay applies: to matrices and embeddings, not to biases, norms and scalars.
    pub decay: bool,
    /// Multiplies the learning rate.
    pub rate: f64,
}

impl ParameterGroup {
    /// The usual rule: what has two dimensions or more decays, and everything has the run's learning rate.
    pub fn of_shape(shape: &[i64]) -> Self {
        Self { decay: shape.len() >= 2, rate: 1.0 }
    }
}
