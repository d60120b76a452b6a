//! `specforge train`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clap::Args;
use serde_json::{Value, json};
use tch::Device;

use super::{LazyProgress, Output, note, record, signals};
use crate::checkpoint::{self, CheckpointStore, Versions};
use crate::config::RunConfig;
use crate::data::{self, BuildReport, ChatTokenizer, TokenCache};
use crate::device;
use crate::dist::ProcessGroup;
use crate::draft::vocabulary::{Corpus, Vocabulary, VocabularyKeys};
use crate::draft::{self, DraftContext, DraftModel};
use crate::error::{Error, Result};
use crate::eval::acceptance::in_training;
use crate::export;
use crate::features::{FeatureSource, OnlineFeatures, RememberedFeatures, StoredFeatures};
use crate::files;
use crate::models::{self, TargetIdentity, TargetTables};
use crate::plan::{self, Plan};
use crate::tracking::Tracker;
use crate::train::{self, Provenance, Split, TrainReport, Trainer, TrainerParts, Writer};

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
    let group = ProcessGroup::single();
    let out = &config.train.output_dir;
    let algorithm = draft::algorithm(&config.draft)?;
    let mut retention = config.checkpoint.clone();
    // What decoding really accepts goes before what the draft's own metrics promise.
    let chosen = if config.eval.every > 0 { in_training::METRIC } else { algorithm.selection_metric };
    retention.best_metric.get_or_insert_with(|| chosen.to_owned());
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
    let all = |cache: &TokenCache| (0..cache.len()).collect::<Vec<_>>();
    let (train_documents, eval_documents) = match &eval_cache {
        Some(cache) => (all(&train_cache), all(cache)),
        None => data::split(&train_cache, config.data.eval_fraction),
    };
    let vocabulary = vocabulary(&config, &tokenizer, &train_cache, &train_documents)?;
    if let Some(vocabulary) = &vocabulary {
        data_hashes.insert("vocabulary".to_owned(), vocabulary.file.map.hash());
    }
    // Before anything in the output folder is touched.
    if let Some(checkpoint) = &checkpoint {
        checkpoint.same_data(&data_hashes)?;
        let manifest = &checkpoint.manifest;
        let order = config.train.order(train_documents.iter().map(|&index| train_cache.length(index)).collect())?;
        train::same_learning_rates(&manifest.configuration, &config.train, &config.optim, &order, manifest.step)?;
    }

    // Target and draft.
    let kind = config.target.dtype.kind();
    let Target { tables, source, model } = target(&config, device, &tokenizer)?;
    let dimensions = tables.dimensions;
    fits_vocabulary(&tokenizer, dimensions.vocab_size, &config.target.path)?;
    for cache in [Some(&train_cache), eval_cache.as_ref()].into_iter().flatten() {
        fits_context(cache, dimensions.max_position_embeddings)?;
    }
    let context = DraftContext {
        target: dimensions,
        embedding: &tables.embedding,
        head: &tables.head,
        vocabulary: vocabulary.as_ref().map(|vocabulary| &vocabulary.file.map),
        kind,
        device,
        seed: config.train.seed,
        chunk_bytes: config.train.chunk_mib << 20,
    };
    let section = draft::vocabulary::with_size(&config.draft, dimensions.vocab_size)?;
    let draft = (algorithm.build)(&section, &context)?;
    // A resumed run has its values from the checkpoint.
    if let (None, Some(folder)) = (&checkpoint, config.draft.get("init_from").and_then(Value::as_str)) {
        let notes = export::eagle3::start_from(Path::new(folder), draft.as_ref(), context.vocabulary)?;
        notes.iter().for_each(|line| note(format!("{folder}: {line}")));
        note(format!("starting from the draft in {folder}"));
    }
    for cache in [Some(&train_cache), eval_cache.as_ref()].into_iter().flatten() {
        draft.check_length(longest(cache))?;
    }
    draft.contract().iter().for_each(|line| note(format!("contract: {line}")));
    if let Source::Stored(stored) = &source {
        let eval = (eval_cache.as_ref().unwrap_or(&train_cache), eval_documents.as_slice());
        stored.require(&draft.capture(), &[(&train_cache, &train_documents), eval])?;
    }

    let held_out = eval_cache.as_ref().unwrap_or(&train_cache);
    let prompts = in_training::prompts(&config.eval, held_out, &eval_documents, dimensions.max_position_embeddings);
    let decoding = |draft: &dyn DraftModel| match &model {
        Some(model) => {
            in_training::measure(&config.eval, draft, model.as_ref(), &prompts, tokenizer.eos_token_ids(), &group)
        }
        None => Ok(BTreeMap::new()),
    };
    if config.eval.every > 0 {
        if prompts.is_empty() {
            let problem = "there are no held-out documents with a prompt to decode";
            return Err(Error::config("eval.every", problem)
                .with_hint("set data.eval_fraction or data.eval, or eval.every to 0"));
        }
        // A tree that cannot be used is found before the first step.
        decoding(draft.as_ref())?;
    }
    let start_step = checkpoint.as_ref().map(|checkpoint| checkpoint.manifest.step);
    let tracker = Tracker::open(out, start_step)?;
    let parts = TrainerParts {
        config: &config.train,
        optim: &config.optim,
        draft: draft.as_ref(),
        source: source.as_dyn(),
        train: Split { cache: &train_cache, documents: train_documents },
        eval: Split { cache: eval_cache.as_ref().unwrap_or(&train_cache), documents: eval_documents },
        group: &group,
        parallel: &config.parallel,
        writer: Some(Writer { store, tracker }),
        decoding: (config.eval.every, &decoding),
        provenance: Provenance { configuration: resolved.clone(), versions: Versions::current(), data_hashes },
        stop: &stop.number,
    };
    let trainer = Trainer::new(parts, checkpoint.as_ref())?;
    // Nothing can be refused any more.
    if let Some(made) = vocabulary.as_ref().filter(|vocabulary| vocabulary.made) {
        made.file.write(&out.join(VOCABULARY_FILE))?;
    }
    files::write_json(&out.join("config.json"), &resolved)?;
    record::write(&out.join(record::FILE_NAME), &resolved)?;
    let report = trainer.run()?;
    files::write_json(&out.join("report.json"), &report)?;
    output.result(&report, || text(&report));
    Ok(())
}

