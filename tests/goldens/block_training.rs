//! Training steps of block drafters against their references: loss, gradients of every weight, and hits by slot.
//!
//! `sp_*`: PyPI speculators 0.9.0, packed documents. `dflash`, `dpace`, ...: SpecForge `a6b6b02`, rows of one document each.
//! Both hand the anchors over. Where a reference trains or sees what decoding never asks for, the blocks are built here by
//! its rule: labels over document borders, the mask of another token, a window that does not move with the row.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::block::blocks::{Block, BlockPlan, Windows};
use specforge::draft::block::{BlockConfig, BlockDraft};
use specforge::draft::{DraftContext, DraftModel, Gradients, StepKey, Tally};
use specforge::features::FeatureBatch;
use specforge::models::TargetInfo;
use specforge::nn::{Embedding, Head, RmsNorm};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::block_parts::near;
use super::compare;
use super::{Golden, compare_scaled};
use crate::fixture::STEP;

/// A draft with the weights of a file, its blocks, and what they are trained on.
pub struct Case {
    pub draft: BlockDraft,
    pub features: FeatureBatch,
    pub blocks: BlockPlan,
}

/// A step's outcome.
pub struct Step {
    pub tally: Tally,
    /// By the draft's own names.
    pub gradients: Vec<(String, Tensor)>,
}

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub fn json_of(golden: &Golden, key: &str) -> Result<Value, String> {
    golden.text(key).and_then(|value| serde_json::from_str(value).map_err(text))
}

/// What a file's tensors are called, by the draft's own names.
pub type Naming<'a> = &'a dyn Fn(&str) -> String;

pub fn same_names(name: &str) -> String {
    name.to_owned()
}

/// Steps are computed in float64. The files are float32 and right within 4e-6; a float32 step of ours adds as much again, in
/// another order, and a deep draft then misses 1e-5 by a fifth now and then. In float32 steps are held to float64 ones by
/// `draft_contract` and `narrow_gradients`.
const KIND: Kind = Kind::Double;

impl Case {
    /// Objective, metrics and gradients.
    pub fn step(&self) -> Result<Step, String> {
        self.step_at(STEP)
    }

    /// The same at another place of the run.
    pub fn step_at(&self, key: StepKey) -> Result<Step, String> {
        let step = self.step_folded(key, false)?;
        // As a GPU takes them, rows of a block are heads of one row: the same numbers.
        let folded = self.step_folded(key, true)?;
        for ((name, own), (_, other)) in step.gradients.iter().zip(&folded.gradients) {
            compare(&format!("{name}, rows as heads"), other, own, 1e-4)?;
        }
        Ok(step)
    }

    fn step_folded(&self, key: StepKey, fold: bool) -> Result<Step, String> {
        let mut gradients = Gradients::zeros(self.draft.parameters()).map_err(text)?;
        let plan = self.draft.plan_of(self.plan(fold), key);
        let mut totals = Gradients::new(&mut gradients);
        let tally = self.draft.accumulate(&self.features, &plan, &plan.counts, &mut totals).map_err(text)?;
        let value = self.draft.evaluate(&self.features, &plan, &plan.counts).map_err(text)?;
        compare_scaled("objective without gradients", &value.objective, &tally.objective, 1e-6, 1e-6)?;
        let names = self.draft.parameters().iter().map(|parameter| parameter.name.clone());
        Ok(Step { tally, gradients: names.zip(gradients).collect() })
    }

    fn plan(&self, fold: bool) -> BlockPlan {
        BlockPlan { blocks: self.blocks.blocks.clone(), windows: self.blocks.windows, fold }
    }

    /// The average of a metric.
    pub fn average(&self, step: &Step, metric: &str) -> Result<f64, String> {
        let place = self.draft.metrics().iter().position(|name| name == metric);
        let place = place.ok_or_else(|| format!("the draft has no metric {metric}: {:?}", self.draft.metrics()))?;
        Ok(step.tally.sums.double_value(&[place as i64]) / step.tally.counts[place])
    }
}

impl Step {
    /// Compares loss and every gradient of the file.
    pub fn check(&self, golden: &Golden, naming: Naming<'_>) -> Result<(), String> {
        near("loss", &self.tally.objective, &golden.tensor("out.loss")?)?;
        for (name, gradient) in &self.gradients {
            let file = format!("grad.{}", naming(name));
            let want = golden.tensor(&file)?;
            near(&file, gradient, &want.view_as(gradient))?;
        }
        Ok(())
    }
}

