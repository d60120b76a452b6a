//! `specforge regen`

use std::path::PathBuf;

use clap::Args;

use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers, signals};
use crate::config::Dtype;
use crate::decode::regenerate::{self, RegenOptions, RegenReport};
use crate::device;
use crate::error::{Error, Result};
use crate::models;

#[derive(Debug, Args)]
pub(super) struct RegenArgs {
    /// Model folder.
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
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: u64,
    /// Largest share of malformed lines that is skipped rather than refused.
    #[arg(long, default_value_t = 0.01, allow_hyphen_values = true, value_parser = numbers::any)]
    max_bad_share: f64,
    /// Start over; an existing file is moved to OUT.bak.
    #[arg(long)]
    restart: bool,
    /// Element type of the target: float32, bfloat16 or float16.
    #[arg(long, default_value = "float32")]
    dtype: Dtype,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: &RegenArgs, output: &Output) -> Result<()> {
    let options = RegenOptions {
        target: args.target.clone(),
        prompts: args.prompts.clone(),
        out: args.out.clone(),
        max_new_tokens: args.max_new_tokens,
        max_prompt_tokens: None,
        max_rows: args.max_rows,
        temperature: args.temperature,
        seed: args.seed,
        max_bad_share: args.max_bad_share,
        restart: args.restart,
    };
    options.check()?;
    let device = device::choose(&args.device)?;
    let stop = signals::watch()?;
    let tokenizer = args.template.tokenizer(&args.target)?;
    let target = models::load_target(&args.target, args.dtype.kind(), device)?;
    let progress = LazyProgress::new("regen", "rows");
    let report = regenerate::run(&options, target.as_ref(), &tokenizer, &stop.arrived, &mut |state| {
        progress.set_with(state.done as u64, state.total as u64, &format!("{:.0} tokens/s", state.tokens_per_second));
    })?;
    report.skipped.iter().for_each(|line| note(format!("warning: skipped {line}")));
    progress.finish(if report.interrupted { "stopped; run the same command again to go on" } else { "done" });
    output.result(&report, || text(&report));
    match (report.failed, &report.errors) {
        (0, _) => Ok(()),
        (failed, errors) => {
            let path = errors.as_ref().map_or_else(String::new, |path| format!("; see {}", path.display()));
            Err(Error::Failed(format!("{failed} rows could not be answered{path}")))
        }
    }
}

fn text(report: &RegenReport) -> String {
    format!(
        "{}: {} rows answered ({} before this run), {} answers, {} ended by themselves\n{} new tokens, {:.0} tokens/s",
        report.out.display(),
        report.answered,
        report.answered_before,
        report.answers,
        report.stopped,
        report.new_tokens,
        report.tokens_per_second
    )
}
