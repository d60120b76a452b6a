//! `specforge regen`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use self::served::ServedArgs;
use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers, ranks};
use crate::config::Dtype;
use crate::data::ChatTokenizer;
use crate::decode::drafter::{self, DraftSampling};
use crate::decode::regenerate::served::Sampling;
use crate::decode::regenerate::{
    self, Estimate, GenerationConfig, Look, Measure, Measured, OnLength, Progress, RegenOptions, RegenReport,
};
use crate::dist::{Meeting, SharedWork};
use crate::error::{Error, Result, foreign};
use crate::hub::Wanted;
use crate::nn::Processors;
use crate::stop::{Answer, Stop};

mod served;

#[derive(Debug, Clone, Args)]
pub(super) struct RegenArgs {
    /// Model folder, a GGUF file of one, or a name on a hub: ORG/NAME[@REVISION]. With --from it runs nothing: its tokenizer and template hold every row to what
    /// training will read, and its generation_config.json says how to sample.
    #[arg(long, required_unless_present = "from")]
    target: Option<PathBuf>,
    #[command(flatten)]
    served: ServedArgs,
    #[command(flatten)]
    template: TemplateArgs,
    /// Prompts, one conversation a line. Assistant messages in them are dropped and answered anew.
    #[arg(long)]
    prompts: PathBuf,
    /// File of answered conversations. A file left by a stopped run is continued.
    #[arg(long)]
    out: PathBuf,
    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 512, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_new_tokens: usize,
    /// Conversations decoded at once.
    #[arg(long, default_value_t = 32, conflicts_with = "from", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_rows: usize,
    /// 0 is greedy. Without this and the next three, the target's generation_config.json decides: greedy unless it says
    /// `do_sample`.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: Option<f64>,
    /// Only this many of the likeliest tokens; 0 is all.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(0usize))]
    top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::any)]
    top_p: Option<f64>,
    /// Above 1 makes tokens that are already there less likely.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::any)]
    repetition_penalty: Option<f64>,
    /// What becomes of a row when an answer reaches --max-new-tokens: keep (go on behind it), stop (it ends the
    /// conversation), drop (leave the row out, and list it in OUT.cut.jsonl).
    #[arg(long, value_enum, default_value_t = Rule::Keep)]
    on_length: Rule,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: u64,
    /// Largest share of malformed lines that is skipped rather than refused.
    #[arg(long, default_value_t = 0.01, allow_hyphen_values = true, value_parser = numbers::any)]
    max_bad_share: f64,
    /// Who guesses, so that answers come sooner: an exported draft, a run's output folder or checkpoint, a smaller model
    /// with the same tokenizer, or `prompt-lookup`. The answers are the same.
    #[arg(long, value_name = "DIR", conflicts_with = "from")]
    draft: Option<String>,
    /// Which guesses of --draft are tried, as `specforge generate` takes it.
    #[arg(long, conflicts_with = "from")]
    tree: Option<String>,
    /// Start over; an existing file is moved to OUT.bak.
    #[arg(long)]
    restart: bool,
    /// Answer nothing: count rows and turns, those that are done, and tokens.
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: answer so many rows, keep nothing of it, and say what the rest would take.
    #[arg(long, value_name = "ROWS", requires = "dry_run", allow_hyphen_values = true,
          value_parser = numbers::at_least(1usize))]
    measure: Option<usize>,
    /// Element type of the target: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's files on
    /// CUDA.
    #[arg(long, conflicts_with = "from")]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rule {
    Keep,
    Stop,
    Drop,
}

impl RegenArgs {
    /// What was given of how tokens are chosen.
    fn sampling(&self) -> Sampling {
        let Self { temperature, top_k, top_p, repetition_penalty, .. } = *self;
        Sampling { temperature, top_k, top_p, repetition_penalty }
    }

    fn on_length(&self) -> OnLength {
        match self.on_length {
            Rule::Keep => OnLength::Keep,
            Rule::Stop => OnLength::Stop,
            Rule::Drop => OnLength::Drop,
        }
    }

