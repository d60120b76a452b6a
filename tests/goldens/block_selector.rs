//! DFlash2's candidate selector: z-lab's `dflash` 0.1.0 (`infer_dflash2*`), and training in speculators 0.9.0, ModelOpt 0.48
//! and NeMo AutoModel 0.7 (`sp_`, `mo_`, `na_dflash2*`), from the hidden states of the files.

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge::draft::block::config::{BlockConfig, BlockShape};
use specforge::draft::block::heads::selector::{KIND, Selector, SelectorConfig};
use specforge::nn::Head;

use super::Golden;
use super::block_batch::{Blocks, Trained, modelopt, modelopt_sizes, pieces, speculators};
use super::block_parts::{
    draft, finder, head_keys, json_of, near, setting, steps, stored_name, text, with_conv, with_head,
};
use super::block_training::{self, Case};

/// Keys of `draft.head` that files have under the same names.
pub const KEYS: &[&str] =
    &["selector_rank", "selector_top_k", "input_embedding_scale", "output_multiplier", "final_logit_softcapping"];

/// Checks the heads of an inference file.
pub fn check_inference(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config = json_of(&golden, "config")?;
    let head = head_keys(&config, "dflash_config", KEYS);
    let selector = selector(&golden, &config, "dflash_config", head)?;
    let projection = Head::plain(golden.tensor("w.target_head.weight")?);
    let mut largest: f64 = 0.0;
    let steps = steps(&golden)?;
    for step in &steps {
        let get = |name: &str| golden.tensor(&format!("{}{name}", step.out));
        let rows = step.hidden.narrow(1, 1, step.hidden.size()[1] - 1); // [1, S, H]
        let logits = selector.finish(projection.logits(&rows));
        largest = largest.max(near("logits", &logits.squeeze_dim(0), &get("logits")?)?);
        near("argmax_tokens", &logits.argmax(-1, false).squeeze_dim(0), &get("argmax_tokens")?)?;
        let candidates = selector.candidates(&logits);
        near("candidate_ids", &candidates.ids.squeeze_dim(0), &get("candidate_ids")?)?;
        largest = largest.max(near("unary", &candidates.logits.squeeze_dim(0), &get("unary")?)?);
        let projected = selector.project(&rows);
        let walk = selector.walk(&candidates, &projected, &step.anchor);
        near("tokens", &walk.tokens.squeeze_dim(0), &get("tokens")?)?;
        largest = largest.max(near("scores", &walk.scores.squeeze_dim(0), &get("scores")?)?);
        let by_lattice = selector.lattice(&candidates, &projected, &step.anchor).walk();
        near("tokens by the lattice", &by_lattice.tokens, &walk.tokens)?;
        near("scores by the lattice", &by_lattice.scores, &walk.scores)?;
    }
    Ok(format!("{} blocks: logits, candidates, scores and tokens within {largest:.1e}", steps.len()))
}

/// Checks a training file of speculators: KL or any other loss, and the selector's term.
pub fn check_speculators(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (spec, call) = (json_of(&golden, "spec")?, json_of(&golden, "call")?);
    let mut section = speculators(&call);
    let mut head = head_keys(&spec, "", KEYS);
    head.insert("objective".to_owned(), json!("speculators"));
    head.insert("selector_weight".to_owned(), call.get("selector_loss_alpha").cloned().unwrap_or(json!(1)));
    section.insert("head".to_owned(), Value::Object(head));
    if spec.get("sample_from_anchor") == Some(&json!(true)) {
        section.insert("layout".to_owned(), json!("shift"));
    }
    with_conv(&spec, "", &mut section);
    let more = Value::Object(["head", "conv"].iter().map(|&key| (key.to_owned(), section[key].clone())).collect());
    let whole = whole(&golden, &block_training::speculators(&golden, "dflash2", more, &naming(&golden))?)?;
    let block_size = spec.get("block_size").and_then(Value::as_i64).ok_or("there is no block size")?;
    let (config, shape) = draft("dflash2", &json_of(&golden, "transformer_layer_config")?, block_size, section)?;
    let blocks = Blocks::packed(&golden, &shape)?;
    let top_k = head_key(&config, "selector_top_k");
    let head = train(&golden, &blocks, (&config, &shape), |trained| {
        trained.near(&golden, "out.unary_loss_sum", trained.part(0))?;
        trained.near(&golden, "out.selector_loss_sum", trained.part(1))?;
        let recall = format!("out.unary_candidate_recall_at_{top_k}");
        let quotient = |name: &str| {
            Ok::<_, String>(number(&golden, &format!("{name}_sum"))? / number(&golden, &format!("{name}_total"))?)
        };
        let (got, want) = (trained.metrics[&format!("recall_at_{top_k}")], quotient(&recall)?);
        if (got - want).abs() > 1e-6 {
            return Err(format!("{recall}: expected {want}, got {got}"));
        }
        Ok(())
    })?;
    Ok(format!("{whole}; {head}"))
}

