//! `specforge tree`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::template::TemplateArgs;
use super::{LazyProgress, Output, note, numbers};
use crate::config::Dtype;
use crate::decode::drafter::MedusaHeads;
use crate::decode::drafter::path_rates::{self, HeadRates, PathRates};
use crate::decode::engine::EngineOptions;
use crate::decode::policy::Policy;
use crate::decode::regenerate::prompts::{Prompt, Prompts};
use crate::error::{Error, Result, foreign};
use crate::files;
use crate::hub::{Wanted, recorded};
use crate::nn::Processors;

/// Sizes that are reported beside the one asked for.
const SIZES: [usize; 5] = [4, 8, 16, 32, 64];

#[derive(Debug, Clone, Args)]
pub(super) struct TreeArgs {
    /// Model folder, a GGUF file of one, or a name on a hub: ORG/NAME[@REVISION].
    #[arg(long)]
    target: PathBuf,
    #[command(flatten)]
    template: TemplateArgs,
    /// Folder of exported Medusa heads.
    #[arg(long)]
    draft: PathBuf,
    /// Prompts the heads were not trained on, one conversation a line; the first question of each is answered anew.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Guesses of the tree; its root, which the target has chosen already, is not counted.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    nodes: usize,
    /// File to write; `--tree FILE` uses it.
    #[arg(long)]
    out: PathBuf,
    /// Longest answer, in tokens.
    #[arg(long, default_value_t = 256, allow_hyphen_values = true, value_parser = numbers::at_least(2usize))]
    max_new_tokens: usize,
    /// Take this many prompts of each file.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    limit: Option<usize>,
    /// Conversations decoded at once.
    #[arg(long, default_value_t = 8, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    max_rows: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true, value_parser = numbers::any)]
    temperature: f64,
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

/// Tokens a round of the best tree of a size, the target's own one included.
#[derive(Serialize)]
struct Size {
    nodes: usize,
    depth: usize,
    /// Of a round that begins anywhere.
    expected_tau: f64,
    /// Of the rounds that decode the same answers.
    tau: f64,
    /// The same with trees chosen from the other half of the answers.
    held_out_tau: f64,
}

/// What is printed, and what the file holds.
#[derive(Serialize)]
struct Report {
    path: PathBuf,
    target: PathBuf,
    draft: PathBuf,
    data: Vec<PathBuf>,
    temperature: f64,
    seed: u64,
    max_new_tokens: usize,
    answers: usize,
    failed: usize,
    positions: u64,
    heads: Vec<HeadRates>,
    sizes: Vec<Size>,
    nodes: usize,
    choices: Vec<Vec<usize>>,
}

pub(super) fn run(args: &TreeArgs, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    let target = Place::Model(&mut args.target, Wanted::Target);
    let draft = Place::Model(&mut args.draft, Wanted::Draft);
    hub::fetch(args.data.iter_mut().map(Place::Data).chain([target, draft]).collect(), None)?;
    let args = &*args;
    let processors = Processors::at_temperature(args.temperature);
    processors.check().map_err(|problem| Error::Usage(format!("--{problem}")))?;
    let devices = args.devices.alone()?;
    let prompts = read_prompts(args)?;
    let tokenizer = args.template.tokenizer(&args.target)?;
    let mut encoded = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        // Everything up to the first question: what comes behind it belongs to answers that are not here.
        let question = prompt.messages.iter().position(|message| message.role == "user").unwrap_or(0);
        let prepared = tokenizer.prepare(&prompt.messages, prompt.tools.as_ref())?;
        let text = prepared.with_arguments(&prompt.template_arguments)?.render(question + 1, true)?;
        encoded.push(tokenizer.encode(&text)?);
    }
    let target = devices.load(&args.target, Dtype::of_target(args.dtype, &args.target, devices.home)?.kind())?;
    let heads = MedusaHeads::read(&args.draft, target.as_ref())?;
    let options = EngineOptions {
        processors,
        policy: Policy::Keyed { seed: args.seed },
        stop_tokens: tokenizer.eos_token_ids().to_vec(),
        max_rows: args.max_rows,
    };
    let (progress, total) = (LazyProgress::new("tree", "answers"), encoded.len() as u64);
    progress.set(0, total);
    let measured = path_rates::measure(target.as_ref(), &heads, &encoded, args.max_new_tokens, options, &mut |done| {
        progress.set(done as u64, total);
    })?;
    progress.finish("done");
    for (index, error) in &measured.failed {
        note(format!("warning: prompt `{}` is left out: {error}", prompts[*index].id));
    }
    let rates = measured.rates;
    if rates.paths() == 0 {
        let problem =
            format!("no head was ever right at {} positions of {} answers", rates.positions(), rates.answers());
        return Err(Error::Failed(format!("{problem}: there is no tree to choose")));
    }
    let report = report(args, &rates, measured.failed.len());
    if report.choices.len() < args.nodes {
        let (found, asked) = (report.choices.len(), args.nodes);
        note(format!("warning: only {found} paths were ever right; the tree has {found} guesses instead of {asked}"));
    }
    files::write_json(&args.out, &report)?;
    output.result(&report, || text(&report));
    Ok(())
}

fn read_prompts(args: &TreeArgs) -> Result<Vec<Prompt>> {
    let mut all = Vec::new();
    for path in &args.data {
        let prompts = Prompts::read(path, 0.01)?;
        prompts.bad_lines.iter().for_each(|line| note(format!("warning: skipped {line}")));
        all.extend(prompts.rows.into_iter().take(args.limit.unwrap_or(usize::MAX)));
    }
    Ok(all)
}

fn report(args: &TreeArgs, rates: &PathRates, failed: usize) -> Report {
    let mut sizes: Vec<usize> = SIZES.into_iter().chain([args.nodes]).filter(|&size| size <= rates.paths()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let size = |nodes| {
        let choices = rates.choose(nodes);
        Size {
            nodes,
            depth: choices.iter().map(Vec::len).max().unwrap_or(0),
            expected_tau: rates.expected_tokens(&choices),
            tau: rates.replay(&choices).tokens_per_round(),
            held_out_tau: rates.replay_held_out(nodes).tokens_per_round(),
        }
    };
    let choices = rates.choose(args.nodes);
    Report {
        path: args.out.clone(),
        target: recorded(&args.target),
        draft: recorded(&args.draft),
        data: args.data.iter().map(|path| recorded(path)).collect(),
        temperature: args.temperature,
        seed: args.seed,
        max_new_tokens: args.max_new_tokens,
        answers: rates.answers(),
        failed,
        positions: rates.positions(),
        heads: rates.head_rates(),
        sizes: sizes.into_iter().map(size).collect(),
        nodes: choices.len(),
        choices,
    }
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{}: {} guesses, chosen by {} positions of {} answers\n\nhead   best guess   {} best\n",
        foreign::path(&report.path),
        report.nodes,
        report.positions,
        report.answers,
        path_rates::RANKS
    );
    for (number, head) in (1..).zip(&report.heads) {
        let _ = writeln!(text, "{number:>4}   {:>8.1} %   {:>5.1} %", 100.0 * head.best, 100.0 * head.within);
    }
    text.push_str("\nguesses   depth   tau, any position   tau, decoding   on other answers\n");
    for Size { nodes, depth, expected_tau, tau, held_out_tau } in &report.sizes {
        let _ = writeln!(text, "{nodes:>7}   {depth:>5}   {expected_tau:>17.3}   {tau:>13.3}   {held_out_tau:>16.3}");
    }
    text
}
