//! Where a draft guesses badly, the mistake that was made: the files are read in every way that such mistakes read them, and
//! the reading under which guesses are right is the one the draft was trained for.
//!
//! Every reading is tried on what the target answered, all places in one pass: how far up among the first guesses stands what
//! the target says? That tells smaller mistakes than counts of right guesses do, and no reading gains by being less sure.
//! What is better beyond chance is decoded with.

use tch::{Device, Kind, Tensor};

use super::head::HEAD;
use super::network;
use super::tensors::other_order;
use crate::decode::drafter::{DraftSampling, DynamicTree, Eagle3Drafter, Eagle3Parts};
use crate::doctor::acceptance::{DEPTH, Decoding, Measured, measure_with};
use crate::doctor::case::Case;
use crate::draft::vocabulary;
use crate::error::{Error, Result};
use crate::export;
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, RopeScaling};
use crate::vocab::VocabMap;

/// Deviations of the mean by which a reading must be better.
const BEYOND_CHANCE: f64 = 4.0;
/// What it must gain in the mean of the logarithm of the place.
const LEAST_GAIN: f64 = 0.02;
/// Readings that are decoded with.
const DECODED: usize = 3;

/// A way to read the files.
struct Reading {
    /// How, as in "with ...".
    words: String,
    parts: Eagle3Parts,
    /// Tokens by which features come late.
    late: usize,
}

/// What would make guesses right, in words, and how many readings were tried.
pub fn explain(case: &Case<'_>, decoding: &Decoding, measured: &Measured) -> Result<(Vec<String>, usize)> {
    let _guard = tch::no_grad_guard();
    let target = case.target.model;
    if case.eagle3.as_ref().is_none_or(|own| own.imported.is_err()) {
        return Ok((Vec::new(), 0));
    }
    let layers = target.info().num_layers();
    let own = Eagle3Parts::from(export::eagle3::read(&case.folder.path, Some(layers))?);
    let readings = readings(case, &own)?;
    let texts: Vec<Text> = measured
        .answers
        .iter()
        .map(|(prompt, answer)| Text::of(target, prompt, &answer.tokens))
        .collect::<Result<_>>()?;
    let heights = |reading: &Reading| -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for text in &texts {
            all.extend(text.heights(reading, target)?);
        }
        Ok(all)
    };
    let base = heights(&Reading { words: String::new(), parts: copy(&own), late: 0 })?;
    let (mut better, mut later) = (Vec::new(), Vec::new());
    for reading in &readings {
        // What is fed back changes no first guess: only a decode can tell.
        if reading.parts.shape.norm_feedback != own.shape.norm_feedback {
            later.push(reading);
            continue;
        }
        let (gain, deviations) = gain(&base, &heights(reading)?);
        if gain > LEAST_GAIN && deviations > BEYOND_CHANCE {
            better.push((gain, reading));
        }
    }
    better.sort_by(|left, right| right.0.total_cmp(&left.0));
    let decode = |reading: &Reading| {
        let parts = copy(&reading.parts);
        let drafter = Eagle3Drafter::new(parts, target, DynamicTree::chain(DEPTH), DraftSampling::Greedy)?;
        measure_with(case, decoding, Box::new(drafter))
    };
    let mut best: Option<(f64, String)> = None;
    for (gain, reading) in better.iter().take(DECODED) {
        let higher = format!("what the target says stands {:.2} times as far up among its guesses", gain.exp());
        // Late features are a mistake of training alone: the loop hands none over late.
        if reading.late > 0 {
            best.get_or_insert((0.0, format!("with {} {higher}", reading.words)));
            continue;
        }
        let other = decode(reading)?;
        let length = other.acceptance_length;
        let chance = 2.0 * (measured.error + other.error).sqrt();
        let is_best = best.as_ref().is_none_or(|(best, _)| length > *best);
        if is_best && length + chance > measured.acceptance_length {
            best = Some((length, format!("with {} it is {length:.2}, and {higher}", reading.words)));
        }
    }
    if let Some((_, text)) = best {
        return Ok((vec![text], readings.len()));
    }
    for reading in later {
        let other = decode(reading)?;
        let chance = BEYOND_CHANCE * (measured.error + other.error).sqrt();
        if other.acceptance_length > measured.acceptance_length + chance {
            let length = other.acceptance_length;
            return Ok((vec![format!("with {} it is {length:.2}", reading.words)], readings.len()));
        }
    }
    Ok((Vec::new(), readings.len()))
}

