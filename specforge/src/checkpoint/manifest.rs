//! What a checkpoint folder says about itself, and reading one back with every byte checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::draft::ParameterGroup;
use crate::error::{Error, Result};
use crate::shim;
use crate::strict;
use crate::weights::WeightsFolder;

/// Layout of a checkpoint folder that this program writes.
pub const FORMAT_VERSION: u32 = 1;

/// Name of the manifest in a checkpoint folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the draft's parameters in a checkpoint folder.
pub const MODEL_FILE: &str = "model.safetensors";
/// Name of the optimizer's state in a checkpoint folder.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Everything about a checkpoint that is not a tensor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Layout of the folder; filled in when it is saved.
    pub format_version: u32,
    /// Optimizer steps taken.
    pub step: u64,
    /// Passes over the data begun, from 0.
    pub epoch: u64,
    /// Batches consumed in this epoch.
    pub position: u64,
    /// Tokens trained on since the start of the run.
    pub tokens_seen: u64,
    /// Steps among them that changed nothing, because something was not finite.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped_steps: u64,
    /// The run's resolved configuration.
    pub configuration: serde_json::Value,
    /// What wrote this.
    pub versions: Versions,
    /// Digests of the data the run reads, by name.
    pub data_hashes: BTreeMap<String, String>,
    /// Everything the run reads, by content; empty in checkpoints of older versions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
    /// What was measured at this step, by the names of [`RetentionConfig::best_metric`](super::RetentionConfig), such as
    /// `acceptance_length`; the log has them behind `eval/`. Empty where nothing was. Those that are not finite are left
    /// out on saving.
    pub metrics: BTreeMap<String, f64>,
    /// What was due at this step and was not measured, because the run was asked to stop: whoever goes on does it first.
    #[serde(default, skip_serializing_if = "Measurements::is_nothing")]
    pub owed: Measurements,
    /// Sums since the last log line, one entry for each rank; empty where this step has a line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub window: Vec<OpenWindow>,
    /// How parameters are updated, of those that are not updated as their shape suggests.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, ParameterGroup>,
    /// Size and digest of every other file of the folder; filled in when it is saved.
    pub files: BTreeMap<String, FileDigest>,
    /// What rebuilds the draft from its tensors, without the run's configuration.
    pub draft: serde_json::Value,
}

/// Whether there is nothing to say. serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Ways to measure a draft on what is held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Measurements {
    /// The draft's metrics on held-out documents.
    pub evaluation: bool,
    /// Decoding of held-out prompts.
    pub decoding: bool,
}

impl Measurements {
    /// Whether none is meant.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// A rank's sums between two log lines. What is not finite is `null`, since JSON has no NaN.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenWindow {
    /// Optimizer steps.
    pub steps: u64,
    /// Sum of the objective.
    pub objective: Option<f64>,
    /// Sum of each metric; none where the rank had no documents.
    pub sums: Vec<Option<f64>>,
    /// Rows behind each sum.
    pub counts: Vec<f64>,
    /// Norms of the gradients: the last, the sum, the largest, and how many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gradient_norms: Vec<f64>,
    /// Sums of the gradients' size and noise, where they are measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gradient_noise: Vec<f64>,
}

/// What wrote a checkpoint.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Versions {
    /// This program.
    pub specforge: String,
    /// libtorch.
    pub libtorch: String,
}

impl Versions {
    /// Those of the running program.
    pub fn current() -> Self {
        Self { specforge: env!("CARGO_PKG_VERSION").to_owned(), libtorch: shim::libtorch_version() }
    }
}

/// Size and content of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

impl FileDigest {
    /// Reads a whole file.
    pub fn of(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let count = file.read(&mut buffer).map_err(Error::io("read", path))?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
            bytes += count as u64;
        }
        let sha256 = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, sha256 })
    }
}

impl Manifest {
    /// Reads the manifest of a checkpoint folder and checks that the files it names are there in their full size.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        // The version is read first: a later layout may have fields that this program does not know.
        let value: serde_json::Value =
            strict::from_json(text.as_bytes()).map_err(|problem| Error::bad_file(&path, problem))?;
        let version = value["format_version"].as_u64();
        if version != Some(u64::from(FORMAT_VERSION)) {
            let got = version.map_or("none".to_owned(), |version| version.to_string());
            return Err(Error::bad_file(&path, format!("expected format_version {FORMAT_VERSION}, got {got}"))
                .with_hint("read this checkpoint with the version of specforge that wrote it"));
        }
        // Read again from the text: a number keeps all of its digits only on its way from there.
        let manifest: Manifest =
            strict::from_json(text.as_bytes()).map_err(|problem| Error::bad_file(&path, problem))?;
        for required in [MODEL_FILE, OPTIMIZER_FILE] {
            let Some(digest) = manifest.files.get(required) else {
                return Err(Error::bad_file(&path, format!("`files` does not list {required}")));
            };
            let file = folder.join(required);
            let got = std::fs::metadata(&file).map_err(Error::io("read", &file))?.len();
            if got != digest.bytes {
                return Err(damaged(&file, format!("expected {} bytes, got {got}", digest.bytes)));
            }
        }
        Ok(manifest)
    }
}

fn damaged(path: &Path, problem: String) -> Error {
    Error::bad_file(path, problem)
        .with_hint("the checkpoint is damaged: remove its folder and resume from an older one")
}

/// A checkpoint that was read and found sound.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Parameters of the draft. Tensors loaded from here on the CPU may share the file's read-only pages: copy them
    /// before training on them.
    pub model: WeightsFolder,
    /// State of the optimizer.
    pub optimizer: WeightsFolder,
}

