//! What every run writes beside its output: configuration, versions and command line.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::Versions;
use crate::error::Result;
use crate::files;

/// File name of the record in an output folder.
pub(super) const FILE_NAME: &str = "specforge.json";

#[derive(Serialize)]
struct Record<'a> {
    command_line: Vec<String>,
    versions: Versions,
    world_size: usize,
    configuration: &'a Value,
}

/// Writes the record of a run of `world_size` processes.
pub(super) fn write(path: &Path, configuration: &Value, world_size: usize) -> Result<()> {
    let command_line = std::env::args().collect();
    files::write_json(path, &Record { command_line, versions: Versions::current(), world_size, configuration })
}
