//! Commands that several processes share: how one finds its place, and which device is its own.

use std::time::Duration;

use tch::Device;

use super::note;
use crate::device;
use crate::dist::{Meeting, ParallelConfig, Placement};
use crate::error::{Error, Result};
use crate::progress;

/// Runs a command as one of the processes that a launcher started, or alone. They meet within `timeout`; of several, the
/// first speaks for all, and an error of one ends all.
pub(super) fn together(timeout: Duration, body: impl FnOnce(Option<&Meeting>) -> Result<()>) -> Result<()> {
    let Some(placement) = Placement::from_environment()? else {
        return body(None);
    };
    if placement.rank > 0 {
        progress::silence();
    }
    let meeting = Meeting::join(placement, timeout, &|line| note(line))?;
    body(Some(&meeting)).map_err(|error| meeting.report(error))
}

/// How long processes wait for each other to start, where no configuration says it.
pub(super) fn default_timeout() -> Duration {
    ParallelConfig::default().timeout()
}

/// The device of this rank: of several on a machine, each takes the CUDA device of its own number.
pub(super) fn device(name: &str, placement: Option<&Placement>) -> Result<Device> {
    let Some(placement) = placement.filter(|placement| placement.local_world_size > 1) else {
        return device::choose(name);
    };
    let (local, count) = (placement.local_rank, placement.local_world_size);
    match (name, device::choose(name)?) {
        ("auto" | "cuda", Device::Cuda(_)) => device::choose(&format!("cuda:{local}")),
        (_, Device::Cuda(_)) => Err(Error::Usage(format!(
            "--device {name}: {count} processes of this machine would share it; expected cuda, which gives each its own"
        ))),
        (_, device) => Ok(device),
    }
}
