//! `specforge gpu-check`

use std::path::PathBuf;

use clap::Args;
use tch::Device;

use super::{Output, note};
use crate::device::{self, CudaState};
use crate::error::{Error, Result};
use crate::eval::gpu_check;
use crate::files;

#[derive(Debug, Args)]
pub(super) struct GpuCheckArgs {
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Tiny sizes, to see whether everything runs; times mean nothing then. Always so on the CPU.
    #[arg(long)]
    quick: bool,
    /// Also write the result to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &GpuCheckArgs, output: &Output) -> Result<()> {
    device::prepare_determinism();
    let device = device::choose(&args.device)?;
    if let (Device::Cpu, CudaState::Unusable(reason)) = (device, device::cuda()) {
        note(format!("no usable GPU ({reason}): the CPU is checked against itself at tiny sizes"));
    }
    let report = gpu_check::run(device, args.quick, &|line| note(line))?;
    if let Some(path) = &args.out {
        files::write_json(path, &report)?;
    }
    output.result(&report, || report.to_string());
    let failed = report.comparisons().filter(|row| !row.passed).count();
    match failed {
        0 => Ok(()),
        _ => Err(Error::Failed(format!("{failed} of {} checks failed", report.comparisons().count()))),
    }
}
