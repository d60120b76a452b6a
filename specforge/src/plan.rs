//! `--plan`: what a run will take, from configuration alone. No weight is loaded, and the model need not be there.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::config::{Dtype, RunConfig};
use crate::data::{self, TokenCache};
use crate::draft::{self, vocabulary};
use crate::error::{Error, Result};
use crate::features::store::{MANIFEST_FILE, StoreManifest};
use crate::models::{Dimensions, LlamaConfig};

/// Bytes of a token in English text, for corpora that cannot be tokenised because the tokenizer is not there.
const BYTES_PER_TOKEN: f64 = 4.0;

/// What a run will take.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Algorithm of the draft.
    pub algorithm: String,
    /// Processes that share the work.
    pub world_size: u64,
    /// Parameters of the target; frozen.
    pub target_parameters: u64,
    /// Tokens of the target.
    pub target_vocabulary: u64,
    /// Tokens that the draft can name.
    pub draft_vocabulary: u64,
    /// Parameters that the optimizer changes.
    pub trainable_parameters: u64,
    /// Peak memory of a process by what needs it, in bytes.
    pub memory: Memory,
    /// Training data.
    pub data: DataPlan,
    /// Optimizer steps; `None` where the data is not there to be counted.
    pub steps: Option<u64>,
    /// Bytes of one checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of all checkpoints kept at once, the one being written included.
    pub disk_bytes: u64,
    /// Bytes of the feature store that the run reads; `None` without one, or where it is not there yet.
    pub store_bytes: Option<u64>,
    /// Floating-point operations of one token: target forward, and draft forward and backward if it is trained.
    pub operations_per_token: u64,
}

/// Peak memory of one process in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    /// Target weights.
    pub target: u64,
    /// Draft values.
    pub draft: u64,
    /// float32 masters and moments.
    pub optimizer: u64,
    /// float32 gradients, and among several processes the buckets in which they are summed.
    pub gradients: u64,
    /// Hidden states kept for later epochs, in the host's memory.
    pub hidden_states: u64,
    /// Working memory of one micro-batch, estimated.
    pub activations: u64,
    /// Sum.
    pub total: u64,
}

/// Training data.
#[derive(Debug, Clone, Serialize)]
pub struct DataPlan {
    /// Tokens of one epoch; `None` where a file is not there.
    pub tokens: Option<u64>,
    /// Supervised tokens among them, where they were counted.
    pub supervised: Option<u64>,
    /// Whether tokens were estimated from file sizes because the tokenizer is not there.
    pub estimated: bool,
}

