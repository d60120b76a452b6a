//! What the checks look at: a draft's folder, the target beside it, and where the draft came from.

use std::path::Path;

use serde_json::Value;

use super::eagle3::Eagle3;
use super::folder::{Folder, words};
use super::origin::Origin;
use crate::data::ChatTokenizer;
use crate::error::{Error, Result};
use crate::export::Engine;
use crate::gguf::packed;
use crate::models::TargetModel;
use crate::strict;

/// Everything that is known before a check begins.
pub struct Case<'a> {
    /// The draft's folder.
    pub folder: Folder,
    /// The target.
    pub target: Beside<'a>,
    /// Where the draft came from, where that is known.
    pub origin: Option<Origin>,
    /// What is known of it as an EAGLE-3 draft, where it is one.
    pub eagle3: Option<Eagle3>,
    /// The engine that shall serve it.
    pub engine: Option<Engine>,
}

/// The target that a draft is examined beside.
pub struct Beside<'a> {
    /// Its folder.
    pub path: &'a Path,
    /// Its config.json.
    pub values: Value,
    /// The model.
    pub model: &'a dyn TargetModel,
    /// Its tokenizer and template, or why it has none.
    pub tokenizer: Result<ChatTokenizer, String>,
}

impl<'a> Case<'a> {
    /// Reads everything. `checkpoint` is the one that the draft was written from, where its own record does not say it.
    pub fn open(
        draft: &Path,
        (path, model): (&'a Path, &'a dyn TargetModel),
        checkpoint: Option<&Path>,
        engine: Option<Engine>,
    ) -> Result<Self> {
        let mut folder = Folder::open(draft)?;
        let text = packed::read_file(path, "config.json")?.unwrap_or_default();
        let values = strict::from_json(&text).map_err(|problem| Error::bad_file(path, problem))?;
        let tokenizer = ChatTokenizer::load(path, None).map_err(|error| words(&error));
        let origin = Origin::find(draft, checkpoint)?;
        let eagle3 = Eagle3::of(&mut folder, model.info().num_layers(), origin.as_ref());
        Ok(Self { folder, target: Beside { path, values, model, tokenizer }, origin, eagle3, engine })
    }
}
