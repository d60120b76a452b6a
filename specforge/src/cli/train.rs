//! `specforge train`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::{LazyProgress, Output, note, record, signals};
use crate::checkpoint::{self, CheckpointStore, Versions};
use crate::config::RunConfig;
use crate::data::{self, BuildReport, ChatTokenizer, TokenCache};
use crate::device;
use crate::draft::{self, DraftContext};
use crate::error::{Error, Result};
use crate::features::{FeatureSource, OnlineFeatures, RememberedFeatures};
use crate::files;
use crate::models;
use crate::plan::Plan;
use crate::tracking::Tracker;
use crate::train::trainer::{Provenance, Split};
use crate::train::{self, TrainReport, Trainer, TrainerParts};

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Configuration file.
    #[arg(long)]
    config: PathBuf,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print parameters, memory, tokens, steps and disk, and stop. Loads no weights.
    #[arg(long)]
    plan: bool,
    /// Go on from the newest checkpoint of the output folder.
    #[arg(long)]
    resume: bool,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: &TrainArgs, output: &Output) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.set)?;
    if args.plan {
        let plan = Plan::new(&config)?;
        output.result(&plan, || plan.to_string());
        return Ok(());
    }
    let device = device::choose(&args.device)?;
    let stop = signals::watch()?;
    let out = &config.train.output_dir;
    let algorithm = draft::algorithm(&config.draft)?;
    let mut retention = config.checkpoint.clone();
    retention.best_metric.get_or_insert_with(|| algorithm.selection_metric.to_owned());
    let store = CheckpointStore::open(out, retention)?;
    let (latest, warnings) = store.latest()?;
    warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
    let checkpoint = match (latest, args.resume) {
        (Some(path), true) => Some(checkpoint::read(&path)?),
        (Some(path), false) => {
            return Err(Error::bad_file(
                out,
                format!("already holds a run, with {} as its newest checkpoint", path.display()),
            )
            .with_hint("continue it with --resume, or choose another train.output_dir"));
        }
        (None, true) => {
            return Err(Error::bad_file(out, "holds no checkpoint to resume from").with_hint("start without --resume"));
        }
        (None, false) => None,
    };
    let resolved = json!(config);
    if let Some(checkpoint) = &checkpoint {
        checkpoint.same_configuration(&resolved, RESUMABLE)?;
        note(format!("resuming from {}", checkpoint.path.display()));
    }

    // Data: tokens first, so that mistakes in it show before any weight is loaded.
    config.data.check()?;
    let tokenizer = config.data.tokenizer(&config.target.path)?;
    let train_cache = tokens(&config, &config.data.train, &tokenizer)?;
    let eval_cache = match config.data.eval.is_empty() {
        true => None,
        false => Some(tokens(&config, &config.data.eval, &tokenizer)?),
    };
    let mut data_hashes = BTreeMap::from([("train".to_owned(), train_cache.content_hash().to_owned())]);
    if let Some(cache) = &eval_cache {
        data_hashes.insert("eval".to_owned(), cache.content_hash().to_owned());
    }
    // Before anything in the output folder is touched.
    if let Some(checkpoint) = &checkpoint {
        checkpoint.same_data(&data_hashes)?;
    }
    let all = |cache: &TokenCache| (0..cache.len()).collect::<Vec<_>>();
    let (train_documents, eval_documents) = match &eval_cache {
        Some(cache) => (all(&train_cache), all(cache)),
        None => data::split(&train_cache, config.data.eval_fraction),
    };
    if let Some(checkpoint) = &checkpoint {
        let manifest = &checkpoint.manifest;
        let order = config.train.order(train_documents.iter().map(|&index| train_cache.length(index)).collect())?;
        train::same_learning_rates(&manifest.configuration, &config.train, &config.optim, &order, manifest.step)?;
    }

    // Target and draft.
    let kind = config.target.dtype.kind();
    note(format!("loading {} on {}", config.target.path.display(), device::name(device)));
    let target: Rc<dyn models::TargetModel> = models::load_target(&config.target.path, kind, device)?.into();
    let dimensions = target.dimensions();
    let tokens_known = tokenizer.vocab_size() as i64;
    if tokens_known > dimensions.vocab_size {
        let problem = format!("the tokenizer has {tokens_known} tokens, the model {}", dimensions.vocab_size);
        return Err(Error::bad_file(&config.target.path, problem));
    }
    for cache in [Some(&train_cache), eval_cache.as_ref()].into_iter().flatten() {
        fits_context(cache, dimensions.max_position_embeddings)?;
    }
    let context = DraftContext {
        target: dimensions,
        embedding: target.embedding(),
        head: target.head(),
        vocabulary: None,
        kind,
        device,
        seed: config.train.seed,
        chunk_bytes: config.train.chunk_mib << 20,
    };
    let draft = (algorithm.build)(&config.draft, &context)?;
    let online = OnlineFeatures::new(Rc::clone(&target));
    let source: Box<dyn FeatureSource> = match config.target.keep_hidden_states {
        true => Box::new(RememberedFeatures::new(online)),
        false => Box::new(online),
    };

    let start_step = checkpoint.as_ref().map(|checkpoint| checkpoint.manifest.step);
    let tracker = Tracker::open(out, start_step)?;
    let parts = TrainerParts {
        config: &config.train,
        optim: &config.optim,
        draft: draft.as_ref(),
        source: source.as_ref(),
        train: Split { cache: &train_cache, documents: train_documents },
        eval: Split { cache: eval_cache.as_ref().unwrap_or(&train_cache), documents: eval_documents },
        store,
        tracker,
        provenance: Provenance { configuration: resolved.clone(), versions: Versions::current(), data_hashes },
        stop: &stop.number,
    };
    let trainer = Trainer::new(parts, checkpoint.as_ref())?;
    // Nothing can be refused any more.
    files::write_json(&out.join("config.json"), &resolved)?;
    record::write(&out.join(record::FILE_NAME), &resolved)?;
    let report = trainer.run()?;
    files::write_json(&out.join("report.json"), &report)?;
    output.result(&report, || text(&report));
    Ok(())
}