impl Plan {
    /// Plans a run of `world_size` processes.
    pub fn new(config: &RunConfig, world_size: usize) -> Result<Self> {
        let world_size = world_size.max(1) as u64;
        let target = target_config(config)?;
        let dimensions = target_dimensions(config)?;
        let algorithm = draft::algorithm(&config.draft)?;
        let section = vocabulary::with_size(&config.draft, dimensions.vocab_size)?;
        let size = (algorithm.size)(&section, &dimensions)?;
        let draft_vocabulary = vocabulary::draft_size(&section, dimensions.vocab_size)? as u64;
        let target_parameters: u64 =
            target.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
        let width = config.target.dtype.kind().elt_size_in_bytes() as u64;
        let masters = if config.target.dtype == Dtype::Float32 { 0 } else { 4 };
        let CountedData { plan: data, steps, kept_tokens, held_out } = data_plan(config, world_size as usize)?;
        let whole_optimizer = size.trainable * (8 + masters);
        let optimizer = match config.parallel.shard_optimizer {
            true => whole_optimizer.div_ceil(world_size),
            false => whole_optimizer,
        };
        let gradients = size.trainable * if world_size > 1 { 8 } else { 4 };
        let activations = activations(config, &target, size.captured, width);
        let kept_tokens = kept_tokens.map_or(0, |tokens| tokens.saturating_add(held_out.div_ceil(world_size)));
        let most_kept = config.target.keep_hidden_mib.map_or(u64::MAX, |mebibytes| mebibytes.saturating_mul(1 << 20));
        let hidden_states = (kept_tokens * size.captured * target.hidden_size as u64 * width).min(most_kept);
        // The embedding is a look-up; the target's head is not run for training.
        let embedding = (target.vocab_size * target.hidden_size) as u64;
        let heads = if target.tie_word_embeddings { 1 } else { 2 };
        // A store stands for the layers.
        let offline = config.target.feature_store.as_ref();
        let loaded_parameters = if offline.is_some() { heads * embedding } else { target_parameters };
        let run_parameters = if offline.is_some() { 0 } else { target_parameters - heads * embedding };
        let weights = (loaded_parameters + size.trainable + size.frozen) * width;
        let memory = Memory {
            target: loaded_parameters * width,
            draft: (size.trainable + size.frozen) * width,
            optimizer,
            gradients,
            hidden_states,
            activations,
            total: weights + optimizer + gradients + hidden_states + activations,
        };
        let checkpoint_bytes = size.trainable * width + whole_optimizer;
        let kept = (config.checkpoint.keep_last as u64).saturating_add(2);
        let operations_per_token = 2 * (run_parameters + size.row_multiply_adds);
        let is_there = |folder: &&std::path::PathBuf| folder.join(MANIFEST_FILE).exists();
        let store = offline.filter(is_there).map(|folder| StoreManifest::read(folder)).transpose()?;
        Ok(Self {
            algorithm: algorithm.name.to_owned(),
            world_size,
            target_parameters,
            target_vocabulary: dimensions.vocab_size as u64,
            draft_vocabulary,
            trainable_parameters: size.trainable,
            memory,
            data,
            steps,
            checkpoint_bytes,
            disk_bytes: checkpoint_bytes.saturating_mul(kept),
            store_bytes: store.map(|store| store.bytes()),
            operations_per_token,
        })
    }
}

/// Working memory of a target forward and of one chunk of logits (logits, probabilities and their gradient).
fn activations(config: &RunConfig, target: &LlamaConfig, captured: u64, width: u64) -> u64 {
    let tokens = config.train.micro_batch_tokens as u64;
    let per_token = 8 * target.hidden_size as u64 + 3 * target.intermediate_size as u64;
    tokens * (per_token + captured * target.hidden_size as u64) * width + 3 * ((config.train.chunk_mib as u64) << 20)
}

/// Sizes of the target, from its folder or from the configuration. No weight is read.
pub fn target_dimensions(config: &RunConfig) -> Result<Dimensions> {
    target_config(config)?.dimensions().map_err(Error::Failed)
}

/// The folder's config.json, or the one written into the configuration.
pub fn target_config(config: &RunConfig) -> Result<LlamaConfig> {
    let path = config.target.path.join("config.json");
    if path.is_file() {
        return LlamaConfig::read(&path);
    }
    let value: &Value = config.target.config.as_ref().ok_or_else(|| {
        Error::bad_file(&config.target.path, "is not a model folder: config.json is not there")
            .with_hint("give target.config in the configuration to plan without the model")
    })?;
    LlamaConfig::from_value(value).map_err(|problem| Error::config("target.config", problem))
}

/// What counting the data says.
struct CountedData {
    plan: DataPlan,
    steps: Option<u64>,
    /// Training tokens whose states the rank with the most keeps; nothing where none are kept.
    kept_tokens: Option<u64>,
    /// Held-out tokens of all ranks, whose states are kept too.
    held_out: u64,
}

