//! P-EAGLE against its references: speculators 0.9.0 (`sp_peagle*`), SpecForge 0.2.0 (`peagle_*`), and one round and the next
//! of decoding as vLLM 0.33.0 lays its rows out (`infer_peagle*`).
//!
//! The references' rows are shifted beforehand: their row `i` holds the feature of token `i`, the embedding of token `i + 1`
//! and what the target predicts from token `i + 1`. Here every document has one token more, in front, and one row more,
//! behind, which nobody sees.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::peagle::rows::{Layout, Row};
use specforge::draft::peagle::{Peagle, PeagleConfig};
use specforge::draft::{DraftContext, DraftModel, Gradients};
use specforge::features::FeatureBatch;
use specforge::models::TargetInfo;
use specforge::nn::{Embedding, Head, RmsNorm};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::{Golden, compare};

const METRICS: i64 = 5;

/// Within the files' own tolerance.
fn near(what: &str, got: &Tensor, want: &Tensor) -> Result<(), String> {
    let (got, want) = (got.reshape(want.size()), want);
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let (got, want) = if want.dim() == 0 { (got.view([1]), want.view([1])) } else { (got, want.shallow_clone()) };
    compare(what, &got, &want, 1e-5 * scale).map(|_| ())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn json_of(golden: &Golden, key: &str) -> Result<Value, String> {
    golden.text(key).and_then(|value| serde_json::from_str(value).map_err(text))
}

/// The name in the references' files of a trained tensor.
fn stored(name: &str) -> String {
    name.strip_prefix("midlayer.").map_or_else(|| name.to_owned(), |rest| format!("layers.0.{rest}"))
}

/// What is not the draft's own.
struct Target {
    head: Head,
    vocabulary: Option<VocabMap>,
    captured: i64,
}

/// A draft with the weights of a file.
fn draft(golden: &Golden, mut section: Map<String, Value>, target: &Target) -> Result<Peagle, String> {
    let embedding = golden.tensor("w.embed_tokens.weight")?;
    let (vocabulary, _) = embedding.size2().map_err(text)?;
    let wide = golden.tensor("w.fc.weight")?.size()[1];
    let hidden = wide / target.captured;
    section.insert("algorithm".to_owned(), json!("peagle"));
    section.insert("lm_head".to_owned(), json!("random"));
    section["config"]["vocab_size"] = json!(vocabulary);
    if section["config"].get("max_position_embeddings").is_none() {
        section["config"]["max_position_embeddings"] = json!(128);
    }
    section["config"]["target_hidden_size"] = json!(hidden);
    if let Some(map) = &target.vocabulary {
        section.insert("draft_vocab_size".to_owned(), json!(map.draft_size()));
    }
    let config = PeagleConfig::read(&Value::Object(section)).map_err(text)?;
    let context = DraftContext {
        target: TargetInfo::of(hidden, vocabulary, 40, 256),
        embedding: &Embedding::plain(embedding),
        head: &target.head,
        vocabulary: target.vocabulary.as_ref(),
        weights: None,
        kind: Kind::Float,
        device: Device::Cpu,
        seed: 0,
        // A few target positions a chunk.
        chunk_bytes: 5 * 4 * vocabulary as usize * (2 * config.num_depths + 1),
    };
    let draft = Peagle::new(config, &context).map_err(text)?;
    let mut unread: Vec<&str> = golden.names_after("w.").filter(|name| !name.contains("verifier")).collect();
    for parameter in draft.parameters() {
        let _guard = tch::no_grad_guard();
        let name = stored(&parameter.name);
        parameter.value.shallow_clone().copy_(&golden.tensor(&format!("w.{name}"))?);
        unread.retain(|other| *other != name);
    }
    unread.retain(|name| !["t2d", "d2t"].contains(name) && !name.starts_with("target"));
    if unread.is_empty() { Ok(draft) } else { Err(format!("weights that the draft has no place for: {unread:?}")) }
}

fn vocabulary(golden: &Golden) -> Result<Option<VocabMap>, String> {
    if !golden.has("w.d2t") {
        return Ok(None);
    }
    let ids: Vec<i64> = golden.integers("w.d2t")?.iter().zip(0..).map(|(offset, draft)| offset + draft).collect();
    let size = golden.tensor("w.t2d")?.numel() as i64;
    if ids.len() as i64 == size { Ok(None) } else { VocabMap::new(ids, size).map(Some).map_err(text) }
}

/// Rows of the references' buffer in documents of ours.
struct Places {
    /// For each of the references' rows that is not padding, ours.
    row_of: HashMap<i64, i64>,
    batch: PackedBatch,
}

impl Places {
    /// `documents` says of each row of the buffer which document it is of; -1 for padding.
    fn new(ids: &[i64], documents: &[i64]) -> Self {
        let mut places = Self { row_of: HashMap::new(), batch: PackedBatch::default() };
        let mut row = 0;
        while row < ids.len() {
            let number = documents[row];
            let length = documents[row..].iter().take_while(|&&other| other == number).count();
            if number >= 0 {
                let batch = &mut places.batch;
                let start = batch.ids.len() as i64;
                batch.ids.push(0);
                batch.ids.extend(&ids[row..row + length]);
                batch.positions.extend(0..=length as i64);
                batch.supervised.extend(vec![false; length + 1]);
                batch.lengths.push(length as i64 + 1);
                batch.documents.push(DocumentRef::new(format!("document {number}"), number as u64));
                places.row_of.extend((0..length as i64).map(|at| (row as i64 + at, start + at)));
            }
            row += length;
        }
        places
    }

    /// Values of the references' rows `[T, ..]` for ours, `shift` rows later; zero elsewhere.
    fn spread(&self, values: &Tensor, shift: i64) -> Tensor {
        let all = Tensor::zeros([self.batch.ids.len() as i64, values.size()[1]], (values.kind(), Device::Cpu));
        let (theirs, ours): (Vec<i64>, Vec<i64>) =
            self.row_of.iter().map(|(&theirs, &ours)| (theirs, ours + shift)).unzip();
        all.index_copy(0, &Tensor::from_slice(&ours), &values.index_select(0, &Tensor::from_slice(&theirs)))
    }
}

/// A file's sampled rows and inputs.
struct Case {
    section: Map<String, Value>,
    target: Target,
    depths: usize,
    documents: Vec<i64>,
    anchors: Vec<i64>,
    row_depths: Vec<i64>,
    /// `[T, ..]` of the references' rows: captured features, and what the target's head reads.
    captured: Tensor,
    last: Tensor,
}

fn check_training(golden: &Golden, case: Case) -> Result<String, String> {
    let (ids, mask) = (golden.integers("in.input_ids")?, golden.integers("in.loss_mask")?);
    let places = Places::new(&ids, &case.documents);
    let (mut rows, mut order) = (Vec::new(), Vec::new());
    for (place, (&anchor, &depth)) in (0i64..).zip(case.anchors.iter().zip(&case.row_depths)) {
        // Rows of padding, and behind an anchor that is not there, see nothing in the reference.
        let Some(&ours) = places.row_of.get(&anchor) else { continue };
        let teacher = places.row_of.get(&(anchor + depth)).map(|row| row + 1);
        let trained = mask[(anchor + depth) as usize] != 0;
        rows.push(Row { anchor: ours, depth: depth as usize, teacher: teacher.filter(|_| trained) });
        if trained {
            order.push((depth, ours, place));
        }
    }
    order.sort_unstable();
    let index = Tensor::from_slice(&order.iter().map(|(_, _, place)| *place).collect::<Vec<_>>());
    let mut hidden = places.spread(&case.captured, 0).chunk(case.target.captured, 1);
    hidden.push(places.spread(&case.last, 1));
    let features = FeatureBatch::new(Arc::new(places.batch.clone()), hidden);
    let mut gradients_compared = 0;
    for layout in [Layout::Chains, Layout::Depths] {
        let draft = draft(golden, case.section.clone(), &case.target)?.with_layout(layout);
        let plan = draft.plan_of_rows(&places.batch, &rows).map_err(text)?;
        if golden.has("mid.hidden") {
            let output = draft.outputs(&features, &plan).map_err(text)?;
            let network = draft.network();
            let of = |name: &str| Ok::<_, String>(golden.tensor(name)?.squeeze_dim(0).index_select(0, &index));
            // Before or behind the last norm.
            let want = of("mid.hidden")?;
            near("hidden", &network.normed(&output), &want).or_else(|_| near("hidden", &output, &want))?;
            if golden.has("mid.logits") {
                near("logits", &network.logits(&output).detach(), &of("mid.logits")?)?;
            }
        }
        let mut totals = Gradients::zeros(draft.parameters()).map_err(text)?;
        let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut totals)).map_err(text)?;
        near("loss", &tally.objective.to_kind(Kind::Float), &golden.tensor("out.loss")?)?;
        let sums = tally.sums.view([case.depths as i64, METRICS]).to_kind(Kind::Float);
        let counts = Tensor::from_slice(&tally.counts).view([case.depths as i64, METRICS]).to_kind(Kind::Float);
        // SpecForge counts the rows whose likeliest token the draft can name.
        let totals_of =
            if case.section.get("normalisation").is_some() { sums.select(1, 3) } else { counts.select(1, 0) };
        let hits = sums.select(1, 1);
        near("correct", &hits.sum(Kind::Float), &golden.tensor("out.full_acc_sum")?)?;
        near("rows", &totals_of.sum(Kind::Float), &golden.tensor("out.full_acc_total")?)?;
        for depth in 0..case.depths as i64 {
            let out = |name: &str| golden.tensor(&format!("out.position_{depth}_acc_{name}"));
            near(&format!("correct at depth {depth}"), &hits.get(depth), &out("sum")?)?;
            near(&format!("rows of depth {depth}"), &totals_of.get(depth), &out("total")?)?;
        }
        gradients_compared = 0;
        for (parameter, gradient) in draft.parameters().iter().zip(&totals) {
            let name = format!("grad.{}", stored(&parameter.name));
            // speculators does not train the projection.
            if golden.has(&name) {
                near(&name, gradient, &golden.tensor(&name)?)?;
                gradients_compared += 1;
            }
        }
        if gradients_compared != golden.names_after("grad.").count() {
            return Err(format!("{gradients_compared} gradients were compared, the file has others"));
        }
        let evaluated = draft.evaluate(&features, &plan, &plan.counts).map_err(text)?;
        near("sums of an evaluation", &evaluated.sums, &tally.sums)?;
    }
    // The terms of a sum, each alone.
    let mut terms = 0;
    for (name, _) in case.section["loss"].as_object().into_iter().flatten() {
        let key = format!("out.{name}_loss_sum");
        if golden.has(&key) {
            let mut section = case.section.clone();
            section.insert("loss".to_owned(), json!(name));
            let draft = draft(golden, section, &case.target)?;
            let plan = draft.plan_of_rows(&places.batch, &rows).map_err(text)?;
            let tally = draft.evaluate(&features, &plan, &plan.counts).map_err(text)?;
            near(&key, &tally.objective.to_kind(Kind::Float), &golden.tensor(&key)?)?;
            terms += 1;
        }
    }
    Ok(format!("{} rows, metrics, {gradients_compared} gradients, {terms} terms", order.len()))
}

