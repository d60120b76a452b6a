//! A model of the Llama family in a GGUF file: the files of its Hugging Face folder, and what is to be made of its tensors.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::{self, Shape, SpecialIds};
use super::dimensions::Dimensions;
use super::metadata::Metadata;
use super::tensors::Plans;
use super::{ImportDtype, parts, tokenizer};
use crate::error::Result;

/// The files of the folder, but for the weights.
pub(super) const FILES: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

/// A GGUF file that was looked through.
#[derive(Debug)]
pub(super) struct Model {
    /// The files that it lies in, in order.
    pub(super) parts: Vec<(PathBuf, File)>,
    /// Every file of the folder by its name, but for the weights.
    pub(super) files: Vec<(&'static str, Value)>,
    pub(super) plans: Plans,
    pub(super) sizes: Dimensions,
    /// What kind of tokenizer it has.
    pub(super) tokenizer: String,
    pub(super) has_chat_template: bool,
}

impl Model {
    /// Reads everything but the weights, which will be of this type.
    pub(super) fn read(path: &Path, file: File, dtype: ImportDtype) -> Result<Self> {
        let (content, parts) = parts::read(path, file)?;
        let metadata = Metadata::new(path.to_path_buf(), content);
        let sizes = Dimensions::read(&metadata, "llama")?;
        let ids = SpecialIds::read(&metadata, sizes.vocab, tokenizer::is_sentencepiece(&metadata)?)?;
        let plans = Plans::new(&metadata, &sizes)?;
        let factors = plans.rope_factors(&parts)?;
        let shape = Shape {
            tied: plans.tied,
            attention_bias: plans.attention_bias,
            mlp_bias: plans.mlp_bias,
            torch_dtype: dtype.torch_name(),
        };
        let config = config::config_json(&metadata, &sizes, &ids, &shape, factors.as_deref())?;
        let tokenizer = tokenizer::read(&metadata, &ids, sizes.context)?;
        let generation = config::generation_config_json(&ids);
        let contents = [config, generation, tokenizer.tokenizer, tokenizer.config, tokenizer.special_tokens_map];
        let files = FILES.into_iter().zip(contents).collect();
        let (kind, has_chat_template) = (tokenizer.kind, tokenizer.has_chat_template);
        Ok(Self { parts, files, plans, sizes, tokenizer: kind, has_chat_template })
    }
}
