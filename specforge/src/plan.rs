//! `--plan`: what a run will take, from configuration alone. No weight is loaded, and the model need not be there.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use tch::Device;

use crate::config::{Dtype, RunConfig};
use crate::data::{self, TokenCache};
use crate::device;
use crate::draft::{self, Documents, Footprint, vocabulary};
use crate::error::{Error, Result};
use crate::features::store::{MANIFEST_FILE, StoreManifest};
use crate::gguf::packed;
use crate::images;
use crate::models::{PictureTarget, Pictures, Spread, TargetConfig, TargetInfo};

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
    /// Element type of target and draft.
    pub element_type: Dtype,
    /// Tokens of the target.
    pub target_vocabulary: u64,
    /// Tokens that the draft can name.
    pub draft_vocabulary: u64,
    /// Parameters that the optimizer changes.
    pub trainable_parameters: u64,
    /// Peak memory of a process by what needs it, in bytes.
    pub memory: Memory,
    /// What the draft takes for a micro-batch.
    pub footprint: Footprint,
    /// Devices that a process spreads the target's layers over; empty where all of them are in one place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DevicePlan>,
    /// Training data.
    pub data: DataPlan,
    /// Optimizer steps; `None` where the data is not there to be counted.
    pub steps: Option<u64>,
    /// Evaluations on held-out documents; `None` where nothing is held out, or where the data is not there to be counted.
    pub evaluation: Option<EvaluationPlan>,
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
    /// float32 masters, moments and averages.
    pub optimizer: u64,
    /// float32 gradients, and among several processes the buckets in which they are summed.
    pub gradients: u64,
    /// Hidden states kept for later epochs, in the host's memory.
    pub hidden_states: u64,
    /// Working memory of one micro-batch, and the states of those that are on their way, estimated.
    pub activations: u64,
    /// The copy of a checkpoint that is being written, in the host's memory; on the first of several processes alone.
    pub checkpoint: u64,
    /// Sum.
    pub total: u64,
}