/// The `draft` section that a speculators file describes.
fn speculators_section(golden: &Golden) -> Result<(Map<String, Value>, i64), String> {
    let mut config = json_of(golden, "transformer_layer_config")?;
    let spec = json_of(golden, "spec")?;
    config["model_type"] = json!(golden.text("arch")?);
    for key in ["norm_before_residual", "norm_before_fc", "fc_norm"] {
        if let Some(value) = spec.get(key) {
            config[key] = value.clone();
        }
    }
    let capture = spec.get("eagle_aux_hidden_state_layer_ids").cloned().unwrap_or_else(|| json!([2, 5, 9]));
    let captured = capture.as_array().map_or(0, Vec::len) as i64;
    let section = Map::from_iter([
        ("config".to_owned(), config),
        ("capture".to_owned(), capture),
        ("mask_token_id".to_owned(), spec["mask_token_id"].clone()),
    ]);
    Ok((section, captured))
}

/// One training step of speculators.
pub fn check_speculators(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (mut section, captured) = speculators_section(&golden)?;
    let depths = json_of(&golden, "cod")?["num_depths"].as_u64().ok_or("`cod` has no `num_depths`")? as usize;
    section.insert("num_depths".to_owned(), json!(depths));
    // A name, or an object of names and factors; the right token is the target's likeliest.
    let loss = golden.text("loss_fn")?;
    let loss: Value = serde_json::from_str(loss).unwrap_or_else(|_| json!(loss));
    section.insert("loss".to_owned(), loss);
    // The verifier's head may have the draft's rows alone: no other token can then be its likeliest.
    let vocabulary = vocabulary(&golden)?;
    let norm = RmsNorm {
        weight: golden.tensor("w.verifier_norm.weight")?,
        epsilon: section["config"]["rms_norm_eps"].as_f64().unwrap_or(1e-6),
    };
    let head = golden.tensor("w.verifier_lm_head.weight")?;
    let head = match &vocabulary {
        None => Head::plain(head),
        Some(map) => {
            let (size, ids) = (map.target_size(), Tensor::from_slice(map.target_ids()));
            let weight = Tensor::zeros([size, head.size()[1]], (Kind::Float, Device::Cpu)).index_copy(0, &ids, &head);
            let bias = Tensor::full([size], -1e30, (Kind::Float, Device::Cpu)).index_fill(0, &ids, 0.0);
            Head { bias: Some(bias), ..Head::plain(weight) }
        }
    };
    let rows = |name: &str| Ok::<_, String>(golden.tensor(name)?.squeeze_dim(0));
    let last = norm.forward(&rows("in.verifier_last_hidden_states")?);
    let case = Case {
        section,
        target: Target { head, vocabulary, captured },
        depths,
        documents: golden.integers("in.document_ids")?,
        anchors: golden.integers("sample.anchor_pos")?,
        row_depths: golden.integers("sample.depth")?,
        captured: rows("in.hidden_states")?,
        last,
    };
    check_training(&golden, case)
}

