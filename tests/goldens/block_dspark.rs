//! DSpark: one block of deepseek-ai/DeepSpec `afdfa7c` (`infer_dspark*`), training of speculators 0.9.0 (`sp_dspark*`) and of
//! SpecForge `a6b6b02` (`dspark_*`).

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge::draft::block::heads::markov::{Markov, MarkovConfig};
use specforge::draft::block::heads::sequential::{Drafted, greedy, walk};
use tch::{Kind, Tensor};

use super::Golden;
use super::block_heads::{close, flag, greedy_length, near, number, of_slots, same, shape, weights};
use super::block_training::{json_of, merge, same_names, specforge, speculators, text};

/// The keys of `draft.head` that a reference's configuration says.
fn head_keys(config: &Value, confidence: bool) -> Map<String, Value> {
    let kind = config.get("markov_head_type").and_then(Value::as_str).unwrap_or("vanilla");
    let head = json!({
        "markov_rank": number(config, "markov_rank", 256.0) as i64,
        "markov_head_type": kind,
        "confidence_head": flag(config, "enable_confidence_head", confidence),
        "confidence_head_with_markov": flag(config, "confidence_head_with_markov", confidence),
    });
    head.as_object().cloned().unwrap_or_default()
}

/// Checks a file of two blocks.
pub fn check_block(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config = json_of(&golden, "config")?;
    let head = golden.tensor("w.lm_head.weight")?; // [DV, H]
    let embedding = golden.tensor("w.embed_tokens.weight")?; // [V, H]
    let (mut worst, mut drafted) = (0.0f64, 0);
    for step in ["step1", "step2"] {
        let get = |name: &str| golden.tensor(&format!("out.{step}.{name}"));
        let hidden = get("hidden")?.unsqueeze(0); // [1, B, H]
        let tokens = get("tokens")?; // [S]
        let (rows, slots) = (hidden.size()[1], tokens.size()[0]);
        let section = json!({"head": head_keys(&config, golden.has("w.confidence_head.proj.weight"))});
        let section = section.as_object().cloned().unwrap_or_default();
        let sizes = (embedding.size()[1], embedding.size()[0]);
        let (config, shape) = shape("dspark", rows, rows == slots, sizes, section)?;
        let own = MarkovConfig::read(&config).map_err(text)?;
        let markov = Markov::new(&own, &shape, &weights(&golden)).map_err(text)?;

        let base = hidden.narrow(1, shape.first_row(), slots).linear(&head, None::<Tensor>); // [1, S, DV]
        worst = worst.max(near(&format!("{step} base logits"), &base.squeeze_dim(0), &get("base_logits")?)?);
        let anchors = golden.tensor(if step == "step1" { "in.tokens" } else { "in.tokens_step2" })?;
        let anchors = anchors.narrow(0, anchors.size()[0] - 1, 1);
        let block = Drafted {
            hidden: &hidden,
            first_row: shape.first_row(),
            base: &base,
            anchors: &anchors,
            embedding: &embedding,
            tokens: None,
            pool: None,
        };
        let walked = walk(&markov, &block, slots, &mut greedy).map_err(text)?;
        same(&format!("{step} tokens"), &walked.tokens, &tokens)?;
        let logits = Tensor::stack(&walked.logits, 1).squeeze_dim(0);
        worst = worst.max(near(&format!("{step} logits"), &logits, &get("logits")?)?);
        if golden.has(&format!("out.{step}.confidence_logits")) {
            let got = walked.confidence.ok_or("the head has no confidence")?.squeeze_dim(0);
            worst = worst.max(near(&format!("{step} confidence"), &got, &get("confidence_logits")?)?);
        }
        drafted += slots;
    }
    Ok(format!("{drafted} tokens of two blocks, logits and confidence, {worst:.1e}"))
}

/// Adds keys to `draft.head`.
fn with(mut head: Map<String, Value>, key: &str, value: impl Into<Value>) -> Map<String, Value> {
    head.insert(key.to_owned(), value.into());
    head
}

