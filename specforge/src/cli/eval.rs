//! `specforge eval`

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::decoding::{DecodingArgs, Models};
use super::diffusion::DiffusionArgs;
use super::diffusion_eval::{self, Asked};
use super::edge::EdgeArgs;
use super::hub::{self, Place};
use super::{LazyProgress, Output, edge_eval, note, numbers, ranks};
use crate::decode::Policy;
use crate::decode::drafter::Opened;
use crate::decode::event::{Listener, Silent};
use crate::dist::{Meeting, SharedWork};
use crate::error::{Error, Result};
use crate::eval::acceptance::beside::{self, Beside, Contender};
use crate::eval::acceptance::{self, AcceptanceOptions, AcceptanceReport, Contestants, Question};
use crate::eval::acceptance::{html, questions, report};
use crate::eval::calibration::{self, ConfidenceLog};
use crate::files;
use crate::hub::recorded;
use crate::models;
use crate::stop::{Answer, Stop};
use crate::trace::Recorder;

/// Ten timed passes of each size for every one of these.
const REPEAT: u32 = 2;

#[derive(Debug, Clone, Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    decoding: DecodingArgs,
    /// Questions: JSON Lines with `turns` (EAGLE, Spec-Bench), `prompt` or `messages`. May be given several times.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Only the first questions of each file.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    limit: Option<usize>,
    /// Questions that are answered together.
    #[arg(long, default_value_t = 1, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    batch: usize,
    /// Leave out plain decoding: no speedup, and losslessness is not checked.
    #[arg(long)]
    no_baseline: bool,
    /// Folder for report.json and report.html.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Page to write: the figures of one draft, or of several side by side.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Fit temperatures to the confidences of the draft, time this machine's decoding steps, and write both into a folder:
    /// sts.json and sps.json, for --verify-budget and SGLang.
    #[arg(long, value_name = "DIR", conflicts_with = "verify_budget")]
    calibrate: Option<PathBuf>,
    /// Record every committed position with the draft in a file for `specforge compare`.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    edge: EdgeArgs,
    /// For masked diffusion models: masked copies of each answer by which its likelihood is estimated; 0 leaves it out.
    #[arg(long, default_value_t = 8, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    likelihood_samples: usize,
    #[command(flatten)]
    diffusion: DiffusionArgs,
}

pub(super) fn run(args: &EvalArgs, stop: &Stop, output: &Output) -> Result<()> {
    if args.edge.cloud.is_some() {
        return on_the_edge(args, stop, output);
    }
    ranks::together(ranks::default_timeout(), |meeting| evaluate(args, meeting, output))
}

/// Measures with the target on another machine.
fn on_the_edge(args: &EvalArgs, stop: &Stop, output: &Output) -> Result<()> {
    let here = [
        ("--trace", args.trace.is_some()),
        ("--calibrate", args.calibrate.is_some()),
        ("--out", args.out.is_some()),
        ("--batch", args.batch > 1),
    ];
    if let Some((flag, _)) = here.iter().find(|(_, is_given)| *is_given) {
        return Err(Error::Usage(format!("{flag}: it needs the target on this machine; with --cloud there is none")));
    }
    let args = &mut args.clone();
    hub::fetch(args.data.iter_mut().map(Place::Data).chain(args.decoding.places()).collect(), None)?;
    let questions = questions::read(&args.data, args.limit)?;
    stop.set_answer(Answer::Finish("stopping: the cloud is told"));
    edge_eval::run(&questions, (&args.decoding, &args.edge), !args.no_baseline, (output, stop))
}