/// One training step of SpecForge.
pub fn check_specforge(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let depths: usize = golden.text("num_depths")?.parse().map_err(text)?;
    let token: i64 = golden.text("mask_token_id")?.parse().map_err(text)?;
    let config = json_of(&golden, "config")?;
    let section = Map::from_iter([
        ("config".to_owned(), config),
        ("capture".to_owned(), json!([2, 5, 9])),
        ("num_depths".to_owned(), json!(depths)),
        ("mask_token_id".to_owned(), json!(token)),
        ("loss".to_owned(), json!("cross_entropy")),
        ("normalisation".to_owned(), json!("covered_rows")),
    ]);
    let logits = golden.tensor("in.target_logits")?.squeeze_dim(0); // [T, V]
    let attended = golden.integers("in.attention_mask")?;
    // The head of a target whose states are its logits.
    let (_, size) = logits.size2().map_err(text)?;
    let case = Case {
        section,
        target: Target {
            head: Head::plain(Tensor::eye(size, (Kind::Float, Device::Cpu))),
            vocabulary: vocabulary(&golden)?,
            captured: 3,
        },
        depths,
        documents: attended.iter().map(|&attended| if attended == 0 { -1 } else { 0 }).collect(),
        anchors: golden.integers("cod.anchor_pos")?,
        row_depths: golden.integers("cod.depth")?,
        captured: golden.tensor("in.hidden_states")?.squeeze_dim(0),
        last: logits,
    };
    check_training(&golden, case)
}

