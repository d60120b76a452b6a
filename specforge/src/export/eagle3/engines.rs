//! What SGLang 0.5.23, vLLM 0.33.0 and llama.cpp b11434 make of a folder or a GGUF file, and why one cannot serve it.
//!
//! llama.cpp reads GGUF files. A folder is looked at with the eyes of its converter, whose file its loader then takes.

use serde_json::Value;

use super::config::{self, Target};
use super::read::Folder;
use super::{D2T, Layout, gguf, targets, twin_norm};
use crate::export::{Engine, EngineReport};
use crate::nn::RopeScaling;

/// What an engine will do with a folder.
pub(super) fn report(engine: Engine, folder: &Folder, target: Option<&Target>) -> EngineReport {
    let (mut resolved, mut problems) = (Vec::new(), Vec::new());
    let direct = engine != Engine::LlamaCpp || folder.layout == Layout::Gguf;
    let unserved = targets::refusal(engine, target);
    if engine == Engine::Sglang && folder.layout == Layout::Speculators {
        problems.push("does not read the speculators format; write --format eagle3".to_owned());
        return EngineReport { engine, resolved, problems, unserved, direct };
    }
    captured(engine, folder, target, &mut resolved, &mut problems);
    match engine {
        Engine::Sglang => {
            both(folder, target, &mut problems);
            sglang(folder, &mut problems);
        }
        Engine::Vllm => {
            both(folder, target, &mut problems);
            vllm(folder, target, &mut problems);
        }
        Engine::LlamaCpp => llama_cpp(folder, target, &mut resolved, &mut problems),
    }
    let shape = &folder.shape;
    resolved.push(format!("rotary embedding: base {}, {}", shape.layer.rope.theta, variant(&shape.layer.rope.scaling)));
    resolved.push(match shape.draft_vocab_size < shape.vocab_size {
        true => format!("vocabulary: {} of {} tokens, through d2t", shape.draft_vocab_size, shape.vocab_size),
        false => format!("vocabulary: all {} tokens", shape.vocab_size),
    });
    let feedback = if folder.keys.norm_output == Some(true) { "normed" } else { "un-normed" };
    let embedding = if shape.hidden_size == shape.target_hidden_size { "the target's" } else { "the draft's own" };
    resolved.push(format!("next feature: the {feedback} output; embedding: {embedding}"));
    EngineReport { engine, resolved, problems, unserved, direct }
}

fn variant(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::Default => "as pretrained".to_owned(),
        RopeScaling::Linear { factor } => format!("linear x {factor}"),
        RopeScaling::Dynamic { factor } => format!("dynamic x {factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings: length, .. } => {
            format!("llama3 x {factor} from {length}")
        }
        RopeScaling::Yarn { factor, original_max_position_embeddings: length, .. } => {
            format!("yarn x {factor} from {length}")
        }
    }
}

/// The layers that an engine takes, by its own rule.
fn captured(
    engine: Engine,
    folder: &Folder,
    target: Option<&Target>,
    resolved: &mut Vec<String>,
    problems: &mut Vec<String>,
) {
    let (keys, shape) = (&folder.keys, &folder.shape);
    let nested = keys.eagle_config.as_ref().and_then(|keys| keys.eagle_aux_hidden_state_layer_ids.clone());
    let top = keys.eagle_aux_hidden_state_layer_ids.clone().filter(|ids| !ids.is_empty());
    let known = target.and_then(|target| target.num_hidden_layers).unwrap_or(shape.num_target_layers);
    let (layers, from) = match engine {
        // The key holds outputs there.
        Engine::Sglang => match &nested {
            Some(ids) => (config::inputs_of(ids), format!("`eagle_config`: outputs of {ids:?}")),
            None => (config::default_capture(known), "its default, no key in `eagle_config`".to_owned()),
        },
        // The key beside `eagle_config` alone.
        Engine::LlamaCpp => match &top {
            Some(ids) if folder.layout == Layout::Gguf => {
                (Some(ids.clone()), format!("`target_layers`: inputs of {ids:?}"))
            }
            Some(ids) => (Some(ids.clone()), format!("the key beside `eagle_config`: inputs of {ids:?}")),
            None => {
                (config::default_capture(known), "its converter's default, no key beside `eagle_config`".to_owned())
            }
        },
        // Either key is taken as it stands.
        Engine::Vllm => match (&top, &nested) {
            (Some(ids), _) => (Some(ids.clone()), format!("the key beside `eagle_config`: inputs of {ids:?}")),
            (None, Some(ids)) => {
                let layers = ids.iter().map(|&id| usize::try_from(id).ok()).collect();
                (layers, format!("`eagle_config`, taken as inputs of {ids:?}"))
            }
            (None, None) => (config::default_capture(known), "its default, no key".to_owned()),
        },
    };
    let Some(layers) = layers else {
        problems.push("takes its default layers, which depend on the target's number of layers".to_owned());
        return;
    };
    resolved.push(format!("captures what layers {layers:?} read ({from})"));
    if layers != shape.capture {
        problems.push(format!("captures what layers {layers:?} read, the draft was trained on {:?}", shape.capture));
    }
    let listed = match engine {
        Engine::Sglang => nested.map(|ids| ids.len()).or(top.map(|ids| ids.len())),
        Engine::Vllm => nested.map(|ids| ids.len()),
        // It counts for itself.
        Engine::LlamaCpp => return,
    };
    let count = keys.num_aux_hidden_states.or(listed.filter(|&count| count > 0)).unwrap_or(3);
    if count != shape.capture.len() {
        let have = shape.capture.len();
        problems
            .push(format!("expects {count} captured layers, the draft has {have}: `num_aux_hidden_states` is missing"));
    }
}

