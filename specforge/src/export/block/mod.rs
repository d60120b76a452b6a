//! Block drafters on disk: DFlash, DFlash2, DSpark, LiLiCorr, XPress and Domino, in two layouts.
//!
//! `block` is z-lab's (PyPI `dflash` 0.1.0), one folder for vLLM and SGLang wherever one can say everything: config.json
//! with Qwen3's keys and `dflash_config`, `model.safetensors` with the engines' names, and `mask_embedding.pt` where the
//! mask has a row of its own. `block-speculators` is that of vllm-project/speculators 0.9, which names its target, so that
//! vLLM needs nothing but the folder; it counts the target's layers from one, and vLLM makes one flag of what its layers
//! see within a block. Both are read, and so are the folders of ModelOpt 0.48 and DeepSpec, whose names differ.
//!
//! The engines' rules were read in vLLM 0.32.0 and 0.33.0 (`model_executor/models/qwen3_dflash.py`, `qwen3_dflash2.py`,
//! `qwen3_dspark.py`, `qwen3_xpress.py`, `lilicorr.py`, `transformers_utils/configs/speculators/algos.py`), SGLang 0.5.23
//! (`srt/models/dflash.py`, `dspark.py`, `lilicorr.py`, `srt/speculative/dflash_utils.py`) and llama.cpp b11434
//! (`conversion/qwen.py`, `src/models/dflash.cpp`); `engines` holds them.

use std::path::Path;

use serde_json::Value;

use super::eagle3::config::Target;
use super::medusa::dtype;
use super::{Engine, ExportReport, Format};
use crate::draft::block::config::{BlockShape, Layout as Rows};
use crate::error::{Error, Result};
use crate::models;

mod config;
mod drafter;
mod engines;
pub mod head;
mod keys;
mod mask;
mod method;
mod parse;
mod read;
mod tensors;
#[cfg(test)]
mod tests;
mod warm_start;
mod write;

pub use method::{Layout, Method};
pub use read::{Imported, read};
pub use tensors::MASK_EMBEDDING;

const CONFIG_FILE: &str = "config.json";
const WEIGHTS_FILE: &str = "model.safetensors";

/// z-lab's layout.
pub const ZLAB: Format = Format {
    name: "block",
    summary: "vLLM and SGLang: block drafters (DFlash, DFlash2, DSpark, LiLiCorr, XPress, Domino) in z-lab's layout",
    files: &[CONFIG_FILE, WEIGHTS_FILE, mask::FILE],
    is_file: None,
    recognise: |config| method::of(config).is_some_and(|(layout, _)| layout == Layout::Zlab),
    write: |source, out| write::write(source, out, Layout::Zlab),
    check,
    start_from: Some(warm_start::start_from),
};

/// speculators' layout.
pub const SPECULATORS: Format = Format {
    name: "block-speculators",
    summary: "vLLM, from one folder: DFlash, DFlash2 and DSpark in vllm-project/speculators' layout",
    files: &[CONFIG_FILE, WEIGHTS_FILE, mask::FILE],
    is_file: None,
    recognise: |config| method::of(config).is_some_and(|(layout, _)| layout == Layout::Speculators),
    write: |source, out| write::write(source, out, Layout::Speculators),
    check,
    start_from: Some(warm_start::start_from),
};

fn format_name(layout: Layout) -> &'static str {
    match layout {
        Layout::Zlab => ZLAB.name,
        Layout::Speculators => SPECULATORS.name,
    }
}

fn check(path: &Path, _: &Value) -> Result<ExportReport> {
    let folder = read::Folder::open(path, None)?;
    let shape = &folder.parsed.shape;
    let mut warnings = folder.parsed.notes.clone();
    let target = Target::read(folder.target().map(|name| name.as_path()));
    match &target {
        Some(target) => {
            fits(&path.join(CONFIG_FILE), target, shape)?;
            warnings.extend(of_target(&folder));
        }
        None => warnings.push(match folder.target() {
            Some(name) => format!("target {} is not here: its sizes were not compared", name.display()),
            None => "config.json names no target: its sizes were not compared".to_owned(),
        }),
    }
    for (name, what) in [(tensors::EMBEDDING, "an embedding"), (tensors::LM_HEAD, "a vocabulary projection")] {
        if folder.contains(name) && shape.draft_vocab_size == shape.vocab_size {
            warnings.push(format!("holds {what} (`{name}`): vLLM uses it, SGLang takes the target's"));
        }
    }
    let engines = Engine::ALL.map(|engine| engines::report(engine, &folder, target.as_ref())).to_vec();
    Ok(ExportReport {
        path: path.to_path_buf(),
        format: format_name(folder.parsed.layout).to_owned(),
        tensors: folder.tensor_count(),
        parameters: folder.parameters(),
        dtype: dtype(folder.kind).to_owned(),
        resolved: lines(&folder),
        engines,
        warnings,
    })
}

