//! Real acceptance while a draft is trained: held-out prompts are decoded with the draft as it is at that step.
//!
//! Simulated acceptance, which every evaluation gives, follows the text of the documents and takes the draft's own
//! features for granted; this is what decoding really accepts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::TokenCache;
use crate::decode::engine::{Engine, EngineOptions};
use crate::decode::event::Silent;
use crate::decode::{Policy, Request, drafter};
use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::DraftModel;
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::nn::Processors;

/// Name of the metric, and of what `checkpoint.best_metric` is without another one.
pub const METRIC: &str = "acceptance_length";

/// The `eval` section of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Optimizer steps between two decodes of held-out prompts; 0 is never.
    pub every: u64,
    /// How many prompts, the first of the held-out documents.
    pub prompts: usize,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Prompts decoded at once.
    pub batch: usize,
    /// The draft tree, as `specforge eval --tree` takes it; the draft's own default without one.
    pub tree: Option<String>,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 0, prompts: 16, max_new_tokens: 64, batch: 8, tree: None }
    }
}

impl EvalConfig {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<()> {
        let positive = [("prompts", self.prompts), ("max_new_tokens", self.max_new_tokens), ("batch", self.batch)];
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(Error::config(format!("eval.{key}"), "expected at least 1, got 0")),
            None => Ok(()),
        }
    }
}

/// Prompts of held-out documents: everything before the first token that is trained.
pub fn prompts(config: &EvalConfig, cache: &TokenCache, documents: &[usize], context: i64) -> Vec<Vec<u32>> {
    let prompt = |&document: &usize| {
        let document = cache.document(document);
        let length = document.supervised.iter().position(|&mark| mark != 0)?;
        let fits = length > 0 && ((length + config.max_new_tokens) as i64) < context;
        fits.then(|| document.tokens[..length].to_vec())
    };
    documents.iter().filter_map(prompt).take(config.prompts).collect()
}

/// Decodes the prompts greedily with the draft of this moment. The ranks of `group` take them in turn; every rank must
/// call this, with the same prompts, and gets the figures of all.
pub fn measure(
    config: &EvalConfig,
    draft: &dyn DraftModel,
    target: &dyn TargetModel,
    prompts: &[Vec<u32>],
    stop_tokens: &[u32],
    group: &ProcessGroup,
) -> Result<BTreeMap<String, f64>> {
    let policy = Policy::Keyed { seed: 0 };
    let sampling = drafter::DraftSampling::for_policy(policy, 0.0);
    let opened = drafter::of_training(draft, config.tree.as_deref(), target, sampling)?;
    let options = EngineOptions {
        processors: Processors::default(),
        policy,
        stop_tokens: stop_tokens.to_vec(),
        max_rows: config.batch,
    };
    let mut engine = Engine::new(target, opened.drafter, options)?;
    for (tag, prompt) in (0..).zip(prompts).skip(group.rank()).step_by(group.world_size()) {
        engine.submit(Request { tag, prompt: prompt.clone(), max_new_tokens: config.max_new_tokens, key: tag })?;
    }
    let (mut rounds, mut tokens) = (0i64, 0i64);
    // By depth: verifications whose tree is that deep, and those that accepted that many guesses.
    let mut depths: Vec<[i64; 2]> = Vec::new();
    for left in engine.run(&mut Silent)? {
        for round in left.decoded?.rounds {
            rounds += 1;
            tokens += round.tokens as i64;
            depths.resize(depths.len().max(round.depth), [0, 0]);
            for (depth, [tried, hit]) in (1..=round.depth).zip(depths.iter_mut()) {
                *tried += 1;
                *hit += i64::from(round.accepted >= depth);
            }
        }
    }
    let deepest = Tensor::from_slice(&[depths.len() as i64]);
    group.all_reduce(&deepest, ReduceOp::Max)?;
    depths.resize(deepest.int64_value(&[0]) as usize, [0, 0]);
    let counts = Tensor::from_slice(&[&[rounds, tokens], depths.as_flattened()].concat());
    group.all_reduce(&counts, ReduceOp::Sum)?;
    let counts = Vec::<i64>::try_from(counts)?;
    let mut values = BTreeMap::from([(METRIC.to_owned(), counts[1] as f64 / counts[0].max(1) as f64)]);
    for (depth, pair) in (1..).zip(counts[2..].chunks(2)) {
        values.insert(format!("depth{depth}/accepted"), pair[1] as f64 / pair[0].max(1) as f64);
    }
    Ok(values)
}
