//! `config.json` and `generation_config.json` of the Llama family from GGUF metadata.

use serde_json::{Map, Value, json};

use super::dimensions::Dimensions;
use super::metadata::{Metadata, six_digits};
use super::rope;
use crate::error::Result;

/// Ids of the tokens with a role, where the file names them.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u64>,
    pub(super) eos: Option<u64>,
    pub(super) pad: Option<u64>,
    pub(super) unk: Option<u64>,
    /// Ends of turns and messages: generation stops there too.
    pub(super) also_stop: Vec<u64>,
}

impl SpecialIds {
    /// Reads the ids; none may lie outside the vocabulary. `sentencepiece` files may leave the customary ids out.
    pub(super) fn read(metadata: &Metadata, vocab: usize, sentencepiece: bool) -> Result<Self> {
        let id = |name: &str, custom: Option<u64>| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let id = metadata.whole(&key)?.or(custom.filter(|_| sentencepiece));
            match id.filter(|&id| id >= vocab as u64) {
                Some(id) => Err(metadata.bad(format!("`{key}`: expected an id below {vocab}, got {id}"))),
                None => Ok(id),
            }
        };
        let eos = id("eos", Some(2))?;
        let mut also_stop = Vec::new();
        for stop in [id("eot", None)?, id("eom", None)?].into_iter().flatten() {
            if eos != Some(stop) && !also_stop.contains(&stop) {
                also_stop.push(stop);
            }
        }
        Ok(Self { bos: id("bos", Some(1))?, eos, pad: id("padding", None)?, unk: id("unknown", Some(0))?, also_stop })
    }
}

/// What the norms add to the mean square, as its author meant it.
pub(super) fn epsilon(metadata: &Metadata) -> Result<f64> {
    let key = metadata.key("attention.layer_norm_rms_epsilon");
    let epsilon = metadata.need(&key, Metadata::number)?;
    match epsilon > 0.0 {
        true => Ok(six_digits(epsilon)),
        false => Err(metadata.bad(format!("`{key}`: expected a positive number, got {epsilon}"))),
    }
}

/// `config.json`. `factors` are the values of the tensor `rope_freqs.weight`, where the file has one.
pub(super) fn config_json(
    metadata: &Metadata,
    sizes: &Dimensions,
    ids: &SpecialIds,
    shape: &Shape,
    factors: Option<&[f32]>,
) -> Result<Value> {
    let epsilon = epsilon(metadata)?;
    let rope = rope::read(metadata, sizes, factors)?;
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": epsilon,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
        "vocab_size": sizes.vocab,
    });
    if let Some(entries) = config.as_object_mut() {
        put_ids(entries, ids);
        entries.insert("use_cache".to_owned(), true.into());
        entries.insert("torch_dtype".to_owned(), shape.torch_dtype.into());
    }
    Ok(config)
}

/// `generation_config.json`.
pub(super) fn generation_config_json(ids: &SpecialIds) -> Value {
    let mut entries = Map::new();
    put_ids(&mut entries, ids);
    if let (Some(eos), false) = (ids.eos, ids.also_stop.is_empty()) {
        let stops: Vec<u64> = std::iter::once(eos).chain(ids.also_stop.iter().copied()).collect();
        entries.insert("eos_token_id".to_owned(), stops.into());
    }
    Value::Object(entries)
}

/// What the tensors say about the network, and the type they are written in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) tied: bool,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) torch_dtype: &'static str,
}

fn put_ids(entries: &mut Map<String, Value>, ids: &SpecialIds) {
    for (key, id) in [("bos_token_id", ids.bos), ("eos_token_id", ids.eos), ("pad_token_id", ids.pad)] {
        if let Some(id) = id {
            entries.insert(key.to_owned(), id.into());
        }
    }
}
