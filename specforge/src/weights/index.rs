//! The index of a model in shards: which file holds which tensor.
//!
//! The index decides. Tools that change some tensors of a large model write them into a further file and point the index
//! there, and leave the old ones where they were.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::strict;

pub(super) const SHARD_INDEX: &str = "model.safetensors.index.json";

/// Rotary buffers, which older files list and often do not hold: they follow from the configuration.
pub fn is_old_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// A shard index.
#[derive(Debug, Deserialize)]
pub(super) struct ShardIndex {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads and checks an index: at least one tensor, and files of this folder only.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let index: Self = strict::from_json(&text).map_err(|problem| Error::bad_file(path, problem))?;
        if index.weight_map.is_empty() {
            return Err(Error::bad_file(path, "`weight_map`: expected at least one tensor, got none"));
        }
        for (name, file) in &index.weight_map {
            let inside = |part| matches!(part, Component::Normal(_));
            if file.is_empty() || !Path::new(file).components().all(inside) {
                let problem = format!("`weight_map`: `{name}` is in `{file}`; expected a file of this folder");
                return Err(Error::bad_file(path, problem).with_hint("shards lie beside their index"));
            }
        }
        Ok(index)
    }

    /// The file that the index names for a tensor.
    pub(super) fn file_of(&self, name: &str) -> Option<&str> {
        self.weight_map.get(name).map(String::as_str)
    }

    /// Every tensor with its file.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.weight_map.iter().map(|(name, file)| (name.as_str(), file.as_str()))
    }

    /// Every file.
    pub(super) fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}
