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
    /// Whether by Muon; else by AdamW.
    pub muon: bool,
}

impl From<&draft::Parameter> for ParameterSlot {
    fn from(parameter: &draft::Parameter) -> Self {
        let value = parameter.value.shallow_clone();
        Self { name: parameter.name.clone(), value, group: parameter.group, muon: false }
    }
}

impl ParameterSlot {
    /// A parameter that AdamW updates as its shape suggests.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        let group = ParameterGroup::of_shape(&value.size());
        Self { name: name.into(), value, group, muon: false }
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
    Average,
}

impl Part {
    /// Its name in a checkpoint stands before that of the parameter.
    pub(super) fn key(self, parameter: &str) -> String {
        let part = match self {
            Part::Master => "master",
            Part::FirstMoment => "first_moment",
            Part::SecondMoment => "second_moment",
            Part::Average => "average",
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
    /// AdamW's alone.
    pub(super) second_moment: Option<Tensor>,
    /// Of the master over the updates, in its type, where one is kept.
    pub(super) average: Option<Tensor>,
}

impl Parameter {
    /// Zero moments for the elements that `cut` gives to this rank, and an average of what they are now.
    pub(super) fn new(slot: ParameterSlot, cut: Cut, averaged: bool) -> Result<Self> {
        // `detach` shares memory, and where the types are equal the conversion is the tensor itself.
        let value = cut.part(&slot.value.f_detach()?)?;
        let master = value.f_to_kind(slot.master_kind())?;
        let first_moment = master.f_zeros_like()?;
        let second_moment = (!slot.muon).then(|| master.f_zeros_like()).transpose()?;
        let average = averaged.then(|| copy_of(&master)).transpose()?;
        Ok(Self { slot, cut, value, master, first_moment, second_moment, average })
    }

    /// Whether master and value are two tensors.
    pub(super) fn has_own_master(&self) -> bool {
        self.slot.value.kind() != self.slot.master_kind()
    }

    /// Whether a checkpoint holds the master: the model's file then holds something else.
    pub(super) fn saves_master(&self) -> bool {
        self.has_own_master() || self.average.is_some()
    }

    /// The value becomes the average, on every rank. Of a value that is its own master, the average becomes what it was. A
    /// collective when sharded.
    pub(super) fn swap_average(&mut self, group: &ProcessGroup) -> Result<()> {
        let Some(average) = &mut self.average else { return Ok(()) };
        let before = copy_of(&self.value)?;
        self.value.f_copy_(average)?;
        if self.slot.value.kind() == self.slot.master_kind() {
            average.f_copy_(&before)?;
        }
        self.cut.gather(&self.slot.value.f_detach()?, group)
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
        let master = self.saves_master().then_some((Part::Master, &self.master));
        let second = self.second_moment.as_ref().map(|moment| (Part::SecondMoment, moment));
        let average = self.average.as_ref().map(|average| (Part::Average, average));
        let first = (Part::FirstMoment, &self.first_moment);
        master.into_iter().chain([first]).chain(second).chain(average).collect()
    }
}

/// The same numbers in memory of their own.
fn copy_of(values: &Tensor) -> Result<Tensor> {
    let mut copy = values.f_empty_like()?;
    copy.f_copy_(values)?;
    Ok(copy)
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
