//! EAGLE-3 drafts on disk, in three layouts: writing, checking, and reading other people's.
//!
//! `eagle3` is one folder for SGLang and vLLM: `model.safetensors` with the reference's names (SafeAILab/EAGLE
//! `cb7e084`: `midlayer.*`, `fc`, `norm`, `lm_head`, `d2t`, `t2d`) and a Llama-like config.json. `speculators` is the
//! format of vllm-project/speculators 0.9: `layers.0.*`, and a config.json that names the target, so that vLLM needs
//! nothing but the folder. Where a folder is named as the draft of a target, vLLM goes by `method`, or by `eagle3` in the
//! folder's name, and by neither it takes the folder for a whole model. `gguf` is one file for llama.cpp, with the target's
//! tokenizer in it.
//!
//! The engines' rules were read from the source of SGLang 0.5.23 (`srt/models/llama_eagle3.py`) and vLLM 0.33.0
//! (`model_executor/models/llama_eagle3.py`), and llama.cpp b11434 (`src/models/eagle3.cpp`, `conversion/llama.py`); `engines` holds them, `scripts/golden/engine_names.py` compares names.
//!
//! Shape legend: `H` hidden size, `TH` the target's, `V` vocabulary, `DV` the draft's own.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::medusa::dtype;
use super::{Engine, ExportReport, Format, Source};
use crate::draft::eagle3::Eagle3Shape;
use crate::error::{Error, Result};
use crate::files::{self, StagedDir};
use crate::weights::writer;

pub(in crate::export) mod config;
mod engines;
mod gguf;
mod pickled;
pub(in crate::export) mod read;
pub(in crate::export) mod targets;
pub(in crate::export) mod warm_start;

pub use config::{default_capture, inputs_of};
pub use read::{Imported, is_other_embedding, read, read_shape};
pub use warm_start::start_from;

/// What engines call a draft of the raw layout.
pub const ARCHITECTURE: &str = "LlamaForCausalLMEagle3";

pub(in crate::export) const CONFIG_FILE: &str = "config.json";
pub(in crate::export) const WEIGHTS_FILE: &str = "model.safetensors";

/// An embedding of the draft's own.
const EMBEDDING: &str = "embed_tokens.weight";
/// Draft id to what must be added to get the target's, `[DV]` int64.
pub(in crate::export) const D2T: &str = "d2t";
/// Whether a token of the target is in the draft's vocabulary, `[V]` bool.
pub(in crate::export) const T2D: &str = "t2d";

/// SGLang's and vLLM's layout.
pub const RAW: Format = Format {
    name: "eagle3",
    summary: "SGLang and vLLM: model.safetensors with midlayer.*",
    files: &[CONFIG_FILE, WEIGHTS_FILE],
    is_file: None,
    recognise: |config| layout(config) == Some(Layout::Raw),
    write: |source, out| write(source, out, Layout::Raw),
    check,
    start_from: Some(start_from),
};

/// vLLM's layout that names its target.
pub const SPECULATORS: Format = Format {
    name: "speculators",
    summary: "vLLM, from one folder: vllm-project/speculators' names, layers.*",
    files: &[CONFIG_FILE, WEIGHTS_FILE],
    is_file: None,
    recognise: |config| layout(config) == Some(Layout::Speculators),
    write: |source, out| write(source, out, Layout::Speculators),
    check,
    start_from: Some(start_from),
};

/// llama.cpp's one file.
pub const GGUF: Format = Format {
    name: "gguf",
    summary: "llama.cpp: one GGUF file, with the target's tokenizer in it",
    files: &[],
    is_file: Some(gguf::is_draft),
    recognise: |_| false,
    write: gguf::write,
    check,
    start_from: Some(start_from),
};

/// How tensors are named and where configuration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::export) enum Layout {
    Raw,
    Speculators,
    Gguf,
}