/// The map that a run chose itself, in its output folder.
const VOCABULARY_FILE: &str = "vocab.safetensors";

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
    "eval",
    "parallel",
    "data.cache_dir",
    // The map's hash is compared instead: where the file lies changes nothing.
    "draft.vocab_map",
];

/// The draft's own vocabulary, where the configuration asks for one.
fn vocabulary(
    config: &RunConfig,
    tokenizer: &ChatTokenizer,
    cache: &TokenCache,
    documents: &[usize],
) -> Result<Option<Vocabulary>> {
    if VocabularyKeys::read(&config.draft)? == VocabularyKeys::default() {
        return Ok(None);
    }
    let target_size = plan::target_config(config)?.vocab_size;
    fits_vocabulary(tokenizer, target_size, &config.target.path)?;
    let corpus = Corpus { cache, documents, tokenizer, target_size };
    let vocabulary = draft::vocabulary::prepare(&config.draft, &corpus)?;
    if let Some(Vocabulary { file, coverage, warnings, .. }) = &vocabulary {
        warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
        let (draft, share) = (file.map.draft_size(), 100.0 * coverage);
        note(format!("draft vocabulary: {draft} of {target_size} tokens, {share:.2} % of the supervised ones"));
    }
    Ok(vocabulary)
}

/// Refuses a tokenizer with more tokens than the model.
pub(super) fn fits_vocabulary(tokenizer: &ChatTokenizer, target_size: i64, model: &Path) -> Result<()> {
    match tokenizer.vocab_size() as i64 {
        known if known > target_size => {
            Err(Error::bad_file(model, format!("the tokenizer has {known} tokens, the model {target_size}")))
        }
        _ => Ok(()),
    }
}

/// Where hidden states come from.
enum Source {
    Online(OnlineFeatures),
    Remembered(RememberedFeatures<OnlineFeatures>),
    Stored(Box<StoredFeatures>),
}

impl Source {
    fn as_dyn(&self) -> &dyn FeatureSource {
        match self {
            Source::Online(source) => source,
            Source::Remembered(source) => source,
            Source::Stored(source) => source.as_ref(),
        }
    }
}

/// What a run has of its target.
struct Target {
    /// What the draft takes from it.
    tables: TargetTables,
    /// Where its hidden states come from.
    source: Source,
    /// The target itself, where it was loaded.
    model: Option<Rc<dyn models::TargetModel>>,
}

