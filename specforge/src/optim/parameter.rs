//! Trained tensors, and what the optimizer keeps for each of them.

use std::collections::HashSet;

use tch::{Device, Kind, Tensor};

use super::cut::Cut;
use crate::dist::ProcessGroup;
use crate::draft::{self, ParameterGroup};
use crate::error::{Error, Result};

/// One trained tensor.
#[derive(Debug)]
pub struct ParameterSlot {
    /// Name in the model's file.
    pub name: String,
    /// The leaf the model computes with, in the type it computes in. Its memory is written: pages mapped from a file
    /// must be copied first.
    pub value: Tensor,
    /// How it is updated.
    pub group: ParameterGroup,
}

impl From<&draft::Parameter> for ParameterSlot {
    fn from(parameter: &draft::Parameter) -> Self {
        let value = parameter.value.shallow_clone();
        Self { name: parameter.name.clone(), value, group: parameter.group }
    }
}

impl ParameterSlot {
    /// A parameter that is updated as its shape suggests.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        let group = ParameterGroup::of_shape(&value.size());
        Self { name: name.into(), value, group }
    }

    /// The type the update is computed in, and that of the gradient: that of the value, but at least float32.
    pub fn master_kind(&self) -> Kind {
        if self.value.kind() == Kind::Double { Kind::Double } else { Kind::Float }
    }
}

/// A quantity that the optimizer keeps for every element of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Master,
    FirstMoment,
    SecondMoment,
}

impl Part {
    /// Its name in a checkpoint stands before that of the parameter.
    pub(super) fn key(self, parameter: &str) -> String {
        let part = match self {
            Part::Master => "master",
            Part::FirstMoment => "first_moment",
            Part::SecondMoment => "second_moment",
        };
        format!("{part}.{parameter}")
    }
}

/// A trained tensor with this rank's part of its state. Without sharding, the part is the whole and has its shape; with
/// it, a range of the flattened tensor.
pub(super) struct Parameter {
    pub(super) slot: ParameterSlot,
    /// Which elements are updated here.
    pub(super) cut: Cut,
    /// Those elements in the memory of `slot.value`.
    pub(super) value: Tensor,
    /// float32 or float64; `value` itself where that has this type.
    pub(super) master: Tensor,
    pub(super) first_moment: Tensor,
    pub(super) second_moment: Tensor,
}

impl Parameter {
    /// Zero moments for the elements that `cut` gives to this rank.
    pub(super) fn new(slot: ParameterSlot, cut: Cut) -> Result<Self> {
        // `detach` shares memory, and where the types are equal the conversion is the tensor itself.
        let value = cut.part(&slot.value.f_detach()?)?;
        let master = value.f_to_kind(slot.master_kind())?;
        let (first_moment, second_moment) = (master.f_zeros_like()?, master.f_zeros_like()?);
        Ok(Self { slot, cut, value, master, first_moment, second_moment })
    }

    /// Whether master and value are two tensors.
    pub(super) fn has_own_master(&self) -> bool {
        self.slot.value.kind() != self.slot.master_kind()
    }

    /// The value becomes its master, rounded, on every rank. A collective when sharded.
    pub(super) fn publish(&mut self, group: &ProcessGroup) -> Result<()> {
        if self.has_own_master() {
            self.value.f_copy_(&self.master)?;
        }
        self.cut.gather(&self.slot.value.f_detach()?, group)
    }

    /// What a checkpoint holds of this parameter beside its value.
    pub(super) fn state(&self) -> Vec<(Part, &Tensor)> {
        let master = self.has_own_master().then_some((Part::Master, &self.master));
        let moments = [(Part::FirstMoment, &self.first_moment), (Part::SecondMoment, &self.second_moment)];
        master.into_iter().chain(moments).collect()
    }
}

/// Refuses lists that cannot be trained together.
pub(super) fn check_slots(slots: &[ParameterSlot]) -> Result<()> {
    let Some(first) = slots.first() else {
        return Err(Error::Failed("optimizer: there is nothing to train".to_owned()));
    };
    let device: Device = first.value.device();
    let mut names = HashSet::new();
    for slot in slots {
        let (value, name) = (&slot.value, &slot.name);
        let problem = if !names.insert(name) {
            "is there twice"
        } else if !matches!(value.kind(), Kind::Double | Kind::Float | Kind::BFloat16 | Kind::Half) {
            "is neither Double, Float, BFloat16 nor Half"
        } else if value.device() != device {
            "is on another device than the first parameter"
        } else if !value.is_contiguous() {
            "is not contiguous"
        } else if !(slot.group.rate.is_finite() && slot.group.rate > 0.0) {
            "has a learning rate that is no positive multiple of the run's"
        } else {
            continue;
        };
        return Err(Error::Failed(format!("optimizer: parameter `{name}` {problem}")));
    }
    Ok(())
}