/// Mean of what one list has over the other, and how many deviations of that mean it is from nothing.
fn gain(base: &[f64], other: &[f64]) -> (f64, f64) {
    let differences: Vec<f64> = other.iter().zip(base).map(|(other, base)| other - base).collect();
    let count = differences.len().max(1) as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let square = differences.iter().map(|difference| (difference - mean).powi(2)).sum::<f64>() / count;
    let deviation = (square / count).sqrt();
    (mean, if deviation > 0.0 { mean / deviation } else { 0.0 })
}

/// The same parts; numbers are shared.
fn copy(parts: &Eagle3Parts) -> Eagle3Parts {
    let share = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
    let tensors = parts.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    Eagle3Parts {
        shape: parts.shape.clone(),
        tensors,
        vocabulary: parts.vocabulary.clone(),
        embedding: share(&parts.embedding),
    }
}

// -- the readings ------------------------------------------------------------------------------------------------------

/// Every mistake that is known, undone: see the table of docs/doctor.md.
fn readings(case: &Case<'_>, own: &Eagle3Parts) -> Result<Vec<Reading>> {
    let target = case.target.model;
    let mut all = Readings { own, list: Vec::new() };
    layers(&mut all, target);
    rotary(&mut all, target);
    flags(&mut all);
    tokens(&mut all, case)?;
    tensors(&mut all);
    for late in 1..=2 {
        let name =
            if late == 1 { "features one token late".to_owned() } else { format!("features {late} tokens late") };
        all.list.push(Reading { words: name, parts: copy(own), late });
    }
    projection(&mut all, target)?;
    Ok(all.list)
}

struct Readings<'a> {
    own: &'a Eagle3Parts,
    list: Vec<Reading>,
}

impl Readings<'_> {
    fn add(&mut self, words: impl Into<String>, change: impl FnOnce(&mut Eagle3Parts)) {
        let mut parts = copy(self.own);
        change(&mut parts);
        self.list.push(Reading { words: words.into(), parts, late: 0 });
    }
}

/// The other convention of layer ids, the default where ids were dropped, and the other order.
fn layers(all: &mut Readings<'_>, target: &dyn TargetModel) {
    let (count, own) = (target.info().num_layers(), all.own.shape.capture.clone());
    let shifted = |by: i64| {
        own.iter().map(|&layer| usize::try_from(layer as i64 + by).ok().filter(|&layer| layer <= count)).collect()
    };
    let default = export::eagle3::default_capture(count).filter(|layers| layers.len() == own.len());
    let reversed = Some(own.iter().rev().copied().collect());
    let mut seen: Vec<Vec<usize>> = vec![own.clone()];
    for layers in [shifted(-1), shifted(1), default, reversed].into_iter().flatten() {
        if !seen.contains(&layers) {
            all.add(format!("layers {layers:?} instead of {own:?}"), |parts| parts.shape.capture.clone_from(&layers));
            seen.push(layers);
        }
    }
}

fn rotary(all: &mut Readings<'_>, target: &dyn TargetModel) {
    let (own, theirs) = (all.own.shape.layer.rope, target.info().draft_template().rope);
    for theta in [theirs.theta, 10_000.0, 500_000.0, 1_000_000.0] {
        if theta != own.theta && (theta == theirs.theta || theirs.theta != own.theta || theta == 10_000.0) {
            all.add(format!("rope_theta {theta} instead of {}", own.theta), |parts| {
                parts.shape.layer.rope.theta = theta
            });
        }
    }
    if theirs.scaling != own.scaling {
        all.add("the target's rope_scaling", |parts| {
            parts.shape.layer.rope.scaling = theirs.scaling;
            parts.shape.layer.rope.theta = theirs.theta;
        });
    }
    if own.scaling != RopeScaling::Default {
        all.add("no rope_scaling", |parts| parts.shape.layer.rope.scaling = RopeScaling::Default);
    }
}

fn flags(all: &mut Readings<'_>) {
    let shape = &all.own.shape;
    let (residual, output, feedback) = (shape.norm_before_residual, shape.norm_output, shape.norm_feedback);
    let (each, together) = (shape.fc_norm, shape.norm_before_fc);
    all.add(format!("norm_before_residual {}", !residual), |parts| parts.shape.norm_before_residual = !residual);
    all.add(format!("norm_feedback {} (the engines' norm_output)", !feedback), |parts| {
        parts.shape.norm_feedback = !feedback;
    });
    // A norm that the files do not hold cannot be tried.
    if output {
        all.add("no norm before the projection", |parts| parts.shape.norm_output = false);
    }
    if each {
        all.add("fc_norm false", |parts| parts.shape.fc_norm = false);
    }
    if together {
        all.add("norm_before_fc false", |parts| parts.shape.norm_before_fc = false);
    }
}

