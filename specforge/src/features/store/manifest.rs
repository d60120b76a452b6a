//! `store.json`: what a store holds, for which target, and which of its shards are whole.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::element::Element;
use crate::error::{Error, Result};
use crate::files;
use crate::models::{TargetIdentity, limits};
use crate::strict;

/// Name of the manifest in a store's folder.
pub const MANIFEST_FILE: &str = "store.json";
/// Layout that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// What the numbers of `layers` mean.
pub const LAYER_CONVENTION: &str = "index of Hugging Face's hidden_states: 0 is the embedding, k the output of layer k \
                                    - 1 (from 0), and the number of layers the output of the last one after the final norm";

/// Everything about a store that is not a tensor. Written anew, atomically, after every shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreManifest {
    /// Layout of the store.
    pub format_version: u32,
    /// The model that computed the states.
    pub target: TargetIdentity,
    /// Element type it ran in.
    pub target_dtype: String,
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Number of its layers.
    pub num_layers: usize,
    /// Hash of tokenizer, chat template and template arguments.
    pub tokenizer: String,
    /// Content hashes of the token caches whose documents are here.
    pub data: Vec<String>,
    /// Captured states, ascending; the final one is always among them.
    pub layers: Vec<usize>,
    /// What the numbers of `layers` mean.
    pub layer_convention: String,
    /// Element type of the states.
    pub element: Element,
    /// Whether every token has the two numbers of [`crate::features::WholeVocabulary`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole_vocabulary: bool,
    /// Most tokens of a shard; a longer document has a shard of its own.
    pub shard_tokens: usize,
    /// Who computed the states, where that was not this program: `vllm`, `sglang`, `files`. Their last bits are not those
    /// that it would compute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Whole shards, sorted by name.
    pub shards: Vec<ShardEntry>,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name in the store's folder.
    pub file: String,
    /// Number of documents.
    pub documents: u64,
    /// Number of their tokens.
    pub tokens: u64,
    /// Length of the file.
    pub bytes: u64,
    /// CRC-32C of the file.
    pub crc32c: u32,
}

impl StoreManifest {
    /// Reads the manifest of a store's folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_FILE);
        if !path.is_file() {
            return Err(Error::bad_file(folder, format!("is no feature store: {MANIFEST_FILE} is not there"))
                .with_hint("make one with `specforge capture`, or correct target.feature_store"));
        }
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let again = "capture into another folder, or fetch the store again";
        let value: serde_json::Value = strict::from_json(&text)
            .map_err(|problem| Error::bad_file(&path, format!("not valid JSON: {problem}")).with_hint(again))?;
        // Another version may have other keys: it is looked at first.
        let version = value.get("format_version").and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(FORMAT_VERSION)) {
            let got = version.map_or("none".to_owned(), |version| version.to_string());
            let problem = format!("`format_version`: expected {FORMAT_VERSION}, got {got}");
            return Err(Error::bad_file(&path, problem).with_hint(again));
        }
        let manifest: Self = serde_path_to_error::deserialize(&value).map_err(|error| {
            let problem = format!("`{}`: {}", error.path(), error.inner());
            Error::bad_file(&path, problem).with_hint(again)
        })?;
        manifest.check().map_err(|problem| Error::bad_file(&path, problem).with_hint(again))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let in_order = self.layers.windows(2).all(|pair| pair[0] < pair[1]);
        if self.layers.last() != Some(&self.num_layers) || !in_order {
            let (last, got) = (self.num_layers, &self.layers);
            return Err(format!("`layers`: expected ascending numbers, the last of them {last}, got {got:?}"));
        }
        limits::within(&[
            ("hidden_size", self.hidden_size, limits::MOST_HIDDEN),
            ("vocab_size", self.vocab_size, limits::MOST_TOKENS),
            ("num_layers", limits::signed(self.num_layers), limits::MOST_LAYERS),
            ("shard_tokens", limits::signed(self.shard_tokens), i64::MAX - 1),
        ])?;
        if let Some(shard) = self.shards.iter().find(|shard| shard.file.contains('/') || shard.file.starts_with('.')) {
            return Err(format!("`shards`: expected names of files in this folder, got `{}`", shard.file));
        }
        // Sums of what is named here must not overflow.
        let whole = |shard: &ShardEntry| {
            shard.documents <= shard.tokens && shard.tokens <= shard.bytes && shard.bytes < 1 << 48
        };
        if let Some(shard) = self.shards.iter().find(|shard| !whole(shard)) {
            return Err(format!("`shards`: counts of `{}` cannot be right", shard.file));
        }
        let total = self.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.bytes));
        if total.is_none_or(|total| total >= 1 << 56) {
            return Err("`shards`: their sizes cannot be right: they sum up to more than any disk holds".to_owned());
        }
        match self.shards.windows(2).find(|pair| pair[0].file >= pair[1].file) {
            Some(pair) => Err(format!("`shards`: expected names in order, got `{}` twice or too late", pair[1].file)),
            None => Ok(()),
        }
    }

    /// Writes the manifest of a store's folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::write_json(&folder.join(MANIFEST_FILE), self)
    }

    /// What an existing store has otherwise than this one would, a line each: key, expected, got. Documents may differ.
    pub fn differences(&self, existing: &Self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for what in self.target.differences(&existing.target) {
            let (now, then) = (self.target.path.display(), existing.target.path.display());
            lines.push(format!("target: {what} of {now} are not those the store was captured from ({then})"));
        }
        let mut compare = |key: &str, now: String, then: String| {
            if now != then {
                lines.push(format!("{key}: asked for {now}, the store has {then}"));
            }
        };
        let origin = |origin: &Option<String>| origin.clone().unwrap_or_else(|| "this program".to_owned());
        compare("states computed by", origin(&self.origin), origin(&existing.origin));
        compare("target.dtype", self.target_dtype.clone(), existing.target_dtype.clone());
        let brief = |hash: &str| hash.chars().take(12).collect::<String>();
        compare("tokenizer or chat template", brief(&self.tokenizer), brief(&existing.tokenizer));
        compare("--layers", listed(&self.layers), listed(&existing.layers));
        compare("--dtype", self.element.name().to_owned(), existing.element.name().to_owned());
        let noted = |whole: bool| if whole { "it" } else { "none" }.to_owned();
        compare("--whole-vocabulary", noted(self.whole_vocabulary), noted(existing.whole_vocabulary));
        compare("--shard-tokens", self.shard_tokens.to_string(), existing.shard_tokens.to_string());
        lines
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// Documents of all shards.
    pub fn documents(&self) -> u64 {
        self.shards.iter().map(|shard| shard.documents).sum()
    }

    /// Tokens of all shards.
    pub fn tokens(&self) -> u64 {
        self.shards.iter().map(|shard| shard.tokens).sum()
    }
}

/// `2,15,30`
pub fn listed(layers: &[usize]) -> String {
    layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
