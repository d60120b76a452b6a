//! `specforge prompts`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers};
use crate::config::Dtype;
use crate::decode::own_prompts::{self, OwnPromptOptions, OwnPrompts, UserTurn};
use crate::error::{Error, Result, foreign};
use crate::hub::Wanted;
use crate::nn::Processors;
use crate::stop::{Answer, Stop};

#[derive(Debug, Clone, Args)]
pub(super) struct PromptsArgs {
    /// Chat model: its folder, a GGUF file of it, or a name on a hub: ORG/NAME[@REVISION].
    #[arg(long)]
    target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    /// Prompts to write, all different.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    count: usize,
    /// File of prompts to write, for `specforge regen`.
    #[arg(long)]
    out: PathBuf,
    /// System message in front of every prompt.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest prompt, in tokens. What is longer is thrown away.
    #[arg(long, default_value_t = 128, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_new_tokens: usize,
    /// Prompts sampled at once.
    #[arg(long, default_value_t = 32, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_rows: usize,
    /// Above 0: prompts are sampled.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 0.95, allow_hyphen_values = true, value_parser = numbers::any)]
    top_p: f64,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    seed: u64,
    /// Element type of the target: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's files on
    /// CUDA.
    #[arg(long)]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

#[derive(Serialize)]
struct Report {
    out: PathBuf,
    prompts: usize,
    #[serde(flatten)]
    written: OwnPrompts,
}

pub(super) fn run(args: &PromptsArgs, stop: &Stop, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    hub::fetch(vec![Place::Model(&mut args.target, Wanted::Target)], None)?;
    let (args, target) = (&*args, &args.target);
    let file = own_prompts::begin(&args.out)?;
    let processors = Processors { temperature: args.temperature, top_p: args.top_p, ..Processors::default() };
    processors.check().map_err(|problem| Error::Usage(format!("--{}", problem.replace('_', "-"))))?;
    if processors.is_greedy() {
        return Err(Error::Usage(
            "--temperature: expected a number above 0: without chance there is one prompt".to_owned(),
        ));
    }
    let tokenizer = args.template.tokenizer(target)?;
    let turn = UserTurn::of(&tokenizer, args.system.as_deref())?;
    let devices = args.devices.choose(&[], None)?;
    let model = devices.load(target, Dtype::of_target(args.dtype, target, devices.home)?.kind())?;
    let options = OwnPromptOptions {
        count: args.count,
        max_new_tokens: args.max_new_tokens,
        max_rows: args.max_rows,
        processors,
        seed: args.seed,
    };
    stop.set_answer(Answer::Finish("stopping after this pass; the prompts that are there are written"));
    let progress = LazyProgress::new("prompts", "prompts");
    let words = |tokens: &[u32]| match tokens.iter().any(|&token| tokenizer.is_special(token)) {
        true => Ok(None),
        false => tokenizer.decode(tokens, false).map(Some),
    };
    let ends = tokenizer.eos_token_ids();
    let written = own_prompts::write_prompts(
        &options,
        model.as_ref(),
        &turn,
        ends,
        &words,
        stop.arrived(),
        &mut |done, speed| {
            progress.set_with(done as u64, args.count as u64, &format!("{speed:.0} tokens/s"));
        },
    )?;
    let shortfall = written.shortfall(&options);
    // What a long run has is kept, whatever ended it.
    if !written.prompts.is_empty() {
        written.write(file, args.system.as_deref(), args.seed)?;
    }
    progress.finish(if written.interrupted { "stopped" } else { "done" });
    if written.interrupted {
        note(format!("warning: {} of {} prompts were written", written.prompts.len(), args.count));
    }
    let report = Report { out: args.out.clone(), prompts: written.prompts.len(), written };
    output.result(&report, || text(&report));
    shortfall.map_or(Ok(()), Err)
}

fn text(report: &Report) -> String {
    let OwnPrompts { tried, unfinished, unusable, repeated, new_tokens, tokens_per_second, .. } = &report.written;
    format!(
        "{}: {} prompts of {tried} tries; left out: {unfinished} too long, {unusable} without words or with special tokens, {repeated} \
         that were there already\n{new_tokens} new tokens, {tokens_per_second:.0} tokens/s",
        foreign::path(&report.out),
        report.prompts,
    )
}
