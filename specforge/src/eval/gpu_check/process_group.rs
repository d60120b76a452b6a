//! Whether a process group carries a device's tensors: collectives, the reducer, and training as one of several ranks.
//!
//! A GPU machine has one rank, over NCCL; the code is that of many, and what it expects is written for any number, so that
//! tests hold it to more than one over Gloo.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::parity::Comparison;
use super::programs::{self, Place};
use crate::data::{DocumentRef, PackedBatch};
use crate::dist::{ParallelConfig, ProcessGroup, ReduceOp, Reducer, Store, nccl};
use crate::draft::{Compared, StepKey};
use crate::error::{Error, Result};
use crate::features::{FeatureSource, OnlineFeatures};
use crate::models::{SharedTarget, TargetConfig};
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::train::GradientSums;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessGroupCheck {
    /// Who carried the tensors, or why nobody could.
    pub backend: String,
    /// What was compared; nothing where nobody could carry them.
    pub checks: Vec<Comparison>,
}

/// Time that a collective has.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Largest difference of trained values, as a share of the largest: sums over ranks are rounded in another order.
const TRAINING_LIMIT: f64 = 1e-5;
/// Small enough for several buckets.
const BUCKET_BYTES: usize = 16 << 10;

/// Checks a group of this process alone. A program without NCCL's process group says so; it is no failure.
pub fn check(device: Device) -> Result<ProcessGroupCheck> {
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listener = TcpListener::bind((address, 0))
        .map_err(|error| Error::Failed(format!("cannot listen on {address} to make a process group: {error}")))?;
    let store = Store::host(&address.to_string(), listener, TIMEOUT)?;
    let mut group = ProcessGroup::gloo(&store, 0, 1, address, TIMEOUT)?;
    let backend = match (device, nccl::library()) {
        (Device::Cuda(_), Ok(library)) => {
            group.add_nccl(&store, device, TIMEOUT)?;
            format!("NCCL, {library}")
        }
        (Device::Cuda(_), Err(reason)) => {
            return Ok(ProcessGroupCheck { backend: format!("not checked: {reason}"), checks: Vec::new() });
        }
        _ => "Gloo".to_owned(),
    };
    Ok(ProcessGroupCheck { backend, checks: check_with(&group, device)? })
}

/// Every rank of `group` calls this.
fn check_with(group: &ProcessGroup, device: Device) -> Result<Vec<Comparison>> {
    let mut checks = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16] {
        let place = Place { device, kind };
        for (name, different) in collectives(group, place)? {
            checks.push(Comparison::new(name.to_owned(), kind, different, 0.0));
        }
    }
    let exact = |check: &str, different: f64| Comparison::new(check.to_owned(), Kind::Float, different, 0.0);
    checks.push(exact("reducer: sums in buckets", reduced(group, device)?));
    checks.push(exact("barrier", f64::from(u8::from(group.barrier().is_err()))));
    let (_, config) = programs::targets()?.swap_remove(0);
    for Compared { label, section, .. } in programs::first_drafts() {
        let alone = train(&config, &section, device, ProcessGroup::SINGLE)?;
        let together = train(&config, &section, device, group)?;
        let pairs = together.iter().zip(&alone);
        let error = pairs.map(|(got, want)| super::parity::largest_difference(got, want)).fold(0.0, worse);
        checks.push(Comparison::new(format!("{label}: training"), Kind::Float, error, TRAINING_LIMIT));
    }
    Ok(checks)
}

/// The larger one; NaN stays.
fn worse(left: f64, right: f64) -> f64 {
    if left.is_nan() || right.is_nan() { f64::NAN } else { left.max(right) }
}

/// How many values differ.
fn different(got: &Tensor, want: &Tensor) -> Result<f64> {
    Ok(got.f_ne_tensor(want)?.f_sum(Kind::Double)?.f_double_value(&[])?)
}

/// How many values each collective gets wrong. Numbers are small whole ones, which all types hold exactly.
fn collectives(group: &ProcessGroup, place: Place) -> Result<Vec<(&'static str, f64)>> {
    const LENGTH: i64 = 33;
    let (rank, world) = (group.rank() as i64, group.world_size() as i64);
    let options = (place.kind, place.device);
    // Of rank r: r + 1, r + 2, ...
    let ramp = |rank: i64, length: i64| Tensor::arange_start(rank + 1, rank + 1 + length, options);
    let sum = || (0..world).map(|rank| ramp(rank, LENGTH)).sum::<Tensor>();
    let mut found = Vec::new();
    for (name, operation, want) in [
        ("all-reduce, sum", ReduceOp::Sum, sum()),
        ("all-reduce, maximum", ReduceOp::Max, ramp(world - 1, LENGTH)),
        ("all-reduce, minimum", ReduceOp::Min, ramp(0, LENGTH)),
    ] {
        let tensor = ramp(rank, LENGTH);
        group.all_reduce(&tensor, operation)?;
        found.push((name, different(&tensor, &want)?));
    }
    let tensor = ramp(rank, LENGTH);
    group.broadcast(&tensor, group.world_size() - 1)?;
    found.push(("broadcast", different(&tensor, &ramp(world - 1, LENGTH))?));
    let whole = Tensor::f_zeros([world * LENGTH], options)?;
    group.all_gather(&whole, &ramp(rank, LENGTH))?;
    let parts: Vec<Tensor> = (0..world).map(|rank| ramp(rank, LENGTH)).collect();
    found.push(("all-gather", different(&whole, &Tensor::f_cat(&parts, 0)?)?));
    let part = Tensor::f_zeros([LENGTH], options)?;
    let whole = ramp(rank, LENGTH).f_repeat([world])?;
    group.reduce_scatter(&part, &whole)?;
    found.push(("reduce-scatter", different(&part, &sum())?));
    Ok(found)
}