/// Checks a training file of ModelOpt: the drafted block, the loss and the selector's figures.
pub fn check_modelopt(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    check_drafted(&golden)?;
    let (source, block_size, sizes) = modelopt_sizes(&golden)?;
    let mut section = modelopt(&source);
    let mut head = head_keys(&source, "dflash_architecture_config", KEYS);
    head.insert("objective".to_owned(), json!("modelopt"));
    head.insert("selector_weight".to_owned(), source.get("dflash_selector_loss_alpha").cloned().unwrap_or(json!(1)));
    section.insert("head".to_owned(), Value::Object(head));
    section.insert("block_size".to_owned(), json!(block_size));
    section.insert("algorithm".to_owned(), json!("dflash2"));
    section.insert("target_layer_ids".to_owned(), json_of(&golden, "target_layer_ids")?);
    let case = block_training::marked_rows(&golden, &sizes, section.clone(), &naming(&golden))?;
    let whole = whole(&golden, &case)?;
    let (config, shape) = draft("dflash2", &sizes, block_size, section)?;
    let blocks = Blocks::unpacked(&golden, &shape)?;
    let recall = format!("recall_at_{}", head_key(&config, "selector_top_k"));
    let head = train(&golden, &blocks, (&config, &shape), |trained| {
        trained.near(&golden, "out.accuracy", trained.metrics["base_accuracy"])?;
        // A selector that is not trained is not looked at there.
        if golden.has("out.metric.selector_coverage") {
            trained.near(&golden, "out.metric.selector_coverage", trained.metrics[&recall])?;
            let accuracy = trained.hits() / trained.metrics[&recall].max(1e-12);
            trained.near(&golden, "out.metric.selector_accuracy", accuracy)?;
        }
        Ok(())
    })?;
    Ok(format!("{whole}; {head}"))
}

/// Checks a training file of NeMo AutoModel.
pub fn check_automodel(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let source = json_of(&golden, "config")?;
    let weights = match golden.text("gamma").ok().and_then(|gamma| gamma.parse::<f64>().ok()) {
        Some(gamma) => json!({"name": "fixed", "gamma": gamma}),
        None => json!({"name": "even"}),
    };
    let alpha: f64 = golden.text("selector_loss_weight")?.parse().map_err(text)?;
    let mut head = head_keys(&source, "dflash_config", KEYS);
    head.insert("objective".to_owned(), json!("automodel"));
    head.insert("selector_weight".to_owned(), json!(alpha));
    let mut section = with_head(head);
    section.insert("weights".to_owned(), weights);
    with_conv(&source, "dflash_config", &mut section);
    let block_size = setting(&source, "dflash_config", "block_size").and_then(Value::as_i64).unwrap_or(16);
    let Value::Object(more) = json!({
        "algorithm": "dflash2", "block_size": block_size, "num_layers": source["num_hidden_layers"],
        "mask_token_id": source["dflash_config"]["mask_token_id"], "mask": "label",
        "target_layer_ids": source["dflash_config"]["target_layer_ids"],
        "layer_types": source["layer_types"], "sliding_window": source["sliding_window"], "is_causal": source["is_causal"],
    }) else {
        unreachable!("an object")
    };
    section.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
    let whole = whole(&golden, &block_training::marked_rows(&golden, &source, section.clone(), &naming(&golden))?)?;
    let (config, shape) = draft("dflash2", &source, block_size, section)?;
    let blocks = Blocks::unpacked(&golden, &shape)?;
    let recall = format!("recall_at_{}", head_key(&config, "selector_top_k"));
    let head = train(&golden, &blocks, (&config, &shape), |trained| {
        trained.near(&golden, "out.base_loss", trained.part(0))?;
        trained.near(&golden, "out.selector_loss", trained.part(1))?;
        trained.near(&golden, "out.base_accuracy", trained.metrics["base_accuracy"])?;
        trained.near(&golden, "out.candidate_recall", trained.metrics[&recall])?;
        trained.near(&golden, "out.accuracy", trained.hits())?;
        Ok(())
    })?;
    Ok(format!("{whole}; {head}"))
}

