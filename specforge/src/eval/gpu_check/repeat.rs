//! Whether two equal runs give equal bits, as `train.deterministic` promises.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use tch::Device;

use super::parity::Comparison;
use super::programs::{self, Place};
use crate::device;
use crate::dist::ProcessGroup;
use crate::draft::{Compared, Gradients, StepKey};
use crate::error::{Error, Result};
use crate::features::{FeatureSource, OnlineFeatures};
use crate::models::{SharedTarget, TargetConfig};
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::shim;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RepeatCheck {
    /// Where it ran, or why it did not.
    pub state: String,
    /// How many tensors of two equal runs differ; nothing where they did not run.
    pub checks: Vec<Comparison>,
}

/// Optimizer steps of a run.
const STEPS: u64 = 2;
/// Long enough for a GPU that attention's gradients are sums of several blocks.
const LENGTHS: [i64; 2] = [600, 250];
/// On the CPU, whose bits are the same anyway.
const SHORT_LENGTHS: [i64; 2] = [40, 23];

/// Trains every draft twice with deterministic algorithms.
pub fn check(device: Device) -> Result<RepeatCheck> {
    if let Err(error) = device::check_determinism(device) {
        return Ok(RepeatCheck { state: format!("not checked: {error}"), checks: Vec::new() });
    }
    shim::deterministic(true)?;
    let checks = all(device);
    shim::deterministic(false)?;
    let state = match device {
        Device::Cuda(_) => device::name(device),
        _ => "cpu, which says nothing of a GPU".to_owned(),
    };
    Ok(RepeatCheck { state, checks: checks? })
}

fn all(device: Device) -> Result<Vec<Comparison>> {
    let (_, config) = programs::targets()?.swap_remove(0);
    let mut checks = Vec::new();
    for Compared { label, kinds, section } in programs::drafts() {
        for &kind in kinds {
            let place = Place { device, kind };
            let run = || refused(|| train(&config, &section, place, 0));
            let differ = different(&run()?, &run()?);
            checks.push(Comparison::new(format!("{label}: training twice"), kind, differ, 0.0));
        }
    }
    Ok(checks)
}

/// An operator without a deterministic algorithm panics as every other that fails.
fn refused<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| match payload.downcast_ref::<String>() {
        Some(text) if text.contains("deterministic") => Err(Error::Torch(text.clone())),
        _ => panic::resume_unwind(payload),
    })
}

/// Gradients of every step, and the values and state after the last, as bytes.
fn train(config: &TargetConfig, section: &Value, place: Place, seed: u64) -> Result<Vec<Vec<u8>>> {
    let weights = &programs::random_weights;
    let target = SharedTarget::from(programs::build(config, weights, place)?);
    let draft = programs::build_draft(section, &*target.in_use(), weights)?;
    let source = OnlineFeatures::new(target);
    let slots = draft.parameters().iter().map(ParameterSlot::from);
    let mut optimizer = Optimizer::new(slots.collect(), &OptimConfig::default(), ProcessGroup::SINGLE, false)?;
    let lengths = if place.device == Device::Cpu { SHORT_LENGTHS } else { LENGTHS };
    let mut found = Vec::new();
    for step in 0..STEPS {
        let batch = programs::documents(&lengths, config.info().vocab_size, seed + step);
        let features = source.features(Arc::new(batch.clone()), &draft.capture())?;
        let mut gradients = Gradients::zeros(draft.parameters())?;
        let plan = draft.plan(&batch, StepKey { step, ..programs::KEY })?;
        let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients))?;
        for tensor in gradients.iter().chain([&tally.objective, &tally.sums]) {
            found.push(programs::bytes(tensor)?);
        }
        optimizer.step(&gradients, 1e-2, Some(1.0), &tally.objective)?;
    }
    for slot in optimizer.slots() {
        found.push(programs::bytes(&slot.value)?);
    }
    for (_, tensor) in optimizer.state()? {
        found.push(programs::bytes(&tensor)?);
    }
    Ok(found)
}

/// How many tensors differ.
fn different(one: &[Vec<u8>], other: &[Vec<u8>]) -> f64 {
    let pairs = one.iter().zip(other).filter(|(one, other)| one != other).count();
    (pairs + one.len().abs_diff(other.len())) as f64
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn the_cpu_repeats_itself_and_other_data_would_show() {
        let check = check(Device::Cpu).unwrap();
        assert!(check.checks.len() > 5 && check.checks.iter().all(|row| row.passed), "{check:#?}");
        let (_, config) = programs::targets().unwrap().swap_remove(0);
        for Compared { label, section, .. } in programs::drafts() {
            let run = |seed| train(&config, &section, Place { device: Device::Cpu, kind: Kind::Float }, seed).unwrap();
            let (one, other) = (run(0), run(7));
            assert!(different(&one, &other) as usize > one.len() * 3 / 4, "{label}");
            assert!(different(&one, &one[1..]) > 0.0);
        }
    }

    #[test]
    fn only_a_refusal_for_the_sake_of_bits_is_caught() {
        let text = "cumsum_cuda_kernel does not have a deterministic implementation";
        assert!(refused::<()>(|| panic!("{text}")).unwrap_err().to_string().contains(text));
        assert!(panic::catch_unwind(|| refused::<()>(|| panic!("a mistake of {}", 1))).is_err());
        assert_eq!(refused(|| Ok(1)).unwrap(), 1);
    }
}