/// Loads the target. With a store, the layers are loaded only to decode with.
fn target(config: &RunConfig, device: Device, tokenizer: &ChatTokenizer) -> Result<Target> {
    let (path, kind) = (&config.target.path, config.target.dtype.kind());
    note(format!("loading {} on {}", path.display(), device::name(device)));
    if let Some(folder) = &config.target.feature_store {
        let decodes = config.eval.every > 0;
        let model: Option<Rc<dyn models::TargetModel>> =
            if decodes { Some(models::load_target(path, kind, device)?.into()) } else { None };
        let tables = match &model {
            Some(model) => TargetTables::of(model.as_ref()),
            None => models::load_tables(path, kind, device)?,
        };
        let identity = TargetIdentity::read(path)?;
        let stored = StoredFeatures::open(folder, &identity, &tables, tokenizer.fingerprint(), &check_progress())?;
        return Ok(Target { tables, source: Source::Stored(Box::new(stored)), model });
    }
    let model: Rc<dyn models::TargetModel> = models::load_target(path, kind, device)?.into();
    let tables = TargetTables::of(model.as_ref());
    let online = OnlineFeatures::new(Rc::clone(&model));
    let source = match config.target.keep_hidden_states {
        true => Source::Remembered(RememberedFeatures::new(online)),
        false => Source::Online(online),
    };
    Ok(Target { tables, source, model: Some(model) })
}

/// Says how much of a large store is checked.
pub(super) fn check_progress() -> impl Fn(u64, u64) + Sync {
    /// Smaller stores are checked before anybody asks.
    const WORTH_SAYING: u64 = 4 << 30;
    let progress = std::sync::OnceLock::new();
    move |done, total| {
        if total > WORTH_SAYING {
            let unit = "MiB";
            let bar = progress.get_or_init(|| crate::progress::Progress::new("check the store", total >> 20, unit));
            bar.set(done >> 20, "");
        }
    }
}

/// Opens or builds the token cache of some files and says what was dropped.
pub(super) fn tokens(config: &RunConfig, files: &[PathBuf], tokenizer: &ChatTokenizer) -> Result<TokenCache> {
    let progress = LazyProgress::new("tokenise", "conversations");
    let report = |done, total| progress.set(done, total);
    let (cache, report) = TokenCache::build_or_open(files, tokenizer, &config.data, &report)?;
    progress.finish(&data_line(&cache, &report));
    report.note.iter().for_each(|line| note(format!("warning: {line}")));
    report.rejected.iter().for_each(|line| note(format!("warning: skipped {line}")));
    Ok(cache)
}

/// Tokens of the longest document.
fn longest(cache: &TokenCache) -> i64 {
    (0..cache.len()).map(|index| cache.length(index)).max().unwrap_or(0) as i64
}

/// Refuses documents that are longer than what the target was made for.
pub(super) fn fits_context(cache: &TokenCache, context: i64) -> Result<()> {
    let longest = longest(cache);
    if longest <= context {
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
        lines.extend(held_out(report));
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

/// Held-out figures before and after: single ones a line each, those of a part of the draft (`step1/accuracy`) as a table.
fn held_out(report: &TrainReport) -> Vec<String> {
    let before = |name: &str| report.start.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
    let single = report.end.iter().filter(|(name, _)| !name.contains('/'));
    let width = single.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = vec![format!("{:<width$}  {:>9}  {:>9}", "held out", "untrained", "trained")];
    lines.extend(single.map(|(name, end)| format!("{name:<width$}  {:>9}  {end:>9.4}", before(name))));
    let parts = || report.end.iter().filter_map(|(name, end)| Some((name.split_once('/')?, end)));
    let mut columns: Vec<&str> = parts().map(|((_, column), _)| column).collect();
    columns.sort_unstable();
    columns.dedup();
    let mut rows: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for ((row, column), end) in parts() {
        let cells = rows.entry(row).or_insert_with(|| vec!["-".to_owned(); columns.len()]);
        if let Ok(place) = columns.binary_search(&column) {
            cells[place] = format!("{} -> {end:.4}", before(&format!("{row}/{column}")));
        }
    }
    let line = |name: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("  {cell:>18}")).collect();
        format!("{name:<8}{cells}")
    };
    if !rows.is_empty() {
        lines.push(line("", &columns.iter().map(|&column| column.to_owned()).collect::<Vec<_>>()));
    }
    lines.extend(rows.iter().map(|(row, cells)| line(row, cells)));
    lines
}
