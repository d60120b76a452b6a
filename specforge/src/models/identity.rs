//! What tells one target from another: hidden states and drafts are worth something for their own target alone.
//!
//! Reading a whole model again costs minutes where it is large, so that a quick look reads only its two tables whole. Of
//! every other tensor name, type, shape and a few bytes at both ends count, which another training run of the same
//! architecture does not share. Where a run depends on every number, the whole content counts: it is read once, and then
//! noted for as long as the files stay untouched.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::family::table_names;
use super::text_model::open_weights;
use crate::error::{Error, Result};
use crate::files::Digests;
use crate::gguf::packed;
use crate::weights::content;

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
    /// Digest of every byte of every tensor; nothing where nobody has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

impl TargetIdentity {
    /// Reads a model folder whole, but for files whose digests are noted. `progress` is told how many bytes have been read,
    /// and of how many.
    pub fn read_whole(path: &Path, digests: &Digests, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Self> {
        let quick = Self::read(path)?;
        let content = content::digest(&open_weights(path)?, digests, progress)?;
        Ok(Self { content: Some(content), ..quick })
    }

    /// Takes a quick look at a model folder.
    pub fn read(path: &Path) -> Result<Self> {
        let names = table_names(path)?;
        let config = packed::read_file(path, "config.json")?;
        let config = config.ok_or_else(|| Error::bad_file(path, "is not a model folder: config.json is not there"))?;
        let weights = open_weights(path)?;
        let (mut tensors, mut samples) = (Sha256::new(), Sha256::new());
        for name in weights.names() {
            let (kind, shape) = (weights.kind(name), weights.shape(name));
            tensors.update(format!("{name} {kind:?} {shape:?}\n"));
            let bytes = weights.bytes(name).unwrap_or_default();
            samples.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            samples.update(&bytes[bytes.len().saturating_sub(SAMPLE_BYTES)..]);
        }
        let tables = names.iter().filter_map(|name| weights.bytes(name));
        let tables: Vec<String> = tables.map(|bytes| format!("{:08x}", crc32c::crc32c(bytes))).collect();
        Ok(Self {
            path: path.to_path_buf(),
            config: hex(&Sha256::digest(config)),
            tensors: hex(&tensors.finalize()),
            samples: hex(&samples.finalize()),
            tables: tables.join(" "),
            content: None,
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
        // Somebody who has not looked at the whole knows no difference there.
        let whole = |own: &Self, of: &Self| own.content.as_ref().filter(|_| of.content.is_some()).cloned();
        let weights = |own: &Self, of: &Self| format!("{} {:?}", own.samples, whole(own, of));
        compare("the weights", &weights(self, other), &weights(other, self));
        compare("embedding or head", &self.tables, &other.tables);
        differences
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