impl Layout {
    fn format(self) -> &'static str {
        match self {
            Layout::Raw => RAW.name,
            Layout::Speculators => SPECULATORS.name,
            Layout::Gguf => GGUF.name,
        }
    }

    /// The name in the file of a tensor of training.
    pub(in crate::export) fn stored(self, name: &str) -> String {
        match (self, name.strip_prefix("midlayer.")) {
            (Layout::Speculators, Some(rest)) => format!("layers.0.{rest}"),
            (Layout::Gguf, _) => gguf::stored_name(name).to_owned(),
            _ => name.to_owned(),
        }
    }
}

/// The name in training of a tensor in a file. SGLang also accepts the older names of the captured layers' norms.
pub fn trained_name(stored: &str) -> String {
    let aliases = [
        ("layers.0.", "midlayer."),
        ("aux_norm_low.", "fc_norm.0."),
        ("aux_norm_mid.", "fc_norm.1."),
        ("aux_norm_high.", "fc_norm.2."),
    ];
    let renamed = aliases.iter().find_map(|(old, new)| Some(format!("{new}{}", stored.strip_prefix(old)?)));
    renamed.unwrap_or_else(|| stored.to_owned())
}

fn layout(config: &Value) -> Option<Layout> {
    let kind = config.get("speculators_model_type");
    if kind.is_some_and(|kind| kind == "eagle3") {
        return Some(Layout::Speculators);
    }
    let names = config.get("architectures").and_then(Value::as_array);
    let is_eagle3 = names.is_some_and(|names| names.iter().any(|name| name.as_str().is_some_and(is_eagle3)));
    (kind.is_none() && is_eagle3).then_some(Layout::Raw)
}

fn is_eagle3(architecture: &str) -> bool {
    architecture.starts_with("Eagle3") || architecture.ends_with("Eagle3")
}

/// The norm that SGLang reads where every other implementation reads `input_layernorm`: in layers after the first.
fn twin_norm(layer: usize) -> (String, String) {
    let prefix = Eagle3Shape::layer_prefix(layer);
    (format!("{prefix}.input_layernorm.weight"), format!("{prefix}.hidden_norm.weight"))
}

fn write(source: &Source, out: &Path, layout: Layout) -> Result<()> {
    let shape = Eagle3Shape::from_description(&source.description)
        .map_err(|problem| Error::Failed(format!("the checkpoint is not one of an EAGLE-3 draft: {problem}")))?;
    if !shape.norm_output {
        return Err(Error::Failed(
            "the draft was trained with `norm_output: false`, but every engine norms before the projection".to_owned(),
        ));
    }
    if layout == Layout::Speculators && shape.fc_norm && shape.norm_before_fc {
        return Err(Error::Failed(
            "`fc_norm` and `norm_before_fc` are both on, which the speculators format excludes; use --format eagle3"
                .to_owned(),
        ));
    }
    let tensors = stored_tensors(source, &shape, layout)?;
    let kind = tensors.first().map_or(Kind::Float, |(_, tensor)| tensor.kind());
    let values = match layout {
        Layout::Raw | Layout::Gguf => config::raw(&shape, source, dtype(kind)),
        Layout::Speculators => config::speculators(&shape, source, dtype(kind)),
    };
    writer::write_tensors(&out.join(WEIGHTS_FILE), &tensors, &[])?;
    files::write_json(&out.join(CONFIG_FILE), &values)
}

/// A tensor of a source by its name in training.
pub(in crate::export) fn trained_tensor<'a>(source: &'a Source, name: &str, want: &[i64]) -> Result<&'a Tensor> {
    let found = source.tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
    match found {
        Some(tensor) if tensor.size() == want => Ok(tensor),
        Some(tensor) => {
            let got = tensor.size();
            Err(Error::Failed(format!("the checkpoint's tensor `{name}`: expected {want:?}, got {got:?}")))
        }
        None => Err(Error::Failed(format!("the checkpoint holds no tensor `{name}`"))),
    }
}