/// Checks a file of speculators' training.
pub fn check_speculators(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (spec, call) = (json_of(&golden, "spec")?, json_of(&golden, "call")?);
    let weight = number(&call, "confidence_head_alpha", 1.0);
    let head = head_keys(&spec, true);
    let rnn = head["markov_head_type"] == json!("rnn") && !flag(&spec, "sample_from_anchor", true);
    let head = with(head, "confidence_gamma", number(&call, "gamma", 4.0));
    let head = with(head, "anchor_row_writes_state", rnn);
    let head = with(head, "confidence_weight", weight);
    let case_of = |more: Value| speculators(&golden, "dspark", more, &same_names);
    let case = case_of(json!({"head": head}))?;
    let first = case.draft.shape().first_row();
    let step = case.step()?;
    step.check(&golden, &same_names)?;

    let scalar = |name: String| Ok::<_, String>(golden.tensor(&name)?.double_value(&[]));
    let silent = with(head.clone(), "confidence_weight", 0.0);
    let objective = |more: Value| Ok::<_, String>(case_of(more)?.step()?.tally.objective.double_value(&[]));
    let (mut worst, mut figures) = (0.0f64, 0);
    for name in golden.names_after("out.").filter_map(|name| name.strip_suffix("_sum")) {
        let total = scalar(format!("out.{name}_total"))?;
        if total == 0.0 {
            continue;
        }
        let slot = name.strip_prefix("position_").and_then(|rest| rest.strip_suffix("_acc")?.parse::<i64>().ok());
        let got = match (slot, name) {
            (Some(row), _) => case.average(&step, &format!("slot{}/accuracy", row - first + 1))?,
            (_, "loss") => step.tally.objective.double_value(&[]),
            (_, "accept_rate") => case.average(&step, "acceptance")?,
            (_, "accept_len") => case.average(&step, "expected_length")?,
            (_, "eal") => greedy_length(&case, &step, "expected_length")?,
            (_, "full_acc") => {
                let (hits, rows) = of_slots(&case, &step, "accuracy");
                hits / rows
            }
            (_, "confidence_abs_error") => case.average(&step, "confidence_error")?,
            (_, "confidence_pred_mean") => case.average(&step, "confidence_mean")?,
            (_, "confidence_cumprod_bias") => case.average(&step, "confidence_chain_bias")?,
            (_, "confidence_loss") => {
                let with_it = json!({"head": with(head.clone(), "confidence_weight", 1.0)});
                objective(with_it)? - objective(json!({"head": silent}))?
            }
            // A loss of the sum, by itself.
            (_, other) => {
                let own = other.strip_suffix("_loss").ok_or_else(|| format!("no figure is called {other}"))?;
                objective(json!({"loss": own, "head": silent}))?
            }
        };
        worst = worst.max(close(name, got, scalar(format!("out.{name}_sum"))? / total)?);
        figures += 1;
    }
    Ok(format!("loss, {} gradients, {figures} figures, {worst:.1e}", step.gradients.len()))
}

/// Checks a file of SpecForge's training.
pub fn check_specforge(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (config, keywords) = (json_of(&golden, "config")?, json_of(&golden, "model_kw")?);
    let (ce, l1) = (number(&keywords, "dspark_ce_loss_alpha", 0.1), number(&keywords, "dspark_l1_loss_alpha", 0.9));
    let weight = number(&keywords, "dspark_confidence_head_alpha", 1.0);
    let head = with(head_keys(&config["dflash_config"], false), "confidence_weight", weight);
    let case_of = |more: Value| {
        let mut section = json!({"layout": "shift", "mask": "exact", "loss": {"ce": ce, "l1": l1}});
        merge(&mut section, more);
        specforge(&golden, "dspark", section)
    };
    let case = case_of(json!({"head": head}))?;
    let step = case.step()?;
    step.check(&golden, &same_names)?;

    let ratio = |name: &str| {
        let part = |part: &str| golden.tensor(&format!("out.ratio.{name}.{part}"));
        Ok::<_, String>((part("num")? / part("den")?).to_kind(Kind::Double))
    };
    let silent = with(head.clone(), "confidence_weight", 0.0);
    let objective = |more: Value| Ok::<_, String>(case_of(more)?.step()?.tally.objective.double_value(&[]));
    let mut worst = 0.0f64;
    let mut figures = 0;
    let mut check = |name: &str, got: f64, want: f64| {
        figures += 1;
        close(name, got, want).map(|difference| worst = worst.max(difference))
    };
    let (hits, rows) = of_slots(&case, &step, "accuracy");
    check("acc", hits / rows, ratio("acc")?.double_value(&[]))?;
    for (slot, want) in (1..).zip(ratio("accuracy_position")?.unbind(0)) {
        // No slot there is supervised, and the ratio 0 / 0.
        if want.double_value(&[]).is_finite() {
            check("accuracy", case.average(&step, &format!("slot{slot}/accuracy"))?, want.double_value(&[]))?;
        }
    }
    if golden.has("out.ratio.tau_probabilistic.num") {
        check("tau", case.average(&step, "expected_length")?, ratio("tau_probabilistic")?.double_value(&[]))?;
    }
    // A loss of no weight is not computed there.
    for (name, loss, factor) in [("ce_loss", "ce", 1.0), ("l1_loss", "l1", l1)] {
        if factor > 0.0 {
            check(name, objective(json!({"loss": loss, "head": silent}))?, ratio(name)?.double_value(&[]))?;
        }
    }
    if head["confidence_head"] == json!(true) && weight > 0.0 {
        let with_it = json!({"head": with(head.clone(), "confidence_weight", 1.0)});
        let got = objective(with_it)? - objective(json!({"head": silent}))?;
        check("confidence_loss", got, ratio("confidence_loss")?.double_value(&[]))?;
    }
    Ok(format!("loss, {} gradients, {figures} figures, {worst:.1e}", step.gradients.len()))
}
