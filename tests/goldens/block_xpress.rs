//! XPress: vLLM 0.33's refiner on z-lab's backbone (`infer_xpress*`), and training in speculators 0.9.0 (`sp_xpress*`) from the
//! hidden states of the files.

use std::path::Path;

use serde_json::{Value, json};
use specforge::draft::block::heads::xpress::{Before, KIND, Xpress, XpressConfig};
use specforge::nn::Head;
use tch::{Kind, Tensor};

use super::Golden;
use super::block_batch::{Blocks, pieces, speculators};
use super::block_parts::{draft, finder, head_keys, json_of, near, setting, steps, stored_name, text, with_head};
use super::block_training;

/// Keys of `draft.head` that files have under the same names.
const KEYS: &[&str] = &["xpress_rank", "xpress_num_passes", "xpress_topc", "xpress_mlp_ratio"];

/// Names of the engine, and what the trainer calls them.
const NAMES: &[(&str, &str)] = &[
    ("xpress_head.w1.", "refiner_head.token_embed."),
    ("xpress_head.w2.", "refiner_head.readout."),
    ("xpress_head.mix.L", "refiner_head.mix_l"),
    ("xpress_head.mlp.gate_proj.", "refiner_head.mlp_gate."),
    ("xpress_head.mlp.up_proj.", "refiner_head.mlp_up."),
    ("xpress_head.mlp.down_proj.", "refiner_head.mlp_down."),
    ("xpress_head.", "refiner_head."),
];

/// Checks the heads of an inference file.
pub fn check_inference(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config = json_of(&golden, "config")?;
    let block_size = setting(&config, "dflash_config", "xpress_block_size").and_then(Value::as_i64);
    let block_size = block_size.ok_or("there is no `xpress_block_size`")?;
    let (draft, shape) = draft("xpress", &config, block_size, with_head(head_keys(&config, "dflash_config", KEYS)))?;
    let own = XpressConfig::read(&draft).map_err(text)?;
    let refiner = Xpress::new(&shape, &finder(&golden, &[])).map_err(text)?;
    let projection = Head::plain(golden.tensor("w.target_head.weight")?);
    let steps = steps(&golden)?;
    let mut largest: f64 = 0.0;
    for step in &steps {
        let get = |name: &str| golden.tensor(&format!("{}{name}", step.out));
        let all = projection.logits(&step.hidden); // [1, B, V]
        largest = largest.max(near("base_logits", &all.squeeze_dim(0), &get("base_logits")?)?);
        let base = all.narrow(1, shape.first_row(), shape.slots());
        // The engine has no token before the anchor, and takes the anchor.
        for (kind, earlier) in [("train", &step.earlier), ("engine", &step.anchor)] {
            let before = Before { anchor: &step.anchor, earlier };
            let passes = own.xpress_num_passes;
            let refined = refiner.refine(&step.hidden, &base, before, passes, None);
            let compare = |name: &str, got: &Tensor| {
                let name = format!("{name}_{kind}");
                near(&name, &got.squeeze_dim(0), &get(&name)?)
            };
            compare("passes", &Tensor::stack(&refined.passes, 1))?;
            compare("tokens", &refined.tokens)?;
            largest = largest.max(compare("logits", &refined.logits)?);
            let topc = refiner.refine(&step.hidden, &base, before, passes, Some(own.xpress_topc));
            near("tokens of the likeliest", &topc.tokens.squeeze_dim(0), &get(&format!("tokens_{kind}_topc"))?)?;
            let fixed = refiner.refine(&step.hidden, &base, before, shape.slots() as usize, None);
            compare("tokens_sequential", &fixed.tokens)?;
            compare("tokens_sequential", &left_to_right(&refiner, &step.hidden, &base, before))?;
        }
    }
    Ok(format!("{} blocks, each with two predecessors: passes, logits and tokens within {largest:.1e}", steps.len()))
}

/// Checks a training file of speculators: the teacher-forced term, those of the free passes, and the base logits'.
pub fn check_speculators(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let (spec, call) = (json_of(&golden, "spec")?, json_of(&golden, "call")?);
    let mut section = speculators(&call);
    let mut head = head_keys(&spec, "", KEYS);
    for (key, ours) in [
        ("consistency_weight", "consistency_weight"),
        ("consistency_passes", "consistency_passes"),
        ("base_anchor_weight", "base_weight"),
        ("base_anchor_full_weight", "base_unweighted"),
    ] {
        if let Some(value) = call.get(key) {
            head.insert(ours.to_owned(), value.clone());
        }
    }
    section.insert("head".to_owned(), Value::Object(head));
    if spec.get("sample_from_anchor") == Some(&json!(true)) {
        section.insert("layout".to_owned(), json!("shift"));
    }
    let naming = |name: &str| stored_name(&golden, NAMES, name);
    let more = json!({"head": section["head"], "labels": section["labels"]});
    let step = block_training::speculators(&golden, "xpress", more, &naming)?.step()?;
    step.check(&golden, &naming)?;
    if golden.has("w.d2t") {
        return Ok(format!("loss, {} gradients, a vocabulary of its own", step.gradients.len()));
    }
    let block_size = spec.get("block_size").and_then(Value::as_i64).ok_or("there is no block size")?;
    let (config, shape) = draft("xpress", &json_of(&golden, "transformer_layer_config")?, block_size, section)?;
    let blocks = Blocks::packed(&golden, &shape)?;
    let mut largest: f64 = 0.0;
    for piece in pieces(&config) {
        let trained = blocks.train(&golden, &KIND, NAMES, (&config, &shape), piece)?;
        trained.near(&golden, "out.tf_loss_sum", trained.part(0))?;
        let last = trained.parts.len() - 1;
        let free = (0..).take_while(|round| golden.has(&format!("out.consistency_round{round}_loss_sum"))).count();
        for round in 0..free {
            let name = format!("out.consistency_round{round}_loss_sum");
            trained.near(&golden, &name, trained.part(round + 1))?;
        }
        if golden.has("out.base_anchor_loss_sum") {
            trained.near(&golden, "out.base_anchor_loss_sum", trained.part(last))?;
        }
        largest = largest.max(trained.check(&golden, NAMES)?);
    }
    let (count, gradients) = (blocks.supervised.len(), step.gradients.len());
    Ok(format!("{count} blocks: loss, terms, {gradients} gradients; head within {largest:.1e}"))
}

fn left_to_right(refiner: &Xpress, hidden: &Tensor, base: &Tensor, before: Before<'_>) -> Tensor {
    let cache = refiner.cache(hidden);
    let mut chosen = Tensor::zeros([base.size()[0], 0], (Kind::Int64, base.device()));
    for slot in 0..base.size()[1] {
        let token = refiner.step(&cache, base, before, slot, &chosen).argmax(-1, true);
        chosen = Tensor::cat(&[chosen, token], 1);
    }
    chosen
}
