//! Finding checkpoints in a folder.
//!
//! A checkpoint counts only if its manifest can be read and its files have their full size; the newest is the one with
//! the highest step.

use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{Checkpoint, MANIFEST_FILE, Manifest, read};
use crate::error::{Error, Result};

/// A checkpoint folder that looks whole.
#[derive(Debug, Clone)]
pub struct Found {
    /// The folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// The checkpoints in a folder.
#[derive(Debug, Default)]
pub struct Scan {
    /// Whole ones, by ascending step.
    pub checkpoints: Vec<Found>,
    /// A line for each folder that was skipped because it is damaged.
    pub warnings: Vec<String>,
}

impl Scan {
    /// The one with the highest step.
    pub fn latest(&self) -> Option<&Found> {
        self.checkpoints.last()
    }
}

/// Looks at the checkpoints of a folder without touching anything, also while a run is writing there.
pub fn scan(root: &Path) -> Result<Scan> {
    let mut scan = Scan::default();
    for (step, path) in step_folders(root)? {
        let mut skip = |problem: String| {
            scan.warnings.push(format!("{}: damaged checkpoint passed over: {problem}", path.display()));
        };
        match Manifest::open(&path) {
            Ok(manifest) if manifest.step == step => scan.checkpoints.push(Found { path, manifest }),
            Ok(manifest) => skip(format!("its manifest is of step {}", manifest.step)),
            Err(error) => skip(error.to_string()),
        }
    }
    Ok(scan)
}

/// Name of the folder of a step.
pub(super) fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Folders named like checkpoints, by ascending step. A root that is not there holds none.
pub(super) fn step_folders(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut folders = Vec::new();
    for (name, path) in entries(root)? {
        let step = name.strip_prefix("step-").and_then(|digits| digits.parse().ok());
        // Only names as this program writes them, so that no two folders are of one step.
        if let Some(step) = step.filter(|&step| folder_name(step) == name && path.is_dir()) {
            folders.push((step, path));
        }
    }
    folders.sort();
    Ok(folders)
}

/// Names and paths in a folder; none if it is not there.
pub(super) fn entries(root: &Path) -> Result<Vec<(String, PathBuf)>> {
    let listing = match fs::read_dir(root) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read folder", root)(error)),
    };
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.map_err(Error::io("read folder", root))?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
    };
    listing.map(entry).collect()
}

/// Reads a checkpoint folder, or the newest whole checkpoint of a run's output folder.
pub fn find(path: &Path) -> Result<Checkpoint> {
    if path.join(MANIFEST_FILE).is_file() {
        return read(path);
    }
    let scan = scan(path)?;
    match scan.latest() {
        Some(found) => read(&found.path),
        None => {
            let problems: String = scan.warnings.iter().map(|warning| format!("; {warning}")).collect();
            Err(Error::bad_file(path, format!("holds no whole checkpoint{problems}"))
                .with_hint("name a step-... folder or the train.output_dir of a run"))
        }
    }
}
