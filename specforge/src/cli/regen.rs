//! `specforge regen`

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::devices::DeviceArgs;
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers, ranks};
use crate::config::Dtype;
use crate::decode::drafter::{self, DraftSampling};
use crate::decode::regenerate::{self, GenerationConfig, OnLength, RegenOptions, RegenReport};
use crate::dist::{Meeting, SharedWork};
use crate::error::{Error, Result, foreign};
use crate::nn::Processors;
use crate::stop::{Answer, Stop};

#[derive(Debug, Args)]
pub(super) struct RegenArgs {
    /// Model folder, or a GGUF file of one.
    #[arg(long)]
    target: PathBuf,
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
    #[arg(long, default_value_t = 32, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
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
    #[arg(long, value_name = "DIR")]
    draft: Option<String>,
    /// Which guesses of --draft are tried, as `specforge generate` takes it.
    #[arg(long)]
    tree: Option<String>,
    /// Start over; an existing file is moved to OUT.bak.
    #[arg(long)]
    restart: bool,
    /// Element type of the target: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's files on
    /// CUDA.
    #[arg(long)]
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
    /// What the target's own file says, with what was given replaced.
    fn processors(&self, own: Processors) -> Processors {
        Processors {
            temperature: self.temperature.unwrap_or(own.temperature),
            top_k: self.top_k.unwrap_or(own.top_k),
            top_p: self.top_p.unwrap_or(own.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(own.repetition_penalty),
        }
    }

    fn on_length(&self) -> OnLength {
        match self.on_length {
            Rule::Keep => OnLength::Keep,
            Rule::Stop => OnLength::Stop,
            Rule::Drop => OnLength::Drop,
        }
    }
}

pub(super) fn run(args: &RegenArgs, stop: &Stop, output: &Output) -> Result<()> {
    ranks::together(ranks::default_timeout(), |meeting| regenerate(args, meeting, stop, output))
}

/// Answers as one of the processes that share the prompts, or alone.
fn regenerate(args: &RegenArgs, meeting: Option<&Meeting>, stop: &Stop, output: &Output) -> Result<()> {
    let own = GenerationConfig::read(&args.target)?;
    let options = RegenOptions {
        target: args.target.clone(),
        prompts: args.prompts.clone(),
        out: args.out.clone(),
        max_new_tokens: args.max_new_tokens,
        max_prompt_tokens: None,
        max_rows: args.max_rows,
        processors: args.processors(own.processors),
        draft: args.draft.clone(),
        tree: args.tree.clone(),
        on_length: args.on_length(),
        seed: args.seed,
        max_bad_share: args.max_bad_share,
        restart: args.restart,
    };
    options.check()?;
    let devices = args.devices.choose(&[], meeting.map(Meeting::placement))?;
    let tokenizer = args.template.tokenizer(&args.target)?;
    let target = devices.load(&args.target, Dtype::of_target(args.dtype, &args.target, devices.home)?.kind())?;
    let sampling = DraftSampling::for_policy(options.policy(), options.processors.temperature);
    let draft = drafter::open(args.draft.as_deref(), args.tree.as_deref(), (target.as_ref(), &args.target), sampling)?;
    draft.notes.iter().for_each(|line| note(format!("warning: {line}")));
    own.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    note(chosen(&options));
    stop.set_answer(Answer::Finish(
        "stopping after this pass; answered rows stay, and the same command goes on from them",
    ));
    let progress = LazyProgress::new("regen", "rows");
    let work = SharedWork::of(meeting, "regen");
    let report = regenerate::run(&options, target.as_ref(), &tokenizer, draft, &work, stop.arrived(), &mut |state| {
        progress.set_with(state.done as u64, state.total as u64, &format!("{:.0} tokens/s", state.tokens_per_second));
    })?;
    let Some(report) = report else { return Ok(()) }; // the first process has it
    report.warnings.iter().for_each(|line| note(format!("warning: {line}")));
    report.skipped.iter().for_each(|line| note(format!("warning: skipped {line}")));
    progress.finish(if report.interrupted { "stopped; run the same command again to go on" } else { "done" });
    output.result(&report, || text(&report));
    match (report.failed, &report.errors) {
        (0, _) => Ok(()),
        (failed, errors) => {
            let path = errors.as_ref().map_or_else(String::new, |path| format!("; see {}", foreign::path(path)));
            Err(Error::Failed(format!("{failed} rows could not be answered{path}")))
        }
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
