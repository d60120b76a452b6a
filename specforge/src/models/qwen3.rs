//! Qwen3: Qwen2 without its biases, with a norm over each head of queries and keys.
//!
//! Reference: `transformers/models/qwen3/modeling_qwen3.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, GatedDesign, HeadNormDesign, LayerDesign, Silent, Sizes,
};
use super::keys::Keys;
use super::qwen2::later_windows;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Qwen3>("qwen3");
/// The text model of Qwen3-VL: positions of text along its three axes are one position.
pub const VISION_FAMILY: Family = decoder::family::<Qwen3>("qwen3_vl_text");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: Some(128), epsilon: 1e-6, tied: false };

/// The family.
#[derive(Debug)]
pub enum Qwen3 {}

impl DecoderFamily for Qwen3 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let windows = later_windows(keys, sizes.layers)?;
        let layer = LayerDesign::new(attention(keys, &sizes)?, Rc::new(mlp));
        Ok(Design::new(sizes, &layer, rope).with_windows(&windows))
    }
}

/// Attention with a norm over each head, and biases where the configuration asks for them.
pub fn attention(keys: &Keys<'_>, sizes: &Sizes) -> Result<AttentionDesign, String> {
    let bias = keys.flag_or("attention_bias", false)?;
    Ok(AttentionDesign { bias, output_bias: bias, norms: HeadNormDesign::EachHead, ..sizes.attention() })
}
