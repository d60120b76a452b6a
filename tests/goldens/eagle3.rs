//! EAGLE-3's training-time test against its references: SpecForge `a6b6b02` (mask `specforge`) and SafeAILab/EAGLE
//! `cb7e084` (mask `official`), both with the loss divided by all positions.
//!
//! File layout: `in.*` inputs, `w.*` weights, `teacher.*` and `mid.stepK.*` values on the way, `out.*` losses and
//! metrics, `grad.*` or `g.*` gradients; the metadata hold the draft's config.json.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::eagle3::{Eagle3, Eagle3Config};
use specforge::draft::{DraftContext, DraftModel, Gradients, Parameter, Tally};
use specforge::features::FeatureBatch;
use specforge::models::TargetInfo;
use specforge::nn::{Embedding, Head};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::{Golden, compare};
use crate::fixture::STEP;

pub mod summary;
mod variants;

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
    fn features(&self) -> FeatureBatch {
        let hidden = self.hidden.iter().map(Tensor::shallow_clone).collect();
        FeatureBatch::new(Arc::new(self.batch.clone()), hidden)
    }

    /// Objective, metrics and gradients.
    fn accumulate(&self) -> Result<(Tally, Vec<Tensor>), String> {
        let zeros = |parameter: &Parameter| parameter.value.zeros_like().detach();
        let mut gradients: Vec<Tensor> = self.draft.parameters().iter().map(zeros).collect();
        let plan = self.draft.plan(&self.batch, STEP).map_err(text)?;
        let mut totals = Gradients::new(&mut gradients);
        let tally = self.draft.accumulate(&self.features(), &plan, &plan.counts, &mut totals).map_err(text)?;
        Ok((tally, gradients))
    }

    /// Objective and metrics without gradients.
    fn evaluate(&self) -> Result<Tally, String> {
        let plan = self.draft.plan(&self.batch, STEP).map_err(text)?;
        self.draft.evaluate(&self.features(), &plan, &plan.counts).map_err(text)
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
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(rope) = config.get_mut(key).and_then(Value::as_object_mut) {
            name_yarn_factor(rope);
        }
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
        target: TargetInfo::of(target_hidden, vocabulary, 8, 256),
        embedding: &Embedding::plain(embedding),
        head: &Head::plain(target_head.shallow_clone()),
        vocabulary: map.as_ref(),
        weights: None,
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
    // Explicit positions are those of every row, or of one that stands for all.
    let mut positions = match golden.has("in.position_ids") {
        true => flat("in.position_ids")?,
        false => (0..tokens).collect(),
    };
    if positions.len() as i64 == tokens {
        positions = positions.repeat(rows as usize);
    }
    if positions.len() as i64 != rows * tokens {
        return Err(format!("in.position_ids: expected {rows} rows of {tokens}, got {} numbers", positions.len()));
    }
    let batch = PackedBatch {
        ids: flat("in.input_ids")?,
        positions,
        supervised: flat("in.loss_mask")?.iter().map(|&mark| mark != 0).collect(),
        lengths: vec![tokens; rows as usize],
        documents: (0..rows).map(|row| DocumentRef::new(format!("row {row}"), row as u64)).collect(),
    };
    let mut hidden = captured.view([rows * tokens, wide]).chunk(3, 1);
    hidden.push(last.view([rows * tokens, -1]));
    Ok(Case { draft, batch, hidden, rows, tokens, steps })
}

/// SpecForge's factor of YaRN's cos and sin takes both scales as they are. Hugging Face's, and so ours, leaves both out
/// where one is 0, which is the same only for a scale of 1.
fn name_yarn_factor(rope: &mut Map<String, Value>) {
    let number = |key: &str| rope.get(key).and_then(Value::as_f64);
    if let (Some(factor), Some(scale), Some(all)) = (number("factor"), number("mscale"), number("mscale_all_dim")) {
        let of = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        rope.insert("attention_factor".to_owned(), json!(of(scale) / of(all)));
    }
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
    let out = |name: &str| golden.tensor(&format!("out.{name}"));
    check_figures(
        &figures(&golden, &case, &tally)?,
        [out("loss")?.squeeze(), out("plosses")?, out("acces")?, out("acceptance_rates")?, out("acc_denoms")?],
    )?;
    let gradients = check_gradients(&golden, &case, &gradients, "grad.")?;

    // Without gradients, the same values.
    let evaluated = case.evaluate()?;
    compare("sums of an evaluation", &evaluated.sums, &tally.sums, 1e-6)?;
    Ok(format!("{compared} rows of {} steps, metrics, {gradients} gradients", case.steps))
}

/// What SpecForge reports of a batch: the loss, and of every step its loss, accuracy, acceptance and number of rows.
fn figures(golden: &Golden, case: &Case, tally: &Tally) -> Result<[Tensor; 5], String> {
    let rows = Tensor::from_slice(&tally.counts).view([-1, METRICS as i64]).select(1, 0);
    let covered = case.sums(tally, 3).clamp_min(1.0);
    let acceptances = case.sums(tally, 2) / &covered;
    let positions = case.rows * case.tokens;
    let over = json_of(golden, "model_over")?;
    let losses = match over.get("lk_loss_type").and_then(Value::as_str) {
        // Divided by the rows that have a loss.
        Some("alpha") => case.sums(tally, 0) / &covered,
        // The blend of the cross-entropy and the batch's mean acceptance.
        Some(_) => {
            let plain = specforge_case(&golden.again().with_text("model_over", "{}"))?;
            let evaluated = plain.evaluate()?;
            let cross_entropy = plain.sums(&evaluated, 0) / positions;
            let number = |key: &str| over.get(key).and_then(Value::as_f64).unwrap_or(1.0);
            let share = (&acceptances * -number("kl_decay")).exp() * number("kl_scale");
            &share * cross_entropy + (1.0 - &share) * (1.0 - &acceptances)
        }
        None => case.sums(tally, 0) / positions,
    };
    let accuracies = case.sums(tally, 1) / &rows;
    Ok([tally.objective.shallow_clone(), losses, accuracies, acceptances, rows])
}

fn check_figures(got: &[Tensor; 5], want: [Tensor; 5]) -> Result<(), String> {
    let names = ["loss", "losses", "accuracies", "acceptances", "rows"];
    for ((name, got), want) in names.iter().zip(got).zip(want) {
        compare(name, got, &want, if *name == "rows" { 0.0 } else { TOLERANCE })?;
    }
    Ok(())
}

/// Outputs and logits of every row that is computed.
fn check_steps(golden: &Golden, case: &Case) -> Result<i64, String> {
    let network = case.draft.network();
    let plan = case.draft.steps(&case.batch, Device::Cpu).map_err(text)?;
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
        if golden.has(&name) || is_trained(parameter) {
            compare(&name, gradient, &golden.tensor(&name)?, TOLERANCE)?;
            compared += 1;
        }
    }
    Ok(compared)
}

/// Whether the reference trains a parameter too. An embedding of another width than the target's is frozen there.
fn is_trained(parameter: &Parameter) -> bool {
    parameter.name != "embed_tokens.weight"
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
