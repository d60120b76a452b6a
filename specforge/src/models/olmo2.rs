//! OLMo 2: norms behind each block instead of before it, and over all heads of queries and keys together.
//!
//! Reference: `transformers/models/olmo2/modeling_olmo2.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, GatedDesign, HeadNormDesign, LayerDesign, NormNames, NormWeights,
    Silent, Sizes,
};
use super::keys::Keys;
use super::rope_keys::{RopeDesign, RopeSource};

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Olmo2>("olmo2");

/// What a configuration leaves out.
pub const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-5, tied: false };

/// Base of the rotary embedding, where the configuration does not say it.
pub const THETA: f64 = 10_000.0;

/// The family.
#[derive(Debug)]
pub enum Olmo2 {}

impl DecoderFamily for Olmo2 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let rope = RopeSource::read(keys, THETA, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        turned_by(keys, sizes, rope)
    }
}

/// A model with this rotary embedding.
pub fn turned_by(keys: &Keys<'_>, sizes: Sizes, rope: RopeDesign) -> Result<Design, String> {
    let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
    let bias = keys.flag_or("attention_bias", false)?;
    let norms = HeadNormDesign::AllHeads;
    let attention = AttentionDesign { bias, output_bias: bias, norms, ..sizes.attention() };
    let layer = LayerDesign { norms: NormNames::BEHIND, ..LayerDesign::new(attention, Rc::new(mlp)) };
    Ok(Design { norm_weights: NormWeights::Wide, ..Design::new(sizes, &layer, rope) })
}
