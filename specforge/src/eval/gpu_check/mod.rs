//! Whether a GPU computes what the CPU computes, and how fast it trains.
//!
//! Everything takes the device as a parameter: without a GPU the same code compares the CPU with itself and trains tiny
//! shapes, so that what runs on a GPU machine has run before.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tch::Device;

use crate::checkpoint::Versions;
use crate::device::{self, CudaDevice, CudaState};
use crate::error::Result;
use crate::shim;

pub mod attention;
pub mod ceilings;
pub mod kernels;
pub mod operations;
pub mod parity;
pub mod process_group;
pub mod programs;
pub mod repeat;
pub mod training;

pub use ceilings::{CeilingSizes, Ceilings};
pub use kernels::KernelCheck;
pub use parity::Comparison;
pub use process_group::ProcessGroupCheck;
pub use repeat::RepeatCheck;
pub use training::{TrainingRun, TrainingSetup};

/// What a check found.
#[derive(Debug, Clone, Serialize)]
pub struct GpuCheck {
    /// When, in UTC.
    pub date: String,
    /// What was run.
    pub versions: Versions,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The driver's description of a CUDA device.
    pub card: Option<CudaDevice>,
    /// Whether CUDA is usable, or why not.
    pub cuda: String,
    /// Whether sizes were too small for times to mean anything.
    pub quick: bool,
    /// Whether every comparison passed.
    pub passed: bool,
    /// The device against the CPU.
    pub parity: Vec<Comparison>,
    /// Losses row by row against operators.
    pub kernels: KernelCheck,
    /// The same training twice, with `train.deterministic`.
    pub repeat: RepeatCheck,
    /// Ranks of a run on the device.
    pub process_group: ProcessGroupCheck,
    /// The device at its best.
    pub ceilings: Ceilings,
    /// Training speed.
    pub training: Vec<TrainingRun>,
}

/// Checks a device. On the CPU, sizes are always the quick ones.
pub fn run(device: Device, quick: bool, say: &dyn Fn(&str)) -> Result<GpuCheck> {
    let quick = quick || device == Device::Cpu;
    shim::exact_float32_products()?;
    let card = match device {
        Device::Cuda(index) => device::describe(index).inspect_err(|error| say(&format!("warning: {error}"))).ok(),
        _ => None,
    };
    say("parity: target, attention, loss, optimizer, checkpoint and sampling against the CPU");
    let parity = parity::check(device)?;
    say("kernels: losses over a vocabulary row by row, against operators");
    let kernels = kernels::check(device, quick)?;
    say("repeat: the same training twice, with train.deterministic");
    let repeat = repeat::check(device)?;
    say("process group: collectives, reducer and training as one of the ranks of a run");
    let process_group = process_group::check(device)?;
    say("ceilings: matrix products and copies");
    let sizes = if quick { CeilingSizes::QUICK } else { CeilingSizes::FULL };
    let ceilings = ceilings::measure(device, sizes)?;
    let setup = if quick { TrainingSetup::quick()? } else { TrainingSetup::full()? };
    let training = training::run(&setup, device, &ceilings, say)?;
    let all = [&parity, &kernels.checks, &repeat.checks, &process_group.checks];
    let passed = all.into_iter().flatten().all(|row| row.passed);
    Ok(GpuCheck {
        date: utc(SystemTime::now()),
        versions: Versions::current(),
        device: device::name(device),
        card,
        cuda: match device::cuda() {
            CudaState::Usable(count) => format!("usable, {count} devices"),
            CudaState::Unusable(reason) => format!("not usable: {reason}"),
        },
        quick,
        passed,
        parity,
        kernels,
        repeat,
        process_group,
        ceilings,
        training,
    })
}

