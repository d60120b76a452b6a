//! `specforge bench-train`

use std::path::PathBuf;

use clap::Args;

use super::hub::{self, Reads};
use super::{Output, numbers};
use crate::config::RunConfig;
use crate::device;
use crate::error::{Error, Result};
use crate::eval::bench_train::{self, BatchShape, BenchTrainOptions, BenchTrainReport};
use crate::hub::Wanted;
use crate::plan;

#[derive(Debug, Args)]
pub(super) struct BenchTrainArgs {
    /// Configuration file. Its target's config.json is enough, the weights are not needed.
    #[arg(long)]
    config: PathBuf,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Documents of a step and tokens of each.
    #[arg(long, value_name = "DxT", default_value = "2x512", allow_hyphen_values = true)]
    batch: BatchShape,
    /// Share of each document that is supervised.
    #[arg(long, default_value_t = 0.5, allow_hyphen_values = true, value_parser = numbers::any)]
    supervised: f64,
    /// Timed steps, after two that are not timed.
    #[arg(long, default_value_t = 5, allow_hyphen_values = true, value_parser = numbers::at_least(1u32))]
    repeat: u32,
    /// Threads of libtorch. All cores where it is not given.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(1i32))]
    threads: Option<i32>,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

pub(super) fn run(args: &BenchTrainArgs, output: &Output) -> Result<()> {
    if !(0.0..1.0).contains(&args.supervised) {
        return Err(Error::Usage(format!("--supervised: expected a share from 0 to below 1, got {}", args.supervised)));
    }
    let device = device::choose(&args.device)?;
    let mut config = RunConfig::load(&args.config, &args.set)?;
    // On CUDA, the files say which element type is the target's.
    let target = if config.target.dtype.is_none() && device.is_cuda() { Wanted::Target } else { Wanted::Description };
    hub::fetch_for(&mut config, Reads { target, data: false, start: None }, None)?;
    let config = config.on(device)?;
    let report = bench_train::run(&BenchTrainOptions {
        target: plan::target_info(&config)?,
        batch: args.batch,
        supervised: args.supervised,
        repeat: args.repeat,
        threads: args.threads,
        kind: config.target.element_type().kind(),
        device,
        chunk_bytes: config.train.chunk_bytes(device),
        draft: config.draft,
    })?;
    output.result(&report, || text(&report));
    Ok(())
}

fn text(report: &BenchTrainReport) -> String {
    let mib = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    format!(
        "{}: {} trainable parameters, {} tokens and {} trained rows a step\n\
         step    {:.3} s: forward and backward {:.3}, optimizer {:.3}; {:.0} tokens/s on {} threads\n\
         memory  {} at the peak, {} before the first step",
        report.algorithm,
        report.trainable_parameters,
        report.tokens,
        report.rows,
        report.median_seconds,
        report.parts[0],
        report.parts[1],
        report.tokens_per_second,
        report.threads,
        mib(report.peak_memory_bytes),
        mib(report.memory_before_bytes),
    )
}