/// Names of the file for the draft's.
fn naming(golden: &Golden) -> impl Fn(&str) -> String + '_ {
    |name| stored_name(golden, &[], name)
}

/// The whole step, the backbone with it.
fn whole(golden: &Golden, case: &Case) -> Result<String, String> {
    let step = case.step()?;
    step.check(golden, &naming(golden))?;
    Ok(format!("loss, {} gradients", step.gradients.len()))
}

/// Loss and gradients in one chunk and in several.
fn train(
    golden: &Golden,
    blocks: &Blocks,
    draft: (&BlockConfig, &BlockShape),
    figures: impl Fn(&Trained) -> Result<(), String>,
) -> Result<String, String> {
    let mut largest: f64 = 0.0;
    for piece in pieces(draft.0) {
        let trained = blocks.train(golden, &KIND, &[], draft, piece)?;
        figures(&trained)?;
        largest = largest.max(trained.check(golden, &[])?);
    }
    Ok(format!("{} blocks: loss, terms and the head's gradients within {largest:.1e}", blocks.supervised.len()))
}

fn head_key(config: &BlockConfig, key: &str) -> i64 {
    config.head.get(key).and_then(Value::as_i64).unwrap_or(16)
}

fn number(golden: &Golden, name: &str) -> Result<f64, String> {
    Ok(golden.tensor(name)?.double_value(&[]))
}

/// Checks the drafted block of a training file.
fn check_drafted(golden: &Golden) -> Result<(), String> {
    let config = json_of(golden, "config")?;
    let base = json_of(golden, "base_config")?;
    let head = head_keys(&config, "dflash_architecture_config", KEYS);
    let selector = selector(golden, &base, "", head)?;
    let get = |name: &str| golden.tensor(&format!("infer.{name}"));
    let (row, anchor) = (get("row")?.int64_value(&[]), get("anchor")?.int64_value(&[]));
    let anchor = golden.tensor("in.input_ids")?.get(row).narrow(0, anchor, 1); // [1]
    let hidden = get("hidden")?; // [1, B, H]
    let rows = hidden.narrow(1, 1, hidden.size()[1] - 1);
    let logits = selector.finish(Head::plain(golden.tensor("w.target_head.weight")?).logits(&rows));
    let candidates = selector.candidates(&logits);
    near("infer.candidate_ids", &candidates.ids, &get("candidate_ids")?)?;
    near("infer.unary", &candidates.logits, &get("unary")?)?;
    near("infer.backbone_tokens", &logits.argmax(-1, false).squeeze_dim(0), &get("backbone_tokens")?)?;
    let walk = selector.walk(&candidates, &selector.project(&rows), &anchor);
    near("infer.tokens", &walk.tokens.squeeze_dim(0), &get("tokens")?)?;
    Ok(())
}

fn selector(golden: &Golden, config: &Value, section: &str, mut head: Map<String, Value>) -> Result<Selector, String> {
    // z-lab's module takes a cap of 0 for none.
    if head.get("final_logit_softcapping").and_then(Value::as_f64) <= Some(0.0) {
        head.remove("final_logit_softcapping");
    }
    let block_size = setting(config, section, "block_size").and_then(Value::as_i64).unwrap_or(16);
    let mut keys = with_head(head);
    with_conv(config, section, &mut keys);
    if !keys.contains_key("conv") {
        keys.insert("conv".to_owned(), json!({"kernel_size": 1, "group_size": 1}));
    }
    let (config, shape) = draft("dflash2", config, block_size, keys)?;
    let own = SelectorConfig::of(&config, &shape).map_err(text)?;
    Selector::new(&own, &finder(golden, &[])).map_err(text)
}
