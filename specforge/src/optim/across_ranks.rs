//! The optimizer over several ranks equals the optimizer on one, to the bit.

use std::path::Path;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::{NonFinite, OptimConfig, Optimizer, ParameterSlot};
use crate::dist::ProcessGroup;
use crate::dist::group::tests::{TIMEOUT, on_ranks};
use crate::error::Error;
use crate::nn::noise;
use crate::weights::{WeightsFolder, write_tensors, writer::host_bytes};

/// Lengths that divide by the number of ranks and that do not, that end within a vector, and that some ranks have
/// nothing of.
const SHAPES: [(&str, &[i64]); 7] = [
    ("whole.weight", &[64, 48]),
    ("odd.weight", &[37, 29]),
    ("large.weight", &[301, 211]),
    ("norm.weight", &[71]),
    ("vector", &[16]),
    ("bias", &[3]),
    ("scale", &[]),
];
/// Type of the parameters, decay of their averages, and whether two matrices are Muon's.
type Case = (Kind, Option<f64>, bool);
const CASES: [Case; 6] = [
    (Kind::Float, None, false),
    (Kind::BFloat16, None, false),
    (Kind::Double, None, false),
    (Kind::Float, Some(0.7), false),
    (Kind::BFloat16, Some(0.7), true),
    (Kind::Float, None, true),
];
/// A rank gives up on its peers after twice that.
const SOON: Duration = Duration::from_secs(TIMEOUT.as_secs() / 2);

/// As [`on_ranks`]; no rank hangs up before the others are done, or even have met.
fn together<T: Send>(world_size: usize, body: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
    on_ranks(world_size, |group| {
        let result = body(group);
        group.barrier().unwrap();
        result
    })
}

/// A tensor as bytes, which threads can hand on.
type Named = Vec<(String, Vec<u8>)>;

fn slots((kind, _, muon): Case) -> Vec<ParameterSlot> {
    let slot = |(index, (name, shape)): (usize, &(&str, &[i64]))| {
        let value = noise::normal(shape, 1.0, 1, index as u64).to_kind(kind).set_requires_grad(true);
        let mut slot = ParameterSlot::new(*name, value);
        slot.group.rate = if index % 3 == 1 { 0.25 } else { 1.0 };
        slot.muon = muon && shape.len() == 2 && index > 0;
        slot
    };
    SHAPES.iter().enumerate().map(slot).collect()
}

fn optimizer(case: Case, group: &ProcessGroup, shard: bool) -> Optimizer<'_> {
    let config = OptimConfig { weight_decay: 0.1, average: case.1, ..OptimConfig::default() };
    Optimizer::new(slots(case), &config, group, shard).unwrap()
}

/// One update; clipped on even steps. With `spoiled`, one gradient of the last rank's range is NaN.
fn step(optimizer: &mut Optimizer<'_>, step: u64, spoiled: bool) {
    let size = if step.is_multiple_of(2) { 2.0 } else { 1e-4 };
    let gradients: Vec<Tensor> = optimizer
        .slots()
        .enumerate()
        .map(|(index, slot)| {
            noise::normal(&slot.value.size(), size, 100 + step, index as u64).to_kind(slot.master_kind())
        })
        .collect();
    if spoiled {
        let _ = gradients[0].get(63).fill_(f64::NAN);
    }
    let rate = 1e-2 / (step + 1) as f64;
    optimizer.step(&gradients, rate, Some(1.0), &Tensor::from(1.5f32)).unwrap();
}

fn values(optimizer: &Optimizer<'_>) -> Named {
    optimizer.slots().map(|slot| (slot.name.clone(), host_bytes(&slot.value).to_vec())).collect()
}

fn state(optimizer: &Optimizer<'_>) -> Named {
    let state = optimizer.state().unwrap();
    state
        .into_iter()
        .map(|(name, tensor)| (format!("{name} {:?}", tensor.size()), host_bytes(&tensor).to_vec()))
        .collect()
}

#[track_caller]
fn assert_equal(got: &Named, want: &Named, what: &str) {
    let names = |list: &Named| list.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(got), names(want), "{what}");
    let different: Vec<&str> =
        got.iter().zip(want).filter(|(got, want)| got.1 != want.1).map(|(got, _)| got.0.as_str()).collect();
    assert!(different.is_empty(), "{what}: {different:?}");
}

