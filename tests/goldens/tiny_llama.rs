//! Tiny random Llama models by transformers (`scripts/golden/tiny_llama.py`): every option of the family.

use std::path::Path;

use specforge::models::{ForwardInput, LogitRows, TargetModel, load_target};
use specforge::nn::AttentionMask;
use specforge::weights::write_tensors;
use tch::{Device, Kind, Tensor};

use super::{Golden, compare};

const TOLERANCE: f64 = 1e-5;

/// Largest `|got - want| / |want|` of a whole tensor: roundings to 8 and to 11 bits over two layers.
const NARROW_TYPES: [(Kind, f64); 2] = [(Kind::BFloat16, 0.03), (Kind::Half, 0.004)];

/// Hidden states of all layers and logits of every row.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    write_model(&golden, folder.path())?;
    let load = |kind| load_target(folder.path(), kind, Device::Cpu).map_err(|error| error.to_string());
    let largest = check_float32(&golden, load(Kind::Float)?.as_ref())?;
    for (kind, tolerance) in NARROW_TYPES {
        check_narrow(&golden, load(kind)?.as_ref(), tolerance)?;
    }
    Ok(format!("largest difference {largest:.1e}"))
}

/// Writes the folder a user would have.
fn write_model(golden: &Golden, folder: &Path) -> Result<(), String> {
    std::fs::write(folder.join("config.json"), golden.text("config")?).map_err(|error| error.to_string())?;
    let weights = golden.names_after("w.").map(|name| Ok((name.to_owned(), golden.tensor(&format!("w.{name}"))?)));
    let weights = weights.collect::<Result<Vec<_>, String>>()?;
    write_tensors(&folder.join("model.safetensors"), &weights, &[]).map_err(|error| error.to_string())
}

fn forward(golden: &Golden, target: &dyn TargetModel) -> Result<(Vec<Tensor>, Tensor), String> {
    let (ids, positions) = (golden.tensor("ids")?, golden.tensor("positions")?);
    let mask = match golden.text("documents") {
        Ok(lengths) => AttentionMask::Documents(serde_json::from_str(lengths).map_err(|error| error.to_string())?),
        Err(_) => AttentionMask::Causal,
    };
    let capture: Vec<usize> = (0..=target.info().num_layers()).collect();
    let input =
        ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: LogitRows::All };
    let output = target.forward(&input, None).map_err(|error| error.to_string())?;
    let logits = output.logits.ok_or("no logits came back")?;
    let (rows, tokens) = ids.size2().map_err(|error| error.to_string())?;
    Ok((output.hidden, logits.view([rows, tokens, -1])))
}

fn check_float32(golden: &Golden, target: &dyn TargetModel) -> Result<f64, String> {
    let (hidden, logits) = forward(golden, target)?;
    let mut largest = compare("logits", &logits, &golden.tensor("logits")?, TOLERANCE)?;
    for (index, got) in hidden.iter().enumerate() {
        let name = format!("hidden.{index}");
        largest = largest.max(compare(&name, got, &golden.tensor(&name)?, TOLERANCE)?);
    }
    Ok(largest)
}

fn check_narrow(golden: &Golden, target: &dyn TargetModel, tolerance: f64) -> Result<(), String> {
    let (hidden, logits) = forward(golden, target)?;
    let last = format!("hidden.{}", hidden.len() - 1);
    for (name, got) in [("logits", &logits), (&last, &hidden[hidden.len() - 1])] {
        let want = golden.tensor(name)?;
        let relative = ((got.to_kind(Kind::Float) - &want).norm() / want.norm()).double_value(&[]);
        if relative.is_nan() || relative > tolerance {
            return Err(format!("{name} in {:?}: relative error {relative:.2e}, tolerance {tolerance}", target.kind()));
        }
    }
    Ok(())
}
