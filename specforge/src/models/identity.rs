//! What tells one target from another: hidden states and drafts are worth something for their own target alone.
//!
//! Reading a whole model again costs minutes where it is large, so that only its two tables are read whole. Of every other
//! tensor name, type, shape and a few bytes at both ends count, which another training run of the same architecture
//! does not share.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::family;
use crate::error::{Error, Result};
use crate::weights::WeightsFolder;

/// Bytes at either end of a tensor that are looked at.
const SAMPLE_BYTES: usize = 4096;

/// Digests of a model folder. It does not matter how the tensors are spread over files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetIdentity {
    /// The folder as it was named; says where the model came from and identifies nothing.
    pub path: PathBuf,
    /// SHA-256 of config.json.
    pub config: String,
    /// SHA-256 of names, element types and shapes of all tensors.
    pub tensors: String,
    /// SHA-256 of both ends of every tensor.
    pub samples: String,
    /// CRC-32C of each of embedding and head, whole.
    pub tables: String,
}

impl TargetIdentity {
    /// What identifies the model, without where it lies.
    pub fn digests(self) -> Vec<String> {
        vec![self.config, self.tensors, self.samples, self.tables]
    }

    /// Reads a model folder.
    pub fn read(path: &Path) -> Result<Self> {
        let family = family(path)?;
        let config_path = path.join("config.json");
        let config = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
        let weights = WeightsFolder::open(path)?;
        let (mut tensors, mut samples) = (Sha256::new(), Sha256::new());
        for name in weights.names() {
            let (kind, shape) = (weights.kind(name), weights.shape(name));
            tensors.update(format!("{name} {kind:?} {shape:?}\n"));
            let bytes = weights.bytes(name).unwrap_or_default();
            samples.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            samples.update(&bytes[bytes.len().saturating_sub(SAMPLE_BYTES)..]);
        }
        let tables = family.table_names.iter().filter_map(|name| weights.bytes(name));
        let tables: Vec<String> = tables.map(|bytes| format!("{:08x}", crc32c::crc32c(bytes))).collect();
        Ok(Self {
            path: path.to_path_buf(),
            config: hex(&Sha256::digest(config)),
            tensors: hex(&tensors.finalize()),
            samples: hex(&samples.finalize()),
            tables: tables.join(" "),
        })
    }

    /// What of the other differs, in words; empty for the same model, wherever it lies.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let mut differences = Vec::new();
        let mut compare = |what: &'static str, left: &str, right: &str| {
            if left != right {
                differences.push(what);
            }
        };
        compare("config.json", &self.config, &other.config);
        compare("names, types or shapes of the tensors", &self.tensors, &other.tensors);
        compare("the weights", &self.samples, &other.samples);
        compare("embedding or head", &self.tables, &other.tables);
        differences
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