/// What a file says of target and draft, beside its tensors.
pub struct Setting<'a> {
    pub section: Map<String, Value>,
    /// Qwen3-style configuration of the layers.
    pub layers: &'a Value,
    pub embedding: Tensor,
    /// The target's projection, whole.
    pub head: Tensor,
    pub map: Option<VocabMap>,
}

/// Builds the draft with chunks of two blocks, so that a file passes through several.
pub fn draft(golden: &Golden, setting: Setting<'_>, naming: Naming<'_>) -> Result<BlockDraft, String> {
    let Setting { mut section, layers, embedding, head, map } = setting;
    let (vocabulary, hidden) = head.size2().map_err(text)?;
    for key in ["intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"] {
        section.insert(key.to_owned(), layers[key].clone());
    }
    if let Some(map) = &map {
        section.insert("draft_vocab_size".to_owned(), json!(map.draft_size()));
    }
    let theta = [&layers["rope_theta"], &layers["rope_parameters"]["rope_theta"]].into_iter().find_map(Value::as_f64);
    let mut target = TargetInfo::of(hidden, vocabulary, 40, 256);
    target.template.rope.theta = theta.ok_or("no rope_theta")?;
    let context = DraftContext {
        target,
        embedding: &Embedding::plain(embedding.to_kind(KIND)),
        head: &Head::plain(head.to_kind(KIND)),
        vocabulary: map.as_ref(),
        weights: None,
        kind: KIND,
        device: Device::Cpu,
        seed: 0,
        chunk_bytes: 1,
    };
    // A window that is shorter than a block is not to be configured: engines would cut the block itself, which training does
    // not. speculators' training has such.
    let window = section.get("sliding_window").and_then(Value::as_i64);
    if let (Some(window), Some(size)) = (window, section.get("block_size").and_then(Value::as_i64)) {
        section.insert("sliding_window".to_owned(), json!(window.max(size)));
    }
    let mut config = BlockConfig::read(&Value::Object(section)).map_err(text)?;
    config.sliding_window = window;
    let draft = BlockDraft::new(config, &context).map_err(text)?.with_blocks_per_chunk(2);
    for parameter in draft.parameters() {
        let _guard = tch::no_grad_guard();
        let value = golden.tensor(&format!("w.{}", naming(&parameter.name)))?;
        parameter.value.shallow_clone().copy_(&value.view_as(&parameter.value));
    }
    Ok(draft)
}

/// Layers of a target that the files number by Hugging Face's index, from 0 as we do.
fn outputs(ids: &Value) -> Value {
    ids.as_array().map_or(Value::Null, |ids| ids.iter().map(|id| json!(id.as_i64().unwrap_or(0) - 1)).collect())
}

/// The batch of a file: rows of `[rows, T]` as documents, or documents of one row by their ids.
fn batch(golden: &Golden) -> Result<PackedBatch, String> {
    let size = golden.tensor("in.input_ids")?.size();
    let (rows, tokens) = (size[0], size[1]);
    let lengths: Vec<i64> = match golden.has("in.document_ids") {
        true => golden
            .integers("in.document_ids")?
            .chunk_by(|one, other| one == other)
            .map(|run| run.len() as i64)
            .collect(),
        false => vec![tokens; rows as usize],
    };
    Ok(PackedBatch {
        ids: golden.integers("in.input_ids")?,
        positions: lengths.iter().flat_map(|&length| 0..length).collect(),
        supervised: golden.integers("in.loss_mask")?.iter().map(|&mark| mark != 0).collect(),
        documents: (0..lengths.len()).map(|row| DocumentRef::new(format!("{row}"), row as u64)).collect(),
        lengths,
    })
}

/// A block at a row of the batch by plain rules: tokens of the whole buffer, and slots as they are marked.
fn block(batch: &PackedBatch, anchor: i64, size: i64, limit: i64, supervised: Vec<bool>) -> Block {
    let mut start = 0;
    let mut document = 0;
    while start + batch.lengths[document] <= anchor {
        start += batch.lengths[document];
        document += 1;
    }
    let token = |row: i64| if row < limit { batch.ids[row as usize] } else { 0 };
    let slots = supervised.len() as i64;
    Block {
        document,
        context: start..anchor,
        position: anchor - start,
        tokens: (0..=size).map(|place| token(anchor + place)).collect(),
        before: if anchor > start { token(anchor - 1) } else { token(anchor) },
        supervised,
        teachers: (0..slots).map(|slot| (anchor + slot).min(limit - 1)).collect(),
    }
}

