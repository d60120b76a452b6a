//! Where a command's models are: one device, or for layers of a target that is too large for it several.

use std::path::Path;

use clap::Args;
use tch::{Device, Kind};

use super::ranks;
use crate::device;
use crate::dist::Placement;
use crate::error::{Error, Result};
use crate::models::{self, Loading, Spread, TargetModel};

#[derive(Debug, Clone, Args)]
pub(super) struct DeviceArgs {
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Devices that share the target's layers, such as cuda:0,cuda:1, or cuda:0=20,cuda:1=12 with how many each gets.
    /// Everything else is on --device, which is the last of them where nothing else is said. `target.devices` of a
    /// configuration.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    target_devices: Vec<String>,
}

/// Devices of this process.
pub(super) struct Devices {
    /// Everything but layers that are spread: tables, draft, what is read and what comes out.
    pub(super) home: Device,
    /// Devices of the target's layers, where they are not all at home.
    pub(super) layers: Spread,
}

impl DeviceArgs {
    /// Devices of a process that is alone and has no configuration.
    pub(super) fn alone(&self) -> Result<Devices> {
        self.choose(&[], None)
    }

    /// The list that counts: what is said here goes before what a configuration says.
    pub(super) fn list(&self, configured: &[String]) -> Vec<String> {
        if self.target_devices.is_empty() { configured.to_vec() } else { self.target_devices.clone() }
    }

    /// Devices of one of the processes of a machine, or of one alone.
    pub(super) fn choose(&self, configured: &[String], placement: Option<&Placement>) -> Result<Devices> {
        let devices = self.named(configured, placement)?;
        devices.layers.check().map_err(|problem| self.refused(problem))?;
        Ok(devices)
    }

    /// The same for a plan, which needs no device to be there.
    pub(super) fn named(&self, configured: &[String], placement: Option<&Placement>) -> Result<Devices> {
        let refused = |problem| self.refused(problem);
        let mut layers = Spread::parse(&self.list(configured)).map_err(refused)?;
        if let Some(placement) = placement {
            layers = layers.of_process(placement.local_rank, placement.local_world_size).map_err(refused)?;
        }
        let home = match (self.device.as_str(), layers.last()) {
            ("auto" | "cuda", Some(last)) => last,
            ("cpu", Some(_)) => {
                let problem = "GPUs cannot share the layers of a target whose draft is on the CPU";
                return Err(refused(problem.to_owned()).with_hint("leave out --device cpu, or the list of devices"));
            }
            (name, _) => ranks::device(name, placement)?,
        };
        Ok(Devices { home, layers })
    }

    fn refused(&self, problem: String) -> Error {
        match self.target_devices.is_empty() {
            true => Error::config("target.devices", problem),
            false => Error::Usage(format!("--target-devices: {problem}")),
        }
    }
}

impl Devices {
    /// Loads the target of a folder.
    pub(super) fn load(&self, folder: &Path, kind: Kind) -> Result<Box<dyn TargetModel>> {
        models::load_target_with(folder, &self.loading(kind))
    }

    /// Loads the masked diffusion model of a folder.
    pub(super) fn load_diffusion(&self, folder: &Path, kind: Kind) -> Result<Box<dyn TargetModel>> {
        models::load_diffusion(folder, &self.loading(kind))
    }

    /// How a target is loaded.
    pub(super) fn loading(&self, kind: Kind) -> Loading<'_> {
        Loading { kind, device: self.home, layers: Some(&self.layers), copies: None }
    }
}

/// Devices of a target as a report names them.
pub(super) fn of_target(target: &dyn TargetModel) -> String {
    device::names(&target.devices())
}