/// The tensors of a source under a layout's names.
fn stored_tensors(source: &Source, shape: &Eagle3Shape, layout: Layout) -> Result<Vec<(String, Tensor)>> {
    let find = |name: &str, want: &[i64]| trained_tensor(source, name, want);
    let mut tensors = Vec::new();
    let mut kind = source.kind;
    for (name, want) in shape.tensors() {
        let value = find(&name, &want)?;
        // Engines want one type in a file.
        let value = value.f_to_kind(*kind.get_or_insert(value.kind()))?;
        tensors.push((layout.stored(&name), value));
    }
    // Published drafts may have a copy of the target's.
    let shares = shape.hidden_size == shape.target_hidden_size;
    if let Some((_, value)) = source.tensors.iter().find(|(name, _)| shares && name == EMBEDDING) {
        tensors.push((EMBEDDING.to_owned(), value.f_to_kind(kind.unwrap_or(value.kind()))?));
    }
    if layout == Layout::Raw {
        for layer in 1..shape.num_layers {
            let (norm, twin) = twin_norm(layer);
            let value = find(&norm, &[shape.hidden_size])?;
            tensors.push((twin, value.f_to_kind(kind.unwrap_or(value.kind()))?));
        }
    }
    if shape.draft_vocab_size < shape.vocab_size {
        tensors.push((D2T.to_owned(), find(D2T, &[shape.draft_vocab_size])?.shallow_clone()));
        tensors.push((T2D.to_owned(), find(T2D, &[shape.vocab_size])?.shallow_clone()));
    }
    Ok(tensors)
}

/// Makes a folder of the layout `eagle3` of a draft in a GGUF file. `overwrite` says whether a folder of a draft or a model
/// that is there may be replaced.
pub fn import(path: &Path, out: &Path, kind: Kind, overwrite: bool) -> Result<ExportReport> {
    crate::gguf::check_folder(path, out, overwrite)?;
    let Imported { shape, mut tensors, vocabulary, embedding, .. } = read(path, None)?;
    if let Some(map) = vocabulary {
        tensors.push((D2T.to_owned(), Tensor::f_from_slice(&map.d2t())?));
        tensors.push((T2D.to_owned(), Tensor::f_from_slice(&map.t2d())?));
    }
    tensors.extend(embedding.map(|table| (EMBEDDING.to_owned(), table)));
    let description = json!({"draft": {"algorithm": "eagle3"}, "shape": shape});
    let source =
        Source { description, tensors, target: PathBuf::new(), target_name: None, kind: Some(kind), q8_0: false };
    let staged = StagedDir::new(out)?;
    write(&source, staged.path(), Layout::Raw)?;
    staged.commit()?;
    super::check(out)
}

fn check(path: &Path, _: &Value) -> Result<ExportReport> {
    let folder = read::Folder::open(path, None)?;
    let shape = &folder.shape;
    let mut warnings = folder.warnings.clone();
    let target = config::Target::read(folder.target.as_deref());
    match &target {
        Some(target) => target.fits(&path.join(CONFIG_FILE), shape)?,
        // Nobody expects a name there.
        None if folder.layout == Layout::Gguf => {}
        None => warnings.push(match &folder.target {
            Some(name) => format!("target {} is not here: its sizes were not compared", name.display()),
            None => "config.json names no target: its sizes were not compared".to_owned(),
        }),
    }
    if folder.embedding().is_some() {
        let what = "holds an embedding although it is as wide as the target";
        warnings.push(match folder.layout {
            Layout::Gguf => format!("{what}: llama.cpp uses it"),
            _ => format!("{what}: vLLM uses it where it differs from the target's, SGLang never"),
        });
    }
    let mut engines = Engine::ALL.map(|engine| engines::report(engine, &folder, target.as_ref())).to_vec();
    // The others read no GGUF files of drafts.
    engines.retain(|known| folder.layout != Layout::Gguf || known.engine == Engine::LlamaCpp);
    let parameters = shape.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
    Ok(ExportReport {
        path: path.to_path_buf(),
        format: folder.layout.format().to_owned(),
        tensors: folder.tensor_count(),
        parameters,
        dtype: dtype(folder.kind).to_owned(),
        resolved: config::lines(shape),
        engines,
        warnings,
    })
}