/// What a sharded optimizer gave to be saved is that of its moment, whatever is trained while it is written.
#[test]
fn a_state_that_was_gathered_does_not_move_on() {
    for world_size in [1, 2, 3] {
        together(world_size, |group| {
            let mut optimizer = optimizer(CASES[0], group, true);
            step(&mut optimizer, 0, false);
            let held = optimizer.state().unwrap();
            let bytes = || held.iter().map(|(_, tensor)| host_bytes(tensor).to_vec()).collect::<Vec<_>>();
            let before = bytes();
            step(&mut optimizer, 1, false);
            assert!(optimizer.state_is_live() || before == bytes(), "{world_size} ranks");
        });
    }
}

#[test]
fn any_number_of_ranks_takes_the_steps_of_one() {
    for case in CASES {
        let mut alone = optimizer(case, ProcessGroup::SINGLE, false);
        (0..6).for_each(|index| step(&mut alone, index, false));
        let (want_values, want_state) = (values(&alone), state(&alone));
        for (world_size, shard) in [(1, true), (2, true), (3, true), (4, true), (2, false)] {
            let all = together(world_size, |group| {
                let mut optimizer = optimizer(case, group, shard);
                (0..6).for_each(|index| step(&mut optimizer, index, false));
                let before = (values(&optimizer), state(&optimizer));
                step(&mut optimizer, 6, true);
                step(&mut optimizer, 7, false);
                let after = (values(&optimizer), state(&optimizer));
                (before, after, optimizer.non_finite().unwrap().fatal, optimizer.steps_taken().unwrap())
            });
            for (rank, (before, after, bad, steps)) in all.into_iter().enumerate() {
                let what = format!("{case:?}, rank {rank} of {world_size}, shard {shard}");
                for (values, state) in [before, after] {
                    assert_equal(&values, &want_values, &what);
                    match (shard || case.2) && rank > 0 {
                        true => assert!(state.is_empty(), "{what}"),
                        false => assert_equal(&state, &want_state, &what),
                    }
                }
                assert_eq!(bad, Some(NonFinite { step: 7, what: "the gradient norm" }), "{what}");
                assert_eq!(steps, 6, "{what}");
            }
        }
    }
}

#[test]
fn each_of_several_ranks_keeps_its_share_of_the_state() {
    let parameter = |kind| ParameterSlot::new("w", Tensor::ones([96, 10], (kind, tch::Device::Cpu)));
    let (none, some) = (None, Some(0.9));
    for (kind, average, bytes) in [
        (Kind::Float, none, 8),
        (Kind::BFloat16, none, 12),
        (Kind::Half, none, 12),
        (Kind::Double, none, 16),
        (Kind::BFloat16, some, 16),
    ] {
        for (world_size, shard) in [(1, true), (2, true), (3, true), (4, true), (3, false)] {
            let kept = together(world_size, |group| {
                let config = OptimConfig { average, ..OptimConfig::default() };
                Optimizer::new(vec![parameter(kind)], &config, group, shard).unwrap().state_bytes()
            });
            let share = if shard { 960 / world_size } else { 960 };
            assert_eq!(kept, vec![bytes * share; world_size], "{kind:?} {shard}");
        }
    }
}

/// Values and state of the first rank, as a checkpoint holds them.
fn save(optimizer: &Optimizer<'_>, group: &ProcessGroup, folder: &Path) {
    let (values, state) = (optimizer.saved_values().unwrap(), optimizer.state().unwrap());
    if group.is_first() {
        write_tensors(&folder.join("model.safetensors"), &values, &[]).unwrap();
        write_tensors(&folder.join("optimizer.safetensors"), &state, &[]).unwrap();
    }
}

fn resume<'a>(case: Case, group: &'a ProcessGroup, shard: bool, folder: &Path) -> Optimizer<'a> {
    let mut resumed = optimizer(case, group, shard);
    let restore = case.0 != Kind::BFloat16 && case.1.is_none(); // masters bring the other values back
    if restore && group.is_first() {
        let model = WeightsFolder::open(&folder.join("model.safetensors")).unwrap();
        for slot in resumed.slots() {
            let saved = model.load(&slot.name, case.0, tch::Device::Cpu).unwrap();
            tch::no_grad(|| slot.value.shallow_clone().copy_(&saved));
        }
    }
    // Only the first rank has the files.
    let read = group.is_first().then(|| WeightsFolder::open(&folder.join("optimizer.safetensors")).unwrap());
    resumed.load_state(read.as_ref()).unwrap();
    if restore {
        resumed.slots().for_each(|slot| group.broadcast(&slot.value.detach(), 0).unwrap());
    }
    resumed
}

