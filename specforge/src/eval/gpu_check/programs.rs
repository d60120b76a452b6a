//! Small programs that touch everything training and decoding need. Each runs on one device in one element type and
//! hands its results back to the host, so that two runs can be compared. Sizes are tiny and odd on purpose.

use std::sync::Arc;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{self, CheckpointStore, Manifest, RetentionConfig};
use crate::data::{DocumentRef, PackedBatch};
use crate::dist::ProcessGroup;
use crate::draft::{self, Compared, DraftContext, DraftModel, Gradients, SampleSize, Samples, StepKey};
use crate::error::{Error, Result};
use crate::eval::bench_train::spread_vocabulary;
use crate::features::{FeatureSource, OnlineFeatures};
use crate::models::{ForwardInput, LogitRows, SharedTarget, TargetConfig, TargetModel};
use crate::nn::{AttentionMask, noise};
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::weights::writer::host_bytes;

/// Named results, each a group of float64 tensors on the host.
pub type Results = Vec<(String, Vec<Tensor>)>;

/// Values of a tensor by its name and shape: float32 on the CPU.
pub type Weights<'a> = &'a dyn Fn(&str, &[i64]) -> Tensor;

/// Where and in which element type a program runs.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Device.
    pub device: Device,
    /// Element type of target and draft.
    pub kind: Kind,
}

/// Random values that depend on the name alone. They have no more digits than bfloat16, so that a model means the same
/// in both element types and only arithmetic differs.
pub fn random_weights(name: &str, shape: &[i64]) -> Tensor {
    // FNV-1a
    let stream = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let inputs = *shape.last().unwrap_or(&1) as f64;
    let values = match shape.len() {
        1 if name.ends_with("norm.weight") => noise::normal(shape, 0.1, 1, stream) + 1.0,
        1 => noise::normal(shape, 0.1, 1, stream),
        _ if name.contains("embed_tokens") => noise::normal(shape, 1.0, 1, stream),
        _ => noise::normal(shape, inputs.sqrt().recip(), 1, stream),
    };
    values.to_kind(Kind::BFloat16).to_kind(Kind::Float)
}

/// Configurations of the targets that are checked and measured. What they are called in a family is data.
const TARGETS: &str = include_str!("targets.json");

/// The configuration of a name, with the values of another over it.
fn target(name: &str, changes: Option<&str>) -> Result<TargetConfig> {
    let all: Value = serde_json::from_str(TARGETS)
        .map_err(|error| Error::Failed(format!("the configurations of the targets that are checked: {error}")))?;
    let mut values = all[name].clone();
    if let (Some(values), Some(changes)) = (values.as_object_mut(), changes.and_then(|name| all[name].as_object())) {
        values.extend(changes.clone());
    }
    TargetConfig::from_value(&values).map_err(Error::Failed)
}

/// Targets that between them use every option of the family that changes a kernel. `D` of the first is 32, which is not
/// `H / N`.
pub fn targets() -> Result<Vec<(&'static str, TargetConfig)>> {
    ["grouped heads", "biases"].into_iter().map(|name| Ok((name, target("small", Some(name))?))).collect()
}

/// A target of the shapes of a model of eight billion parameters.
pub fn large_target() -> Result<TargetConfig> {
    target("8B", None)
}

/// Documents of random tokens; the last 60 % of each are supervised.
pub fn documents(lengths: &[i64], vocabulary: i64, seed: u64) -> PackedBatch {
    let mut next = noise::keyed_stream(seed, 1);
    let mut batch = PackedBatch::default();
    for (index, &length) in lengths.iter().enumerate() {
        batch.ids.extend((0..length).map(|_| (next() % vocabulary as u64) as i64));
        batch.positions.extend(0..length);
        batch.supervised.extend((0..length).map(|token| token * 5 >= length * 2));
        batch.lengths.push(length);
        batch.documents.push(DocumentRef::new(format!("random {index}"), index as u64));
    }
    batch
}

