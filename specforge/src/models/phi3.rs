//! Phi-3 and Phi-4: a Llama whose projections are joined, of whose heads a part may turn, with LongRoPE for long texts.
//!
//! Reference: `transformers/models/phi3/modeling_phi3.py` (Hugging Face transformers 5.8.1). It chooses between the two
//! sets of LongRoPE factors by the longest row of a batch; here each text chooses for itself, so that a batch equals its
//! rows alone.

use std::rc::Rc;

use serde_json::Value;

use super::Family;
use super::decoder::{self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, Silent, Sizes, windows};
use super::keys::Keys;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Phi3>("phi3");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-5, tied: false };

/// The family.
#[derive(Debug)]
pub enum Phi3 {}

impl DecoderFamily for Phi3 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        for (key, allowed) in [
            ("attention_bias", Value::Bool(false)),
            ("mlp_bias", Value::Bool(false)),
            ("lm_head_bias", Value::Bool(false)),
            ("full_attn_mod", 1.into()),
            ("interpolate_factor", 1.into()),
        ] {
            keys.only(key, &allowed)?;
        }
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let mlp = GatedDesign { names: ["gate_up_proj", "", "down_proj"], joined: true, ..mlp };
        let source = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?;
        let source = RopeSource {
            share: keys.positive_or("partial_rotary_factor", 1.0)?,
            turns_parts: true,
            long_by_other_names: true,
            ..source
        };
        let rope = source.design()?;
        let window = windows::width(keys, None, false)?;
        let windows = windows::read(keys, sizes.layers, window, |_| true)?;
        let attention = AttentionDesign { joined: true, ..sizes.attention() };
        let layer = LayerDesign::new(attention, Rc::new(mlp));
        Ok(Design::new(sizes, &layer, rope).with_windows(&windows))
    }
}