impl Checkpoint {
    /// The draft's tensors in the order of their names, on the CPU.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let kind = |name: &str| self.model.kind(name).unwrap_or(Kind::Float);
        self.model.names().map(|name| Ok((name.to_owned(), self.model.load(name, kind(name), Device::Cpu)?))).collect()
    }

    /// Refuses a checkpoint whose tensors are not those of a draft: `parameters`, which are floating-point numbers, and
    /// `buffers`.
    pub fn same_tensors(&self, parameters: &[(String, Vec<i64>)], buffers: &[(String, Vec<i64>)]) -> Result<()> {
        self.model.check(&[parameters, buffers].concat(), |_| false)?;
        self.model.check_numbers(parameters)
    }

    /// Refuses a resumed run whose configuration would change the updates. `free` keys may differ; a key ending in a
    /// section frees the whole section.
    pub fn same_configuration(&self, now: &serde_json::Value, free: &[&str]) -> Result<()> {
        let (mut then_values, mut now_values) = (BTreeMap::new(), BTreeMap::new());
        flatten("", &self.manifest.configuration, &mut then_values);
        flatten("", now, &mut now_values);
        let is_free = |key: &str| free.iter().any(|free| key == *free || key.starts_with(&format!("{free}.")));
        let keys: BTreeSet<&String> = then_values.keys().chain(now_values.keys()).collect();
        for key in keys.into_iter().filter(|key| !is_free(key)) {
            // A key that an older version did not know is one that is not set.
            let set = |values: &BTreeMap<String, String>| values.get(key).filter(|value| *value != "null").cloned();
            let (then, now) = (set(&then_values), set(&now_values));
            if then != now {
                let show = |value: Option<String>| value.unwrap_or_else(|| "nothing".to_owned());
                let problem = format!("the checkpoint was trained with {}, got {}", show(then), show(now));
                return Err(Error::config(key, problem)
                    .with_hint("set it back to resume, or start a new run in another train.output_dir"));
            }
        }
        Ok(())
    }

    /// Refuses a resumed run that would update a parameter otherwise than the checkpoint's did. What is the same as ever
    /// is in neither list.
    pub fn same_groups(&self, now: &BTreeMap<String, ParameterGroup>) -> Result<()> {
        let then = &self.manifest.groups;
        let Some(name) = then.keys().chain(now.keys()).find(|name| then.get(*name) != now.get(*name)) else {
            return Ok(());
        };
        let show = |group: Option<&ParameterGroup>| match group {
            Some(ParameterGroup { decay, rate }) => {
                format!("{rate} times the learning rate, {} weight decay", if *decay { "with" } else { "without" })
            }
            None => "what is usual".to_owned(),
        };
        let problem =
            format!("parameter `{name}` was trained with {}, got {}", show(then.get(name)), show(now.get(name)));
        Err(Error::bad_file(&self.path, problem)
            .with_hint("set optim.groups back, or use the version of the program that the run began with"))
    }

    /// Refuses a resumed run on other data: for checkpoints that say no more about what the run read.
    pub fn same_data(&self, now: &BTreeMap<String, String>) -> Result<()> {
        if &self.manifest.data_hashes == now {
            return Ok(());
        }
        let then = &self.manifest.data_hashes;
        let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
        let hash = |hashes: &BTreeMap<String, String>, name| hashes.get(name).map_or("none", String::as_str).to_owned();
        let changes = names.into_iter().filter(|name| then.get(*name) != now.get(*name));
        let changes = changes.map(|name| format!("{name} was {}, is {}", hash(then, name), hash(now, name)));
        let problem = format!("the data changed since this checkpoint: {}", changes.collect::<Vec<_>>().join("; "));
        Err(Error::bad_file(&self.path, problem)
            .with_hint("restore the files of data.train and draft.vocab_map, or start a new run"))
    }
}

/// Every leaf of a JSON value under its dotted key.
fn flatten(prefix: &str, value: &serde_json::Value, into: &mut BTreeMap<String, String>) {
    match value.as_object() {
        Some(object) => {
            for (key, value) in object {
                flatten(&if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") }, value, into);
            }
        }
        None => drop(into.insert(prefix.to_owned(), value.to_string())),
    }
}

/// Reads a checkpoint folder and verifies size and SHA-256 of its files.
pub fn read(folder: &Path) -> Result<Checkpoint> {
    if !folder.is_dir() {
        return Err(Error::bad_file(folder, "no such checkpoint folder"));
    }
    let manifest = Manifest::open(folder)?;
    for name in [MODEL_FILE, OPTIMIZER_FILE] {
        let (path, expected) = (folder.join(name), &manifest.files[name]);
        let got = FileDigest::of(&path)?;
        if &got != expected {
            return Err(damaged(&path, format!("expected SHA-256 {}, got {}", expected.sha256, got.sha256)));
        }
    }
    let open = |name: &str| WeightsFolder::open(&folder.join(name));
    let (model, optimizer) = (open(MODEL_FILE)?, open(OPTIMIZER_FILE)?);
    Ok(Checkpoint { path: folder.to_path_buf(), manifest, model, optimizer })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_to_the_bit() {
        let mut manifest = Manifest { step: u64::MAX, ..Manifest::default() };
        let mut value = 0.1;
        for index in 0..2000 {
            value = (value * 1.37 + 1e-3) * if value > 1e9 { 1e-15 } else { 1.0 };
            manifest.metrics.insert(index.to_string(), value);
        }
        manifest.draft = serde_json::to_value(&manifest.metrics).unwrap();
        let text = serde_json::to_string(&manifest).unwrap();
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest);
    }
}
