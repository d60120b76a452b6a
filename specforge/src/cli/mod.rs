//! The command line: one file a subcommand, no logic. Results go to stdout, progress and logs to stderr.

use std::cell::{Cell, OnceCell};
use std::io::{ErrorKind, Write};

use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::error::{Error, Result, foreign};
use crate::progress::{self, Progress};

mod bench;
mod bench_shapes;
mod bench_train;
mod capture;
mod compare;
mod decoding;
mod devices;
mod diffusion;
mod diffusion_eval;
mod doctor;
mod edge;
mod edge_eval;
mod eval;
mod export;
mod generate;
mod gpu_check;
mod hub;
mod images;
mod import;
mod inspect;
mod launch;
mod machine;
mod mask;
mod numbers;
mod program;
mod prompts;
mod ranks;
mod record;
mod regen;
mod scale;
mod serve;
mod serve_edges;
mod signals;
mod template;
mod train;
mod tree;
mod tune;
mod validate;
mod vocab;

pub use program::main;

/// Trains draft models for speculative decoding.
#[derive(Debug, Parser)]
#[command(name = "specforge", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a draft model.
    Train(train::TrainArgs),
    /// Run a command with several processes, on one machine or many.
    Launch(launch::LaunchArgs),
    /// Let a chat model write prompts, where there are none at hand.
    Prompts(prompts::PromptsArgs),
    /// Let the target answer prompts itself: on-policy training data.
    Regen(regen::RegenArgs),
    /// Write the target's hidden states to disk, so that training does not run it.
    Capture(capture::CaptureArgs),
    /// Show conversations as the trainer sees them, and the statistics of a data set.
    Inspect(inspect::InspectArgs),
    /// Check data files, every record of them, and say what is wrong by kind.
    Validate(validate::ValidateArgs),
    /// Choose the tokens of a draft's own, smaller vocabulary by how often they are trained.
    Vocab(vocab::VocabArgs),
    /// Choose the static draft tree of Medusa heads by how often each of its paths is right.
    Tree(tree::TreeArgs),
    /// Find the tree and batch that decode fastest here, and what to start engines with.
    Tune(tune::TuneArgs),
    /// Write or check the files that serving engines load.
    Export(export::ExportArgs),
    /// Make a Hugging Face folder from a GGUF file.
    Import(import::ImportArgs),
    /// Time a target's prefill and greedy decode.
    Bench(bench::BenchArgs),
    /// Time a training step of a draft on random features.
    BenchTrain(bench_train::BenchTrainArgs),
    /// Answer a prompt, with or without a draft.
    Generate(generate::GenerateArgs),
    /// Next-scale image models: decode images, train the tokenizer.
    Images(images::ImagesArgs),
    /// Answer clients of OpenAI's API, or verify for drafts on other machines.
    Serve(serve::ServeArgs),
    /// Measure a draft by decoding with it: acceptance, speed, losslessness.
    Eval(eval::EvalArgs),
    /// Say what acceptance to expect of more data and compute, by the curves of runs.
    Scale(scale::ScaleArgs),
    /// Say where two recorded decodes differ, and which of them is wrong.
    Compare(compare::CompareArgs),
    /// Say what is wrong with a draft, or what this machine can do.
    Doctor(doctor::DoctorArgs),
    /// Check that a GPU computes what the CPU computes, and measure how fast it trains.
    GpuCheck(gpu_check::GpuCheckArgs),
}

impl Cli {
    /// Runs the subcommand.
    pub fn run(self) -> Result<()> {
        let output = Output { json: self.json, failure: Cell::new(None) };
        let stop = signals::watch()?;
        match self.command {
            Command::Train(args) => train::run(&args, &stop, &output),
            Command::Launch(args) => launch::run(&args, &stop, &output),
            Command::Prompts(args) => prompts::run(&args, &stop, &output),
            Command::Regen(args) => regen::run(&args, &stop, &output),
            Command::Capture(args) => capture::run(&args, &stop, &output),
            Command::Inspect(args) => inspect::run(&args, &output),
            Command::Validate(args) => validate::run(&args, &output),
            Command::Vocab(args) => vocab::run(&args, &output),
            Command::Tree(args) => tree::run(&args, &output),
            Command::Tune(args) => tune::run(&args, &output),
            Command::Export(args) => export::run(&args, &output),
            Command::Import(args) => import::run(&args, &output),
            Command::Bench(args) => bench::run(&args, &output),
            Command::BenchTrain(args) => bench_train::run(&args, &output),
            Command::Generate(args) => generate::run(&args, &stop, &output),
            Command::Images(args) => images::run(&args, &stop, &output),
            Command::Serve(args) => serve::run(&args, &stop, &output),
            Command::Eval(args) => eval::run(&args, &stop, &output),
            Command::Scale(args) => scale::run(&args, &output),
            Command::Compare(args) => compare::run(&args, &output),
            Command::Doctor(args) => doctor::run(&args, &output),
            Command::GpuCheck(args) => gpu_check::run(&args, &output),
        }?;
        match output.failure.take() {
            Some(error) => Err(Error::io("write", "standard output")(error)),
            None => Ok(()),
        }
    }
}

/// Where results go.
struct Output {
    json: bool,
    /// Why a result could not be printed.
    failure: Cell<Option<std::io::Error>>,
}

impl Output {
    /// Prints a result, as JSON or as text. A reader that went away is no error.
    fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        self.coloured_result(value, || foreign::block(&text()).into_owned());
    }

    /// The same with text that holds colours of ours, and nothing else that a terminal obeys.
    fn coloured_result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        let text = match self.json {
            true => serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}")),
            false => text(),
        };
        self.write(&format!("{}\n", text.trim_end()));
    }

    /// Prints text as it is.
    fn write(&self, text: &str) {
        let mut stdout = std::io::stdout();
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        self.failure.set(written.err().filter(|error| error.kind() != ErrorKind::BrokenPipe));
    }
}

/// One line of progress on stderr.
fn note(text: impl AsRef<str>) {
    progress::say(text.as_ref());
}

/// Progress whose total is known at the first report.
struct LazyProgress {
    label: &'static str,
    unit: &'static str,
    inner: OnceCell<Progress>,
}

impl LazyProgress {
    fn new(label: &'static str, unit: &'static str) -> Self {
        Self { label, unit, inner: OnceCell::new() }
    }

    fn set(&self, done: u64, total: u64) {
        self.set_with(done, total, "");
    }

    fn set_with(&self, done: u64, total: u64, message: &str) {
        // What was there before the first report says nothing about the speed of this process.
        self.inner.get_or_init(|| Progress::resumed(self.label, total, self.unit, done)).set(done, message);
    }

    fn finish(&self, message: &str) {
        match self.inner.get() {
            Some(progress) => progress.finish(message),
            None => note(format!("{}: {message}", self.label)),
        }
    }
}