/// How many of the reducer's sums are wrong, over some steps, and one more where they came in a single bucket.
fn reduced(group: &ProcessGroup, device: Device) -> Result<f64> {
    const LENGTHS: [i64; 4] = [3000, 17, 5000, 257];
    let gradient = |rank: usize, step: usize| {
        let of_length = move |length: i64| {
            let start = (10 * rank + step) as f64;
            Tensor::arange_start(start, start + length as f64, (Kind::Float, device))
        };
        LENGTHS.map(of_length)
    };
    let mut gradients: Vec<Tensor> = gradient(0, 0).iter().map(Tensor::zeros_like).collect();
    let mut reducer = Reducer::new(group, &gradients, BUCKET_BYTES)?;
    let mut wrong = 0.0;
    for step in 0..3 {
        for (total, own) in gradients.iter_mut().zip(gradient(group.rank(), step)) {
            total.f_copy_(&own)?;
        }
        reducer.prepare()?;
        reducer.finish(&mut gradients)?;
        for (index, total) in gradients.iter().enumerate() {
            let want: Tensor = (0..group.world_size()).map(|rank| gradient(rank, step)[index].shallow_clone()).sum();
            wrong += different(total, &want)?;
        }
    }
    Ok(wrong + f64::from(u8::from(reducer.times()?.len() < 2)))
}

const DOCUMENTS: [i64; 6] = [17, 4, 23, 9, 12, 30];

/// Every `world`-th document of a step, from `rank` on.
fn share(vocabulary: i64, step: u64, rank: usize, world: usize) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (index, &length) in DOCUMENTS.iter().enumerate().skip(rank).step_by(world) {
        let document = programs::documents(&[length], vocabulary, 100 * step + index as u64);
        batch.ids.extend(document.ids);
        batch.positions.extend(document.positions);
        batch.supervised.extend(document.supervised);
        batch.lengths.extend(document.lengths);
        batch.documents.push(DocumentRef::new(format!("random {index}"), index as u64));
    }
    batch
}

/// The draft's values after some steps as one of the ranks of a group, on the host.
fn train(config: &TargetConfig, section: &Value, device: Device, group: &ProcessGroup) -> Result<Vec<Tensor>> {
    let weights = &programs::random_weights;
    let target = SharedTarget::from(programs::build(config, weights, Place { device, kind: Kind::Float })?);
    let draft = programs::build_draft(section, &*target.in_use(), weights)?;
    let source = OnlineFeatures::new(target);
    let slots = draft.parameters().iter().map(ParameterSlot::from);
    // AdamW's usual epsilon gives a gradient that is nothing but rounding a whole step of its own, and hides a factor
    // that all gradients share. Clipping would hide one too.
    let optim = OptimConfig { epsilon: 1e-2, ..OptimConfig::default() };
    let mut optimizer = Optimizer::new(slots.collect(), &optim, group, true)?;
    let parallel = ParallelConfig { bucket_mib: 1, ..ParallelConfig::default() };
    let mut gradients = GradientSums::new(draft.parameters(), group, &parallel)?;
    for step in 0..3 {
        let key = StepKey { step, ..programs::KEY };
        let counts = draft.count(&share(config.info().vocab_size, step, 0, 1), key)?;
        let batch = share(config.info().vocab_size, step, group.rank(), group.world_size());
        let plan = draft.plan(&batch, key)?;
        let features = source.features(Arc::new(batch), &draft.capture())?;
        gradients.start()?;
        let tally = gradients.add(true, |gradients| draft.accumulate(&features, &plan, &counts, gradients))?;
        gradients.finish()?;
        group.all_reduce(&tally.objective, ReduceOp::Sum)?;
        optimizer.step(gradients.totals(), 1e-2, None, &tally.objective)?;
    }
    let values: Vec<Tensor> = optimizer.slots().map(|slot| slot.value.shallow_clone()).collect();
    programs::all_on_host(&values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::group::tests::on_ranks;

    fn failed(checks: &[Comparison]) -> Vec<&Comparison> {
        checks.iter().filter(|row| !row.passed).collect()
    }

    #[test]
    fn one_rank_computes_what_a_process_alone_does() {
        let check = check(Device::Cpu).unwrap();
        assert_eq!(check.backend, "Gloo");
        assert!(check.checks.len() > 15 && check.checks.iter().all(|row| row.error == 0.0), "{check:#?}");
    }

    #[test]
    fn several_ranks_compute_it_together() {
        for world_size in [2, 3] {
            let all = on_ranks(world_size, |group| check_with(group, Device::Cpu).unwrap());
            for checks in &all {
                assert!(failed(checks).is_empty(), "{checks:#?}");
                // Sums are rounded in another order: equal to the last bit would mean that the ranks shared nothing.
                let training = |row: &&Comparison| row.check.ends_with("training");
                assert!(checks.iter().filter(training).all(|row| row.error > 0.0), "{checks:#?}");
            }
        }
    }
}
