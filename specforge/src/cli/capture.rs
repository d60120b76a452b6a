//! `specforge capture`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::template::TemplateArgs;
use super::{Output, note, signals, train};
use crate::config::RunConfig;
use crate::device;
use crate::draft;
use crate::error::{Error, Result, foreign};
use crate::features::OnlineFeatures;
use crate::features::store::{Capture, CaptureReport, Element, LAYER_CONVENTION, Overview, StoreManifest};
use crate::features::store::{capture, manifest};
use crate::files::{self, Digests};
use crate::models::{self, SharedTarget, TargetIdentity, TargetInfo};
use crate::progress::Progress;
use crate::stop::{Answer, Stop};

#[derive(Debug, Args)]
pub(super) struct CaptureArgs {
    /// Configuration file of the training run.
    #[arg(long)]
    config: PathBuf,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    template: TemplateArgs,
    /// Folder of the store; `target.feature_store` where it is not given. A store left by a stopped run is continued.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Element type of the stored states: float32, bfloat16 or float8 (a byte and a scale for each token).
    #[arg(long, default_value = "bfloat16")]
    dtype: Element,
    /// Hidden states to store, by Hugging Face's index, such as 2,15,27,30. What the draft needs where it is not given;
    /// the final one is always stored.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
    /// Most tokens of a shard; shards of about 256 MiB where it is not given.
    #[arg(long)]
    shard_tokens: Option<usize>,
    /// Print documents, tokens and disk, and stop. Loads no weights.
    #[arg(long)]
    plan: bool,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    capture: CaptureReport,
    tokens_per_second: f64,
    stopped_by: Option<i32>,
}

pub(super) fn run(args: &CaptureArgs, stop: &Stop, output: &Output) -> Result<()> {
    let mut config = RunConfig::load(&args.config, &args.set)?;
    args.template.apply(&mut config.data)?;
    let out = args.out.as_ref().or(config.target.feature_store.as_ref()).ok_or_else(|| {
        Error::Usage("--out: name the store's folder here, or as target.feature_store in the configuration".to_owned())
    })?;
    let device = device::choose(&args.device)?;

    // Tokens first, so that mistakes in the data show before any weight is loaded.
    config.data.check()?;
    let tokenizer = config.data.tokenizer(&config.target.path)?;
    let mut caches = vec![train::tokens(&config, &config.data.train, &tokenizer)?];
    if !config.data.eval.is_empty() {
        caches.push(train::tokens(&config, &config.data.eval, &tokenizer)?);
    }
    let dimensions = models::read_info(&config.target.path)?;
    for cache in &caches {
        train::fits_context(cache, dimensions.max_position_embeddings)?;
    }
    let layers = layers(args, &config, &dimensions)?;
    let shard_tokens = args
        .shard_tokens
        .unwrap_or_else(|| capture::default_shard_tokens(args.dtype, layers.len(), dimensions.hidden_size));
    if shard_tokens == 0 {
        return Err(Error::Usage("--shard-tokens: expected a number above 0, got 0".to_owned()));
    }
    let digests = Digests::in_cache(&config.data.cache_dir);
    let wanted = StoreManifest {
        format_version: manifest::FORMAT_VERSION,
        target: TargetIdentity::read_whole(&config.target.path, &digests, &train::check_progress("read the target"))?,
        target_dtype: config.target.dtype.name().to_owned(),
        hidden_size: dimensions.hidden_size,
        vocab_size: dimensions.vocab_size,
        num_layers: dimensions.num_layers(),
        tokenizer: tokenizer.fingerprint().to_owned(),
        data: Vec::new(),
        layers,
        layer_convention: LAYER_CONVENTION.to_owned(),
        element: args.dtype,
        shard_tokens,
        shards: Vec::new(),
    };
    let caches: Vec<_> = caches.iter().collect();
    let capture = Capture::prepare(out, wanted.clone(), &caches, &digests, &train::check_progress("check the store"))?;
    for (_, problem) in capture.damaged() {
        note(format!("warning: {problem}; captured again"));
    }
    let overview = capture.overview().clone();
    if args.plan {
        output.result(&overview, || describe(&overview, &wanted));
        return Ok(());
    }
    describe(&overview, &wanted).lines().for_each(note);
    enough_space(out, overview.bytes_to_write)?;

    let kind = config.target.dtype.kind();
    let pack_tokens = config.train.micro_batch_tokens;
    let target = SharedTarget::from(models::load_target(&config.target.path, kind, device)?);
    let head = target.in_use().head().share();
    let source = OnlineFeatures::new(target);
    let left = overview.tokens - overview.tokens_before;
    if left > 0 {
        let rate = capture.measure(&source, pack_tokens)?;
        let minutes = left as f64 / rate / 60.0;
        note(format!("time       about {minutes:.1} minutes, at the {rate:.0} tokens/s of the first documents"));
    }
    stop.set_answer(Answer::Finish(
        "stopping after this pack; whole shards stay, and the same command goes on from them",
    ));
    let progress = Progress::resumed("capture", overview.tokens, "tokens", overview.tokens_before);
    let report = capture.run(&source, &head, pack_tokens, stop.arrived(), &|done| progress.set(done, ""))?;
    progress.finish(if report.complete { "done" } else { "stopped; run the same command again to go on" });
    let stopped_by = Some(stop.asked()).filter(|_| !report.complete);
    let tokens_per_second = report.tokens_captured as f64 / report.seconds.max(1e-9);
    let report = Report { capture: report, tokens_per_second, stopped_by };
    output.result(&report, || text(&report));
    Ok(())
}

