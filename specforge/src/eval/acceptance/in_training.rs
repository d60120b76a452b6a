//! Real acceptance while a draft is trained: held-out prompts are decoded with the draft as it is at that step.
//!
//! Simulated acceptance, which every evaluation gives, follows the text of the documents and takes the draft's own
//! features for granted; this is what decoding really accepts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::TokenCache;
use crate::decode::engine::{Decoded, Engine, EngineOptions};
use crate::decode::event::Silent;
use crate::decode::{Policy, Request, drafter};
use crate::dist::{ProcessGroup, ReduceOp};
use crate::draft::DraftModel;
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::nn::Processors;

/// Name of the metric, and of what `checkpoint.best_metric` is without another one.
pub const METRIC: &str = "acceptance_length";

/// Whether a decode gives a figure of this name.
pub fn can_measure(name: &str) -> bool {
    let depth = name.strip_prefix("depth").and_then(|rest| rest.strip_suffix("/accepted"));
    name == METRIC
        || depth
            .is_some_and(|depth| depth.parse::<usize>().is_ok_and(|number| number.to_string() == depth && number > 0))
}

/// The `eval` section of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Optimizer steps between two decodes of held-out prompts; 0 is never.
    pub every: u64,
    /// How many prompts: those of the held-out documents whose content has the lowest hashes.
    pub prompts: usize,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Prompts decoded at once.
    pub batch: usize,
    /// The draft tree, as `specforge eval --tree` takes it; the draft's own default without one.
    pub tree: Option<String>,
    /// Most tokens of held-out documents that an evaluation of `train.eval_every` reads; 0 reads all of them.
    pub max_tokens: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 0, prompts: 16, max_new_tokens: 64, batch: 8, tree: None, max_tokens: 150_000 }
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

/// What held-out prompts are decoded with.
#[derive(Clone, Copy)]
pub struct InTraining<'a> {
    /// The `eval` section.
    pub config: &'a EvalConfig,
    /// The target.
    pub target: &'a dyn TargetModel,
    /// See [`prompts`]; the same on every rank.
    pub prompts: &'a [Vec<u32>],
    /// Tokens that end an answer.
    pub stop_tokens: &'a [u32],
    /// The ranks, which take the prompts in turn.
    pub group: &'a ProcessGroup,
}

impl<'a> InTraining<'a> {
    /// Refuses what could not be decoded with this draft, a tree that does not fit it, say.
    pub fn check(&self, draft: &dyn DraftModel) -> Result<()> {
        self.engine(draft).map(drop)
    }

    /// With the prompts of this rank submitted.
    fn engine(&self, draft: &dyn DraftModel) -> Result<Engine<'a>> {
        let Self { config, target, prompts, group, .. } = *self;
        let policy = Policy::Keyed { seed: 0 };
        let sampling = drafter::DraftSampling::for_policy(policy, 0.0);
        let opened = drafter::of_training(draft, config.tree.as_deref(), target, sampling)?;
        let options = EngineOptions {
            processors: Processors::default(),
            policy,
            stop_tokens: self.stop_tokens.to_vec(),
            max_rows: config.batch,
        };
        let mut engine = Engine::new(target, opened.drafter, options)?;
        for (tag, prompt) in (0..).zip(prompts).skip(group.rank()).step_by(group.world_size()) {
            engine.submit(Request { tag, prompt: prompt.clone(), max_new_tokens: config.max_new_tokens, key: tag })?;
        }
        Ok(engine)
    }
}

/// What a decode of the prompts gave.
#[derive(Debug, Default)]
pub struct Held {
    /// Figures of all ranks, by name.
    pub figures: BTreeMap<String, f64>,
    /// This rank's answers, in the order of their prompts.
    pub answers: Vec<Decoded>,
}

/// Decodes the prompts greedily with the draft of this moment. Every rank must call this and gets the figures of all;
/// none where a rank was asked to `stop` before the end.
pub fn measure(with: &InTraining<'_>, draft: &dyn DraftModel, stop: &AtomicI32) -> Result<Option<Held>> {
    let group = with.group;
    let mut engine = with.engine(draft)?;
    let mut all_left = Vec::new();
    loop {
        // One round after the other on all ranks, so that a signal to one of them ends it on all.
        let own = [i64::from(stop.load(Ordering::Relaxed)), engine.pending() as i64];
        let most = Tensor::from_slice(&own);
        group.all_reduce(&most, ReduceOp::Max)?;
        let [signal, pending] = [most.int64_value(&[0]), most.int64_value(&[1])];
        if signal != 0 {
            return Ok(None);
        }
        if pending == 0 {
            break;
        }
        if engine.pending() > 0 {
            all_left.extend(engine.step(&mut Silent)?);
        }
    }
    let mut answers = all_left.into_iter().map(|left| left.decoded).collect::<Result<Vec<Decoded>>>()?;
    answers.sort_unstable_by_key(|answer| answer.tag);
    let (mut rounds, mut tokens) = (0i64, 0i64);
    // By depth: verifications whose tree is that deep, and those that accepted that many guesses.
    let mut depths: Vec<[i64; 2]> = Vec::new();
    for answer in &answers {
        for round in &answer.rounds {
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
    let mut figures = BTreeMap::from([(METRIC.to_owned(), counts[1] as f64 / counts[0].max(1) as f64)]);
    for (depth, pair) in (1..).zip(counts[2..].chunks(2)) {
        figures.insert(format!("depth{depth}/accepted"), pair[1] as f64 / pair[0].max(1) as f64);
    }
    Ok(Some(Held { figures, answers }))
}