/// The draft's vocabulary, read in other ways.
fn tokens(all: &mut Readings<'_>, case: &Case<'_>) -> Result<()> {
    let Some(d2t) = case.folder.tensors.get("d2t").filter(|_| all.own.vocabulary.is_some()) else { return Ok(()) };
    let offsets = Vec::<i64>::try_from(d2t.to_kind(Kind::Int64))?;
    let size = all.own.shape.vocab_size;
    let summed = offsets.iter().scan(-1, |sum: &mut i64, offset| {
        *sum = sum.saturating_add(offset.saturating_add(1));
        Some(*sum)
    });
    let ways = [
        ("d2t ignored", (0..offsets.len() as i64).collect()),
        ("d2t as the target's ids themselves", offsets.clone()),
        ("d2t as gaps that add up", summed.collect::<Vec<i64>>()),
    ];
    for (name, ids) in ways {
        if let Ok(map) = VocabMap::new(ids, size)
            && all.own.vocabulary.as_ref() != Some(&map)
        {
            all.add(name, |parts| parts.vocabulary = Some(map));
        }
    }
    Ok(())
}

/// Tensors that a converter wrote in another order.
fn tensors(all: &mut Readings<'_>) {
    let head_dim = all.own.shape.layer.head_dim;
    for (to_halves, name) in [(true, "neighbours"), (false, "halves")] {
        all.add(format!("rows of q and k taken for those of a rotary embedding that turns {name}"), |parts| {
            change(parts, &["q_proj.weight", "k_proj.weight"], |rows| other_order(rows, head_dim, to_halves));
        });
    }
    all.add("embedding and feature in the other order", |parts| {
        let swap = |matrix: &Tensor| match matrix.size()[1] {
            wide if wide % 2 == 0 => Tensor::cat(&matrix.chunk(2, 1).into_iter().rev().collect::<Vec<_>>(), 1),
            _ => matrix.shallow_clone(),
        };
        let first = [
            "midlayer.self_attn.q_proj.weight",
            "midlayer.self_attn.k_proj.weight",
            "midlayer.self_attn.v_proj.weight",
        ];
        change(parts, &first, swap);
    });
    all.add("the norms of embedding and feature swapped", |parts| {
        for (name, _) in &mut parts.tensors {
            *name = match name.as_str() {
                "midlayer.hidden_norm.weight" => "midlayer.input_layernorm.weight".to_owned(),
                "midlayer.input_layernorm.weight" => "midlayer.hidden_norm.weight".to_owned(),
                _ => std::mem::take(name),
            };
        }
    });
    all.add("square matrices transposed", |parts| {
        change(parts, &["o_proj.weight"], |matrix| match matrix.size()[0] == matrix.size()[1] {
            true => matrix.transpose(0, 1).contiguous(),
            false => matrix.shallow_clone(),
        });
    });
    all.add("gate and up swapped", |parts| {
        for (name, _) in &mut parts.tensors {
            *name = match name.contains("gate_proj") {
                true => name.replace("gate_proj", "up_proj"),
                false => name.replace("up_proj", "gate_proj"),
            };
        }
    });
}

/// Changes the tensors whose names end so.
fn change(parts: &mut Eagle3Parts, ends: &[&str], with: impl Fn(&Tensor) -> Tensor) {
    for (_, tensor) in parts.tensors.iter_mut().filter(|(name, _)| ends.iter().any(|end| name.ends_with(end))) {
        *tensor = with(tensor);
    }
}

/// The target's own projection in the place of the draft's.
fn projection(all: &mut Readings<'_>, target: &dyn TargetModel) -> Result<()> {
    if all.own.shape.hidden_size != all.own.shape.target_hidden_size || !target.head().is_plain() {
        return Ok(());
    }
    let head = match &all.own.vocabulary {
        Some(map) => vocabulary::gather_rows(target.head(), map)?.weight,
        None => target.head().weight.shallow_clone(),
    };
    all.add("the target's projection (tied) instead of its own", |parts| {
        change(parts, &[HEAD], |_| head.shallow_clone())
    });
    Ok(())
}

// -- what the target answered ------------------------------------------------------------------------------------------

/// A prompt with its answer, and the target's hidden states behind every token.
struct Text {
    /// `[T]`
    tokens: Vec<i64>,
    /// Tokens of the prompt.
    prompt: usize,
    /// By Hugging Face's index, `[T, TH]` each.
    hidden: Vec<Tensor>,
}