/// What neither engine does.
fn both(folder: &Folder, target: Option<&Target>, problems: &mut Vec<String>) {
    let shape = &folder.shape;
    if !shape.norm_output {
        problems.push("norms before the projection, the draft was trained without".to_owned());
    } else if (folder.keys.norm_output == Some(true)) != shape.norm_feedback {
        let key = "`norm_output` means that to an engine, whatever `norm_feedback` says";
        problems.push(format!("takes the other output for the next feature: {key}"));
    }
    if let RopeScaling::Dynamic { .. } = shape.layer.rope.scaling {
        problems.push("stretches dynamic rotary embeddings once, not with the length as in training".to_owned());
    }
    let last = target.and_then(|target| target.num_hidden_layers).unwrap_or(shape.num_target_layers);
    if last > 0 && shape.capture.contains(&last) {
        problems.push(format!("cannot capture the last, normed output of the target (index {last})"));
    }
}

fn sglang(folder: &Folder, problems: &mut Vec<String>) {
    let (keys, shape) = (&folder.keys, &folder.shape);
    let names = folder.values.get("architectures").and_then(Value::as_array);
    if !names.is_some_and(|names| names.iter().any(|name| name == "LlamaForCausalLMEagle3")) {
        problems.push("knows the architecture as LlamaForCausalLMEagle3 only".to_owned());
    }
    if shape.norm_before_residual {
        problems.push("has no `norm_before_residual`".to_owned());
    }
    if keys.draft_vocab_size.is_none() {
        problems.push("needs `draft_vocab_size`; without a value it takes the target's projection".to_owned());
    }
    if keys.tie_word_embeddings == Some(true) {
        problems.push("replaces the projection by the embedding: `tie_word_embeddings` is true".to_owned());
    }
    if folder.values.get("target_hidden_size").is_some_and(Value::is_null) {
        problems.push("keeps an embedding that nobody loads: remove `target_hidden_size`, which is null".to_owned());
    }
    if shape.capture.len() as i64 * shape.target_hidden_size == shape.hidden_size {
        problems.push("skips `fc` where the captured features are as wide as the draft".to_owned());
    }
    if let Some(layer) = (1..shape.num_layers).find(|&layer| !folder.contains(&twin_norm(layer).1)) {
        problems.push(format!("norms the input of layer {layer} by `{}`, which is missing", twin_norm(layer).1));
    }
}

fn vllm(folder: &Folder, target: Option<&Target>, problems: &mut Vec<String>) {
    let (keys, shape) = (&folder.keys, &folder.shape);
    if shape.draft_vocab_size == shape.vocab_size && folder.contains(D2T) {
        problems.push("refuses `d2t` where the draft has the target's whole vocabulary".to_owned());
    }
    if shape.fc_norm && keys.fc_norm != Some(true) {
        problems.push("reads `fc_norm`, not `use_aux_norm`".to_owned());
    }
    if let Some(name) = folder.stored.iter().find(|name| name.starts_with("aux_norm_")) {
        problems.push(format!("does not know the tensor name `{name}`"));
    }
    let length = folder.values.get("max_position_embeddings").and_then(Value::as_i64);
    let wanted = target.and_then(|target| target.max_position_embeddings);
    if let (Some(length), Some(wanted)) = (length, wanted)
        && length < wanted
    {
        problems.push(format!(
            "sizes its rotary tables by `max_position_embeddings` ({length}) and fails past it; the target reads {wanted}"
        ));
    }
}

fn llama_cpp(folder: &Folder, target: Option<&Target>, resolved: &mut Vec<String>, problems: &mut Vec<String>) {
    let (keys, shape) = (&folder.keys, &folder.shape);
    problems
        .extend(gguf::inexpressible(shape).into_iter().map(|problem| format!("cannot be told what it is: {problem}")));
    let last = target.and_then(|target| target.num_hidden_layers).unwrap_or(shape.num_target_layers);
    if shape.num_target_layers == 0 && last > 0 && shape.capture.contains(&last) {
        problems.push(format!("cannot capture the last, normed output of the target (index {last})"));
    }
    if folder.layout == Layout::Gguf {
        resolved.push("loads it as it is, with -md and --spec-type draft-eagle3".to_owned());
        return;
    }
    resolved
        .push("after convert_hf_to_gguf.py with --target-model-dir; --format gguf writes its file at once".to_owned());
    if keys.draft_vocab_size.is_none() {
        problems.push("takes a draft without `draft_vocab_size` for an ordinary model when it converts it".to_owned());
    }
    if shape.norm_before_fc && keys.norm_before_fc != Some(true) {
        problems.push("reads `norm_before_fc` beside `eagle_config` only when it converts a folder".to_owned());
    }
}