/// One round of decoding, and the next.
pub fn check_inference(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (section, captured) = speculators_section(&golden)?;
    let masks: i64 = golden.text("num_speculative_tokens")?.parse::<i64>().map_err(text)? - 1;
    let map = vocabulary(&golden)?;
    let hidden = golden.tensor("w.fc.weight")?.size()[1] / captured;
    let head = Head::plain(Tensor::zeros(
        [golden.tensor("w.embed_tokens.weight")?.size()[0], hidden],
        (Kind::Float, Device::Cpu),
    ));
    let target = Target { head, vocabulary: map, captured };
    let draft = draft(&golden, section, &target)?;
    let _guard = tch::no_grad_guard();
    let network = draft.network();
    let mut cache = network.new_cache(1, 4);
    let ids = golden.integers("in.tokens")?[1..].to_vec();
    let rounds = [("in.features", ids), ("in.features_step2", golden.integers("in.tokens_step2")?)];
    let mut tokens_compared = 0;
    for (step, (features, ids)) in (1..).zip(rounds) {
        let parts = golden.tensor(features)?.chunk(captured, 1);
        let projected = network.project_hidden_states(&parts).map_err(text)?;
        let output = network.draft(&[projected], &[ids], masks, &mut cache).map_err(text)?.squeeze_dim(0);
        let out = |name: &str| golden.tensor(&format!("out.step{step}.{name}"));
        let want = out("hidden")?;
        near("hidden", &network.normed(&output), &want).or_else(|_| near("hidden", &output, &want))?;
        let logits = network.logits(&output);
        near("logits", &logits, &out("logits")?)?;
        let mut tokens = logits.argmax(-1, false);
        let want = out("tokens")?;
        if let Some(map) = &target.vocabulary
            && !tokens.equal(&want)
        {
            tokens = Tensor::from_slice(map.target_ids()).index_select(0, &tokens);
        }
        if !tokens.equal(&want) {
            return Err(format!("step {step}: tokens {tokens:?}, expected {want:?}"));
        }
        tokens_compared += tokens.numel();
    }
    Ok(format!("{tokens_compared} tokens of 2 rounds"))
}
