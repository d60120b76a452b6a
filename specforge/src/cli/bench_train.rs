//! `specforge bench-train`

use std::path::PathBuf;

use clap::Args;

use super::bench_shapes::Shape;
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
    #[arg(long, required_unless_present = "shape", conflicts_with = "shape")]
    config: Option<PathBuf>,
    /// A shape that others have published figures of, in place of a configuration: eagle3-2048, dflash-2048,
    /// dflash-2048-128, dflash-2560, or dflash-small for a processor. `--set draft.algorithm=dflash2` takes another head.
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,
    /// Override one value, as `section.key=value`. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Documents of a step and tokens of each, or tokens of each: 128,256,512. Without it the shape's, or 2x512.
    #[arg(long, value_name = "DxT", allow_hyphen_values = true)]
    batch: Option<BatchShape>,
    /// Share of each document that is supervised. Without it the shape's, or 0.5.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::any)]
    supervised: Option<f64>,
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
    let shape = args.shape.as_deref().map(Shape::find).transpose()?;
    let supervised = args.supervised.or(shape.map(|shape| shape.supervised)).unwrap_or(0.5);
    if !(0.0..1.0).contains(&supervised) {
        return Err(Error::Usage(format!("--supervised: expected a share from 0 to below 1, got {supervised}")));
    }
    let device = device::choose(&args.device)?;
    let mut config = match (shape, &args.config) {
        (Some(shape), _) => RunConfig::with(shape.configuration(device.is_cuda()), &args.set)?,
        (None, Some(path)) => RunConfig::load(path, &args.set)?,
        (None, None) => return Err(Error::Usage("expected --config or --shape".to_owned())), // clap has seen to it
    };
    let own = || shape.map_or_else(|| BatchShape::equal(2, 512), Shape::batch);
    // On CUDA, the files say which element type is the target's.
    let target = if config.target.dtype.is_none() && device.is_cuda() { Wanted::Target } else { Wanted::Description };
    hub::fetch_for(&mut config, Reads { target, data: false, start: None }, None)?;
    let config = config.on(device)?;
    let report = bench_train::run(&BenchTrainOptions {
        target: plan::target_info(&config)?,
        batch: args.batch.clone().unwrap_or_else(own),
        supervised,
        repeat: args.repeat,
        threads: args.threads,
        kind: config.target.element_type().kind(),
        device,
        chunk_bytes: config.train.chunk_bytes(device),
        mixed_precision: config.train.mixed_precision.is_some(),
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
         work    {:.1} GFLOP a step, {:.0} GFLOP/s: {:.0} % of what a product of large matrices reaches here ({:.0} GFLOP/s)\n\
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
        report.operations as f64 / 1e9,
        report.operations_per_second / 1e9,
        100.0 * report.operations_per_second / report.ceiling_per_second,
        report.ceiling_per_second / 1e9,
        mib(report.peak_memory_bytes),
        mib(report.memory_before_bytes),
    )
}