#[test]
fn what_some_ranks_saved_any_other_number_continues() {
    for case in CASES {
        let mut alone = optimizer(case, ProcessGroup::SINGLE, false);
        (0..4).for_each(|index| step(&mut alone, index, false));
        let want_saved = state(&alone);
        (4..7).for_each(|index| step(&mut alone, index, false));
        let (want_values, want_state) = (values(&alone), state(&alone));
        for (from, shard) in [(2, true), (3, true), (2, false)] {
            let folder = tempfile::tempdir().unwrap();
            together(from, |group| {
                let mut first = optimizer(case, group, shard);
                (0..4).for_each(|index| step(&mut first, index, false));
                save(&first, group, folder.path());
            });
            for (to, shard) in [(1, true), (3, true), (4, true), (2, false)] {
                let all = together(to, |group| {
                    let mut second = resume(case, group, shard, folder.path());
                    let loaded = state(&second);
                    (4..7).for_each(|index| step(&mut second, index, false));
                    (loaded, values(&second), state(&second))
                });
                let what = format!("{case:?}, from {from} to {to}, shard {shard}");
                assert_equal(&all[0].0, &want_saved, &what);
                assert_equal(&all[0].2, &want_state, &what);
                all.iter().for_each(|(_, values, _)| assert_equal(values, &want_values, &what));
            }
        }
    }
}

#[test]
fn what_the_first_rank_cannot_read_is_soon_an_error_on_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    let mut damaged = optimizer(CASES[0], ProcessGroup::SINGLE, false).state().unwrap();
    let (name, _) = damaged.pop().unwrap();
    write_tensors(&path, &damaged, &[]).unwrap();
    for (file, word) in [(Some(&path), name.as_str()), (None, "no state to load")] {
        for shard in [true, false] {
            let started = Instant::now();
            let all = together(3, |group| {
                let read = file.filter(|_| group.is_first()).map(|path| WeightsFolder::open(path).unwrap());
                let mut optimizer = optimizer(CASES[0], group, shard);
                step(&mut optimizer, 0, false);
                let before = (values(&optimizer), state(&optimizer));
                let error = optimizer.load_state(read.as_ref()).unwrap_err();
                assert!(before == (values(&optimizer), state(&optimizer)), "something was changed");
                error
            });
            assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
            assert!(all.iter().all(|error| error.to_string().contains(word)), "{all:?}");
            assert!(matches!(all[1], Error::Peer { rank: 1, .. }) && matches!(all[2], Error::Peer { rank: 2, .. }));
        }
    }
}

/// Seconds of a step on each rank, the fastest of several.
fn seconds_of_a_step(group: &ProcessGroup, shard: bool) -> f64 {
    let shape = [2304, 2304];
    let options = (Kind::Float, tch::Device::Cpu);
    let slots = (0..16).map(|index| ParameterSlot::new(format!("w{index}"), Tensor::ones(shape, options))).collect();
    let gradients: Vec<Tensor> = (0..16).map(|_| Tensor::full(shape, 1e-3, options)).collect();
    let mut optimizer = Optimizer::new(slots, &OptimConfig::default(), group, shard).unwrap();
    let step = |_| {
        group.barrier().unwrap();
        let started = Instant::now();
        optimizer.step(&gradients, 1e-4, Some(1.0), &Tensor::from(1f32)).unwrap();
        started.elapsed().as_secs_f64()
    };
    (0..8).map(step).fold(f64::INFINITY, f64::min)
}

#[test]
#[ignore = "times 85 million parameters; run it in release, alone and with OMP_NUM_THREADS=1"]
fn speed_of_a_step() {
    println!("one rank: {:.3} s", seconds_of_a_step(ProcessGroup::SINGLE, false));
    for (world_size, shard) in [(2, false), (2, true)] {
        let seconds = together(world_size, |group| seconds_of_a_step(group, shard));
        println!("{world_size} ranks, shard {shard}: {seconds:.3?} s");
    }
}
