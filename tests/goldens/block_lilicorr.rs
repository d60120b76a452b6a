//! LiLiCorr: SGLang 0.5's head on z-lab's backbone (`infer_lilicorr*`), and training in ModelOpt 0.48 (`mo_lilicorr*`)
//! from the hidden states of the files.

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge::draft::block::heads::lattice::{Candidates, Lattice};
use specforge::draft::block::heads::lilicorr::{KIND, Lilicorr, LilicorrConfig};
use specforge::nn::Head;
use tch::Tensor;

use super::Golden;
use super::block_batch::{Blocks, modelopt, modelopt_sizes, pieces};
use super::block_parts::{
    context_at, draft, finder, head_keys, json_of, near, setting, steps, stored_name, text, with_head,
};
use super::block_training;

/// Keys of `draft.head` that files have under the same names.
pub const KEYS: &[&str] = &[
    "lilicorr_candidate_topk",
    "lilicorr_hidden_size",
    "lilicorr_num_layers",
    "lilicorr_num_heads",
    "lilicorr_mlp_ratio",
    "lilicorr_factor_dim",
    "lilicorr_vector_eps",
    "lilicorr_logit_scale",
];

/// Names of the engines, and what the trainer calls them.
pub const NAMES: &[(&str, &str)] = &[
    ("feature_norm", "feature_mlp.0"),
    ("feature_mlp.up_proj", "feature_mlp.1"),
    ("feature_mlp.down_proj", "feature_mlp.3"),
    ("mlp.up_proj", "mlp.0"),
    ("mlp.down_proj", "mlp.2"),
];

/// Terms of ModelOpt's configuration, in the order of the objective, and what they are called here.
const TERMS: [(&str, &str); 4] = [("ce", "ce"), ("margin", "margin"), ("pen", "penalty"), ("cal", "calibration")];

struct Scorer {
    head: Lilicorr,
    count: i64,
    epsilon: f64,
    projection: Head,
    embedding: Tensor,
}

impl Scorer {
    fn new(golden: &Golden, config: &Value, block_size: i64, head: Map<String, Value>) -> Result<Self, String> {
        let (config, shape) = draft("lilicorr", config, block_size, with_head(head))?;
        let own = LilicorrConfig::of(&config, &shape).map_err(text)?;
        Ok(Self {
            head: Lilicorr::new(&own, &shape, &finder(golden, NAMES)).map_err(text)?,
            count: own.lilicorr_candidate_topk,
            epsilon: shape.layer.rms_norm_eps,
            projection: Head::plain(golden.tensor("w.target_head.weight")?),
            embedding: golden.tensor("w.target_embed.weight")?,
        })
    }

    /// Logits, candidates, their log-probabilities and the lattice of blocks `hidden [n, B, H]`.
    fn score(&self, hidden: &Tensor, context: &Tensor) -> (Tensor, Candidates, Tensor, Lattice) {
        let rows = hidden.narrow(1, 1, hidden.size()[1] - 1); // [n, S, H]
        let logits = self.projection.logits(&rows);
        let candidates = Candidates::likeliest(&logits, self.count);
        let log_q = &candidates.logits - logits.logsumexp([-1].as_slice(), true);
        let lattice = self.head.lattice(&candidates, &log_q, &rows, context, &self.embedding);
        (logits, candidates, log_q, lattice)
    }
}

/// Checks the heads of an inference file.
pub fn check_inference(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let config = json_of(&golden, "config")?;
    let block_size = setting(&config, "dflash_config", "block_size").and_then(Value::as_i64).unwrap_or(16);
    let scorer = Scorer::new(&golden, &config, block_size, head_keys(&config, "dflash_config", KEYS))?;
    let steps = steps(&golden)?;
    let mut largest: f64 = 0.0;
    for step in &steps {
        let get = |name: &str| golden.tensor(&format!("{}{name}", step.out));
        let context = context_at(&golden, &step.features, step.features.size()[0] - 1, scorer.epsilon)?;
        let (logits, candidates, log_q, lattice) = scorer.score(&step.hidden, &context);
        let walk = lattice.walk();
        for (name, got) in [
            ("anchor_hidden", &context),
            ("argmax_tokens", &logits.argmax(-1, false)),
            ("candidate_ids", &candidates.ids),
            ("candidate_log_probs", &log_q),
            ("log_start", &lattice.start),
            ("log_pair", &lattice.pairs),
            ("path", &walk.places),
            ("tokens", &walk.tokens),
        ] {
            largest = largest.max(near(name, &got.squeeze_dim(0), &get(name)?)?);
        }
    }
    Ok(format!("{} blocks: candidates, lattice, path and tokens within {largest:.1e}", steps.len()))
}

