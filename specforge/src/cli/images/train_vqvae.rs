//! `specforge images train-vqvae`

use std::path::PathBuf;

use clap::Args;

use super::super::Output;
use crate::data::GreyImages;
use crate::device;
use crate::error::Result;
use crate::images::{TokenizerRun, read_configuration};
use crate::stop::Stop;

/// Trains a VQVAE on small grey pictures.
#[derive(Debug, Clone, Args)]
pub(super) struct TrainVqvaeArgs {
    /// Pictures with labels, one a line: pixels row by row from 0 to 255, then the label; may be compressed. `scripts/digits`
    /// fetches one.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Settings of the run and of the model, such as examples/images/digits-vqvae.json.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where checkpoints, metrics and the finished model go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on from the newest checkpoint there.
    #[arg(long)]
    resume: bool,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: &TrainVqvaeArgs, stop: &Stop, output: &Output) -> Result<()> {
    let device = device::choose(&args.device)?;
    let (config, model) = read_configuration(&args.config)?;
    let images = GreyImages::read(&args.data)?;
    let run = TokenizerRun {
        config: &config,
        model: &model,
        images: &images,
        folder: &args.out,
        resume: args.resume,
        device,
        stop,
    };
    let report = run.train()?;
    output.result(&report, || {
        let figures: Vec<String> = report.figures.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        let model = report.model.as_ref().map_or("stopped".to_owned(), |model| model.display().to_string());
        format!("{} steps, {}: {model}", report.steps, figures.join(", "))
    });
    Ok(())
}
