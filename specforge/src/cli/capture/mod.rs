//! `specforge capture`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use self::elsewhere::ElsewhereArgs;
use super::devices::DeviceArgs;
use super::hub::{self, Reads};
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers, ranks, signals, train};
use crate::config::RunConfig;
use crate::dist::{Meeting, Placement, SharedWork};
use crate::draft;
use crate::error::{Error, Result, foreign};
use crate::features::OnlineFeatures;
use crate::features::store::{Capture, CaptureReport, Element, Going, LAYER_CONVENTION, Overview, StoreManifest};
use crate::features::store::{StreamPlan, Windows, capture, manifest};
use crate::files::{self, Digests};
use crate::hub::Wanted;
use crate::memory;
use crate::models::{self, LayerWise, SharedTarget, TargetIdentity, TargetInfo};
use crate::stop::{Answer, Stop};

mod elsewhere;

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
    /// Note what the target says of its whole vocabulary behind every token, in 12 bytes: its likeliest token and the sum of
    /// all. Training on a CPU a draft with a vocabulary of its own then makes no pass over the whole one. In float32 alone.
    #[arg(long)]
    whole_vocabulary: bool,
    /// Most tokens of a shard; shards of about 256 MiB where it is not given.
    #[arg(long)]
    shard_tokens: Option<usize>,
    /// Load one layer of the target at a time, for a target that does not fit where it runs: all documents of a window pass
    /// through it before the next one is loaded. The store is the same.
    #[arg(long)]
    stream_layers: bool,
    /// Most tokens of such a window: every window reads all weights once. As many as half of the free memory holds where it
    /// is not given.
    #[arg(long, value_name = "TOKENS", requires = "stream_layers", allow_hyphen_values = true,
          value_parser = numbers::at_least(1usize))]
    window_tokens: Option<usize>,
    /// Print documents, tokens, disk and, with --stream-layers, windows and memory, and stop. Loads no weights.
    #[arg(long)]
    plan: bool,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    elsewhere: ElsewhereArgs,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    capture: CaptureReport,
    tokens_per_second: f64,
    stopped_by: Option<i32>,
    /// Rows of states from elsewhere that the target's head was asked about and knew.
    #[serde(skip_serializing_if = "Option::is_none")]
    rows_judged: Option<usize>,
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    overview: Overview,
    #[serde(skip_serializing_if = "Option::is_none")]
    streaming: Option<StreamPlan>,
}

pub(super) fn run(args: &CaptureArgs, stop: &Stop, output: &Output) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.set)?;
    ranks::together(config.parallel.timeout(), |meeting| capture_with(args, config, meeting, stop, output))
}