/// Keys that may differ between a run and its continuation: they change how long and how often, never an update. The
/// first three decide learning rates too, which are compared by themselves.
const RESUMABLE: &[&str] = &[
    "train.epochs",
    "train.max_steps",
    "optim.schedule.total_steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.micro_batch_tokens",
    "train.output_dir",
    "checkpoint",
    "data.cache_dir",
];

/// Opens or builds the token cache of some files and says what was dropped.
fn tokens(config: &RunConfig, files: &[PathBuf], tokenizer: &ChatTokenizer) -> Result<TokenCache> {
    let progress = LazyProgress::new("tokenise", "conversations");
    let report = |done, total| progress.set(done, total);
    let (cache, report) = TokenCache::build_or_open(files, tokenizer, &config.data, &report)?;
    progress.finish(&data_line(&cache, &report));
    report.note.iter().for_each(|line| note(format!("warning: {line}")));
    report.rejected.iter().for_each(|line| note(format!("warning: skipped {line}")));
    Ok(cache)
}

/// Refuses documents that are longer than what the target was made for.
fn fits_context(cache: &TokenCache, context: i64) -> Result<()> {
    let longest = (0..cache.len()).map(|index| cache.length(index)).max().unwrap_or(0);
    if longest as i64 <= context {
        return Ok(());
    }
    let problem = format!("a document has {longest} tokens, the target reads at most {context}");
    Err(Error::config("data.max_length", problem).with_hint(format!("set data.max_length to {context} or less")))
}

fn data_line(cache: &TokenCache, report: &BuildReport) -> String {
    let supervised = 100.0 * cache.supervised_tokens() as f64 / cache.total_tokens().max(1) as f64;
    format!(
        "{} documents, {} tokens, {supervised:.1} % supervised, {} without supervision dropped{}",
        cache.len(),
        cache.total_tokens(),
        report.without_supervision,
        if report.from_cache { " (from the cache)" } else { "" }
    )
}

fn text(report: &TrainReport) -> String {
    let mut lines = Vec::new();
    if let Some(signal) = report.stopped_by {
        lines.push(format!("stopped by {} after step {}; continue with --resume", signals::name(signal), report.steps));
    }
    if !report.end.is_empty() {
        let width = report.end.keys().map(String::len).max().unwrap_or(0);
        lines.push(format!("{:<width$}  {:>9}  {:>9}", "held out", "untrained", "trained"));
        for (name, end) in &report.end {
            let start = report.start.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
            lines.push(format!("{name:<width$}  {start:>9}  {end:>9.4}"));
        }
        lines.push(format!("always guessing the commonest token: {:.4}", report.commonest_token_share));
    }
    let rate = report.tokens as f64 / report.seconds.max(1e-9);
    lines.push(format!(
        "{} of {} steps, {} tokens, {rate:.0} tokens/s",
        report.steps, report.total_steps, report.tokens
    ));
    lines.push(format!("checkpoint: {}", report.checkpoint.display()));
    lines.join("\n")
}
