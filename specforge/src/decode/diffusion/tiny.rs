//! Tiny random models for tests, in float64.

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::Prompt;
use crate::error::Result;
use crate::models::{TargetConfig, TargetModel};
use crate::nn::noise;

/// Tokens of their vocabulary.
const VOCABULARY: i64 = 40;
/// Their mask token.
pub(crate) const MASK: i64 = 39;

/// 4 layers with grouped heads: LLaDA's, or Dream's whose rows say what stands behind them.
pub(crate) fn model(shift: bool, seed: u64) -> Box<dyn TargetModel> {
    let values = match shift {
        false => json!({
            "model_type": "llada", "d_model": 24, "n_heads": 6, "n_kv_heads": 2, "n_layers": 4, "mlp_hidden_size": 32,
            "vocab_size": VOCABULARY, "max_sequence_length": 96, "mask_token_id": MASK, "weight_tying": false,
        }),
        true => json!({
            "model_type": "Dream", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "max_position_embeddings": 96, "rope_theta": 1000.0, "mask_token_id": MASK,
        }),
    };
    let config = TargetConfig::from_value(&values).unwrap();
    let mut stream = 0;
    let mut random = |name: &str, shape: &[i64]| -> Result<Tensor> {
        stream += 1;
        let (deviation, centre) = match shape {
            [_] => (0.2, if name.contains("bias") { 0.0 } else { 1.0 }),
            [.., width] => (1.4 / (*width as f64).sqrt(), 0.0),
            [] => (1.0, 0.0),
        };
        Ok((noise::normal(shape, deviation, seed, stream) + centre).to_kind(Kind::Double))
    };
    config.build(Device::Cpu, &mut random).unwrap()
}

/// One of each.
pub(crate) fn both() -> [Box<dyn TargetModel>; 2] {
    [model(false, 3), model(true, 4)]
}

/// A random prompt.
pub(crate) fn prompt(length: usize, key: u64) -> Prompt {
    let mut next = noise::keyed_stream(key, 5);
    Prompt { tokens: (0..length).map(|_| (next() % MASK as u64) as u32).collect(), key }
}