/// Captures as one of the processes that share the documents, or alone.
fn capture_with(
    args: &CaptureArgs,
    mut config: RunConfig,
    meeting: Option<&Meeting>,
    stop: &Stop,
    output: &Output,
) -> Result<()> {
    let work = SharedWork::of(meeting, "capture");
    let placement = meeting.map(Meeting::placement);
    args.template.apply(&mut config.data)?;
    let out = args.out.as_ref().or(config.target.feature_store.as_ref()).cloned().ok_or_else(|| {
        Error::Usage("--out: name the store's folder here, or as target.feature_store in the configuration".to_owned())
    })?;
    let devices = args.devices.choose(&config.target.devices, placement)?;
    if !devices.layers.is_empty() && (args.stream_layers || args.elsewhere.origin()?.is_some()) {
        note("warning: target.devices is of no use here: this capture never loads all layers of the target");
    }
    hub::fetch_for(&mut config, Reads { target: Wanted::Target, data: true, start: None }, meeting)?;
    let mut config = config.on(devices.home)?;

    let files = args.elsewhere.files()?;
    let tokenizer = config.data.tokenizer(&config.target.path)?;
    if let Some(files) = &files {
        args.elsewhere.write_documents(files, &tokenizer, &mut config.data, &work)?;
    }
    // Tokens first, so that mistakes in the data show before any weight is loaded.
    config.data.check()?;
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
    let dtype = config.target.element_type().name();
    if args.whole_vocabulary && dtype != "float32" {
        let problem = format!("--whole-vocabulary: is noted by a target in float32 alone, and target.dtype is {dtype}");
        return Err(Error::Usage(problem));
    }
    let digests = Digests::in_cache(&config.data.cache_dir);
    let path = &config.target.path;
    let wanted = StoreManifest {
        format_version: manifest::FORMAT_VERSION,
        // One process reads every byte; the others see whether they mean the same model.
        target: match work.is_first() {
            true => TargetIdentity::read_whole(path, &digests, &train::check_progress("read the target"))?,
            false => TargetIdentity::read(path)?,
        },
        target_dtype: config.target.element_type().name().to_owned(),
        hidden_size: dimensions.hidden_size,
        vocab_size: dimensions.vocab_size,
        num_layers: dimensions.num_layers(),
        tokenizer: tokenizer.fingerprint().to_owned(),
        data: Vec::new(),
        layers,
        layer_convention: LAYER_CONVENTION.to_owned(),
        element: args.dtype,
        whole_vocabulary: args.whole_vocabulary,
        shard_tokens,
        origin: args.elsewhere.origin()?,
        shards: Vec::new(),
    };
    let caches: Vec<_> = caches.iter().collect();
    let check = train::check_progress("check the store");
    let capture = Capture::prepare_together(&out, wanted.clone(), &caches, &digests, &check, &work)?;
    for (_, problem) in capture.damaged() {
        note(format!("warning: {problem}; captured again"));
    }
    let overview = capture.overview().clone();
    let pack_tokens = config.train.micro_batch_tokens;
    let kind = config.target.element_type().kind();
    let streamed = match args.stream_layers {
        true => Some(LayerWise::open(path, kind, devices.home)?),
        false => None,
    };
    let windows = |target: &LayerWise| Windows {
        tokens: args.window_tokens.unwrap_or_else(|| window_tokens(&capture, target, placement)),
        pack_tokens,
    };
    let streaming = streamed.as_ref().map(|target| capture.stream_plan(target, windows(target)));
    let planned = Planned { overview, streaming };
    if args.plan {
        if work.is_first() {
            output.result(&planned, || describe(&planned, &wanted));
        }
        return work.finish(&mut |_| Ok(()));
    }
    describe(&planned, &wanted).lines().for_each(note);
    let overview = planned.overview;
    if work.is_first() {
        enough_space(&out, overview.bytes_to_write)?;
    }

    let progress = LazyProgress::new("capture", "tokens");
    let done = |tokens: u64| progress.set(tokens, overview.tokens);
    let going = Going { work: &work, stop: stop.arrived(), progress: &done };
    let listen = || {
        stop.set_answer(Answer::Finish(
            "stopping after this pack; whole shards stay, and the same command goes on from them",
        ));
    };
    // The others may write shards while this process still loads its target: it stops as they do.
    if work.world_size() > 1 {
        listen();
    }
    let begin = || {
        listen();
        done(overview.tokens_before);
    };
    let mut rows_judged = None;
    let report = match streamed {
        Some(target) => {
            begin();
            capture.run_streamed(&target, windows(&target), &going)?
        }
        None if wanted.origin.is_some() => {
            let (report, rows) = args.elsewhere.run(files, &capture, &config, &going, &begin)?;
            rows_judged = Some(rows);
            report
        }
        None => {
            let local_world_size = placement.map_or(1, |placement| placement.local_world_size);
            let target = SharedTarget::from(train::load_shared(&config, &devices, local_world_size)?);
            let head = target.in_use().head().share();
            let source = OnlineFeatures::new(target);
            let left = overview.tokens - overview.tokens_before;
            if left > 0 {
                let rate = capture.measure(&source, pack_tokens)? * work.world_size() as f64;
                let minutes = left as f64 / rate / 60.0;
                note(format!("time       about {minutes:.1} minutes, at {rate:.0} tokens/s as in the first documents"));
            }
            begin();
            capture.run(&source, &head, pack_tokens, &going)?
        }
    };
    let Some(report) = report else { return Ok(()) }; // the first process has it
    progress.finish(if report.complete { "done" } else { "stopped; run the same command again to go on" });
    let stopped_by = Some(stop.asked()).filter(|&signal| !report.complete && signal > 0);
    let tokens_per_second = report.tokens_captured as f64 / report.seconds.max(1e-9);
    let report = Report { capture: report, tokens_per_second, stopped_by, rows_judged };
    output.result(&report, || text(&report));
    Ok(())
}

