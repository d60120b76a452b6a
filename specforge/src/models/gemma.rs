//! Gemma: norms that store one less than their weights, embeddings times the root of their width, GELU.
//!
//! Reference: `transformers/models/gemma/modeling_gemma.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use serde_json::Value;

use super::Family;
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, NormWeights, Silent, Sizes,
};
use super::keys::Keys;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Gemma>("gemma");

/// What a configuration leaves out.
pub const SILENT: Silent = Silent { head_dim: Some(256), epsilon: 1e-6, tied: true };
/// Its activation.
pub const ACTIVATION: &str = "gelu_pytorch_tanh";

/// The family.
#[derive(Debug)]
pub enum Gemma {}

impl DecoderFamily for Gemma {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        // The first files named their activation twice, and once wrongly.
        let is_named = keys.filled("hidden_activation").is_some();
        keys.know(["hidden_act"]);
        let key = if is_named { "hidden_activation" } else { "hidden_act" };
        let mlp = GatedDesign::read(keys, sizes.hidden_size, key, ACTIVATION)?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let layer = LayerDesign::new(attention(keys, &sizes)?, Rc::new(mlp));
        Ok(with_embedding(Design::new(sizes, &layer, rope)))
    }
}

/// Causal attention, with biases where the configuration asks for them.
pub fn attention(keys: &Keys<'_>, sizes: &Sizes) -> Result<AttentionDesign, String> {
    keys.only("use_bidirectional_attention", &Value::Bool(false))?;
    let bias = keys.flag_or("attention_bias", false)?;
    Ok(AttentionDesign { bias, output_bias: bias, ..sizes.attention() })
}

/// The same with this family's norms and scaled embeddings.
pub fn with_embedding(design: Design) -> Design {
    Design {
        norm_weights: NormWeights::LessOne,
        embedding_scale: (design.sizes.hidden_size as f64).sqrt(),
        rounds_embedding_scale: true,
        ..design
    }
}
