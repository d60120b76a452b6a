//! How many drafted tokens to verify against SGLang 0.5.23: temperatures of confidences, budgets and verify lengths.
//!
//! File layout: `in.logits`, `in.prefix_mask` what temperatures are fitted to, `[n, g]`; `in.raw_confidence` raw
//! confidences of requests, `[R, g]`; `mid.*` their confidences and survivals; `out.*` temperatures and calibration errors,
//! the budget and lengths with both forms of costs, and lengths with budgets `out.lens_budget_N`. Metadata: `gamma`, `cfg`,
//! `sps_table`, `sps_additive`.

use std::path::Path;

use serde_json::Value;
use specforge::decode::verify_budget::{self, Limits, StepCosts, Stop, sts};
use tch::{Kind, Tensor};

use super::{Golden, compare_scaled};

const TOLERANCE: f64 = 1e-5;

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let limits = limits(golden.text("cfg")?)?;
    let drafted: i64 = golden.text("gamma")?.parse().map_err(|error| format!("`gamma`: {error}"))?;

    // Temperatures.
    let raw = golden.tensor("in.logits")?; // [n, g]
    if raw.size().last() != Some(&drafted) {
        return Err(format!("in.logits: expected {drafted} columns, got {:?}", raw.size()));
    }
    let fitted = sts::fit(&raw, &golden.tensor("in.prefix_mask")?, "").map_err(|error| error.to_string())?;
    near(&golden, "out.temperatures", &fitted.temperatures)?;
    near(&golden, "out.ece_before", &fitted.ece_before)?;
    near(&golden, "out.ece_after", &fitted.ece_after)?;

    // Confidences and survivals.
    let raw = golden.tensor("in.raw_confidence")?; // [R, g]
    let flat = Vec::<f32>::try_from(raw.flatten(0, -1)).map_err(|error| error.to_string())?;
    let chains = flat.chunks_exact(drafted as usize);
    let confidences: Vec<Vec<f32>> =
        chains.map(|chain| verify_budget::confidences(chain, &fitted.temperatures)).collect();
    let survivals: Vec<Vec<f32>> = confidences.iter().map(|chain| verify_budget::survivals(chain)).collect();
    for (name, got) in [("mid.confidence", &confidences), ("mid.survival", &survivals)] {
        let got = Tensor::from_slice(&got.concat()).view([-1, drafted]);
        compare_scaled(name, &got, &golden.tensor(name)?, TOLERANCE, TOLERANCE)?;
    }

    // Budgets with both forms of costs, through their files.
    let mut forms = 0;
    for (key, prefix) in [("sps_table", "out.table"), ("sps_additive", "out.additive")] {
        if !golden.has(&format!("{prefix}.budget")) {
            continue;
        }
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let file = folder.path().join("sps.json");
        std::fs::write(&file, golden.text(key)?).map_err(|error| error.to_string())?;
        let costs = StepCosts::read(&file).map_err(|error| error.to_string())?;
        let budget = verify_budget::choose_budget(&survivals, &costs, limits, Stop::Best);
        equal(&golden, &format!("{prefix}.budget"), &[budget.tokens])?;
        near(&golden, &format!("{prefix}.theta"), &[budget.tokens_per_second])?;
        let lengths = verify_budget::verify_lengths(&survivals, budget.tokens, limits);
        equal(&golden, &format!("{prefix}.verify_lens"), &lengths)?;
        forms += 1;
    }

    // Lengths with budgets that were given.
    let mut budgets = 0;
    for text in golden.names_after("out.lens_budget_") {
        let budget = text.parse().map_err(|_| format!("out.lens_budget_{text}: expected a number at the end"))?;
        let lengths = verify_budget::verify_lengths(&survivals, budget, limits);
        equal(&golden, &format!("out.lens_budget_{text}"), &lengths)?;
        budgets += 1;
    }
    let (samples, requests) = (fitted.num_samples, survivals.len());
    Ok(format!(
        "{drafted} temperatures of {samples} samples, {forms} forms of costs and {budgets} budgets for {requests} requests"
    ))
}

/// The bounds that a file was made with.
fn limits(text: &str) -> Result<Limits, String> {
    let config: Value = serde_json::from_str(text).map_err(|error| format!("`cfg`: {error}"))?;
    let mut limits = Limits::default();
    for (key, value) in config.as_object().ok_or("`cfg`: expected an object")? {
        let wrong = || format!("`cfg.{key}`: not expected here: {value}");
        match key.as_str() {
            "min_verify_len" => limits.min_verify_length = value.as_u64().ok_or_else(wrong)? as usize,
            // 0 is the whole chain.
            "max_verify_len" => {
                limits.max_verify_length = Some(value.as_u64().ok_or_else(wrong)? as usize).filter(|&most| most > 0);
            }
            "survival_eps" => limits.survival_eps = value.as_f64().ok_or_else(wrong)? as f32,
            "gamma" => {}
            _ => return Err(wrong()),
        }
    }
    Ok(limits)
}

fn near(golden: &Golden, name: &str, got: &[f64]) -> Result<(), String> {
    let want = golden.tensor(name)?.to_kind(Kind::Double);
    compare_scaled(name, &Tensor::from_slice(got).view_(want.size()), &want, TOLERANCE, TOLERANCE).map(drop)
}

fn equal(golden: &Golden, name: &str, got: &[usize]) -> Result<(), String> {
    let want = golden.integers(name)?;
    match got.iter().map(|&value| value as i64).eq(want.iter().copied()) {
        true => Ok(()),
        false => Err(format!("{name}: expected {want:?}, got {got:?}")),
    }
}