/// Builds a target with the given weights.
pub fn build(config: &TargetConfig, weights: Weights<'_>, place: Place) -> Result<Box<dyn TargetModel>> {
    let Place { device, kind } = place;
    config.build(device, &mut |name, shape| Ok(weights(name, shape).f_to_kind(kind)?.f_to_device(device)?))
}

fn on_host(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)
}

/// Results of a program.
pub(super) fn all_on_host<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
    tensors.into_iter().map(on_host).collect()
}

/// Packs that are taken apart into slices, and packs of so many documents that one mask serves them all.
const PACKS: [(&str, &[i64]); 2] = [("5 documents", &[7, 1, 12, 5, 9]), ("40 documents", &[3; 40])];

/// Forward passes of a target: packed documents, a ragged prefill, decoding with a cache.
pub fn forward(config: &TargetConfig, weights: Weights<'_>, place: Place) -> Result<Results> {
    let target = build(config, weights, place)?;
    let mut results = Results::new();
    for (name, lengths) in PACKS {
        let batch = documents(lengths, config.info().vocab_size, 7);
        let row = |values: &[i64]| Tensor::from_slice(values).to_device(place.device).unsqueeze(0); // [1, T]
        let (ids, positions) = (row(&batch.ids), row(&batch.positions));
        let mask = AttentionMask::Documents(batch.lengths);
        let capture = [0, 1, config.info().num_layers()];
        let input =
            ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: LogitRows::All };
        let output = target.forward(&input, None)?;
        results.push((format!("hidden states, {name}"), all_on_host(&output.hidden)?));
        results.push((format!("logits, {name}"), all_on_host(&output.logits)?));
    }
    results.push(("logits, ragged cache".to_owned(), decode(target.as_ref(), config.info().vocab_size)?));
    Ok(results)
}

/// Logits of three rows of different lengths: a padded prefill, single tokens, then three tokens at once.
fn decode(target: &dyn TargetModel, vocabulary: i64) -> Result<Vec<Tensor>> {
    let device = target.device();
    let mut lengths = [6i64, 9, 4];
    let mut cache = target.new_cache(3, 4); // has to grow
    let mut next = noise::keyed_stream(3, 2);
    let mut logits = Vec::new();
    for tokens in [9, 1, 1, 3, 1] {
        let past = if cache.is_empty() { [0; 3] } else { lengths };
        let ids: Vec<i64> = (0..3 * tokens).map(|_| (next() % vocabulary as u64) as i64).collect();
        let ids = Tensor::from_slice(&ids).view([3, tokens]).to_device(device);
        let first = Tensor::from_slice(&past).view([3, 1]);
        let positions =
            (first + Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).view([1, tokens])).to_device(device);
        // Of the prefill, each row's own last token; afterwards all.
        let rows: Vec<i64> = match past {
            [0, ..] => lengths.iter().enumerate().map(|(row, length)| row as i64 * tokens + length - 1).collect(),
            _ => (0..3 * tokens).collect(),
        };
        let rows = Tensor::from_slice(&rows).to_device(device);
        let (mask, capture) = (AttentionMask::Causal, []);
        let logit_rows = LogitRows::Rows(&rows);
        let input =
            ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: logit_rows };
        logits.extend(all_on_host(&target.forward(&input, Some(&mut cache))?.logits)?);
        match past {
            [0, ..] => cache.advance(&lengths),
            _ => {
                cache.advance(&[tokens; 3]);
                lengths = lengths.map(|length| length + tokens);
            }
        }
    }
    Ok(logits)
}

/// Drafts whose losses are compared: those of every algorithm, in the order of the table.
pub fn drafts() -> Vec<Compared> {
    draft::algorithms().into_iter().flat_map(|algorithm| (algorithm.samples)(SampleSize::Small).compared).collect()
}

/// One draft of every algorithm.
pub(super) fn first_drafts() -> Vec<Compared> {
    let first = |samples: Samples| samples.compared.into_iter().next();
    draft::algorithms().into_iter().filter_map(|algorithm| first((algorithm.samples)(SampleSize::Small))).collect()
}

