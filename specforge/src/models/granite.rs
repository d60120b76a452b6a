//! Granite: a Llama whose embeddings, scores, blocks and logits are multiplied with numbers of its configuration.
//!
//! Reference: `transformers/models/granite/modeling_granite.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, Silent, Sizes};
use super::keys::Keys;
use super::rope_keys::RopeSource;
use crate::nn::HeadForm;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Granite>("granite");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: false };

/// The family.
#[derive(Debug)]
pub enum Granite {}

impl DecoderFamily for Granite {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let mlp = GatedDesign { bias: keys.flag_or("mlp_bias", false)?, ..mlp };
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let bias = keys.flag_or("attention_bias", false)?;
        let scale = Some(keys.positive_or("attention_multiplier", 1.0)?);
        let attention = AttentionDesign { bias, output_bias: bias, scale, ..sizes.attention() };
        let residual_scale = keys.positive_or("residual_multiplier", 1.0)?;
        let layer = LayerDesign { residual_scale, ..LayerDesign::new(attention, Rc::new(mlp)) };
        Ok(Design {
            embedding_scale: keys.positive_or("embedding_multiplier", 1.0)?,
            head: HeadForm { scale: keys.positive_or("logits_scaling", 1.0)?.recip(), ..HeadForm::PLAIN },
            ..Design::new(sizes, &layer, rope)
        })
    }
}
