//! EAGLE-3's training-time test against its references: SpecForge `a6b6b02` (mask `specforge`) and SafeAILab/EAGLE
//! `cb7e084` (mask `official`), both with the loss divided by all positions.
//!
//! File layout: `in.*` inputs, `w.*` weights, `teacher.*` and `mid.stepK.*` values on the way, `out.*` losses and
//! metrics, `grad.*` or `g.*` gradients; the metadata hold the draft's config.json.

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge::data::PackedBatch;
use specforge::draft::eagle3::{Eagle3, Eagle3Config};
use specforge::draft::{DraftContext, DraftModel, Tally};
use specforge::features::FeatureBatch;
use specforge::models::Dimensions;
use specforge::optim::{AdamW, Group, OptimConfig, ParameterSlot};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::{Golden, compare};

const TOLERANCE: f64 = 1e-5;
const METRICS: usize = 5;

/// A draft with the weights of a file, and the file's batch.
struct Case {
    draft: Eagle3,
    batch: PackedBatch,
    hidden: Vec<Tensor>,
    rows: i64,
    tokens: i64,
    steps: usize,
}

impl Case {
    fn features(&self) -> FeatureBatch<'_> {
        let hidden = self.hidden.iter().map(Tensor::shallow_clone).collect();
        FeatureBatch { batch: &self.batch, hidden }
    }

    /// Objective, metrics and gradients.
    fn accumulate(&self) -> Result<(Tally, Vec<Tensor>), String> {
        let zeros = |parameter: &specforge::draft::Parameter| parameter.value.zeros_like().detach();
        let mut gradients: Vec<Tensor> = self.draft.parameters().iter().map(zeros).collect();
        let counts = self.draft.count_rows(&self.batch);
        let tally = self.draft.accumulate(&self.features(), &counts, &mut gradients).map_err(text)?;
        Ok((tally, gradients))
    }

    /// Sums of one metric, a step each.
    fn sums(&self, tally: &Tally, metric: usize) -> Tensor {
        tally.sums.view([self.steps as i64, METRICS as i64]).select(1, metric as i64)
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn json_of(golden: &Golden, key: &str) -> Result<Value, String> {
    golden.text(key).and_then(|value| serde_json::from_str(value).map_err(text))
}

/// Builds the draft with small chunks, so that a file passes through several.
fn case(golden: &Golden, mut section: Map<String, Value>, target_head: &Tensor, last: &Tensor) -> Result<Case, String> {
    let captured = golden.tensor(if golden.has("in.hidden3") { "in.hidden3" } else { "in.hidden_state" })?;
    let (rows, tokens, wide) = captured.size3().map_err(text)?;
    let (target_hidden, vocabulary) = (wide / 3, golden.tensor("w.t2d")?.numel() as i64);
    let mut config = json_of(golden, "config")?;
    config["target_hidden_size"] = json!(target_hidden);
    if config.get("num_hidden_layers").is_none() {
        config["num_hidden_layers"] = json!(1);
    }
    let scaled = config.get("rope_scaling").is_some_and(Value::is_object);
    if let (false, Ok(rope)) = (scaled, json_of(golden, "rope_parameters")) {
        config["rope_parameters"] = rope;
    }
    section.insert("config".to_owned(), config);
    section.insert("normalisation".to_owned(), json!("all_positions"));
    let config = Eagle3Config::read(&Value::Object(section)).map_err(text)?;
    let steps = config.ttt_steps;

    let embedding = golden.tensor("w.embed_tokens.weight")?;
    let d2t = golden.integers("w.d2t")?;
    let ids: Vec<i64> = d2t.iter().enumerate().map(|(draft, offset)| draft as i64 + offset).collect();
    let map = (ids.len() as i64 != vocabulary).then(|| VocabMap::new(ids, vocabulary)).transpose().map_err(text)?;
    let context = DraftContext {
        target: Dimensions::of(target_hidden, vocabulary, 8, 256),
        embedding: &embedding,
        head: target_head,
        vocabulary: map.as_ref(),
        kind: Kind::Float,
        device: Device::Cpu,
        seed: 0,
        chunk_bytes: 5 * 4 * vocabulary as usize * (2 * steps + 1),
    };
    let draft = Eagle3::new(config, &context).map_err(text)?;
    for parameter in draft.parameters() {
        let _guard = tch::no_grad_guard();
        parameter.value.shallow_clone().copy_(&golden.tensor(&format!("w.{}", parameter.name))?);
    }
    let flat = |name: &str| golden.integers(name);
    let positions = match golden.has("in.position_ids") {
        true => flat("in.position_ids")?,
        false => (0..rows).flat_map(|_| 0..tokens).collect(),
    };
    let batch = PackedBatch {
        ids: flat("in.input_ids")?,
        positions,
        supervised: flat("in.loss_mask")?.iter().map(|&mark| mark != 0).collect(),
        lengths: vec![tokens; rows as usize],
        documents: (0..rows).map(|row| format!("row {row}")).collect(),
    };
    let mut hidden = captured.view([rows * tokens, wide]).chunk(3, 1);
    hidden.push(last.view([rows * tokens, -1]));
    Ok(Case { draft, batch, hidden, rows, tokens, steps })
}

fn specforge_case(golden: &Golden) -> Result<Case, String> {
    let over = json_of(golden, "model_over")?;
    let weights = json_of(golden, "loss_weights")?;
    let steps: usize = golden.text("ttt_length")?.parse().map_err(text)?;
    let listed: Vec<Value> = weights.as_array().into_iter().flatten().take(steps).cloned().collect();
    let mut section = Map::from_iter([
        ("mask".to_owned(), json!("specforge")),
        ("ttt_steps".to_owned(), json!(steps)),
        ("loss_weights".to_owned(), json!(listed)),
    ]);
    if let Some(kind) = over.get("lk_loss_type").and_then(Value::as_str) {
        section.insert("loss".to_owned(), json!(format!("lk_{kind}")));
    }
    for (theirs, ours) in [("kl_scale", "lk_scale"), ("kl_decay", "lk_decay")] {
        if let Some(value) = over.get(theirs) {
            section.insert(ours.to_owned(), value.clone());
        }
    }
    case(golden, section, &golden.tensor("w.target_head.fc.weight")?, &golden.tensor("in.target")?)
}

/// One file of SpecForge's.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let case = specforge_case(&golden)?;
    let compared = check_steps(&golden, &case)?;

    let (tally, gradients) = case.accumulate()?;
    compare("loss", &tally.objective, &golden.tensor("out.loss")?.squeeze(), TOLERANCE)?;
    let counts = Tensor::from_slice(&tally.counts).view([-1, METRICS as i64]).select(1, 0);
    compare("rows", &counts, &golden.tensor("out.acc_denoms")?, 0.0)?;
    let covered = case.sums(&tally, 3).clamp_min(1.0);
    let positions = case.rows * case.tokens;
    let over = json_of(&golden, "model_over")?;
    match over.get("lk_loss_type").and_then(Value::as_str) {
        // Divided by the rows that have a loss.
        Some("alpha") => {
            compare("losses", &(case.sums(&tally, 0) / &covered), &golden.tensor("out.plosses")?, TOLERANCE)?
        }
        // The blend of a batch's mean acceptance; the whole loss above holds it.
        Some(_) => 0.0,
        None => compare("losses", &(case.sums(&tally, 0) / positions), &golden.tensor("out.plosses")?, TOLERANCE)?,
    };
    compare("accuracies", &(case.sums(&tally, 1) / counts), &golden.tensor("out.acces")?, TOLERANCE)?;
    compare("acceptances", &(case.sums(&tally, 2) / covered), &golden.tensor("out.acceptance_rates")?, TOLERANCE)?;
    let gradients = check_gradients(&golden, &case, &gradients, "grad.")?;

    // Without gradients, the same values.
    let counts = case.draft.count_rows(&case.batch);
    let evaluated = case.draft.evaluate(&case.features(), &counts).map_err(text)?;
    compare("sums of an evaluation", &evaluated.sums, &tally.sums, 1e-6)?;
    Ok(format!("{compared} rows of {} steps, metrics, {gradients} gradients", case.steps))
}