/// The states to store, ascending.
fn layers(args: &CaptureArgs, config: &RunConfig, dimensions: &TargetInfo) -> Result<Vec<usize>> {
    let mut layers = match args.layers.is_empty() {
        true => (draft::algorithm(&config.draft)?.capture)(&config.draft, dimensions)?,
        false => args.layers.clone(),
    };
    let last = dimensions.num_layers();
    if let Some(layer) = layers.iter().find(|&&layer| layer > last) {
        return Err(Error::Usage(format!("--layers: this target has hidden states 0 to {last}, got {layer}")));
    }
    layers.push(last);
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

/// Refuses to begin what cannot end well.
fn enough_space(out: &std::path::Path, needed: u64) -> Result<()> {
    let free = files::free_bytes(out)?;
    if needed <= free {
        return Ok(());
    }
    let problem = format!("the store needs about {} more, and only {} are free there", size(needed), size(free));
    Err(Error::bad_file(out, problem)
        .with_hint("free some space, choose another folder, or store fewer bits (--dtype float8) or layers"))
}

fn describe(overview: &Overview, wanted: &StoreManifest) -> String {
    let Overview { documents, tokens, documents_before, tokens_before, shards, bytes, bytes_to_write } = overview;
    let token = *bytes as f64 / (*tokens).max(1) as f64;
    let mut lines = vec![
        format!("documents  {documents}, {documents_before} of them in the store already"),
        format!("tokens     {tokens}, {tokens_before} of them in the store already"),
        format!("states     {} in {}", manifest::listed(&wanted.layers), wanted.element.name()),
    ];
    lines.push(format!(
        "disk       about {} in the end ({token:.0} bytes a token), {} to write, in {shards} shards",
        size(*bytes),
        size(*bytes_to_write)
    ));
    lines.join("\n")
}

fn text(report: &Report) -> String {
    let CaptureReport { out, documents, tokens, bytes, shards, layers, element, .. } = &report.capture;
    let first =
        format!("{}: {documents} documents, {tokens} tokens, {} in {shards} shards", foreign::path(out), size(*bytes));
    let states = format!("states {} in {}", manifest::listed(layers), element.name());
    let speed = format!("{} tokens captured, {:.0} tokens/s", report.capture.tokens_captured, report.tokens_per_second);
    match report.stopped_by {
        None => format!("{first}\n{states}\n{speed}"),
        Some(signal) => format!(
            "{first}\n{states}\n{speed}\nstopped by {}; run the same command again to go on",
            signals::name(signal)
        ),
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mebibytes if mebibytes < 1024.0 => format!("{mebibytes:.1} MiB"),
        mebibytes => format!("{:.1} GiB", mebibytes / 1024.0),
    }
}