/// As many tokens as half of the free memory holds, of what this process may take of it.
fn window_tokens(capture: &Capture<'_>, target: &LayerWise, placement: Option<&Placement>) -> usize {
    const SHARE_OF_FREE: u64 = 2;
    let processes = placement.map_or(1, |placement| placement.local_world_size) as u64;
    let bytes = memory::available().map_or(u64::MAX, |free| free / SHARE_OF_FREE / processes);
    usize::try_from(bytes / capture.window_bytes_a_token(target)).unwrap_or(usize::MAX)
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

fn describe(planned: &Planned, wanted: &StoreManifest) -> String {
    let Overview { documents, tokens, documents_before, tokens_before, shards, bytes, bytes_to_write } =
        &planned.overview;
    let token = *bytes as f64 / (*tokens).max(1) as f64;
    let mut lines = vec![
        format!("documents  {documents}, {documents_before} of them in the store already"),
        format!("tokens     {tokens}, {tokens_before} of them in the store already"),
        format!(
            "states     {} in {}, computed in {}",
            manifest::listed(&wanted.layers),
            wanted.element.name(),
            wanted.target_dtype
        ),
    ];
    lines.push(format!(
        "disk       about {} in the end ({token:.0} bytes a token), {} to write, in {shards} shards",
        size(*bytes),
        size(*bytes_to_write)
    ));
    if let Some(plan) = &planned.streaming {
        lines.push(format!(
            "windows    {} of up to {} tokens; each reads {} of weights, all {}",
            plan.windows,
            plan.window_tokens,
            size(plan.bytes_a_window),
            size(plan.bytes_read)
        ));
        lines.push(format!(
            "memory     {} at the peak where the target runs (largest part {}, whole target {}), {} of states in the host",
            size(plan.peak_device),
            size(plan.largest_part),
            size(plan.whole_target),
            size(plan.peak_host)
        ));
    }
    lines.join("\n")
}

fn text(report: &Report) -> String {
    let CaptureReport { out, documents, tokens, bytes, shards, layers, element, processes, complete, .. } =
        &report.capture;
    let first =
        format!("{}: {documents} documents, {tokens} tokens, {} in {shards} shards", foreign::path(out), size(*bytes));
    let judged = match report.rows_judged {
        Some(rows) if rows > 0 => format!("; the target's head knew them on {rows} rows"),
        _ => String::new(),
    };
    let states = format!("states {} in {}{judged}", manifest::listed(layers), element.name());
    let (captured, rate) = (report.capture.tokens_captured, report.tokens_per_second);
    let together = if *processes > 1 { format!(" of {processes} processes together") } else { String::new() };
    let speed = format!("{captured} tokens captured, {rate:.0} tokens/s{together}");
    if *complete {
        return format!("{first}\n{states}\n{speed}");
    }
    let by = report.stopped_by.map_or_else(|| "a signal to another process".to_owned(), signals::name);
    format!("{first}\n{states}\n{speed}\nstopped by {by}; run the same command again to go on")
}

fn size(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mebibytes if mebibytes < 1024.0 => format!("{mebibytes:.1} MiB"),
        mebibytes => format!("{:.1} GiB", mebibytes / 1024.0),
    }
}