impl fmt::Display for GpuCheck {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = match &self.card {
            Some(card) => {
                let memory = gibibytes(card.memory_bytes as f64);
                let CudaDevice { name, multiprocessors, capability, driver, .. } = card;
                format!("{name}, {memory} GiB, {multiprocessors} multiprocessors of {capability}, driver CUDA {driver}")
            }
            None => self.device.clone(),
        };
        writeln!(out, "device     {device}")?;
        writeln!(out, "cuda       {}", self.cuda)?;
        writeln!(out, "versions   specforge {}, libtorch {}", self.versions.specforge, self.versions.libtorch)?;
        let Ceilings { bfloat16_size, bfloat16_rate, float32_size, float32_rate, copy_bandwidth } = self.ceilings;
        let (bfloat16, float32) = (tera(bfloat16_rate), tera(float32_rate));
        writeln!(
            out,
            "ceilings   bfloat16 {bfloat16} TFLOP/s ({bfloat16_size} squared), float32 {float32} TFLOP/s \
             ({float32_size} squared), copy {} TB/s",
            tera(copy_bandwidth)
        )?;
        write_comparisons(out, "parity with the CPU in float32", &self.parity)?;
        write_comparisons(out, &format!("losses row by row: {}", self.kernels.state), &self.kernels.checks)?;
        write_comparisons(out, &format!("the same bits twice: {}", self.repeat.state), &self.repeat.checks)?;
        let title = format!("process group of one rank: {}", self.process_group.backend);
        write_comparisons(out, &title, &self.process_group.checks)?;
        self.write_training(out)
    }
}

/// Number of checks, which failed, and a table of all.
fn write_comparisons(out: &mut fmt::Formatter<'_>, title: &str, rows: &[Comparison]) -> fmt::Result {
    if rows.is_empty() {
        return writeln!(out, "\n{title}");
    }
    let verdict = match rows.iter().filter(|row| !row.passed).count() {
        0 => "all passed".to_owned(),
        failed => format!("{failed} FAILED"),
    };
    writeln!(out, "\n{title}: {} checks, {verdict}", rows.len())?;
    let width = rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
    writeln!(out, "{:<width$}  {:<8}  {:>8}  {:>8}", "check", "type", "error", "limit")?;
    for row in rows {
        let mark = if row.passed { "" } else { "  FAILED" };
        let Comparison { check, kind, error, limit, .. } = row;
        writeln!(out, "{check:<width$}  {kind:<8}  {error:>8.1e}  {limit:>8.1e}{mark}")?;
    }
    Ok(())
}

impl GpuCheck {
    /// Everything that was compared.
    pub fn comparisons(&self) -> impl Iterator<Item = &Comparison> {
        let parts = [&self.parity, &self.kernels.checks, &self.repeat.checks, &self.process_group.checks];
        parts.into_iter().flatten()
    }

    fn write_training(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let note =
            if self.quick { " at tiny shapes, where times mean nothing" } else { " at the shapes of a model of 8B" };
        writeln!(out, "\ntraining{note}")?;
        let width = self.training.iter().map(|run| run.name.len()).max().unwrap_or(0);
        writeln!(
            out,
            "{:<width$} {:>6} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>10} {:>6}",
            "draft",
            "tokens",
            "tokens/s",
            "step ms",
            "target",
            "draft",
            "optim",
            "asked",
            "peak GiB",
            "GFLOP/tok",
            "share"
        )?;
        for run in &self.training {
            let start = format!("{:<width$} {:>6}", run.name, run.tokens);
            let Some(result) = &run.result else {
                writeln!(out, "{start} {}", run.problem.as_deref().unwrap_or_default())?;
                continue;
            };
            writeln!(
                out,
                "{start} {:>9.0} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>9.1} {:>8} {:>10.3} {:>5.1}%",
                result.tokens_per_second,
                result.step_ms,
                result.target_ms,
                result.draft_ms,
                result.optimizer_ms,
                result.asked_ms,
                result.peak_bytes.map_or("-".to_owned(), |bytes| gibibytes(bytes as f64)),
                result.operations_per_token / 1e9,
                100.0 * result.share_of_matrix_rate,
            )?;
        }
        Ok(())
    }
}

fn gibibytes(bytes: f64) -> String {
    format!("{:.1}", bytes / f64::from(1 << 30))
}

fn tera(value: f64) -> String {
    format!("{:.3}", value / 1e12)
}

/// `2026-03-01T12:00:00Z`
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, seconds) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March put the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (1_772_366_400, "2026-03-01T12:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
