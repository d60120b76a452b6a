//! OLMo 3: OLMo 2 with windows on three of four layers, of which those without a window alone stretch their positions.
//!
//! Reference: `transformers/models/olmo3/modeling_olmo3.py` (Hugging Face transformers). Versions 4.57 and 5.24 give the layers
//! with windows frequencies of their own; 5.8.1 stretches those too, see `docs/decisions.md`.

use super::Family;
use super::decoder::{self, DecoderFamily, Design, Sizes, windows};
use super::keys::Keys;
use super::olmo2::{SILENT, THETA, turned_by};
use super::rope_keys::{RopeSource, by_kind};

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Olmo3>("olmo3");

/// The family.
#[derive(Debug)]
pub enum Olmo3 {}

impl DecoderFamily for Olmo3 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let [full, local] = match by_kind(keys)? {
            Some(variants) => {
                let theta = keys.positive_or("rope_theta", THETA)?;
                let of = |variant| {
                    RopeSource::of(keys, variant, theta, [sizes.head_dim, sizes.max_position_embeddings]).design()
                };
                [of(variants[0])?, of(variants[1])?]
            }
            None => {
                let source = RopeSource::read(keys, THETA, sizes.head_dim, sizes.max_position_embeddings)?;
                let full = source.design()?;
                let local = full.unscaled();
                [full, local]
            }
        };
        let window = windows::width(keys, Some(4096), false)?;
        let windows = windows::read(keys, sizes.layers, window, |layer| (layer + 1) % 4 != 0)?;
        let mut design = turned_by(keys, sizes, full)?.with_windows(&windows);
        design.ropes.push(local);
        for layer in &mut design.layers {
            layer.rope = Some(usize::from(layer.window.is_some()));
        }
        Ok(design)
    }
}