/// Outputs and logits of every row that is computed.
fn check_steps(golden: &Golden, case: &Case) -> Result<i64, String> {
    let network = case.draft.network();
    let plan = case.draft.plan(&case.batch, Device::Cpu).map_err(text)?;
    let features = case.features();
    let projected = network.project_hidden_states(&features.hidden[..3]).map_err(text)?;
    let flat = |name: &str| Ok::<_, String>(golden.tensor(name)?.view([case.rows * case.tokens, -1]));
    compare("fc", &projected, &flat("mid.fc_out")?, TOLERANCE)?;
    let mut compared = 0;
    for (k, (hidden, step)) in network.backbone(&plan, &projected).map_err(text)?.iter().zip(&plan.steps).enumerate() {
        let want = |name: &str| Ok::<_, String>(flat(&format!("mid.step{k}.{name}"))?.index_select(0, &step.rows));
        compare(&format!("output of step {k}"), hidden, &want("hidden")?, TOLERANCE)?;
        let logits = network.compute_logits(hidden).map_err(text)?;
        compare(&format!("logits of step {k}"), &logits, &want("logits")?, TOLERANCE)?;
        compared += step.len;
    }
    Ok(compared)
}

fn check_gradients(golden: &Golden, case: &Case, gradients: &[Tensor], prefix: &str) -> Result<usize, String> {
    let mut compared = 0;
    for (parameter, gradient) in case.draft.parameters().iter().zip(gradients) {
        let name = format!("{prefix}{}", parameter.name);
        // An embedding of another width than the target's is frozen in the reference, and trained here.
        if golden.has(&name) || parameter.name != "embed_tokens.weight" {
            compare(&name, gradient, &golden.tensor(&name)?, TOLERANCE)?;
            compared += 1;
        }
    }
    Ok(compared)
}

