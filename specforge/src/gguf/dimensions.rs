//! Sizes of a network of the Llama family from GGUF metadata.
//!
//! Whatever would change the network and has no place in a Hugging Face Llama configuration is refused, not dropped.

use candle_core::quantized::gguf_file::Value as GgufValue;

use super::metadata::Metadata;
use crate::error::Result;

/// What the tensors are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Dimensions {
    /// Number of layers.
    pub layers: usize,
    /// `H`
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub groups: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// `V`
    pub vocab: usize,
    /// Longest context.
    pub context: usize,
}

/// Keys that change what the network computes in a way this family does not have, and the value that changes nothing.
const FOREIGN: [(&str, Neutral); 19] = [
    ("expert_count", Neutral::Number(0.0)),
    ("expert_used_count", Neutral::Number(0.0)),
    ("attention.sliding_window", Neutral::Number(0.0)),
    ("attention.clamp_kqv", Neutral::Number(0.0)),
    ("attention.max_alibi_bias", Neutral::Number(0.0)),
    ("attention.scale", Neutral::Number(0.0)),
    ("logit_scale", Neutral::Number(1.0)),
    ("embedding_scale", Neutral::Number(1.0)),
    ("residual_scale", Neutral::Number(1.0)),
    ("use_parallel_residual", Neutral::Flag(false)),
    ("attention.causal", Neutral::Flag(true)),
    ("expert_shared_count", Neutral::Number(0.0)),
    ("leading_dense_block_count", Neutral::Number(0.0)),
    ("final_logit_softcapping", Neutral::Number(0.0)),
    ("attn_logit_softcapping", Neutral::Number(0.0)),
    ("attention.output_scale", Neutral::Number(1.0)),
    ("attention.temperature_scale", Neutral::Number(0.0)),
    ("nextn_predict_layers", Neutral::Number(0.0)),
    ("altup.num_inputs", Neutral::Number(0.0)),
];

#[derive(Debug, Clone, Copy)]
enum Neutral {
    Number(f64),
    Flag(bool),
}

impl Dimensions {
    /// Reads and checks the sizes of a network of this architecture.
    pub(super) fn read(metadata: &Metadata, wanted: &str) -> Result<Self> {
        refuse_part(metadata)?;
        let architecture = metadata.need("general.architecture", Metadata::text)?;
        if architecture != wanted {
            let error = metadata.bad(format!("expected the architecture `{wanted}`, got `{architecture}`"));
            return Err(match wanted {
                "llama" => error.with_hint("only models of the Llama family can be imported from GGUF"),
                _ => error,
            });
        }
        for (name, neutral) in FOREIGN {
            refuse_unless_neutral(metadata, &metadata.key(name), neutral)?;
        }
        let hidden = size(metadata, "embedding_length")?;
        let heads = size(metadata, "attention.head_count")?;
        let groups = optional_size(metadata, "attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(groups) {
            let problem =
                format!("`{}`: expected a divisor of {heads}, got {groups}", metadata.key("attention.head_count_kv"));
            return Err(metadata.bad(problem));
        }
        let head_dim = head_dim(metadata, hidden, heads)?;
        let tokens = metadata.need("tokenizer.ggml.tokens", Metadata::texts)?.len();
        let vocab = optional_size(metadata, "vocab_size")?.unwrap_or(tokens);
        if tokens != vocab {
            return Err(metadata
                .bad(format!("`{}` is {vocab}, but the tokenizer has {tokens} tokens", metadata.key("vocab_size"))));
        }
        Ok(Self {
            layers: size(metadata, "block_count")?,
            hidden,
            intermediate: size(metadata, "feed_forward_length")?,
            heads,
            groups,
            head_dim,
            vocab,
            context: size(metadata, "context_length")?,
        })
    }
}

/// Refuses one file of several that are a model together.
fn refuse_part(metadata: &Metadata) -> Result<()> {
    let count = metadata.whole("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(());
    }
    let number = metadata.whole("split.no")?.unwrap_or(0).saturating_add(1);
    Err(metadata
        .bad(format!("is part {number} of {count} of a split GGUF file; expected the whole model in one file"))
        .with_hint("join the parts first: `llama-gguf-split --merge` with the first part and a new name"))
}

/// Width of a head. The rotary turns all of it, or the file is refused.
fn head_dim(metadata: &Metadata, hidden: usize, heads: usize) -> Result<usize> {
    let rotated = optional_size(metadata, "rope.dimension_count")?;
    let keys = optional_size(metadata, "attention.key_length")?;
    let head_dim = match keys.or(rotated) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let problem =
                format!("`{}`: expected a divisor of {hidden}, got {heads}", metadata.key("attention.head_count"));
            return Err(metadata.bad(problem));
        }
    };
    let values = optional_size(metadata, "attention.value_length")?;
    for (key, other) in [("rope.dimension_count", rotated), ("attention.value_length", values)] {
        if let Some(other) = other.filter(|&other| other != head_dim) {
            return Err(
                metadata.bad(format!("`{}`: expected {head_dim}, the width of a head, got {other}", metadata.key(key)))
            );
        }
    }
    if !head_dim.is_multiple_of(2) {
        return Err(metadata.bad(format!("expected heads of an even width, got {head_dim}")));
    }
    Ok(head_dim)
}

fn size(metadata: &Metadata, name: &str) -> Result<usize> {
    let key = metadata.key(name);
    metadata.need(&key, |metadata, _| optional_size(metadata, name))
}

/// A positive size, small enough that no product of two overflows.
fn optional_size(metadata: &Metadata, name: &str) -> Result<Option<usize>> {
    let key = metadata.key(name);
    if let Some(GgufValue::Array(_)) = metadata.get(&key) {
        return Err(metadata.bad(format!("`{key}`: layers of different sizes are not supported")));
    }
    match metadata.whole(&key)? {
        Some(size) if size == 0 || size > i32::MAX as u64 => {
            Err(metadata.bad(format!("`{key}`: expected a size from 1 to {}, got {size}", i32::MAX)))
        }
        size => Ok(size.map(|size| size as usize)),
    }
}

fn refuse_unless_neutral(metadata: &Metadata, key: &str, neutral: Neutral) -> Result<()> {
    let (got, same) = match neutral {
        Neutral::Number(neutral) => match metadata.number(key)? {
            Some(number) => (number.to_string(), number == neutral),
            None => return Ok(()),
        },
        Neutral::Flag(neutral) => match metadata.flag(key)? {
            Some(flag) => (flag.to_string(), flag == neutral),
            None => return Ok(()),
        },
    };
    if same { Ok(()) } else { Err(metadata.bad(format!("`{key}` = {got} is not supported"))) }
}
