//! config.json of both layouts, written from a drafter's shape and head.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::drafter::Drafter;
use super::head::{Head, MarkovKind};
use super::method::Method;
use crate::draft::block::config::{BlockShape, LayerType, Layout as Rows};
use crate::export::Source;
use crate::export::eagle3::config::{Target, object, rope_parameters};
use crate::nn::RopeScaling;

/// config.json of z-lab's layout.
pub(super) fn zlab(drafter: &Drafter, source: &Source, dtype: &str) -> Value {
    let Drafter { method, shape, head } = drafter;
    let mut values = object(json!({"architectures": [method.architecture()]}));
    values.append(&mut transformer(shape, &source.target, dtype));
    values.append(&mut object(json!({
        "num_target_layers": shape.num_target_layers,
        "block_size": stored_block_size(*method, shape),
    })));
    if shape.draft_vocab_size < shape.vocab_size {
        values.insert("draft_vocab_size".to_owned(), json!(shape.draft_vocab_size));
    }
    let mut block = object(json!({"mask_token_id": shape.mask_token_id, "target_layer_ids": shape.target_layer_ids}));
    let mut nested = convolution(shape);
    // Engines look for everything of DSpark but convolutions at the top.
    if *method == Method::Dspark { &mut values } else { &mut nested }.append(&mut block);
    match head {
        Head::Plain => {}
        Head::Selector(_) | Head::Lilicorr(_) => nested.append(&mut head.training_keys()),
        Head::Markov(_) => values.append(&mut markov(head, shape)),
        Head::Xpress(keys) => values.append(&mut object(json!({
            "xpress_block_size": shape.block_size,
            "xpress_rank": keys.xpress_rank,
            "xpress_mlp_hidden": keys.xpress_rank * keys.xpress_mlp_ratio,
            "xpress_num_passes": keys.xpress_num_passes,
            "xpress_topc": keys.xpress_topc,
        }))),
        Head::Domino(keys) => {
            nested.append(&mut object(json!({
                "projector_type": "domino",
                "shift_label": shape.layout == Rows::Shift,
            })));
            nested.append(&mut head.training_keys());
            values.insert("emb_dim".to_owned(), json!(keys.emb_dim));
        }
    }
    if *method == Method::Lilicorr {
        nested.insert("lilicorr_enabled".to_owned(), json!(true));
    }
    nested.shift_remove("input_embedding_scale");
    if shape.input_embedding_scale != 1.0 {
        nested.insert("input_embedding_scale".to_owned(), json!(shape.input_embedding_scale));
    }
    if !nested.is_empty() {
        values.insert("dflash_config".to_owned(), Value::Object(nested));
    }
    values.insert("base_model_name_or_path".to_owned(), json!(source.target_words()));
    values.append(&mut own_section(shape));
    Value::Object(values)
}

/// config.json of the speculators layout, for the kinds that it has.
pub(super) fn speculators(drafter: &Drafter, source: &Source, dtype: &str) -> Value {
    let Drafter { method, shape, head } = drafter;
    let architectures = Target::read(Some(&source.target)).and_then(|target| target.architectures);
    let inputs: Vec<i64> = shape.target_layer_ids.iter().map(|id| id + 1).collect();
    let mut values = object(json!({
        "architectures": [method.speculators_architecture()],
        "speculators_model_type": method.name(),
        "speculators_version": "0.9.0",
        "torch_dtype": dtype,
        "draft_vocab_size": shape.draft_vocab_size,
        "block_size": shape.block_size,
        "aux_hidden_state_layer_ids": inputs,
        "mask_token_id": shape.mask_token_id,
        "sliding_window_non_causal": !shape.layers.iter().any(|layer| layer.causal),
        "sample_from_anchor": shape.layout == Rows::Shift,
    }));
    values.append(&mut convolution(shape));
    if let Head::Selector(keys) = head {
        values.append(&mut object(json!({
            "selector_rank": keys.selector_rank,
            "selector_top_k": keys.selector_top_k,
        })));
    }
    if *method == Method::Dspark {
        values.append(&mut markov(head, shape));
    }
    values.append(&mut object(json!({
        "transformer_layer_config": transformer(shape, &source.target, dtype),
        "speculators_config": {
            "algorithm": method.name(),
            "proposal_methods": [{
                "proposal_type": "greedy",
                "speculative_tokens": shape.slots(),
                "accept_tolerance": 0.0,
                "verifier_accept_k": 1,
            }],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": source.target_words(),
                "architectures": architectures.unwrap_or_else(|| json!(["Qwen3ForCausalLM"])),
            },
        },
    })));
    values.append(&mut own_section(shape));
    Value::Object(values)
}