impl Text {
    fn of(target: &dyn TargetModel, prompt: &[u32], answer: &[u32]) -> Result<Self> {
        let tokens: Vec<i64> = prompt.iter().chain(answer).map(|&id| i64::from(id)).collect();
        let count = tokens.len() as i64;
        let ids = Tensor::from_slice(&tokens).unsqueeze(0).f_to_device(target.device())?; // [1, T]
        let positions = Tensor::arange(count, (Kind::Int64, target.device())).unsqueeze(0); // [1, T]
        let capture: Vec<usize> = (0..=target.info().num_layers()).collect();
        let input = ForwardInput {
            ids: &ids,
            positions: &positions,
            mask: &AttentionMask::Causal,
            capture: &capture,
            logits: LogitRows::None,
        };
        let hidden = target.forward(&input, None)?.hidden.into_iter().map(|state| state.squeeze_dim(0)).collect();
        Ok(Self { tokens, prompt: prompt.len(), hidden })
    }

    /// How far up among the first guesses what the target says stands, at every place of the answer but the first: minus the
    /// logarithm of its place from 1.
    fn heights(&self, Reading { parts, late, .. }: &Reading, target: &dyn TargetModel) -> Result<Vec<f64>> {
        // Row t reads the features of token t and the embedding of token t + 1, and guesses token t + 2; all later by `late`.
        let rows = self.tokens.len().saturating_sub(2 + late);
        let first = self.prompt.saturating_sub(1 + late);
        if rows <= first {
            return Ok(Vec::new());
        }
        let network = network(&parts.shape, &parts.tensors, target)?;
        let feature = |&layer: &usize| {
            let state = self.hidden.get(layer);
            let state = state.ok_or_else(|| Error::Failed(format!("hidden state {layer} is not there")))?;
            Ok(state.narrow(0, 0, rows as i64))
        };
        let captured: Vec<Tensor> = parts.shape.capture.iter().map(feature).collect::<Result<_>>()?;
        let features = network.project_hidden_states(&captured)?.unsqueeze(0); // [1, R, H]
        let next = &self.tokens[1 + late..1 + late + rows];
        let ids = Tensor::from_slice(next).unsqueeze(0).f_to_device(target.device())?; // [1, R]
        let positions = Tensor::arange(rows as i64, (Kind::Int64, target.device())).unsqueeze(0); // [1, R]
        let mut cache = network.new_cache(1, rows as i64);
        let hidden = network.forward_cached(&features, &ids, &positions, &AttentionMask::Causal, &mut cache)?; // [1, R, H]
        let logits = network.logits(&hidden.squeeze_dim(0)).f_to_kind(Kind::Float)?; // [R, DV]
        let name = |&token: &i64| match &parts.vocabulary {
            Some(map) => map.draft_id(token).unwrap_or(-1),
            None => token,
        };
        let said: Vec<i64> = self.tokens[2 + late..].iter().map(name).collect(); // [R]
        let index = Tensor::from_slice(&said).f_clamp_min(0)?.f_to_device(target.device())?.unsqueeze(1); // [R, 1]
        let own = logits.f_gather(1, &index, false)?; // [R, 1]
        // Equals stand before it, so that logits that say nothing are worth nothing.
        let before = logits.f_ge_tensor(&own)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?; // [R]
        let before = Vec::<f64>::try_from(before.f_to_device(Device::Cpu)?)?;
        let sound = bool::try_from(logits.f_isfinite()?.f_all()?)?;
        // A token without a name stands behind all others, and so does everything where logits are no numbers.
        let last = logits.size()[1] as f64 + 1.0;
        let height = |(place, said): (f64, i64)| if sound && said >= 0 { -place.ln() } else { -last.ln() };
        Ok(before.into_iter().zip(said).skip(first).map(height).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::gain;

    #[test]
    fn chance_is_told_from_gain() {
        assert_eq!(gain(&[-1.0, -2.0], &[-1.0, -2.0]), (0.0, 0.0));
        let base: Vec<f64> = (0..100).map(|place| -f64::from(place % 7)).collect();
        let shifted = |by: f64, noise: f64| -> Vec<f64> {
            (0..100).zip(&base).map(|(place, base)| base + by + if place % 2 == 0 { noise } else { -noise }).collect()
        };
        let (mean, deviations) = gain(&base, &shifted(0.1, 0.05));
        assert!((mean - 0.1).abs() < 1e-9 && (deviations - 20.0).abs() < 1e-6);
        assert!(gain(&base, &shifted(0.1, 1.0)).1 < 1.1);
        assert!(gain(&base, &shifted(-0.1, 0.05)).1 < -4.0);
    }
}
