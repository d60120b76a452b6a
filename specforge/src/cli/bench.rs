//! `specforge bench`

use std::path::PathBuf;

use clap::Args;

use super::devices::DeviceArgs;
use super::hub::{self, Place};
use super::{Output, numbers};
use crate::config::Dtype;
use crate::error::Result;
use crate::eval::bench::{self, BenchOptions, BenchReport, DecodeShape, PrefillShape, VerifyShape};
use crate::hub::Wanted;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Model folder, a GGUF file of one, or a name on a hub: ORG/NAME[@REVISION].
    #[arg(long)]
    target: PathBuf,
    /// Time a prefill of ROWSxTOKENS. May be given several times.
    #[arg(long, value_name = "RxT", allow_hyphen_values = true)]
    prefill: Vec<PrefillShape>,
    /// Time greedy decoding of ROWSxPROMPTxNEW tokens. May be given several times.
    #[arg(long, value_name = "RxTxN", allow_hyphen_values = true)]
    decode: Vec<DecodeShape>,
    /// Time the verification of trees of NODES on caches of CONTEXT tokens, beside that of single tokens. May be given
    /// several times.
    #[arg(long, value_name = "RxCxN", allow_hyphen_values = true)]
    verify: Vec<VerifyShape>,
    /// Timed runs of each shape, after one that is not timed.
    #[arg(long, default_value_t = 3, allow_hyphen_values = true, value_parser = numbers::at_least(1u32))]
    repeat: u32,
    /// Threads of libtorch. All cores where it is not given.
    #[arg(long, allow_hyphen_values = true, value_parser = numbers::at_least(1i32))]
    threads: Option<i32>,
    /// Element type of the target: float32, bfloat16 or float16. Without it float32 on the CPU, and that of the target's files on
    /// CUDA.
    #[arg(long)]
    dtype: Option<Dtype>,
    #[command(flatten)]
    devices: DeviceArgs,
}

pub(super) fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    let devices = args.devices.alone()?;
    let mut target = args.target.clone();
    hub::fetch(vec![Place::Model(&mut target, Wanted::Target)], None)?;
    let kind = Dtype::of_target(args.dtype, &target, devices.home)?.kind();
    let report = bench::run(&BenchOptions {
        target,
        prefill: args.prefill.clone(),
        decode: args.decode.clone(),
        verify: args.verify.clone(),
        repeat: args.repeat,
        threads: args.threads,
        kind,
        device: devices.home,
        layers: devices.layers,
    })?;
    output.result(&report, || text(&report));
    Ok(())
}

fn text(report: &BenchReport) -> String {
    let prefill = report.prefill.iter().map(|timing| {
        let shape = timing.shape;
        format!("prefill  {:>3} x {:<10} {:>9.1} tokens/s", shape.rows, shape.tokens, timing.tokens_per_second)
    });
    let decode = report.decode.iter().map(|timing| {
        let shape = timing.shape;
        let sizes = format!("{} + {}", shape.prompt, shape.new);
        format!("decode   {:>3} x {sizes:<10} {:>9.1} tokens/s", shape.rows, timing.tokens_per_second)
    });
    let verify = report.verify.iter().map(|timing| {
        let shape = timing.shape;
        let sizes = format!("{} nodes on {}", shape.nodes, shape.context);
        format!("verify   {:>3} x {sizes:<16} {:>5.2} x the time of one token", shape.rows, timing.ratio)
    });
    prefill.chain(decode).chain(verify).collect::<Vec<_>>().join("\n")
}
