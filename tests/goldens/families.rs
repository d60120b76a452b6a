//! Folders of tiny random models of every family by transformers (`scripts/golden/families.py`): one golden each, with
//! config.json in the spelling of version 5, and beside it `config_v4.json`, which must say the same.

use std::path::Path;

use specforge::models::parts::{Part, Passing};
use specforge::models::{ForwardInput, LayerWise, LogitRows, TargetModel, load_target};
use specforge::nn::AttentionMask;
use tch::{Device, Kind, Tensor};

use super::Golden;

/// Largest difference that passes: so much, and this share of what is expected.
const TOLERANCE: (f64, f64) = (5e-4, 1e-4);
/// Steps of one token behind a prefill.
const STEPS: i64 = 5;

/// States, logits and cached steps with both spellings, packed, and layer by layer.
pub fn check(folder: &Path) -> Result<String, String> {
    let golden = Golden::open(&folder.join("golden.safetensors"))?;
    let mut largest = 0.0f64;
    for name in ["config.json", "config_v4.json"] {
        let own = tempfile::tempdir().map_err(|error| error.to_string())?;
        let copy = |from: &str, to: &str| {
            std::fs::copy(folder.join(from), own.path().join(to)).map_err(|error| format!("{from}: {error}"))
        };
        copy(name, "config.json")?;
        copy("model.safetensors", "model.safetensors")?;
        let difference = check_spelling(&golden, own.path()).map_err(|problem| format!("{name}: {problem}"))?;
        largest = largest.max(difference);
    }
    Ok(format!("largest difference {largest:.1e}"))
}

fn check_spelling(golden: &Golden, folder: &Path) -> Result<f64, String> {
    let text = |error: specforge::error::Error| error.to_string();
    let target = load_target(folder, Kind::Float, Device::Cpu).map_err(text)?;
    let target = target.as_ref();
    let (ids, lengths) = (golden.tensor("in.input_ids")?, golden.integers("in.lengths")?);
    let [whole, short] = lengths.as_slice() else { return Err(format!("two lengths, got {lengths:?}")) };
    let (whole, short) = (*whole, *short);
    let mut largest = 0.0f64;
    let mut compare = |what: &str, got: &Tensor, want: &Tensor| {
        largest = largest.max(near(what, got, want)?);
        Ok::<_, String>(())
    };

    // 1. Both rows at once, the second padded.
    let (states, logits) = forward(target, &ids, &AttentionMask::Causal)?;
    let want = golden.tensor("out.logits")?;
    for (row, &length) in lengths.iter().enumerate() {
        let real = |tensor: &Tensor| tensor.get(row as i64).narrow(0, 0, length);
        for (index, state) in states.iter().enumerate() {
            let want = golden.tensor(&format!("out.hidden.{index}"))?;
            compare(&format!("row {row}, hidden state {index}"), &real(state), &real(&want))?;
        }
        compare(&format!("row {row}, logits"), &real(&logits), &real(&want))?;
    }

    // 2. Prefill, then one token at a time.
    let cached = steps(target, &ids)?; // [2, 5, V]
    let want = golden.tensor("out.cached_logits")?;
    for (row, &length) in lengths.iter().enumerate() {
        let real = (length - (whole - STEPS)).max(0);
        let [got, want] = [&cached, &want].map(|tensor| tensor.get(row as i64).narrow(0, 0, real));
        compare(&format!("row {row}, cached logits"), &got, &want)?;
    }

    // 3. The second row alone.
    let alone = ids.narrow(0, 1, 1).narrow(1, 0, short);
    let (_, logits) = forward(target, &alone, &AttentionMask::Causal)?;
    let want_alone = golden.tensor("out.row1.logits")?;
    compare("row 1 alone", &logits, &want_alone)?;
    compare("row 1 alone, cached", &steps(target, &alone)?, &golden.tensor("out.row1.cached_logits")?)?;

    // 4. Both texts in one pack, and the same layer by layer.
    let packed = Tensor::cat(&[ids.narrow(0, 0, 1), alone], 1);
    let mask = AttentionMask::Documents(vec![whole, short]);
    let (states, logits) = forward(target, &packed, &mask)?;
    let want = Tensor::cat(&[golden.tensor("out.logits")?.narrow(0, 0, 1), want_alone], 1);
    compare("packed", &logits, &want)?;
    let streamed = layer_by_layer(folder, &packed, &mask)?;
    for (index, (state, whole)) in streamed.iter().zip(&states).enumerate() {
        if !state.equal(whole) {
            return Err(format!("hidden state {index} layer by layer is not that of the model"));
        }
    }
    Ok(largest)
}