/// What one device of several holds.
#[derive(Debug, Clone, Serialize)]
pub struct DevicePlan {
    /// Its name.
    pub device: String,
    /// Number of its first layer, and of the one behind its last; nothing where it has no layer.
    pub layers: Option<(usize, usize)>,
    /// Whether all but the layers is here: tables, draft, what training needs.
    pub is_home: bool,
    /// Bytes of all that.
    pub bytes: u64,
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

/// What evaluations on held-out documents take.
#[derive(Debug, Clone, Serialize)]
pub struct EvaluationPlan {
    /// Tokens of one evaluation.
    pub tokens: u64,
    /// How many there are: before the first step, every `train.eval_every` steps, and at the end.
    pub evaluations: u64,
    /// Their share of the run's floating-point operations, estimated.
    pub share: f64,
}

/// The data as far as it is known.
struct Counted {
    data: DataPlan,
    steps: Option<u64>,
    /// Documents of an epoch.
    documents: Option<u64>,
    /// Tokens that are trained on, over all steps.
    trained_tokens: Option<f64>,
    /// Training tokens whose states the rank with the most keeps; nothing where none are kept.
    kept_tokens: Option<u64>,
    /// Tokens of an evaluation.
    held_out_tokens: Option<u64>,
}

impl Counted {
    /// The documents of a full micro-batch: of average length where they were counted, of the greatest where not.
    fn micro_batch(&self, config: &RunConfig) -> Documents {
        let most = config.train.micro_batch_tokens as u64;
        let longest = (config.data.max_length as u64).min(most);
        let average = self.data.tokens.zip(self.documents).map(|(tokens, documents)| tokens.div_ceil(documents.max(1)));
        let tokens = average.unwrap_or(longest).clamp(1, longest.max(1));
        let share = |supervised: u64| supervised as f64 / self.data.tokens.unwrap_or(0).max(1) as f64;
        let supervised = self.data.supervised.map_or(1.0, share).min(1.0);
        Documents { count: (most / tokens).max(1), tokens, supervised }
    }
}

impl Plan {
    /// Plans a run of `world_size` processes.
    pub fn new(config: &RunConfig, world_size: usize) -> Result<Self> {
        let world_size = world_size.max(1) as u64;
        let target = target_info(config)?;
        let algorithm = draft::algorithm(&config.draft)?;
        let section = vocabulary::with_size(&config.draft, target.vocab_size)?;
        let size = (algorithm.size)(&section, &target)?;
        let draft_vocabulary = vocabulary::draft_size(&section, target.vocab_size)? as u64;
        let target_parameters = target.parameters.all;
        let width = config.target.element_type().kind().elt_size_in_bytes() as u64;
        let masters = if config.target.element_type() == Dtype::Float32 { 0 } else { 4 };
        let counted = match &target.pictures {
            Some(pictures) => picture_plan(config, pictures, world_size as usize)?,
            None => data_plan(config, world_size as usize)?,
        };
        let (averages, averaged_masters) = if config.optim.average.is_some() { (4, 4 - masters) } else { (0, 0) };
        let whole_optimizer = size.trainable * (8 + masters + averages);
        let optimizer = match config.parallel.shard_optimizer {
            true => whole_optimizer.div_ceil(world_size),
            false => whole_optimizer,
        };
        let gradients = size.trainable * if world_size > 1 { 8 } else { 4 };
        let micro_batch = counted.micro_batch(config);
        let footprint = (algorithm.footprint)(&section, &target, micro_batch)?;
        let activations = activations(config, &target, size.captured, width) + footprint.numbers * width;
        let rows_per_token =
            footprint.rows.map_or(1.0, |rows| rows as f64 / (micro_batch.count * micro_batch.tokens).max(1) as f64);
        // Of a token, all rows that pass through the draft for it.
        let draft_operations = (size.row_multiply_adds as f64 * rows_per_token) as u64;
        // Held-out states are kept too, by the ranks in turn.
        let held_out = counted.held_out_tokens.unwrap_or(0).div_ceil(world_size);
        let kept_tokens = counted.kept_tokens.map_or(0, |tokens| tokens.saturating_add(held_out));
        let most_kept = config.target.keep_hidden_mib.map_or(u64::MAX, |mebibytes| mebibytes.saturating_mul(1 << 20));
        let hidden_states = (kept_tokens * size.captured * target.hidden_size as u64 * width).min(most_kept);
        // A store stands for the layers. The embedding is a look-up; the target's head is not run for training.
        let offline = config.target.feature_store.as_ref();
        let loaded_parameters = if offline.is_some() { target.parameters.tables } else { target_parameters };
        let run_parameters = if offline.is_some() { 0 } else { target.parameters.a_token };
        let weights = (loaded_parameters + size.trainable + size.frozen) * width;
        // Beside averages a checkpoint holds what they are of.
        let checkpoint_bytes = size.trainable * (width + averaged_masters) + whole_optimizer;
        let memory = Memory {
            target: loaded_parameters * width,
            draft: (size.trainable + size.frozen) * width,
            optimizer,
            gradients,
            hidden_states,
            activations,
            checkpoint: checkpoint_bytes,
            total: weights + optimizer + gradients + hidden_states + activations + checkpoint_bytes,
        };
        let kept = (config.checkpoint.keep_last as u64).saturating_add(2);
        let operations_per_token = 2 * (run_parameters + draft_operations);
        let evaluation = evaluation_plan(config, &counted, run_parameters as f64, draft_operations as f64);
        let Counted { data, steps, .. } = counted;
        let is_there = |folder: &&std::path::PathBuf| folder.join(MANIFEST_FILE).exists();
        let store = offline.filter(is_there).map(|folder| StoreManifest::read(folder)).transpose()?;
        Ok(Self {
            algorithm: algorithm.name.to_owned(),
            world_size,
            target_parameters,
            element_type: config.target.element_type(),
            target_vocabulary: target.vocab_size as u64,
            draft_vocabulary,
            trainable_parameters: size.trainable,
            memory,
            footprint,
            devices: Vec::new(),
            data,
            steps,
            evaluation,
            checkpoint_bytes,
            disk_bytes: checkpoint_bytes.saturating_mul(kept),
            store_bytes: store.map(|store| store.bytes()),
            operations_per_token,
        })
    }
}

impl Plan {
    /// Says which device gets which layers. Where a store stands for the layers, there are none.
    pub fn spread(&mut self, config: &RunConfig, spread: &Spread, home: Device) -> Result<()> {
        if config.target.feature_store.is_some() && config.eval.every == 0 {
            return Ok(());
        }
        let kind = config.target.element_type().kind();
        let refuse = |problem| Error::bad_file(&config.target.path, problem);
        let blocks = target_config(config)?.blocks(spread, home, kind).map_err(refuse)?;
        let Memory { target, draft, optimizer, gradients, activations, .. } = &self.memory;
        let of_layers: u64 = blocks.iter().map(|block| block.bytes).sum();
        let beside = target.saturating_sub(of_layers) + draft + optimizer + gradients + activations;
        self.devices = blocks
            .iter()
            .map(|block| DevicePlan {
                device: device::name(block.device),
                layers: Some((block.layers.start, block.layers.end)),
                is_home: block.device == home,
                bytes: block.bytes + if block.device == home { beside } else { 0 },
            })
            .collect();
        if self.devices.iter().all(|device| !device.is_home) {
            self.devices.push(DevicePlan { device: device::name(home), layers: None, is_home: true, bytes: beside });
        }
        Ok(())
    }
}

/// Working memory of a target forward and of one chunk of logits (logits, probabilities and their gradient).
fn activations(config: &RunConfig, target: &TargetInfo, captured: u64, width: u64) -> u64 {
    let tokens = config.train.micro_batch_tokens as u64;
    let per_token = 8 * target.hidden_size as u64 + 3 * target.widest as u64;
    let batches = 1 + config.train.prefetch as u64;
    // The size that `--device auto` would give a chunk here.
    let chunk = device::choose("auto").map_or(0, |device| config.train.chunk_bytes(device)) as u64;
    tokens * (per_token + batches * captured * target.hidden_size as u64) * width + 3 * chunk
}

/// What the target is, from its folder or from the configuration. No weight is read.
pub fn target_info(config: &RunConfig) -> Result<TargetInfo> {
    match draft::algorithm(&config.draft)?.pictures {
        true => PictureTarget::find(&config.target.path)?.info(),
        false => Ok(target_config(config)?.info().clone()),
    }
}

fn target_config(config: &RunConfig) -> Result<TargetConfig> {
    let folder = &config.target.path;
    if packed::has_file(folder, "config.json") {
        let target = TargetConfig::read(folder)?;
        target.causal(folder)?;
        return Ok(target);
    }
    let values: &Value = config.target.config.as_ref().ok_or_else(|| {
        Error::bad_file(folder, "is not a model folder: config.json is not there")
            .with_hint("give target.config in the configuration to plan without the model")
    })?;
    let target = TargetConfig::from_value(values).map_err(|problem| Error::config("target.config", problem))?;
    target.causal(folder)?;
    Ok(target)
}

/// The evaluations of a run whose target has `target` multiply-adds a token, and whose draft has `draft` for a row that is
/// trained; a third of them are its forward pass.
fn evaluation_plan(config: &RunConfig, counted: &Counted, target: f64, draft: f64) -> Option<EvaluationPlan> {
    let tokens = counted.held_out_tokens.filter(|&tokens| tokens > 0)?;
    let (steps, trained) = (counted.steps.filter(|&steps| steps > 0)?, counted.trained_tokens?);
    let on_the_way = match config.train.eval_every {
        0 => 1,
        every => steps.div_ceil(every),
    };
    let evaluations = on_the_way.saturating_add(1);
    // States that are kept are computed once.
    let passes = |all: f64, once: f64| if config.target.keep_hidden_states { all.min(once) } else { all };
    let evaluated = tokens as f64 * evaluations as f64;
    let evaluating = passes(evaluated, tokens as f64) * target + evaluated * draft / 3.0;
    let training = passes(trained, counted.data.tokens.unwrap_or(0) as f64) * target + trained * draft;
    Some(EvaluationPlan { tokens, evaluations, share: evaluating / (evaluating + training) })
}

/// The plan of documents whose lengths are known, with the supervised tokens of the corpus and those of an evaluation.
fn counted(
    config: &RunConfig,
    world_size: usize,
    lengths: Vec<usize>,
    (supervised, held_out): (u64, u64),
) -> Result<Counted> {
    let keeps = config.target.keep_hidden_states;
    let (documents, tokens) = (lengths.len() as u64, lengths.iter().sum::<usize>() as u64);
    let order = config.train.order(lengths)?;
    let steps = config.train.total_steps(&order)?;
    config.optim.schedule.check_length(steps)?;
    let kept_tokens = match keeps && world_size > 1 {
        true => Some(order.clone().with_owners(world_size)?.most_owned_tokens()),
        false => Some(tokens).filter(|_| keeps),
    };
    let of_epoch = order.epoch(0)?.len().max(1);
    Ok(Counted {
        data: DataPlan { tokens: Some(tokens), supervised: Some(supervised), estimated: false },
        steps: Some(steps),
        documents: Some(documents),
        trained_tokens: Some(tokens as f64 * steps as f64 / of_epoch as f64),
        kept_tokens,
        held_out_tokens: Some(held_out),
    })
}

/// The same for pictures, which are counted and not encoded.
fn picture_plan(config: &RunConfig, pictures: &Pictures, world_size: usize) -> Result<Counted> {
    let files = |paths: &[PathBuf]| Ok::<_, Error>(images::Pictures::read(paths)?.origins());
    let all = files(&config.data.train)?;
    let fraction = config.data.eval_fraction;
    let trains = |origin: &&u64| !config.data.eval.is_empty() || data::is_trained(**origin, fraction);
    let trained = all.iter().filter(trains).count();
    let held_out = match config.data.eval.is_empty() {
        true => all.len() - trained,
        false => files(&config.data.eval)?.len(),
    };
    let (codes, length) = (pictures.codes() as u64, pictures.codes() as usize + 1);
    // As many as fit, but at least one.
    let most = match config.eval.max_tokens {
        0 => held_out,
        most => held_out.min((most / length).max(1)),
    };
    let evaluated = (most * length) as u64;
    counted(config, world_size, vec![length; trained], (all.len() as u64 * codes, evaluated))
}

fn data_plan(config: &RunConfig, world_size: usize) -> Result<Counted> {
    let keeps = config.target.keep_hidden_states;
    if packed::has_file(&config.target.path, "tokenizer.json") {
        let tokenizer = config.data.tokenizer(&config.target.path)?;
        let open = |files| Ok::<_, Error>(TokenCache::build_or_open(files, &tokenizer, &config.data, &|_, _| {})?.0);
        let cache = open(&config.data.train)?;
        let all = |cache: &TokenCache| (0..cache.len()).collect::<Vec<usize>>();
        let eval_cache = (!config.data.eval.is_empty()).then(|| open(&config.data.eval)).transpose()?;
        let (documents, held_out) = match &eval_cache {
            None => data::split(&cache, config.data.eval_fraction),
            Some(eval_cache) => (all(&cache), all(eval_cache)),
        };
        let eval_cache = eval_cache.as_ref().unwrap_or(&cache);
        let held_out = data::by_content(eval_cache, held_out);
        let evaluated = data::first_tokens(eval_cache, &held_out, config.eval.max_tokens);
        let lengths: Vec<usize> = documents.iter().map(|&index| cache.length(index)).collect();
        let held_out = evaluated.iter().map(|&index| eval_cache.length(index) as u64).sum();
        return counted(config, world_size, lengths, (cache.supervised_tokens(), held_out));
    }
    let bytes = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.len()).ok();
    let estimated = |paths: &[PathBuf]| {
        let total: Option<u64> = paths.iter().map(|path| bytes(path)).sum();
        total.map(|bytes| (bytes as f64 / BYTES_PER_TOKEN) as u64)
    };
    let tokens = estimated(&config.data.train);
    let all =
        tokens.map(|tokens| config.train.epochs.saturating_mul(tokens.div_ceil(config.train.batch_tokens as u64)));
    let steps = all.into_iter().chain(config.train.max_steps).min();
    let held_out = match config.data.eval.is_empty() {
        true => tokens.map(|tokens| (tokens as f64 * config.data.eval_fraction) as u64),
        false => estimated(&config.data.eval),
    };
    let most = if config.eval.max_tokens == 0 { u64::MAX } else { config.eval.max_tokens as u64 };
    Ok(Counted {
        data: DataPlan { tokens, supervised: None, estimated: true },
        steps,
        documents: None,
        trained_tokens: steps.map(|steps| steps as f64 * config.train.batch_tokens as f64),
        kept_tokens: tokens.filter(|_| keeps).map(|tokens| tokens.div_ceil(world_size as u64)),
        held_out_tokens: held_out.map(|tokens| tokens.min(most)),
    })
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
        let devices: Vec<(String, String)> = self.devices.iter().map(DevicePlan::row).collect();
        let mut rows = vec![
            ("algorithm", self.algorithm.clone()),
            ("target", format!("{} parameters in {}, frozen", self.target_parameters, self.element_type.name())),
            ("trainable", format!("{} parameters", self.trainable_parameters)),
            ("vocabulary", vocabulary),
            ("memory", format!("{} at the peak{each}", size(memory.total))),
            ("  target", size(memory.target)),
            ("  draft", size(memory.draft)),
            ("  gradients", size(memory.gradients)),
            ("  optimizer", size(memory.optimizer)),
            ("  hidden", format!("{} of states kept, in the host's memory", size(memory.hidden_states))),
            ("  activations", format!("{} (estimated)", size(memory.activations))),
            ("  checkpoint", format!("{} while one is written, in the host's memory", size(memory.checkpoint))),
            ("tokens", tokens),
            ("steps", self.steps.map_or_else(unknown, |steps| steps.to_string())),
            ("evaluation", self.evaluation.as_ref().map_or("none, or unknown".to_owned(), EvaluationPlan::to_string)),
            ("checkpoint", format!("{} each, {} on disk", size(self.checkpoint_bytes), size(self.disk_bytes))),
            ("work", format!("{:.2} GFLOP a token", self.operations_per_token as f64 / 1e9)),
        ];
        let place = rows.iter().position(|(name, _)| *name == "memory").unwrap_or(rows.len());
        drop(rows.splice(place..place, self.footprint.lines.iter().cloned()));
        let place = rows.iter().position(|(name, _)| *name == "tokens").unwrap_or(rows.len());
        drop(rows.splice(place..place, devices.iter().map(|(name, row)| (name.as_str(), row.clone()))));
        if let Some(bytes) = self.store_bytes {
            rows.push(("store", format!("{} of hidden states on disk", size(bytes))));
        }
        rows.iter().try_for_each(|(name, value)| writeln!(formatter, "{name:<13} {value}"))
    }
}

impl DevicePlan {
    fn row(&self) -> (String, String) {
        let layers = match self.layers {
            None => "no layers of the target".to_owned(),
            Some((first, end)) if end - first == 1 => format!("layer {first} of the target"),
            Some((first, end)) => format!("layers {first} to {} of the target", end - 1),
        };
        let beside = if self.is_home { "; embedding, head, draft and optimizer" } else { "" };
        (self.device.clone(), format!("{}: {layers}{beside}", size(self.bytes)))
    }
}

impl fmt::Display for EvaluationPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, evaluations, share } = self;
        write!(formatter, "{tokens} held-out tokens, {evaluations} times: {:.1} % of the run's work", 100.0 * share)
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mebibytes if mebibytes < 1024.0 => format!("{mebibytes:.1} MiB"),
        mebibytes => format!("{:.1} GiB", mebibytes / 1024.0),
    }
}
