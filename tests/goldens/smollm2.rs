//! The real model SmolLM2-135M-Instruct against transformers: hidden states, last logits, greedy tokens.

use std::path::{Path, PathBuf};

use specforge::models::{ForwardInput, LogitRows, TargetModel, load_target};
use specforge::nn::{AttentionMask, KvCache};
use tch::{Device, Kind, Tensor};

use super::{Golden, compare, compare_scaled};

const TOLERANCE: f64 = 1e-3;
/// The first token's hidden states reach 22,000 in the middle layers, where neighbouring float32 are 2e-3 apart and the
/// reference is 2e-2 off its own float64 result.
const RELATIVE: f64 = 5e-6;
const PROMPTS: [&str; 3] = ["p0", "p1", "p2"];
const CAPTURE: [usize; 6] = [0, 1, 3, 16, 28, 30];

fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.models/SmolLM2-135M-Instruct")
}

/// All prompts of the file.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let folder = model_folder();
    let target = load_target(&folder, Kind::Float, Device::Cpu).map_err(|error| {
        let hint = "this golden needs the real model: `specforge import` makes it from the archive of scripts/setup";
        format!("{error} ({hint})")
    })?;
    let end = end_of_text(&folder)?;
    let mut largest = 0f64;
    for prompt in PROMPTS {
        largest = largest.max(check_states(&golden, target.as_ref(), prompt)?);
        let (ids, want) =
            (golden.integers(&format!("{prompt}.input_ids"))?, golden.integers(&format!("{prompt}.greedy30"))?);
        for (how, cached) in [("without a cache", false), ("with the cache", true)] {
            let got = greedy(target.as_ref(), &ids, want.len(), end, cached)?;
            if got != want {
                return Err(format!("{prompt}: greedy tokens {how}: expected {want:?}, got {got:?}"));
            }
        }
    }
    Ok(format!("logits differ by {largest:.1e}, {} prompts token for token", PROMPTS.len()))
}

fn end_of_text(folder: &Path) -> Result<i64, String> {
    let text = std::fs::read_to_string(folder.join("config.json")).map_err(|error| error.to_string())?;
    let config: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    config["eos_token_id"].as_i64().ok_or_else(|| "config.json has no eos_token_id".to_owned())
}

fn check_states(golden: &Golden, target: &dyn TargetModel, prompt: &str) -> Result<f64, String> {
    let ids = golden.tensor(&format!("{prompt}.input_ids"))?.view([1, -1]);
    let positions = Tensor::arange(ids.size()[1], (Kind::Int64, Device::Cpu)).view([1, -1]);
    let mask = AttentionMask::Causal;
    let input =
        ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &CAPTURE, logits: LogitRows::All };
    let output = target.forward(&input, None).map_err(|error| error.to_string())?;
    for (index, got) in CAPTURE.iter().zip(&output.hidden) {
        let name = format!("{prompt}.hidden.{index}");
        compare_scaled(&name, &got.squeeze_dim(0), &golden.tensor(&name)?, TOLERANCE, RELATIVE)?;
    }
    let name = format!("{prompt}.logits_last");
    let last = output.logits.ok_or("no logits came back")?.get(-1);
    compare(&name, &last, &golden.tensor(&name)?, TOLERANCE)
}

/// The most likely continuation, the end of the text never chosen.
fn greedy(target: &dyn TargetModel, prompt: &[i64], count: usize, end: i64, cached: bool) -> Result<Vec<i64>, String> {
    let mut cache: Option<KvCache> = cached.then(|| target.new_cache(1, 8));
    let mut ids = prompt.to_vec();
    while ids.len() < prompt.len() + count {
        let past = cache.as_ref().map_or(0, |cache| cache.len()) as usize;
        let new = &ids[past..];
        let positions: Vec<i64> = (past as i64..ids.len() as i64).collect();
        let last = Tensor::from_slice(&[new.len() as i64 - 1]);
        let input = ForwardInput {
            ids: &Tensor::from_slice(new).view([1, -1]),
            positions: &Tensor::from_slice(&positions).view([1, -1]),
            mask: &AttentionMask::Causal,
            capture: &[],
            logits: LogitRows::Rows(&last),
        };
        let output = target.forward(&input, cache.as_mut()).map_err(|error| error.to_string())?;
        if let Some(cache) = &mut cache {
            cache.advance(&[new.len() as i64]);
        }
        let logits = output.logits.ok_or("no logits came back")?;
        let _ = logits.narrow(1, end, 1).fill_(f64::NEG_INFINITY);
        ids.push(logits.argmax(-1, false).int64_value(&[0]));
    }
    Ok(ids.split_off(prompt.len()))
}