/// Positions of the texts of a mask, or of each row.
fn positions(ids: &Tensor, mask: &AttentionMask) -> Tensor {
    let size = ids.size();
    let range = |count: i64| Tensor::arange(count, (Kind::Int64, Device::Cpu));
    match mask {
        AttentionMask::Documents(lengths) => {
            Tensor::cat(&lengths.iter().map(|&length| range(length)).collect::<Vec<_>>(), 0).unsqueeze(0)
        }
        _ => range(size[1]).expand(&size, false),
    }
}

/// All states, and logits `[B, T, V]`.
fn forward(target: &dyn TargetModel, ids: &Tensor, mask: &AttentionMask) -> Result<(Vec<Tensor>, Tensor), String> {
    let capture: Vec<usize> = (0..=target.info().num_layers()).collect();
    let positions = positions(ids, mask);
    let input = ForwardInput { ids, positions: &positions, mask, capture: &capture, logits: LogitRows::All };
    let output = target.forward(&input, None).map_err(|error| error.to_string())?;
    let size = ids.size();
    Ok((output.hidden, output.logits.ok_or("no logits came back")?.view([size[0], size[1], -1])))
}

/// Logits of the last tokens, `[B, 5, V]`, each in a pass of its own behind a prefill of the others.
fn steps(target: &dyn TargetModel, ids: &Tensor) -> Result<Tensor, String> {
    let (rows, tokens) = ids.size2().map_err(|error| error.to_string())?;
    let positions = positions(ids, &AttentionMask::Causal);
    let mut cache = target.new_cache(rows, 4);
    let mut pass = |start: i64, count: i64| {
        let input = ForwardInput {
            ids: &ids.narrow(1, start, count),
            positions: &positions.narrow(1, start, count),
            mask: &AttentionMask::Causal,
            capture: &[],
            logits: LogitRows::All,
        };
        let output = target.forward(&input, Some(&mut cache)).map_err(|error| error.to_string())?;
        cache.advance(&vec![count; rows as usize]);
        Ok::<_, String>(output.logits.ok_or("no logits came back")?.view([rows, count, -1]))
    };
    let _ = pass(0, tokens - STEPS)?;
    let steps = (tokens - STEPS..tokens).map(|start| pass(start, 1)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::cat(&steps, 1))
}

/// States as `capture --stream-layers` computes them.
fn layer_by_layer(folder: &Path, ids: &Tensor, mask: &AttentionMask) -> Result<Vec<Tensor>, String> {
    let text = |error: specforge::error::Error| error.to_string();
    let target = LayerWise::open(folder, Kind::Float, Device::Cpu).map_err(text)?;
    let (layers, positions) = (target.info().num_layers(), positions(ids, mask));
    let (mut states, mut hidden) = (Vec::new(), None::<Tensor>);
    for part in Part::all(layers) {
        let loaded = target.load(part).map_err(text)?;
        let passing = Passing { ids, positions: &positions, mask, hidden: hidden.as_ref() };
        let next = loaded.forward(&passing).map_err(text)?;
        if part.state(layers).is_some() {
            states.push(next.shallow_clone());
        }
        hidden = Some(next);
    }
    Ok(states)
}

/// Largest difference of two tensors; an error where one is too large. NaN never passes.
fn near(what: &str, got: &Tensor, want: &Tensor) -> Result<f64, String> {
    if got.size() != want.size() {
        return Err(format!("{what}: expected shape {:?}, got {:?}", want.size(), got.size()));
    }
    if want.numel() == 0 {
        return Ok(0.0);
    }
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let difference = (got - &want).abs();
    let over: Tensor = &difference - (want.abs() * TOLERANCE.1 + TOLERANCE.0);
    let (largest, over) = (difference.max().double_value(&[]), over.max().double_value(&[]));
    match over <= 0.0 {
        true => Ok(largest),
        false => Err(format!("{what}: differs by {largest:.3e}")),
    }
}
