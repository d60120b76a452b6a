//! What a run reads, by content: noted for its checkpoints, and compared with the one it goes on from as soon as it is
//! known.

use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::super::note;
use super::inputs::check_progress;
use crate::checkpoint::inputs::{self, Input};
use crate::checkpoint::{Checkpoint, Inputs};
use crate::config::RunConfig;
use crate::data::{ChatTokenizer, TokenCache};
use crate::error::{Error, Result};
use crate::features::store::StoreManifest;
use crate::files::{Digests, hexadecimal};
use crate::models::TargetIdentity;
use crate::vocab::VocabMap;

/// What is known of it so far.
pub(super) struct Content<'a> {
    config: &'a RunConfig,
    checkpoint: Option<&'a Checkpoint>,
    digests: Digests,
    inputs: Inputs,
}

impl<'a> Content<'a> {
    pub(super) fn new(config: &'a RunConfig, checkpoint: Option<&'a Checkpoint>) -> Self {
        Self { config, checkpoint, digests: Digests::in_cache(&config.data.cache_dir), inputs: Inputs::new() }
    }

    /// Everything, when all is known.
    pub(super) fn inputs(&self) -> Inputs {
        self.inputs.clone()
    }

    fn name(&mut self, input: Input, digest: Option<String>) {
        if let Some(digest) = digest {
            self.inputs.insert(input.name.to_owned(), digest);
        }
    }

    fn compare(&self, which: &[Input]) -> Result<()> {
        self.checkpoint.map_or(Ok(()), |checkpoint| checkpoint.same_inputs(&self.inputs, which))
    }

    pub(super) fn tokenizer(&mut self, tokenizer: &ChatTokenizer) -> Result<()> {
        let parts = tokenizer.parts();
        self.name(inputs::TOKENIZER, Some(parts.tokenizer.clone()));
        self.name(inputs::TEMPLATE, parts.template.clone());
        self.name(inputs::SPECIAL_TOKENS, Some(parts.special_tokens.clone()));
        self.compare(&[inputs::TOKENIZER, inputs::TEMPLATE, inputs::SPECIAL_TOKENS])
    }

    /// The image tokenizer and the transformer of a run on pictures: digests of both.
    pub(super) fn pictures(&mut self, tokenizer: &str, transformer: Option<&str>) -> Result<()> {
        self.name(inputs::TOKENIZER, Some(tokenizer.to_owned()));
        self.name(inputs::TARGET_WEIGHTS, transformer.map(str::to_owned));
        self.compare(&[inputs::TOKENIZER, inputs::TARGET_WEIGHTS])
    }

    pub(super) fn data(&mut self, train: &TokenCache, held_out: Option<&TokenCache>) -> Result<()> {
        self.name(inputs::DATA, Some(train.token_hash()));
        self.name(inputs::HELD_OUT, held_out.map(TokenCache::token_hash));
        self.compare(&[inputs::DATA, inputs::HELD_OUT])
    }

    pub(super) fn vocabulary(&mut self, vocabulary: Option<&VocabMap>) -> Result<()> {
        self.name(inputs::VOCABULARY, vocabulary.map(VocabMap::hash));
        self.compare(&[inputs::VOCABULARY])
    }

    /// What the draft begins with: the first rank's business. The folder may be gone by the time a run goes on, which has
    /// its values already.
    pub(super) fn starting_draft(&mut self) -> Result<()> {
        let from = self.config.draft.get("init_from").and_then(Value::as_str).map(Path::new);
        let noted = self.checkpoint.and_then(|checkpoint| checkpoint.manifest.inputs.get(inputs::STARTING_DRAFT.name));
        let digest = match (from, noted) {
            (Some(from), Some(noted)) if !from.exists() => {
                note(format!("warning: {} is gone: the draft of this run began there", from.display()));
                Some(noted.clone())
            }
            (Some(from), _) => Some(folder_digest(from, &self.digests)?),
            (None, _) => None,
        };
        self.name(inputs::STARTING_DRAFT, digest);
        self.compare(&[inputs::STARTING_DRAFT])
    }

    /// The target. Where a store stands for its layers, and nothing decodes with them, the store says what they were.
    pub(super) fn target(&mut self) -> Result<TargetIdentity> {
        let path = &self.config.target.path;
        let stored = match &self.config.target.feature_store {
            Some(folder) if self.config.eval.every == 0 => StoreManifest::read(folder)?.target.content,
            _ => None,
        };
        let identity = match stored {
            // The store is compared with this folder when it is opened.
            Some(content) => TargetIdentity { content: Some(content), ..TargetIdentity::read(path)? },
            None => TargetIdentity::read_whole(path, &self.digests, &check_progress("read the target"))?,
        };
        self.name(inputs::TARGET_CONFIG, Some(identity.config.clone()));
        self.name(inputs::TARGET_WEIGHTS, identity.content.clone());
        self.compare(&[inputs::TARGET_CONFIG, inputs::TARGET_WEIGHTS])?;
        Ok(identity)
    }

    /// Where the hidden states come from.
    pub(super) fn states(&mut self, states: String) -> Result<()> {
        self.name(inputs::HIDDEN_STATES, Some(states));
        self.compare(&[inputs::HIDDEN_STATES])
    }
}

/// A digest of the files of a published draft: its tensors and what describes them.
fn folder_digest(folder: &Path, digests: &Digests) -> Result<String> {
    if folder.is_file() {
        return digests.sha256(folder);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let file = entry.map_err(Error::io("read", folder))?.path();
        let counts =
            file.extension().is_some_and(|ext| ["json", "safetensors", "bin", "pt"].iter().any(|known| ext == *known));
        if counts && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hash.update(format!("{name} {}\n", digests.sha256(&file)?));
    }
    Ok(hexadecimal(&hash.finalize()))
}