/// speculators' packed batch: anchors index the buffer, and nothing stops at a document's end.
pub fn speculators(golden: &Golden, algorithm: &str, more: Value, naming: Naming<'_>) -> Result<Case, String> {
    let (layers, spec, call) =
        (json_of(golden, "transformer_layer_config")?, json_of(golden, "spec")?, json_of(golden, "call")?);
    let size = spec["block_size"].as_i64().ok_or("no block_size")?;
    let shift = spec["sample_from_anchor"].as_bool().unwrap_or(algorithm == "dspark");
    let loss = match &call["loss_fn"] {
        Value::String(name) => serde_json::from_str(name).unwrap_or_else(|_| json!(name)),
        _ => json!("kl"),
    };
    let weights = match call["per_position_loss_weight"].as_str() {
        Some("dpace") => json!({"name": "d_pace", "alpha": call["dpace_alpha"].as_f64().unwrap_or(0.5)}),
        _ => json!({"name": "fixed", "gamma": call["gamma"].as_f64().unwrap_or(4.0)}),
    };
    let types = layers.get("layer_types").or(spec.get("layer_types")).cloned();
    let sliding = |kind: &Value| kind.as_str() == Some("sliding_attention");
    let any_sliding = types.as_ref().and_then(Value::as_array).is_some_and(|types| types.iter().any(sliding));
    let non_causal = spec["sliding_window_non_causal"].as_bool().unwrap_or(algorithm == "dflash2");
    let mut section = json!({
        "algorithm": algorithm,
        "num_layers": layers["num_hidden_layers"],
        "block_size": size,
        "layout": if shift { "shift" } else { "fill_in" },
        "target_layer_ids": outputs(&spec["aux_hidden_state_layer_ids"]),
        "mask_token_id": spec["mask_token_id"],
        "layer_types": types,
        "sliding_window": if any_sliding { layers.get("sliding_window").or(spec.get("sliding_window")).cloned() } else { None },
        "is_causal": if any_sliding && non_causal { Some(false) } else { None },
        "loss": loss, "labels": "teacher", "weights": weights, "denominators": "rows",
    });
    merge(&mut section, more);
    let Value::Object(section) = section else { return Err("no section".to_owned()) };
    let head = golden.tensor("w.verifier_lm_head.weight")?;
    let map = match golden.has("w.d2t") {
        true => {
            let ids = golden.integers("w.d2t")?.iter().zip(0..).map(|(offset, id)| id + offset).collect();
            Some(VocabMap::new(ids, golden.tensor("w.t2d")?.numel() as i64).map_err(text)?)
        }
        false => None,
    };
    let (head, map) = whole_head(head, map)?;
    let embedding = golden.tensor("w.embed_tokens.weight")?;
    let draft = draft(golden, Setting { section, layers: &layers, embedding, head, map }, naming)?;

    let batch = batch(golden)?;
    let tokens = batch.ids.len() as i64;
    let marks = golden.integers("mid.loss_mask")?;
    let (anchors, valid) = (golden.integers("sample.anchors")?, golden.integers("sample.valid")?);
    let first = draft.shape().first_row();
    let mut blocks = BlockPlan { windows: Windows::ByBlock, ..BlockPlan::default() };
    for (index, (&anchor, &valid)) in anchors.iter().zip(&valid).enumerate() {
        let own = &marks[index * size as usize..][..size as usize];
        let supervised: Vec<bool> = own[first as usize..].iter().map(|&mark| mark != 0 && valid != 0).collect();
        if supervised.contains(&true) {
            blocks.blocks.push(block(&batch, anchor, size, tokens, supervised));
        }
    }
    let norm = RmsNorm {
        weight: golden.tensor("w.verifier_norm.weight")?,
        epsilon: layers["rms_norm_eps"].as_f64().unwrap_or(1e-6),
    };
    let last = norm.forward(&golden.tensor("in.verifier_last_hidden_states")?.squeeze_dim(0));
    let features = features(golden, batch, draft.shape().target_layer_ids.len() as i64, Some(last))?;
    Ok(Case { draft, features, blocks })
}

