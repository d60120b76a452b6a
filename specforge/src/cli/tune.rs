//! `specforge tune`

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::devices::{self, DeviceArgs};
use super::hub::{self, Place};
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers};
use crate::config::Dtype;
use crate::decode::drafter::{DraftSampling, open};
use crate::decode::engine::EngineOptions;
use crate::decode::policy::Policy;
use crate::doctor::launch::{self, EngineFlags};
use crate::error::{Error, Result, foreign};
use crate::eval::acceptance::questions;
use crate::eval::tune::{self, Batch, Prompt, TuneOptions, Tuned, report};
use crate::files;
use crate::hub::{Wanted, recorded};
use crate::models::TargetModel;
use crate::nn::Processors;

#[derive(Debug, Clone, Args)]
pub(super) struct TuneArgs {
    /// Model folder, a GGUF file of one, or a name on a hub: ORG/NAME[@REVISION].
    #[arg(long)]
    target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    /// Who guesses, as for `eval`. Given several times, the drafts are ranked.
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    draft: Vec<String>,
    /// Prompts the drafts were not trained on, as for `eval`; of each the first turn is answered.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// File to write: the fastest tree, which `--tree FILE` takes, and everything that was measured.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Only the first prompts of each file.
    #[arg(long, default_value_t = 8, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    limit: usize,
    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 128, allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    max_new_tokens: usize,
    /// Requests that run together: each of these is tuned by itself.
    #[arg(long, value_name = "N,N,...", default_value = "1,4,16", value_delimiter = ',', allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    batches: Vec<usize>,
    /// Deepest guess that is tried.
    #[arg(long, default_value_t = 6, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_depth: usize,
    /// Most guesses of a tree.
    #[arg(long, default_value_t = 32, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_nodes: usize,
    /// Children tried behind a guess, for trees of the draft's own probabilities; chains are tried in any case.
    #[arg(long, value_name = "K,K,...", default_value = "4", value_delimiter = ',', allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    top_k: Vec<usize>,
    /// Timed rounds of each size.
    #[arg(long, default_value_t = 15, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    repeat: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: u64,
    /// Element type of target and drafts: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's
    /// files on CUDA.
    #[arg(long)]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

/// What is printed, and what the file holds.
#[derive(Serialize)]
struct Report {
    /// The fastest tree of all, as `--tree` takes it.
    tree: String,
    /// Whose it is.
    draft: PathBuf,
    /// Requests that run together where it is the fastest.
    rows: usize,
    /// Times of plain decoding of as many requests, as decoded.
    speedup: f64,
    settings: Value,
    drafts: Vec<DraftReport>,
    ranking: Vec<Ranked>,
}

#[derive(Serialize)]
struct DraftReport {
    draft: PathBuf,
    #[serde(flatten)]
    tuned: Tuned,
    /// What engines are started with, by requests that run together.
    engines: Vec<EngineFlags>,
}

/// A draft's place for one number of requests together.
#[derive(Serialize)]
struct Ranked {
    rows: usize,
    draft: PathBuf,
    tree: String,
    tokens_per_second: f64,
    speedup: f64,
}

pub(super) fn run(args: &TuneArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    let target = Place::Model(&mut args.target, Wanted::Target);
    let drafts = args.draft.iter_mut().map(Place::Drafter);
    hub::fetch(args.data.iter_mut().map(Place::Data).chain(drafts).chain([target]).collect(), None)?;
    let args = &*args;
    let options = options(args)?;
    let home = args.devices.alone()?;
    let tokenizer = args.template.tokenizer(&args.target)?;
    let questions = questions::read(&args.data, Some(args.limit))?;
    let dtype = Dtype::of_target(args.dtype, &args.target, home.home)?;
    let target = home.load(&args.target, dtype.kind())?;
    super::train::fits_vocabulary(&tokenizer, target.info().vocab_size, &args.target)?;
    let options = TuneOptions {
        engine: EngineOptions { stop_tokens: tokenizer.eos_token_ids().to_vec(), ..options.engine.clone() },
        ..options
    };
    let (prompts, left_out) = tune::prompts(target.as_ref(), &tokenizer, &questions, args.max_new_tokens)?;
    left_out.iter().for_each(|line| note(format!("warning: {line}")));
    let mut drafts = Vec::new();
    for draft in &args.draft {
        drafts.push(tune_draft(args, draft, target.as_ref(), &prompts, &options)?);
    }
    let settings = json!({
        "target": recorded(&args.target),
        "data": args.data.iter().map(|path| recorded(path)).collect::<Vec<_>>(),
        "prompts": prompts.len(),
        "max_new_tokens": args.max_new_tokens,
        "batches": options.batches,
        "max_depth": args.max_depth,
        "max_nodes": args.max_nodes,
        "top_k": options.top_k,
        "repeat": args.repeat,
        "temperature": args.temperature,
        "seed": args.seed,
        "dtype": dtype,
        "device": devices::of_target(target.as_ref()),
        "threads": tch::get_num_threads(),
    });
    let report = report(settings, drafts)?;
    if let Some(path) = &args.out {
        files::write_json(path, &report)?;
        note(format!("tree: {}", path.display()));
    }
    output.result(&report, || text(&report));
    let faults: usize = report
        .drafts
        .iter()
        .flat_map(|draft| &draft.tuned.batches)
        .flat_map(Batch::decodes)
        .map(|one| one.faults)
        .sum();
    match faults {
        0 => Ok(()),
        faults => Err(Error::Failed(format!(
            "{faults} answers with a draft are not those of the target; record both with `specforge eval --trace` and run \
             `specforge compare`"
        ))),
    }
}

fn options(args: &TuneArgs) -> Result<TuneOptions> {
    let processors = Processors::at_temperature(args.temperature);
    processors.check().map_err(|problem| Error::Usage(format!("--{problem}")))?;
    let sorted = |numbers: &[usize]| {
        let mut numbers = numbers.to_vec();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    };
    let engine =
        EngineOptions { processors, policy: Policy::Keyed { seed: args.seed }, stop_tokens: Vec::new(), max_rows: 1 };
    Ok(TuneOptions {
        engine,
        max_new_tokens: args.max_new_tokens,
        batches: sorted(&args.batches),
        max_depth: args.max_depth,
        max_nodes: args.max_nodes,
        top_k: sorted(&args.top_k),
        repeat: args.repeat,
    })
}

fn tune_draft(
    args: &TuneArgs,
    draft: &str,
    target: &dyn TargetModel,
    prompts: &[Prompt],
    options: &TuneOptions,
) -> Result<DraftReport> {
    let sampling = DraftSampling::for_policy(options.engine.policy, args.temperature);
    let told = RefCell::new(HashSet::new());
    let open = |tree: Option<&str>| {
        let opened = open(Some(draft), tree, (target, &args.target), sampling)?;
        // A draft is opened several times, and says the same each time.
        for line in &opened.notes {
            if told.borrow_mut().insert(line.clone()) {
                note(format!("warning: {line}"));
            }
        }
        Ok(opened)
    };
    let mut stage: Option<(&'static str, LazyProgress)> = None;
    let mut progress = |what: &'static str, done: u64, total: u64| {
        if stage.as_ref().is_none_or(|(shown, _)| *shown != what || done == 0) {
            if let Some((_, shown)) = stage.take() {
                shown.finish("done");
            }
            stage = Some((what, LazyProgress::new("tune", what)));
        }
        if let Some((_, shown)) = &stage {
            shown.set(done, total);
        }
    };
    let tuned = tune::tune(target, prompts, options, &open, &mut progress)?;
    if let Some((_, shown)) = stage {
        shown.finish("done");
    }
    let engines = tuned.batches.iter().flat_map(|batch| launch::flags(&tuned, batch)).collect();
    Ok(DraftReport { draft: recorded(Path::new(draft)), tuned, engines })
}

fn report(settings: Value, drafts: Vec<DraftReport>) -> Result<Report> {
    let mut ranking: Vec<Ranked> = Vec::new();
    for one in &drafts {
        ranking.extend(one.tuned.batches.iter().map(|batch| {
            let (_, tested) = batch.fastest();
            Ranked {
                rows: batch.rows,
                draft: one.draft.clone(),
                tree: report::short_fastest(batch),
                tokens_per_second: tested.tokens_per_second,
                speedup: tested.speedup,
            }
        }));
    }
    ranking.sort_by(|a, b| a.rows.cmp(&b.rows).then(b.speedup.total_cmp(&a.speedup)));
    let all = drafts.iter().flat_map(|draft| draft.tuned.batches.iter().map(move |batch| (draft, batch)));
    let speed = |batch: &Batch| batch.fastest().1.tokens_per_second;
    let fastest = all.max_by(|(_, a), (_, b)| speed(a).total_cmp(&speed(b)));
    let Some((draft, batch)) = fastest else {
        return Err(Error::Failed("nothing was tuned".to_owned()));
    };
    let (tree, tested) = batch.fastest();
    let (tree, rows, speedup) = (tree.to_owned(), batch.rows, tested.speedup);
    Ok(Report { tree, draft: draft.draft.clone(), rows, speedup, settings, drafts, ranking })
}

fn text(report: &Report) -> String {
    let mut parts: Vec<String> = Vec::new();
    for draft in &report.drafts {
        let name = foreign::path(&draft.draft).to_string();
        parts.push(report::text(&name, &draft.tuned));
        if !draft.engines.is_empty() {
            parts.push(launch::flags_text(&draft.engines));
        }
    }
    if report.drafts.len() > 1 {
        parts.push(ranking(&report.ranking));
    }
    parts.join("\n\n")
}

fn ranking(places: &[Ranked]) -> String {
    let mut lines = vec![format!("{:>8}  {:>8}  {:>9}  draft and tree", "together", "speed-up", "tokens/s")];
    for Ranked { rows, draft, tree, tokens_per_second, speedup } in places {
        let draft = foreign::path(draft);
        lines.push(format!("{rows:>8}  {speedup:>7.2}x  {tokens_per_second:>9.2}  {draft}  {tree}"));
    }
    lines.join("\n")
}