fn data_plan(config: &RunConfig, world_size: usize) -> Result<CountedData> {
    let keeps = config.target.keep_hidden_states;
    if config.target.path.join("tokenizer.json").is_file() {
        let tokenizer = config.data.tokenizer(&config.target.path)?;
        let (cache, _) = TokenCache::build_or_open(&config.data.train, &tokenizer, &config.data, &|_, _| {})?;
        let (documents, own_eval) = match config.data.eval.is_empty() {
            true => data::split(&cache, config.data.eval_fraction),
            false => ((0..cache.len()).collect(), Vec::new()),
        };
        let lengths: Vec<usize> = documents.iter().map(|&index| cache.length(index)).collect();
        let tokens = lengths.iter().sum::<usize>() as u64;
        let mut held_out = own_eval.iter().map(|&index| cache.length(index) as u64).sum();
        if keeps && !config.data.eval.is_empty() {
            held_out =
                TokenCache::build_or_open(&config.data.eval, &tokenizer, &config.data, &|_, _| {})?.0.total_tokens();
        }
        let order = config.train.order(lengths)?;
        let steps = config.train.total_steps(&order)?;
        config.optim.schedule.check_length(steps)?;
        let kept_tokens = match keeps && world_size > 1 {
            true => Some(order.with_owners(world_size)?.most_owned_tokens()),
            false => Some(tokens).filter(|_| keeps),
        };
        let plan = DataPlan { tokens: Some(tokens), supervised: Some(cache.supervised_tokens()), estimated: false };
        return Ok(CountedData { plan, steps: Some(steps), kept_tokens, held_out });
    }
    let bytes = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.len()).ok();
    let total: Option<u64> = config.data.train.iter().map(|path| bytes(path)).sum();
    let tokens = total.map(|bytes| (bytes as f64 / BYTES_PER_TOKEN) as u64);
    let all =
        tokens.map(|tokens| config.train.epochs.saturating_mul(tokens.div_ceil(config.train.batch_tokens as u64)));
    let steps = all.into_iter().chain(config.train.max_steps).min();
    let kept_tokens = tokens.filter(|_| keeps).map(|tokens| tokens.div_ceil(world_size as u64));
    let plan = DataPlan { tokens, supervised: None, estimated: true };
    Ok(CountedData { plan, steps, kept_tokens, held_out: 0 })
}

impl fmt::Display for Plan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = &self.memory;
        let unknown = || "unknown: a data file is not there".to_owned();
        let tokens = self.data.tokens.map_or_else(unknown, |tokens| {
            let how = match self.data.supervised {
                Some(supervised) => format!("{supervised} of the corpus supervised"),
                None => "estimated from file sizes, the tokenizer is not there".to_owned(),
            };
            format!("{tokens} an epoch ({how})")
        });
        let vocabulary = match self.draft_vocabulary == self.target_vocabulary {
            true => format!("{} tokens, all of the target's", self.target_vocabulary),
            false => format!("{} of the target's {} tokens", self.draft_vocabulary, self.target_vocabulary),
        };
        let each = match self.world_size {
            1 => String::new(),
            ranks => format!(", of each of {ranks} ranks"),
        };
        let mut rows = vec![
            ("algorithm", self.algorithm.clone()),
            ("target", format!("{} parameters, frozen", self.target_parameters)),
            ("trainable", format!("{} parameters", self.trainable_parameters)),
            ("vocabulary", vocabulary),
            ("memory", format!("{} at the peak{each}", size(memory.total))),
            ("  target", size(memory.target)),
            ("  draft", size(memory.draft)),
            ("  gradients", size(memory.gradients)),
            ("  optimizer", size(memory.optimizer)),
            ("  hidden", format!("{} of states kept, in the host's memory", size(memory.hidden_states))),
            ("  activations", format!("{} (estimated)", size(memory.activations))),
            ("tokens", tokens),
            ("steps", self.steps.map_or_else(unknown, |steps| steps.to_string())),
            ("checkpoint", format!("{} each, {} on disk", size(self.checkpoint_bytes), size(self.disk_bytes))),
            ("work", format!("{:.2} GFLOP a token", self.operations_per_token as f64 / 1e9)),
        ];
        if let Some(bytes) = self.store_bytes {
            rows.push(("store", format!("{} of hidden states on disk", size(bytes))));
        }
        rows.iter().try_for_each(|(name, value)| writeln!(formatter, "{name:<13} {value}"))
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mebibytes if mebibytes < 1024.0 => format!("{mebibytes:.1} MiB"),
        mebibytes => format!("{:.1} GiB", mebibytes / 1024.0),
    }
}