/// Rows of one document each, as SpecForge trains them.
pub fn specforge(golden: &Golden, algorithm: &str, more: Value) -> Result<Case, String> {
    let layers = json_of(golden, "config")?;
    let size: i64 = golden.text("block_size")?.parse().map_err(text)?;
    let kw = json_of(golden, "model_kw")?;
    let types = layers["layer_types"].clone();
    let sliding = types.as_array().is_some_and(|types| types.iter().any(|kind| kind == "sliding_attention"));
    let weights = match (kw["loss_type"].as_str(), kw["loss_decay_gamma"].as_f64()) {
        (Some("dpace"), _) => json!({"name": "d_pace", "alpha": kw["dpace_alpha"].as_f64().unwrap_or(0.5)}),
        (Some("dpace-cumulative-confidence-only"), _) => {
            json!({"name": "d_pace", "alpha": kw["dpace_alpha"].as_f64().unwrap_or(0.5), "part": "confidence"})
        }
        (Some("dpace-continuation-value-only"), _) => {
            json!({"name": "d_pace", "alpha": kw["dpace_alpha"].as_f64().unwrap_or(0.5), "part": "continuation"})
        }
        (_, Some(gamma)) => json!({"name": "fixed", "gamma": gamma}),
        _ => json!({"name": "even"}),
    };
    let denominators = if weights["name"] == "d_pace" { "documents" } else { "weights" };
    let mut section = json!({
        "algorithm": algorithm,
        "num_layers": layers["num_hidden_layers"],
        "block_size": size,
        "target_layer_ids": layers["dflash_config"]["target_layer_ids"],
        "mask_token_id": layers["dflash_config"]["mask_token_id"],
        "layer_types": types,
        "sliding_window": if sliding { layers["sliding_window"].clone() } else { Value::Null },
        "loss": "ce", "labels": "data", "weights": weights, "denominators": denominators,
    });
    merge(&mut section, more);
    let mask = section["mask"].as_str() == Some("exact");
    if section["mask"].is_null() {
        section["mask"] = json!("label");
    }
    let Value::Object(section) = section else { return Err("no section".to_owned()) };
    let setting = Setting {
        section,
        layers: &layers,
        embedding: golden.tensor("w.target_embed.weight")?,
        head: golden.tensor("w.target_head.weight")?,
        map: None,
    };
    let draft = draft(golden, setting, &same_names)?;
    let batch = batch(golden)?;
    let (slots, tokens) = (draft.shape().slots(), batch.lengths[0]);
    let (anchors, keep) = (golden.integers("sample.anchors")?, golden.integers("sample.keep")?);
    let of_row = anchors.len() / batch.lengths.len();
    let mut blocks = BlockPlan::default();
    for (index, (&anchor, _)) in anchors.iter().zip(&keep).enumerate().filter(|(_, (_, keep))| **keep != 0) {
        let start = (index / of_row) as i64 * tokens;
        let (row, end) = (start + anchor, start + tokens);
        let mut open = true;
        let supervised: Vec<bool> = (1..=slots)
            .map(|slot| {
                let own = row + slot < end && batch.supervised[(row + slot) as usize];
                open &= own;
                if mask { open } else { own }
            })
            .collect();
        if supervised.contains(&true) {
            blocks.blocks.push(block(&batch, row, size, end, supervised));
        }
    }
    let last = golden.has("in.target_last_hidden_states").then(|| golden.tensor("in.target_last_hidden_states"));
    let last = last.transpose()?.map(|last| last.flatten(0, 1));
    let features = features(golden, batch, draft.shape().target_layer_ids.len() as i64, last)?;
    Ok(Case { draft, features, blocks })
}