/// Measures as one of the processes that share the questions, or alone.
fn evaluate(args: &EvalArgs, meeting: Option<&Meeting>, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(args.data.iter_mut().map(Place::Data).chain(args.decoding.places()).collect(), meeting)?;
    let args = &*args;
    let work = SharedWork::of(meeting, "eval");
    refuse_several(args, work.world_size())?;
    let placement = meeting.map(Meeting::placement);
    let questions = questions::read(&args.data, args.limit)?;
    if models::read_info(&args.decoding.target)?.diffusion.is_some() {
        return fill_in(args, &questions, work.world_size(), output);
    }
    args.diffusion.refuse()?;
    let each = args.decoding.each()?;
    let models = each[0].models_of(placement)?;
    if let [alone] = each.as_slice() {
        let Some(report) = measure(args, alone, &models, &questions, &work)? else { return Ok(()) };
        write(args, &report, || html::page(&report))?;
        output.result(&report, || report::text(&report));
        return judge(&[&report]);
    }
    let mut drafts = Vec::new();
    for (number, decoding) in (1..).zip(&each) {
        let name = decoding.draft_name()?.unwrap_or_default();
        note(format!("draft {number} of {}: {name}", each.len()));
        // What was handed out for the draft before is done.
        let report = measure(args, decoding, &models, &questions, &SharedWork::alone())?;
        drafts.extend(report.map(|report| Contender::new(Some(Path::new(name)), report)));
    }
    let beside = Beside::new(drafts);
    write(args, &beside, || beside::page(&beside))?;
    output.result(&beside, || beside::text(&beside));
    judge(&beside.drafts.iter().map(|draft| &draft.report).collect::<Vec<_>>())
}

/// Refuses what one process alone, or one draft alone, can do.
fn refuse_several(args: &EvalArgs, processes: usize) -> Result<()> {
    let drafts = args.decoding.each()?.len();
    let flags = [
        ("--trace", args.trace.is_some(), "records a decode"),
        ("--calibrate", args.calibrate.is_some(), "measures a machine"),
    ];
    for (flag, _, what) in flags.into_iter().filter(|(_, given, _)| *given) {
        if processes > 1 {
            return Err(Error::Usage(format!("{flag}: one process {what}; this run has several")));
        }
        if drafts > 1 {
            return Err(Error::Usage(format!("{flag}: expected one --draft, got {drafts}")));
        }
    }
    if drafts > 1 && processes > 1 {
        let problem = format!("--draft: expected one for a run of several processes, got {drafts}");
        return Err(Error::Usage(problem));
    }
    Ok(())
}

/// Answers the questions with one draft. The first process has the report.
fn measure(
    args: &EvalArgs,
    decoding: &DecodingArgs,
    models: &Models,
    questions: &[Question],
    work: &SharedWork<'_>,
) -> Result<Option<AcceptanceReport>> {
    let opened = decoding.draft(models)?;
    opened.notes.iter().for_each(|line| note(format!("warning: {line}")));
    let settings = decoding.settings(models, &opened, args.batch)?;
    let slots = match &args.calibrate {
        Some(_) => confident_drafts(&opened)?,
        None => 0,
    };
    let options = AcceptanceOptions {
        engine: decoding.engine(models, args.batch)?,
        max_new_tokens: decoding.max_new_tokens,
        baseline: !args.no_baseline,
        budget: decoding.budget()?,
    };
    let promise = match decoding.policy()? {
        _ if acceptance::exact(&options.engine) => "exact",
        Policy::Maximal { .. } => "distribution",
        _ => "lossy",
    };
    same_questions(work, &settings, questions)?;
    let mut listener = match &args.trace {
        Some(path) => {
            Traced::Recorded(Box::new(Recorder::create(path, decoding.header(models, &opened, args.batch)?)?))
        }
        None => Traced::Not(Silent),
    };
    let progress = LazyProgress::new("eval", "questions");
    progress.set(0, questions.len() as u64);
    let contestants =
        Contestants { target: models.target.as_ref(), tokenizer: &models.tokenizer, drafter: opened.drafter };
    let report = |done: usize| progress.set(done as u64, questions.len() as u64);
    let mut log = ConfidenceLog::new(listener.get(), slots);
    let measured = acceptance::measure(contestants, questions, &options, work, &mut log, &report)?;
    let heard = log.finish();
    let Some(measured) = measured else { return Ok(None) }; // the first process has it
    progress.finish("done");
    if let Traced::Recorded(recorder) = listener {
        recorder.finish()?;
    }
    let clock = measured.clock();
    let mut report = AcceptanceReport::new(settings, promise, measured);
    if let Some(folder) = &args.calibrate {
        note("calibrate: timing the target's passes");
        let names: Vec<String> = args.data.iter().map(|path| recorded(path).display().to_string()).collect();
        let target = models.target.as_ref();
        let measured = calibration::measure(target, &heard, clock, args.batch, &names.join(" "), REPEAT)?;
        measured.write(folder)?;
        note(format!("calibration: {}", folder.display()));
        report.calibration = Some(measured);
    }
    Ok(Some(report))
}

