//! SpecForge's summary (`eagle3_summary.json`): losses, metrics and gradient norms of cases whose tensors lie beside it,
//! five optimizer steps of some, and learning rates.

use std::path::Path;

use serde_json::{Value, json};
use specforge::dist::ProcessGroup;
use specforge::draft::DraftModel;
use specforge::optim::{OptimConfig, Optimizer, ParameterSlot};
use tch::{Kind, Tensor};

use super::{Golden, TOLERANCE, check_figures, compare, figures, is_trained, json_of, specforge_case, text};

/// A case of the summary that has weights and inputs of `eagle3_compact.safetensors`, told by what else it says. The
/// compact teacher is another way to the same numbers, so `kl` is that file itself. The rotary parameters and the place
/// where positions begin anew were found by trying: no others nearby give the summary's numbers.
fn of_compact(name: &str, compact: Golden) -> Result<Option<Golden>, String> {
    Ok(match name {
        "kl" => Some(compact),
        "lk_lambda" => Some(compact.with_text("model_over", r#"{"lk_loss_type": "lambda", "kl_decay": 3.0}"#)),
        "rope_yarn" => {
            let mut config = json_of(&compact, "config")?;
            config["rope_scaling"] = json!({
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
                "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            });
            Some(compact.with_text("config", &config.to_string()))
        }
        "positions" => {
            let positions: Vec<i64> = (0..10).chain(0..14).chain(0..24).collect();
            Some(compact.with_tensor("in.position_ids", Tensor::from_slice(&positions).view([2, 24])))
        }
        _ => None,
    })
}

/// SpecForge's table of cases, those whose tensors lie beside it: losses, metrics and the norm of all gradients, and for
/// some five optimizer steps; and its learning rates.
pub fn check(path: &Path) -> Result<String, String> {
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(path).map_err(text)?).map_err(text)?;
    let (mut read, mut trained) = (0, 0);
    for (name, want) in summary["cases"].as_object().into_iter().flatten() {
        let beside = |name: &str| path.with_file_name(format!("eagle3_{name}.safetensors"));
        let golden = match (beside(name).is_file(), beside("compact").is_file()) {
            (true, _) => Some(Golden::open(&beside(name))?),
            (false, true) => of_compact(name, Golden::open(&beside("compact"))?)?,
            (false, false) => None,
        };
        let Some(golden) = golden else { continue };
        check_case(&golden, want).map_err(|problem| format!("{name}: {problem}"))?;
        read += 1;
        if let Some(steps) = want.get("opt") {
            check_optimizer(&golden, steps).map_err(|problem| format!("{name}: {problem}"))?;
            trained += 1;
        }
    }
    let rates = check_rates(&summary["lr"])?;
    Ok(format!("{read} cases, {trained} runs of five optimizer steps, {rates} learning rates"))
}

/// Figures and the norm of the gradients, the reference's frozen embedding left out.
fn check_case(golden: &Golden, want: &Value) -> Result<(), String> {
    let case = specforge_case(golden)?;
    let (tally, gradients) = case.accumulate()?;
    let list = |key: &str| Tensor::from_slice(&numbers(&want[key]));
    let number = |key: &str| want[key].as_f64().map(Tensor::from).ok_or(format!("`{key}` is missing"));
    let wanted = [number("loss")?, list("plosses"), list("acces"), list("acceptance"), list("denoms")];
    check_figures(&figures(golden, &case, &tally)?, wanted)?;
    let trained = case.draft.parameters().iter().zip(&gradients).filter(|(parameter, _)| is_trained(parameter));
    let squares: f64 = trained.map(|(_, gradient)| gradient.square().sum(Kind::Double).double_value(&[])).sum();
    compare("norm of the gradients", &Tensor::from(squares.sqrt()), &number("grad_norm")?, TOLERANCE)?;
    Ok(())
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

fn check_optimizer(golden: &Golden, want: &Value) -> Result<(), String> {
    let case = specforge_case(golden)?;
    let slots = case.draft.parameters().iter().filter(|parameter| is_trained(parameter)).map(|parameter| {
        let mut slot = ParameterSlot::from(parameter);
        slot.group.decay = false;
        slot
    });
    let config = OptimConfig { max_gradient_norm: Some(0.5), ..OptimConfig::default() };
    let mut optimizer = Optimizer::new(slots.collect(), &config, ProcessGroup::SINGLE, false).map_err(text)?;
    let (rates, norms, losses) = (numbers(&want["lr"]), numbers(&want["grad_norm"]), numbers(&want["loss"]));
    for (step, rate) in rates.iter().enumerate() {
        let (tally, gradients) = case.accumulate()?;
        let pairs = case.draft.parameters().iter().zip(gradients);
        let gradients: Vec<Tensor> = pairs.filter(|(parameter, _)| is_trained(parameter)).map(|pair| pair.1).collect();
        let report = optimizer.step(&gradients, *rate, config.max_gradient_norm, &tally.objective).map_err(text)?;
        let near = |what: &str, got: f64, want: f64| match (got - want).abs() <= TOLERANCE {
            true => Ok(()),
            false => Err(format!("optimizer step {step}: {what}: expected {want}, got {got}")),
        };
        near("loss", tally.objective.double_value(&[]), losses[step])?;
        near("gradient norm", report.gradient_norm.double_value(&[]), norms[step])?;
    }
    if rates.is_empty() { Err("no optimizer step in the file".to_owned()) } else { Ok(()) }
}

/// Schedules of SpecForge. Its cosine starts above the base rate: PyTorch's recursion begins one step late, which scales
/// the whole curve by `2 / (1 + cos(pi / n))`. Ours does not; the tables agree after division by that factor.
fn check_rates(tables: &Value) -> Result<usize, String> {
    let mut compared = 0;
    for table in tables.as_array().into_iter().flatten() {
        let get = |key: &str| table[key].as_f64().ok_or(format!("`{key}` is missing"));
        let (base, total, warmup) = (get("lr")?, get("total_steps")?, get("warmup_steps")?);
        let cosine = table["kind"] == "cosine";
        let kind = if cosine { "cosine" } else { "constant" };
        let schedule = json!({"kind": kind, "warmup_steps": warmup as u64});
        let schedule: specforge::optim::ScheduleConfig = serde_json::from_value(schedule).map_err(text)?;
        let overshoot = 2.0 / (1.0 + (std::f64::consts::PI / (total - warmup)).cos());
        for (step, want) in numbers(&table["lr_used_at_step"]).into_iter().take(total as usize).enumerate() {
            let factor = if cosine && step as f64 >= warmup { overshoot } else { 1.0 };
            let got = schedule.learning_rate(base, step as u64, total as u64) * factor;
            if (got - want).abs() > 1e-5 * base {
                return Err(format!("{kind} of {total} steps, step {step}: expected {want}, got {got}"));
            }
            compared += 1;
        }
    }
    Ok(compared)
}