/// Checks a training file of ModelOpt: the drafted block, the loss, its terms and the prefixes.
pub fn check_modelopt(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    check_drafted(&golden)?;
    let (source, block_size, sizes) = modelopt_sizes(&golden)?;
    let mut section = modelopt(&source);
    let mut head = head_keys(&source, "dflash_architecture_config", KEYS);
    head.insert("denominator".to_owned(), json!("reached"));
    let mut terms = Vec::new();
    for (term, ours) in TERMS {
        let (key, weight) = (format!("dflash_lilicorr_w_{term}"), format!("{ours}_weight"));
        let weight_of_file = source.get(&key).and_then(Value::as_f64).unwrap_or(0.0);
        if weight_of_file > 0.0 {
            terms.push(format!("out.metric.lilicorr_{ours}"));
        }
        head.insert(weight, json!(weight_of_file));
    }
    if let Some(margin) = source.get("dflash_lilicorr_margin").filter(|margin| margin.as_f64() > Some(0.0)) {
        head.insert("margin".to_owned(), margin.clone());
    }
    section.insert("head".to_owned(), Value::Object(head));
    section.insert("block_size".to_owned(), json!(block_size));
    section.insert("algorithm".to_owned(), json!("lilicorr"));
    section.insert("target_layer_ids".to_owned(), json_of(&golden, "target_layer_ids")?);
    let naming = |name: &str| stored_name(&golden, NAMES, name);
    let step = block_training::marked_rows(&golden, &sizes, section.clone(), &naming)?.step()?;
    step.check(&golden, &naming)?;
    let (config, shape) = draft("lilicorr", &sizes, block_size, section)?;
    let blocks = Blocks::unpacked(&golden, &shape)?;
    let mut largest: f64 = 0.0;
    for piece in pieces(&config) {
        let trained = blocks.train(&golden, &KIND, NAMES, (&config, &shape), piece)?;
        trained.near(&golden, "out.metric.origin_loss", trained.part(0))?;
        trained.near(&golden, "out.metric.origin_accuracy", trained.metrics["base_accuracy"])?;
        for (index, name) in terms.iter().enumerate() {
            trained.near(&golden, name, trained.part(index + 1))?;
        }
        for (name, ours) in [("selected", "selected"), ("top1", "base"), ("oracle", "oracle")] {
            let got = trained.metrics[&format!("{ours}_prefix")];
            trained.near(&golden, &format!("out.metric.lilicorr_{name}_prefix"), got)?;
        }
        largest = largest.max(trained.check(&golden, NAMES)?);
    }
    let count = blocks.supervised.len();
    let gradients = step.gradients.len();
    Ok(format!(
        "{count} blocks: loss, {} terms, prefixes, {gradients} gradients; head within {largest:.1e}",
        terms.len() + 1
    ))
}

/// Checks the drafted block of a training file.
fn check_drafted(golden: &Golden) -> Result<(), String> {
    let (config, block_size, base) = modelopt_sizes(golden)?;
    let scorer = Scorer::new(golden, &base, block_size, head_keys(&config, "dflash_architecture_config", KEYS))?;
    let get = |name: &str| golden.tensor(&format!("infer.{name}"));
    let (row, anchor) = (get("row")?.int64_value(&[]), get("anchor")?.int64_value(&[]));
    let features = golden.tensor("in.hidden_states")?.get(row);
    let context = context_at(golden, &features, anchor - 1, scorer.epsilon)?;
    let (logits, candidates, log_q, lattice) = scorer.score(&get("hidden")?, &context);
    let walk = lattice.walk();
    near("infer.backbone_tokens", &logits.argmax(-1, false).squeeze_dim(0), &get("backbone_tokens")?)?;
    near("infer.candidate_ids", &candidates.ids, &get("candidate_ids")?)?;
    near("infer.candidate_log_probs", &log_q, &get("candidate_log_probs")?)?;
    near("infer.log_start", &lattice.start, &get("log_start")?)?;
    near("infer.log_pair", &lattice.pairs, &get("log_pair")?)?;
    near("infer.path", &walk.places.squeeze_dim(0), &get("path")?)?;
    near("infer.tokens", &walk.tokens.squeeze_dim(0), &get("tokens")?)?;
    Ok(())
}