/// One file of SafeAILab's, which gives the target's logits themselves.
pub fn check_official(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let logits = golden.tensor("in.target_logits")?;
    let steps: usize = golden.text("ttt")?.parse().map_err(text)?;
    let section = Map::from_iter([
        ("mask".to_owned(), json!("official")),
        ("lm_head".to_owned(), json!("random")),
        ("ttt_steps".to_owned(), json!(steps)),
    ]);
    let identity = Tensor::eye(logits.size()[2], (Kind::Float, Device::Cpu));
    let case = case(&golden, section, &identity, &logits)?;
    let (tally, gradients) = case.accumulate()?;
    compare("loss", &tally.objective, &golden.tensor("out.loss")?.squeeze(), TOLERANCE)?;
    let positions = case.rows * case.tokens;
    compare("losses", &(case.sums(&tally, 0) / positions), &golden.tensor("out.plosses")?, TOLERANCE)?;
    let counts = Tensor::from_slice(&tally.counts).view([-1, METRICS as i64]).select(1, 0) + 1e-6;
    compare("accuracies", &(case.sums(&tally, 1) / counts), &golden.tensor("out.accs")?, TOLERANCE)?;
    let gradients = check_gradients(&golden, &case, &gradients, "g.")?;
    Ok(format!("{steps} steps, {gradients} gradients"))
}

/// SpecForge's table of losses: five optimizer steps and the learning rates, from the weights of the file beside it.
pub fn check_summary(path: &Path) -> Result<String, String> {
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(path).map_err(text)?).map_err(text)?;
    let mut trained = 0;
    for (name, case) in summary["cases"].as_object().into_iter().flatten() {
        let Some(steps) = case.get("opt") else { continue };
        // The compact teacher is another way to the same numbers, so its file has the weights of `kl`.
        let files = [format!("eagle3_{name}.safetensors"), "eagle3_compact.safetensors".to_owned()];
        let files = if name == "kl" { &files[..] } else { &files[..1] };
        let Some(file) = files.iter().map(|file| path.with_file_name(file)).find(|file| file.is_file()) else {
            continue;
        };
        check_optimizer(&Golden::open(&file)?, steps).map_err(|problem| format!("{name}: {problem}"))?;
        trained += 1;
    }
    let rates = check_rates(&summary["lr"])?;
    Ok(format!("{trained} runs of five optimizer steps, {rates} learning rates"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

fn check_optimizer(golden: &Golden, want: &Value) -> Result<(), String> {
    let case = specforge_case(golden)?;
    let slots = case.draft.parameters().iter().map(|parameter| ParameterSlot {
        group: Group::NoDecay,
        ..ParameterSlot::new(&parameter.name, parameter.value.shallow_clone())
    });
    let config = OptimConfig { max_gradient_norm: Some(0.5), ..OptimConfig::default() };
    let mut optimizer = AdamW::new(slots.collect(), &config).map_err(text)?;
    let (rates, norms, losses) = (numbers(&want["lr"]), numbers(&want["grad_norm"]), numbers(&want["loss"]));
    for (step, rate) in rates.iter().enumerate() {
        let (tally, gradients) = case.accumulate()?;
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
