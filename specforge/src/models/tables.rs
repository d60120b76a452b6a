//! A target's folder without its layers: what a draft on another machine reads of it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::family::stored_tables;
use crate::error::{Error, Result};
use crate::files::{self, StagedDir};
use crate::gguf::{self, packed};
use crate::weights;

/// What such a folder has beside embedding and head.
const DESCRIPTION: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct TablesReport {
    /// The folder.
    pub out: PathBuf,
    /// Names of the tensors.
    pub tensors: Vec<String>,
    /// Bytes of their elements.
    pub bytes: u64,
}

/// Writes tokenizer, configuration, embedding and head of a target, a folder or a GGUF file, into the new folder `out`.
pub fn write_tables(source: &Path, out: &Path, overwrite: bool) -> Result<TablesReport> {
    gguf::check_folder(source, out, overwrite)?;
    let tables = stored_tables(source)?;
    let staged = StagedDir::new(out)?;
    for name in DESCRIPTION {
        if let Some(content) = packed::read_file(source, name)? {
            let path = staged.path().join(name);
            files::write_file(&path, |file| file.write_all(&content))?;
        }
    }
    if !staged.path().join("tokenizer.json").is_file() {
        return Err(Error::bad_file(source, "has no tokenizer.json, without which no edge can draft"));
    }
    weights::write_tensors(&staged.path().join("model.safetensors"), &tables, &[("format", "pt".to_owned())])?;
    staged.commit()?;
    let bytes = tables.iter().map(|(_, table)| (table.numel() * table.kind().elt_size_in_bytes()) as u64).sum();
    Ok(TablesReport { out: out.to_path_buf(), tensors: tables.into_iter().map(|(name, _)| name).collect(), bytes })
}