/// Chance plays the same part wherever a program runs.
pub(super) const KEY: StepKey = StepKey { seed: 1, step: 0, total: 4 };

/// Loss, hits and gradients of a draft on packed documents. Hits are counts, and whatever else is summed beside losses:
/// compare them where no rounding can turn one.
pub fn loss(config: &TargetConfig, section: &Value, weights: Weights<'_>, place: Place) -> Result<Results> {
    let target = SharedTarget::from(build(config, weights, place)?);
    let draft = build_draft(section, &*target.in_use(), weights)?;
    let batch = documents(&[17, 4, 23, 9], config.info().vocab_size, 11);
    let source = OnlineFeatures::new(target);
    let features = source.features(Arc::new(batch.clone()), &draft.capture())?;
    let plan = draft.plan(&batch, KEY)?;
    let mut gradients = Gradients::zeros(draft.parameters())?;
    let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients))?;
    let named = draft.metrics().into_iter().zip(0..);
    let (losses, hits): (Vec<_>, Vec<_>) = named.partition(|(name, _)| name.ends_with("/loss"));
    let pick = |chosen: &[(String, i64)]| chosen.iter().map(|(_, index)| tally.sums.get(*index)).collect::<Vec<_>>();
    let mut losses = pick(&losses);
    losses.push(tally.objective.shallow_clone());
    Ok(vec![
        ("loss".to_owned(), all_on_host(&losses)?),
        ("hits".to_owned(), all_on_host(&pick(&hits))?),
        ("gradients".to_owned(), all_on_host(&gradients)?),
    ])
}

/// A draft on the target's own device, with random values in every parameter.
pub(super) fn build_draft(
    section: &Value,
    target: &dyn TargetModel,
    weights: Weights<'_>,
) -> Result<Box<dyn DraftModel>> {
    let dimensions = target.info();
    let vocabulary = spread_vocabulary(section, dimensions.vocab_size)?;
    let context = DraftContext {
        target: dimensions.clone(),
        embedding: target.embedding(),
        head: target.head(),
        vocabulary: vocabulary.as_ref(),
        weights: None,
        kind: target.kind(),
        device: target.device(),
        seed: 1,
        chunk_bytes: dimensions.vocab_size as usize * 4 * 5, // five rows: several chunks, the last one smaller
    };
    let draft = (draft::algorithm(section)?.build)(section, &context)?;
    let _guard = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let value = weights(&format!("draft.{}", parameter.name), &parameter.value.size());
        parameter.value.shallow_clone().f_copy_(&value)?;
    }
    Ok(draft)
}

const SHAPES: [(&str, &[i64]); 3] = [("a.weight", &[33, 17]), ("a.bias", &[33]), ("b.weight", &[5, 129])];

fn slots(weights: Weights<'_>, place: Place) -> Result<Vec<ParameterSlot>> {
    let slot = |(name, shape): &(&str, &[i64])| {
        let value = weights(name, shape).f_to_kind(place.kind)?.f_to_device(place.device)?;
        Ok(ParameterSlot::new(*name, value.f_set_requires_grad(true)?))
    };
    SHAPES.iter().map(slot).collect()
}

/// The same gradients everywhere, from noise: Adam's first steps follow the sign of a gradient however small it is.
fn noise_gradients(step: u64, device: Device) -> Vec<Tensor> {
    let size = if step == 0 { 2.0 } else { 0.002 }; // clipped, then not
    let gradient = |(index, (_, shape)): (usize, &(&str, &[i64]))| {
        noise::normal(shape, size, 50 + step, index as u64).to_device(device)
    };
    SHAPES.iter().enumerate().map(gradient).collect()
}

