//! What vLLM 0.33, SGLang 0.5.23 and llama.cpp b11434 make of a folder, and why one cannot serve it as it was trained.
//!
//! Much of what goes wrong with block drafters is silent: a wrong mask, a layer too far, a head that is dropped. Each
//! engine's own rule is applied to the keys as they stand, and its result compared with the drafter's shape.

use super::Method;
use super::head::{Head, Lilicorr};
use super::read::Folder;
use super::tensors::Spelling;
use crate::draft::block::config::{BlockShape, LayerType};
use crate::export::eagle3::config::Target;
use crate::export::{Engine, EngineReport};
use crate::nn::RopeScaling;

mod llama_cpp;
mod sglang;
mod targets;
mod vllm;

/// What an engine will do with a folder.
pub(super) fn report(engine: Engine, folder: &Folder, target: Option<&Target>) -> EngineReport {
    let mut lines = Lines::default();
    match engine {
        Engine::Vllm => vllm::look(folder, target, &mut lines),
        Engine::Sglang => sglang::look(folder, target, &mut lines),
        Engine::LlamaCpp => llama_cpp::look(folder, &mut lines),
    }
    let unserved = targets::refusal(engine, target);
    let direct = engine != Engine::LlamaCpp;
    EngineReport { engine, resolved: lines.resolved, problems: lines.problems, unserved, direct }
}

/// What is found out about an engine.
#[derive(Default)]
struct Lines {
    resolved: Vec<String>,
    problems: Vec<String>,
}

impl Lines {
    fn says(&mut self, line: impl Into<String>) {
        self.resolved.push(line.into());
    }

    fn fails(&mut self, line: impl Into<String>) {
        self.problems.push(line.into());
    }

    /// Compares what an engine's layers see within the block with what they were trained with.
    fn causality(&mut self, engines: &[bool], shape: &BlockShape, why: &str) {
        let trained: Vec<bool> = shape.layers.iter().map(|layer| layer.causal).collect();
        if engines == trained {
            self.says(format!("layers are causal in the block: {} ({why})", truths(engines)));
        } else {
            self.fails(format!(
                "makes layers causal in the block as {} ({why}); the draft was trained with {}",
                truths(engines),
                truths(&trained)
            ));
        }
    }

    /// The same for windows.
    fn windows(&mut self, engines: &[Option<i64>], shape: &BlockShape, why: &str) {
        let trained: Vec<Option<i64>> = shape.layers.iter().map(|layer| layer.window).collect();
        if engines != trained {
            self.fails(format!(
                "gives layers the windows {} ({why}); the draft was trained with {}",
                words(engines),
                words(&trained)
            ));
        }
    }
}

fn truths(layers: &[bool]) -> String {
    let word = |causal: &bool| if *causal { "yes" } else { "no" };
    match layers.windows(2).all(|pair| pair[0] == pair[1]) {
        true => layers.first().map_or("none".to_owned(), |causal| word(causal).to_owned()),
        false => format!("[{}]", layers.iter().map(word).collect::<Vec<_>>().join(", ")),
    }
}

fn words(windows: &[Option<i64>]) -> String {
    let word = |window: &Option<i64>| window.map_or("none".to_owned(), |window| window.to_string());
    format!("[{}]", windows.iter().map(word).collect::<Vec<_>>().join(", "))
}

/// Types of the layers as a file has them.
fn layer_types(folder: &Folder) -> Option<&[LayerType]> {
    folder.parsed.keys.layer_types.as_deref()
}

/// The file's types, or full layers.
fn types_or_full(folder: &Folder) -> Vec<LayerType> {
    let full = || vec![LayerType::FullAttention; folder.parsed.shape.layers.len()];
    layer_types(folder).map_or_else(full, <[LayerType]>::to_vec)
}

/// What is wrong for every engine that loads the files.
fn shared(folder: &Folder, target: Option<&Target>, lines: &mut Lines) {
    let shape = &folder.parsed.shape;
    let known = target.and_then(|target| target.num_hidden_layers).unwrap_or(shape.num_target_layers);
    if known > 0 && shape.target_layer_ids.contains(&(known as i64 - 1)) {
        lines.fails(format!(
            "hands over the last layer of the target ({}) before its final norm, Hugging Face behind it, where the \
             draft read it in training",
            known - 1
        ));
    }
    if let RopeScaling::Dynamic { .. } = shape.layer.rope.scaling {
        lines.fails("stretches dynamic rotary embeddings once, not with the length as in training");
    }
    let wanted = target.and_then(|target| target.max_position_embeddings);
    let length = folder.parsed.max_position_embeddings;
    if let Some(wanted) = wanted.filter(|wanted| length < *wanted) {
        lines.fails(format!(
            "sizes its rotary tables by `max_position_embeddings` ({length}) and fails past it; the target reads {wanted}"
        ));
    }
    if folder.is_zlab() && folder.parsed.keys.model_type.is_none() {
        lines.fails("finds no `model_type` in config.json: transformers cannot read it");
    }
    const IN_A_SECTION: [&str; 4] = ["conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"];
    let looked_for = IN_A_SECTION.iter().chain(&Lilicorr::KEYS).find(|key| folder.parsed.places.only_at_top(key));
    if let Some(key) = looked_for.filter(|_| folder.is_zlab()) {
        lines.fails(format!("looks for `{key}` in `dflash_config`, not at the top of config.json"));
    }
    let candidates = match folder.head() {
        Head::Lilicorr(keys) => Some(keys.lilicorr_candidate_topk),
        _ => None,
    };
    if let Some(candidates) = candidates.filter(|count| *count > 16 || count.count_ones() != 1) {
        lines.fails(format!("takes a power of two up to 16 for `lilicorr_candidate_topk`, got {candidates}"));
    }
    for spelling in &folder.spellings {
        if let Some(problem) = of_both(*spelling) {
            lines.fails(problem);
        }
    }
    if shape.conv.is_some() && folder.parsed.method == Method::Domino {
        lines.fails("has no Domino with convolutions");
    }
}

/// Names that neither vLLM nor SGLang loads.
fn of_both(spelling: Spelling) -> Option<String> {
    let name = match spelling {
        Spelling::NumberedParts => "feature_mlp.0, layers.i.mlp.0 and the like, the trainer's",
        Spelling::FlatMarkov => "markov_w1, confidence_proj and the like, ModelOpt's",
        Spelling::Refiner => "refiner_head, speculators'",
        Spelling::Prefixed | Spelling::Encoder | Spelling::Codebook => return None,
    };
    Some(format!(
        "does not know the tensor names {name}: `specforge export` of a draft that started from here writes them"
    ))
}