    /// What is known of the run before anything is done.
    fn estimate(&self, tokenizer: Option<&ChatTokenizer>, measure: Measure<'_>) -> Result<Estimate> {
        let look = Look {
            prompts: &self.prompts,
            out: &self.out,
            max_bad_share: self.max_bad_share,
            on_length: self.on_length(),
            max_new_tokens: self.max_new_tokens,
        };
        look.estimate(tokenizer, self.measure.map(|rows| (rows, measure)))
    }
}

pub(super) fn run(args: &RegenArgs, stop: &Stop, output: &Output) -> Result<()> {
    ranks::together(ranks::default_timeout(), |meeting| {
        let args = &mut args.clone();
        // Where servers answer, the target's tokenizer and template are enough.
        let wanted = if args.served.is_given() { Wanted::Description } else { Wanted::Target };
        let mut places = vec![Place::Data(&mut args.prompts)];
        places.extend(args.draft.iter_mut().map(Place::Drafter));
        places.extend(args.target.iter_mut().map(|target| Place::Model(target, wanted)));
        hub::fetch(places, meeting)?;
        let args = &*args;
        match (args.served.is_given(), &args.target) {
            (false, Some(target)) => regenerate(args, target, meeting, stop, output),
            _ if meeting.is_some_and(|meeting| meeting.placement().world_size > 1) => Err(Error::Usage(
                "--from: one process asks all servers; --concurrency says how many turns are on their way".to_owned(),
            )),
            _ => served::run(args, stop, output),
        }
    })
}

/// Answers as one of the processes that share the prompts, or alone.
fn regenerate(args: &RegenArgs, target: &Path, meeting: Option<&Meeting>, stop: &Stop, output: &Output) -> Result<()> {
    let own = GenerationConfig::read(target)?;
    let options = RegenOptions {
        target: target.to_path_buf(),
        prompts: args.prompts.clone(),
        out: args.out.clone(),
        max_new_tokens: args.max_new_tokens,
        max_prompt_tokens: None,
        max_rows: args.max_rows,
        processors: args.sampling().over(own.processors),
        draft: args.draft.clone(),
        tree: args.tree.clone(),
        on_length: args.on_length(),
        seed: args.seed,
        max_bad_share: args.max_bad_share,
        restart: args.restart,
    };
    options.check()?;
    let tokenizer = args.template.tokenizer(target)?;
    if args.dry_run && args.measure.is_none() {
        let estimate = args.estimate(Some(&tokenizer), &mut |_, _| Ok((0, 0, 0.0)))?;
        return told(&estimate, meeting, output);
    }
    let devices = args.devices.choose(&[], meeting.map(Meeting::placement))?;
    let model = devices.load(target, Dtype::of_target(args.dtype, target, devices.home)?.kind())?;
    let sampling = DraftSampling::for_policy(options.policy(), options.processors.temperature);
    let draft = || drafter::open(args.draft.as_deref(), args.tree.as_deref(), (model.as_ref(), target), sampling);
    stop.set_answer(Answer::Finish(
        "stopping after this pass; answered rows stay, and the same command goes on from them",
    ));
    let progress = LazyProgress::new("regen", "rows");
    let mut tell = |state: Progress| {
        progress.set_with(state.done as u64, state.total as u64, &format!("{:.0} tokens/s", state.tokens_per_second));
    };
    if args.dry_run {
        let estimate = args.estimate(Some(&tokenizer), &mut |prompts, out| {
            let (prompts, out) = (prompts.to_path_buf(), out.to_path_buf());
            let some = RegenOptions { prompts, out, restart: false, ..options.clone() };
            let work = SharedWork::alone();
            let report =
                regenerate::run(&some, model.as_ref(), &tokenizer, draft()?, &work, stop.arrived(), &mut tell)?;
            Ok(report.map_or((0, 0, 0.0), |report| (report.answers, report.new_tokens, report.tokens_per_second)))
        })?;
        progress.finish("measured");
        return told(&estimate, meeting, output);
    }
    let draft = draft()?;
    draft.notes.iter().for_each(|line| note(format!("warning: {line}")));
    own.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    note(chosen(&options));
    let work = SharedWork::of(meeting, "regen");
    let report = regenerate::run(&options, model.as_ref(), &tokenizer, draft, &work, stop.arrived(), &mut tell)?;
    let Some(report) = report else { return Ok(()) }; // the first process has it
    report.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    report.skipped.iter().for_each(|line| note(format!("warning: skipped {line}")));
    progress.finish(if report.interrupted { "stopped; run the same command again to go on" } else { "done" });
    output.result(&report, || text(&report));
    all_answered(report.failed, report.errors.as_deref())
}

