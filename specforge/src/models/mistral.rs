//! Mistral: a Llama whose layers all see through one window, where the configuration has one.
//!
//! Reference: `transformers/models/mistral/modeling_mistral.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{self, DecoderFamily, Design, GatedDesign, LayerDesign, Silent, Sizes, windows};
use super::keys::Keys;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Mistral>("mistral");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: false };

/// The family.
#[derive(Debug)]
pub enum Mistral {}

impl DecoderFamily for Mistral {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let window = windows::width(keys, Some(4096), false)?;
        let windows = windows::read(keys, sizes.layers, window, |_| true)?;
        let layer = LayerDesign::new(sizes.attention(), Rc::new(mlp));
        Ok(Design::new(sizes, &layer, rope).with_windows(&windows))
    }
}