/// Rows of one document each, as ModelOpt and NeMo AutoModel train them: anchors that are not kept have no block, and slots
/// are supervised as they are marked. What the target predicts is given as logits, and the states that give them are found.
pub fn marked_rows(
    golden: &Golden,
    layers: &Value,
    section: Map<String, Value>,
    naming: Naming<'_>,
) -> Result<Case, String> {
    let head = golden.tensor("w.target_head.weight")?;
    let embedding = golden.tensor("w.target_embed.weight")?;
    let last = match golden.has("in.target_logits") {
        true => Some(states_of(&golden.tensor("in.target_logits")?.flatten(0, 1), &head)?),
        false => None,
    };
    let draft = draft(golden, Setting { section, layers, embedding, head, map: None }, naming)?;
    let batch = batch(golden)?;
    let (size, slots, tokens) = (draft.shape().block_size, draft.shape().slots(), batch.lengths[0]);
    let (anchors, keep) = (golden.integers("sample.anchors")?, golden.integers("sample.keep")?);
    let of_row = anchors.len() / batch.lengths.len();
    let mut blocks = BlockPlan::default();
    for (index, (&anchor, _)) in anchors.iter().zip(&keep).enumerate().filter(|(_, (_, keep))| **keep != 0) {
        let start = (index / of_row) as i64 * tokens;
        let (row, end) = (start + anchor, start + tokens);
        let marked = |slot: i64| row + slot < end && batch.supervised[(row + slot) as usize];
        let supervised: Vec<bool> = (1..=slots).map(marked).collect();
        if supervised.contains(&true) {
            blocks.blocks.push(block(&batch, row, size, end, supervised));
        }
    }
    let features = features(golden, batch, draft.shape().target_layer_ids.len() as i64, last)?;
    Ok(Case { draft, features, blocks })
}

/// States `[T, H]` whose logits are `[T, V]` by a projection `[V, H]`, the shortest ones.
fn states_of(logits: &Tensor, head: &Tensor) -> Result<Tensor, String> {
    let (wide, projection) = (logits.to_kind(Kind::Double), head.to_kind(Kind::Double));
    let states = wide.matmul(&projection.pinverse(1e-15).transpose(0, 1));
    near("logits of the states found for them", &states.matmul(&projection.transpose(0, 1)), &wide)?;
    Ok(states.to_kind(Kind::Float))
}

/// Adds keys to a section.
pub fn merge(section: &mut Value, more: Value) {
    if let (Some(section), Value::Object(more)) = (section.as_object_mut(), more) {
        section.extend(more);
    }
}

/// Where a file has only the rows of the draft's vocabulary, the target's projection with nothing in the others.
fn whole_head(head: Tensor, map: Option<VocabMap>) -> Result<(Tensor, Option<VocabMap>), String> {
    let Some(map) = map else { return Ok((head, None)) };
    if head.size()[0] == map.target_size() {
        return Ok((head, Some(map)));
    }
    let whole = Tensor::zeros([map.target_size(), head.size()[1]], (Kind::Float, Device::Cpu));
    Ok((whole.index_copy(0, &Tensor::from_slice(map.target_ids()), &head), Some(map)))
}

/// What the draft reads of the batch: captured layers, and the last state where there is one.
fn features(golden: &Golden, batch: PackedBatch, layers: i64, last: Option<Tensor>) -> Result<FeatureBatch, String> {
    let captured = golden.tensor("in.hidden_states")?.flatten(0, 1); // [T, nf * H]
    let all = captured.chunk(layers, 1).into_iter().chain(last);
    let hidden = all.map(|states| states.to_kind(KIND)).collect();
    Ok(FeatureBatch::new(Arc::new(batch), hidden))
}

/// Plain DFlash of speculators.
pub fn check_speculators_dflash(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let case = speculators(&golden, "dflash", json!({}), &same_names)?;
    let step = case.step()?;
    step.check(&golden, &same_names)?;
    let shape = case.draft.shape();
    // The file counts rows, and names those alone that predict something.
    for (slot, row) in (1..=shape.slots()).zip(shape.first_row()..) {
        let own =
            |what: &str| golden.tensor(&format!("out.position_{row}_acc_{what}")).map(|sum| sum.double_value(&[]));
        let (right, all) = (own("sum")?, own("total")?);
        let got = case.average(&step, &format!("slot{slot}/accuracy"))?;
        // A slot that no block supervises has 0 / 0.
        if all > 0.0 && (got - right / all).abs() > 1e-6 {
            return Err(format!("accuracy of slot {slot}: expected {right} of {all}, got {got}"));
        }
    }
    Ok(format!("loss, {} gradients, accuracy by slot", step.gradients.len()))
}

/// Plain DFlash and D-PACE of SpecForge.
pub fn check_specforge_dflash(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let case = specforge(&golden, "dflash", json!({}))?;
    let step = case.step()?;
    step.check(&golden, &same_names)?;
    Ok(format!("loss, {} gradients", step.gradients.len()))
}
