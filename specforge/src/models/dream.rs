//! Dream: a Qwen2 without the causal mask, which fills masked tokens in; each row says what stands one position behind it.
//!
//! Reference: `dream/model/generation_utils.py` of NVlabs/Fast-dLLM, commit 24cc59e75f20a6384bae8c905965bb090b96388e.

use serde_json::{Value, json};

use super::decoder::{self, DecoderFamily, Design};
use super::keys::Keys;
use super::qwen2::Qwen2;
use super::{Family, Infilling, LayerShape, MaskedDiffusion};

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Dream>("Dream");

/// The family.
#[derive(Debug)]
pub enum Dream {}

impl DecoderFamily for Dream {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let mask = keys.whole("mask_token_id")?;
        keys.only("use_mrope", &false.into())?;
        keys.only("use_sliding_window", &false.into())?;
        let design = Qwen2::design(keys)?;
        match design.layers.iter().all(|layer| layer.window.is_none()) {
            true => Ok(Design { diffusion: Some(MaskedDiffusion { mask, shift: true }), ..design }),
            false => {
                Err("`layer_types`: a masked diffusion model has no windows, which end where a token stands".to_owned())
            }
        }
    }
}

/// config.json of a model of plain layers.
pub(super) fn written(model: &Infilling) -> Value {
    let LayerShape { intermediate_size, num_attention_heads, num_key_value_heads, rms_norm_eps, rope, .. } =
        model.layer;
    json!({
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope.theta,
        "max_position_embeddings": rope.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
        "use_sliding_window": false,
        "use_mrope": false,
        "mask_token_id": model.diffusion.mask,
    })
}
