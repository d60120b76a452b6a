//! A small random Llama for the tests of this room.

use tch::Tensor;

use crate::models::llama::{LlamaConfig, LlamaTarget};
use crate::nn::noise;

/// Context of [`target`].
pub(crate) const CONTEXT: usize = 96;

/// Two layers, four heads in two groups, 64 tokens; float64, so that no batch shape flips a choice.
pub(crate) fn target(seed: u64) -> LlamaTarget {
    target_with(seed, &|_, tensor| tensor)
}

/// The same model with tensors changed by name.
pub(crate) fn target_with(seed: u64, change: &dyn Fn(&str, Tensor) -> Tensor) -> LlamaTarget {
    let config: LlamaConfig = serde_json::from_value(serde_json::json!({
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": CONTEXT,
    }))
    .unwrap();
    let mut stream = 0;
    let mut tensor = |name: &str, shape: &[i64]| {
        stream += 1;
        let random = noise::normal(shape, 0.3, seed, stream).to_kind(tch::Kind::Double);
        let centred = if name.ends_with("norm.weight") { random + 1.0 } else { random };
        Ok(change(name, centred))
    };
    LlamaTarget::build(config, &mut tensor).unwrap()
}
