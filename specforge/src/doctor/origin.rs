//! Where a draft came from: the checkpoint it was written from, or what was noted of it when it was.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;

use crate::checkpoint::{self, Inputs};
use crate::error::Result;
use crate::export::RECORD_FILE;
use crate::strict;

/// What is known of the training.
#[derive(Debug)]
pub struct Origin {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// What rebuilds the draft.
    pub description: Value,
    /// Its tensors, where the checkpoint is there.
    pub tensors: Option<Vec<(String, Tensor)>>,
    /// What the run read, by content.
    pub inputs: Inputs,
}

impl Origin {
    /// The checkpoint that is `named`, or the one of the record beside the draft; nothing where nobody says one.
    pub fn find(draft: &Path, named: Option<&Path>) -> Result<Option<Self>> {
        if let Some(path) = named {
            return Self::of_checkpoint(path).map(Some);
        }
        // A record of somebody else's is no record.
        let text = std::fs::read(draft.join(RECORD_FILE)).unwrap_or_default();
        let record: Value = strict::from_json(&text).unwrap_or_default();
        let Some(path) = record.pointer("/configuration/checkpoint").and_then(Value::as_str).map(PathBuf::from) else {
            return Ok(None);
        };
        if path.is_dir()
            && let Ok(found) = Self::of_checkpoint(&path)
        {
            return Ok(Some(found));
        }
        let noted = |key: &str| record.pointer(&format!("/configuration/{key}")).cloned().unwrap_or_default();
        let inputs = serde_json::from_value(noted("inputs")).unwrap_or_default();
        Ok(Some(Self { path, description: noted("draft"), tensors: None, inputs }))
    }

    fn of_checkpoint(path: &Path) -> Result<Self> {
        let found = checkpoint::find(path)?;
        let (description, inputs) = (found.manifest.draft.clone(), found.manifest.inputs.clone());
        Ok(Self { tensors: Some(found.tensors()?), path: found.path, description, inputs })
    }

    /// A tensor of training.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let found = self.tensors.as_ref()?.iter().find(|(other, _)| other == name);
        found.map(|(_, tensor)| tensor)
    }
}