/// Values and state of an optimizer after two steps.
pub fn optimizer(weights: Weights<'_>, place: Place) -> Result<Results> {
    let optimizer = stepped(weights, place)?;
    let values: Vec<Tensor> = optimizer.slots().map(|slot| slot.value.shallow_clone()).collect();
    // Masters exist for 16-bit values only, so the state is compared by part and not as a whole.
    let moments = optimizer.state()?.into_iter().filter(|(name, _)| name.contains("moment"));
    let moments: Vec<Tensor> = moments.map(|(_, tensor)| tensor).collect();
    Ok(vec![("values".to_owned(), all_on_host(&values)?), ("moments".to_owned(), all_on_host(&moments)?)])
}

fn stepped(weights: Weights<'_>, place: Place) -> Result<Optimizer<'static>> {
    let config = OptimConfig { weight_decay: 0.1, ..OptimConfig::default() };
    let mut optimizer = Optimizer::new(slots(weights, place)?, &config, ProcessGroup::SINGLE, false)?;
    let loss = Tensor::from(1.5f32).to_device(place.device);
    for step in 0..2 {
        optimizer.step(&noise_gradients(step, place.device), 1e-2, Some(1.0), &loss)?;
    }
    Ok(optimizer)
}

/// How many tensors a step with NaN in it changed, and one more if the step was not reported.
pub fn nan_guard(weights: Weights<'_>, place: Place) -> Result<usize> {
    let mut optimizer = stepped(weights, place)?;
    let snapshot = |optimizer: &Optimizer<'_>| -> Result<Vec<Vec<u8>>> {
        let values = optimizer.slots().map(|slot| slot.value.shallow_clone());
        let tensors = values.chain(optimizer.state()?.into_iter().map(|(_, tensor)| tensor));
        tensors.map(|tensor| bytes(&tensor)).collect()
    };
    let before = snapshot(&optimizer)?;
    let gradients = noise_gradients(0, place.device);
    let _ = gradients[1].get(4).fill_(f64::NAN);
    let loss = Tensor::from(1.5f32).to_device(place.device);
    optimizer.step(&gradients, 1e-2, Some(1.0), &loss)?;
    optimizer.step(&noise_gradients(1, place.device), 1e-2, None, &loss)?;
    let changed = before.iter().zip(snapshot(&optimizer)?).filter(|(before, after)| *before != after).count();
    let reported = optimizer.non_finite()?.fatal.is_some_and(|bad| bad.step == 3);
    Ok(changed + usize::from(!reported))
}

/// Saves an optimizer's values and state from `place` and reads them on the CPU: how many tensors came back different.
pub fn checkpoint(weights: Weights<'_>, place: Place) -> Result<usize> {
    let optimizer = stepped(weights, place)?;
    let folder = tempfile::tempdir().map_err(Error::io("create a folder in", std::env::temp_dir()))?;
    let store = CheckpointStore::open(folder.path(), RetentionConfig::default())?;
    let model: Vec<(String, Tensor)> = optimizer.slots().map(|slot| (slot.name.clone(), slot.value.detach())).collect();
    let state = optimizer.state()?;
    let saved = store.save(Manifest { step: 2, ..Manifest::default() }, &model, &state)?;
    let read = checkpoint::read(&saved.path)?;
    let mut different = 0;
    for (tensors, folder) in [(&model, &read.model), (&state, &read.optimizer)] {
        for (name, tensor) in tensors {
            let loaded = folder.load(name, tensor.kind(), Device::Cpu)?;
            different += usize::from(bytes(tensor)? != bytes(&loaded)?);
        }
    }
    // The state goes on where it was left, on the CPU as well.
    let slots_on_host = slots(weights, Place { device: Device::Cpu, ..place })?;
    let mut resumed = Optimizer::new(slots_on_host, &OptimConfig::default(), ProcessGroup::SINGLE, false)?;
    resumed.load_state(Some(&read.optimizer))?;
    for ((_, got), (_, want)) in resumed.state()?.iter().zip(&state) {
        different += usize::from(bytes(got)? != bytes(want)?);
    }
    Ok(different)
}

/// A tensor as it lies in memory.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(host_bytes(&tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?).to_vec())
}