/// `block_size` as engines take it in z-lab's layout: for DSpark the number of drafted tokens.
fn stored_block_size(method: Method, shape: &BlockShape) -> i64 {
    if method == Method::Dspark { shape.slots() } else { shape.block_size }
}

fn convolution(shape: &BlockShape) -> Map<String, Value> {
    let keys = |conv: crate::draft::block::config::Convolution| {
        object(json!({"conv_kernel_size": conv.kernel_size, "conv_group_size": conv.group_size}))
    };
    shape.conv.map(keys).unwrap_or_default()
}

fn markov(head: &Head, shape: &BlockShape) -> Map<String, Value> {
    let Head::Markov(keys) = head else { return Map::new() };
    let kind = match keys.markov_head_type {
        MarkovKind::Vanilla => "vanilla",
        MarkovKind::Gated => "gated",
        MarkovKind::Rnn => "rnn",
    };
    object(json!({
        "markov_rank": keys.markov_rank,
        "markov_head_type": kind,
        "enable_confidence_head": keys.confidence_head,
        "confidence_head_with_markov": keys.confidence_head && keys.confidence_head_with_markov,
        "sample_from_anchor": shape.layout == Rows::Shift,
    }))
}

/// What any Qwen3's config.json says, and what its layers see.
fn transformer(shape: &BlockShape, target: &Path, dtype: &str) -> Map<String, Value> {
    let layer = &shape.layer;
    // Engines make their rotary tables for this length and fail behind it.
    let own_length = layer.rope.max_position_embeddings;
    let target_length = Target::read(Some(target)).and_then(|target| target.max_position_embeddings);
    let dynamic = matches!(layer.rope.scaling, RopeScaling::Dynamic { .. });
    let length = if dynamic { own_length } else { target_length.unwrap_or(0).max(own_length) };
    let rope = rope_parameters(&layer.rope);
    let window = shape.layers.iter().find_map(|layer| layer.window);
    let types: Vec<LayerType> = shape
        .layers
        .iter()
        .map(|layer| if layer.window.is_some() { LayerType::SlidingAttention } else { LayerType::FullAttention })
        .collect();
    let mut values = object(json!({
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": shape.layers.len(),
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": layer.rope.theta,
        "rope_parameters": rope,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "tie_word_embeddings": false,
        "torch_dtype": dtype,
        "layer_types": types,
        "use_sliding_window": window.is_some(),
    }));
    if layer.rope.scaling != RopeScaling::Default {
        let mut older = rope;
        older.shift_remove("rope_theta");
        values.insert("rope_scaling".to_owned(), Value::Object(older));
    }
    if let Some(window) = window {
        values.insert("sliding_window".to_owned(), json!(window));
    }
    // Where layers differ they are what their type makes them: `write` refuses everything else.
    if let Some(causal) = one_causality(shape) {
        values.insert("is_causal".to_owned(), json!(causal));
    }
    values
}

/// Whether rows see only those before them, where all layers are alike.
pub(super) fn one_causality(shape: &BlockShape) -> Option<bool> {
    let first = shape.layers.first()?.causal;
    shape.layers.iter().all(|layer| layer.causal == first).then_some(first)
}

/// What engines do not read, and import does.
fn own_section(shape: &BlockShape) -> Map<String, Value> {
    object(json!({
        "specforge": {
            "num_target_layers": shape.num_target_layers,
            "max_position_embeddings": shape.layer.rope.max_position_embeddings,
        },
    }))
}