/// An estimate is one for all processes.
fn told(estimate: &Estimate, meeting: Option<&Meeting>, output: &Output) -> Result<()> {
    if meeting.is_none_or(|meeting| meeting.placement().rank == 0) {
        output.result(estimate, || estimate_text(estimate));
    }
    Ok(())
}

/// Rows without answer are an error at the end of a run that did all others.
fn all_answered(failed: usize, errors: Option<&Path>) -> Result<()> {
    let path = errors.map_or_else(String::new, |path| format!("; see {}", foreign::path(path)));
    match failed {
        0 => Ok(()),
        failed => Err(Error::Failed(format!("{failed} rows could not be answered{path}"))),
    }
}

/// What is to be done, in words.
fn estimate_text(estimate: &Estimate) -> String {
    let Estimate { rows, done, unusable, turns, prompt_tokens, counted, most_new_tokens, .. } = *estimate;
    let about = if counted { "" } else { " (a quarter of their bytes)" };
    let mut text = format!(
        "{rows} rows, {done} of them done, {unusable} lines that cannot be used\n\
         {turns} turns to answer: {prompt_tokens} tokens of prompts{about}, at most {most_new_tokens} of answers",
    );
    if let Some(length) = estimate.tokens_an_answer {
        let likely = length * turns as f64;
        text.push_str(&format!("\nthe answers that are there have {length:.0} tokens: about {likely:.0} in all"));
    }
    match estimate.measured {
        Some(Measured { rows, answers, tokens_an_answer, tokens_per_second, new_tokens, seconds }) => {
            text.push_str(&format!(
                "\n{rows} rows tried: {answers} answers of {tokens_an_answer:.0} tokens, {tokens_per_second:.0} tokens/s; all of \
                 them: about {new_tokens} tokens, {}",
                duration(seconds)
            ));
        }
        None if turns > 0 => {
            let most = duration(most_new_tokens as f64 / 1000.0);
            text.push_str(&format!("\nat 1000 tokens/s at most {most}; --measure ROWS tries some rows"));
        }
        None => {}
    }
    text
}

/// Seconds, as somebody who waits would say it.
fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

/// How tokens are chosen, in words.
fn chosen(options: &RegenOptions) -> String {
    let Processors { temperature, top_k, top_p, repetition_penalty } = options.processors;
    let mut words = match options.processors.is_greedy() {
        true => "tokens are chosen greedily".to_owned(),
        false => format!("tokens are sampled: temperature {temperature}"),
    };
    if !options.processors.is_greedy() {
        if top_k > 0 {
            words.push_str(&format!(", top-k {top_k}"));
        }
        if top_p < 1.0 {
            words.push_str(&format!(", top-p {top_p}"));
        }
        words.push_str(&format!(", seed {}", options.seed));
    }
    if repetition_penalty != 1.0 {
        words.push_str(&format!(", repetition penalty {repetition_penalty}"));
    }
    words
}

fn text(report: &RegenReport) -> String {
    let dropped = match report.dropped {
        0 => String::new(),
        dropped => format!(", {dropped} rows left out"),
    };
    let guessed = match (report.drafter.as_str(), report.acceptance_length) {
        ("none", _) | (_, None) => String::new(),
        (drafter, Some(length)) => format!(", tau {length:.2} with {drafter}"),
    };
    format!(
        "{}: {} rows answered ({} before this run), {} answers, {} ended by themselves{dropped}\n\
         {} new tokens, {:.0} tokens/s{guessed}",
        foreign::path(&report.out),
        report.answered,
        report.answered_before,
        report.answers,
        report.stopped,
        report.new_tokens,
        report.tokens_per_second
    )
}