/// Whether a drafter of this shape is one for this target.
fn fits(path: &Path, target: &Target, shape: &BlockShape) -> Result<()> {
    let layers = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let known_layers = Some(layers(shape.num_target_layers)).filter(|&count| count > 0);
    let pairs = [
        ("hidden size", target.hidden_size, Some(shape.hidden_size)),
        ("vocabulary", target.vocab_size, Some(shape.vocab_size)),
        ("number of layers", target.num_hidden_layers.map(layers), known_layers),
    ];
    for (what, target, draft) in pairs {
        if let (Some(target), Some(draft)) = (target, draft)
            && target != draft
        {
            let problem = format!("{what}: the target has {target}, the draft was made for {draft}");
            return Err(Error::bad_file(path, problem));
        }
    }
    match target.num_hidden_layers {
        Some(count) if shape.target_layer_ids.iter().any(|&id| id >= layers(count)) => {
            let ids = &shape.target_layer_ids;
            Err(Error::bad_file(path, format!("`target_layer_ids`: the target has {count} layers, got {ids:?}")))
        }
        _ => Ok(()),
    }
}

/// What the target's own embedding, head and positions mean for a drafter.
fn of_target(folder: &read::Folder) -> Vec<String> {
    let Some(info) = folder.target().and_then(|path| models::read_info(path).ok()) else { return Vec::new() };
    let (shape, template) = (&folder.parsed.shape, info.draft_template());
    let mut warnings = Vec::new();
    let (own, target) = (shape.layer.rope, template.rope);
    if own.theta != target.theta || own.scaling != target.scaling {
        warnings.push(format!(
            "rotary embedding: base {}, {:?}; the target's is {}, {:?}: drafts read its features by its positions",
            own.theta, own.scaling, target.theta, target.scaling
        ));
    }
    if info.embedding_scale != 1.0 && shape.input_embedding_scale == 1.0 {
        warnings.push(format!(
            "the target multiplies its embedding by {}: vLLM hands drafts unscaled rows unless `input_embedding_scale` \
             says so, SGLang where the target's class has a scale for them",
            info.embedding_scale
        ));
    }
    if info.head != crate::nn::HeadForm::PLAIN && folder.parsed.method != Method::Dflash {
        warnings.push(
            "the target's head scales or bends its logits: engines add what the draft's head says to the plain product"
                .to_owned(),
        );
    }
    warnings
}

/// A drafter in words.
fn lines(folder: &read::Folder) -> Vec<String> {
    let (shape, method) = (&folder.parsed.shape, folder.parsed.method);
    let layer = &shape.layer;
    let rows = match shape.layout {
        Rows::FillIn => "each row drafts the token in its place, the anchor's row none",
        Rows::Shift => "each row drafts the token behind it",
    };
    let seen = |layer: &crate::draft::block::config::BlockLayer| {
        let window = layer.window.map_or("everything".to_owned(), |window| format!("{window} tokens"));
        format!("{window}, {} in the block", if layer.causal { "causal" } else { "bidirectional" })
    };
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for words in shape.layers.iter().map(seen) {
        match kinds.last_mut() {
            Some((last, count)) if *last == words => *count += 1,
            _ => kinds.push((words, 1)),
        }
    }
    let kinds: Vec<String> = kinds.into_iter().map(|(words, count)| format!("{count} x {words}")).collect();
    let conv = shape.conv.map(|conv| format!(", convolutions of {} taps", conv.kernel_size)).unwrap_or_default();
    let mask = if shape.mask_embedding { "a row of its own" } else { "a row of the target's embedding" };
    vec![
        format!(
            "{}: {} layers of hidden size {}, {} heads of {}, {} for keys and values{conv}",
            method.name(),
            shape.layers.len(),
            shape.hidden_size,
            layer.num_attention_heads,
            layer.head_dim,
            layer.num_key_value_heads
        ),
        format!("blocks of {} rows, {} drafts: {rows}", shape.block_size, shape.slots()),
        format!("layers see {}", kinds.join("; ")),
        format!(
            "reads what layers {:?} of the target give (hidden_states {:?})",
            shape.target_layer_ids,
            shape.capture()
        ),
        format!("mask token {}, {mask}", shape.mask_token_id),
        folder.head().words(),
    ]
}