/// Writes the report where it was asked for.
fn write<T: Serialize>(args: &EvalArgs, report: &T, page: impl Fn() -> String) -> Result<()> {
    if let Some(folder) = &args.out {
        files::create_dir_all(folder)?;
        files::write_json(&folder.join("report.json"), report)?;
        files::write_text(&folder.join("report.html"), &page())?;
        note(format!("report: {}", folder.join("report.html").display()));
    }
    if let Some(path) = &args.report {
        files::write_text(path, &page())?;
        note(format!("report: {}", path.display()));
    }
    Ok(())
}

/// An answer that is not the target's is an error.
fn judge(reports: &[&AcceptanceReport]) -> Result<()> {
    match reports.iter().map(|report| report.lossless.faults).sum() {
        0 => Ok(()),
        faults => Err(Error::Failed(format!(
            "{faults} answers with the draft are not those of the target; record both with --trace and run `specforge compare`"
        ))),
    }
}

/// Measures a target of masked diffusion, which has no draft but several ways to decode.
fn fill_in(args: &EvalArgs, questions: &[Question], processes: usize, output: &Output) -> Result<()> {
    let refused = [
        ("--calibrate", args.calibrate.is_some()),
        ("--trace", args.trace.is_some()),
        ("--batch", args.batch != 1),
        ("several processes", processes > 1),
    ];
    if let Some((what, _)) = refused.into_iter().find(|(_, given)| *given) {
        return Err(Error::Usage(format!(
            "{what}: the target is a masked diffusion model, whose ways to decode are timed one after the other in one process; \
             `specforge generate --trace` records one of them"
        )));
    }
    let asked =
        Asked { questions, baseline: !args.no_baseline, samples: args.likelihood_samples, out: args.out.as_deref() };
    diffusion_eval::run(&args.diffusion, &args.decoding, &asked, output)
}

/// Drafted tokens of a request that the draft gives a confidence for.
fn confident_drafts(opened: &Opened<'_>) -> Result<usize> {
    match opened.drafter.confident_drafts() {
        0 => Err(Error::Usage(format!(
            "--calibrate: expected a draft that says how sure it is, one with a confidence head and a chain of guesses; got \
             `{}` with the tree `{}`, which gives no confidence",
            opened.method, opened.tree
        ))),
        slots => Ok(slots),
    }
}

/// Refuses a process that was started on something else than the first: places of files and devices may differ.
fn same_questions(work: &SharedWork<'_>, settings: &Value, questions: &[Question]) -> Result<()> {
    const PLACES: [&str; 4] = ["target", "draft", "device", "threads"];
    let mut own = settings.clone();
    if let Some(own) = own.as_object_mut() {
        own.retain(|key, _| !PLACES.contains(&key.as_str()));
        let asked = questions.iter().map(|question| format!("{question:?}")).collect::<String>();
        own.insert("questions".to_owned(), format!("{:08x}", crc32c::crc32c(asked.as_bytes())).into());
    }
    let first = work.from_first("the settings", || Ok(own.to_string().into_bytes()))?;
    if first == own.to_string().as_bytes() {
        return Ok(());
    }
    let (rank, first) = (work.rank(), String::from_utf8_lossy(&first).into_owned());
    Err(Error::Usage(format!(
        "rank {rank} was started on something else than rank 0: expected {first}, got {own}; start every rank with the same \
         program, options and files"
    )))
}

/// Who listens to the drafted side.
enum Traced {
    Recorded(Box<Recorder>),
    Not(Silent),
}

impl Traced {
    fn get(&mut self) -> &mut dyn Listener {
        match self {
            Traced::Recorded(recorder) => recorder.as_mut(),
            Traced::Not(silent) => silent,
        }
    }
}
