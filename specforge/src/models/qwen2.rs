//! Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, whose later layers may see through a window.
//!
//! Reference: `transformers/models/qwen2/modeling_qwen2.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, Silent, Sizes, windows};
use super::keys::Keys;
use super::limits;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Qwen2>("qwen2");
/// The text model of Qwen2.5-VL: positions of text along its three axes are one position.
pub const VISION_FAMILY: Family = decoder::family::<Qwen2>("qwen2_5_vl_text");
/// The same where its keys stand at the top.
pub const FLAT_VISION_FAMILY: Family = decoder::family::<Qwen2>("qwen2_5_vl");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: false };
/// Keys of what sees images.
const VISION_KEYS: [&str; 6] = [
    "vision_config",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "image_token_id",
    "video_token_id",
];
/// First layer with a window, where the configuration does not say it.
const FIRST_WINDOW: i64 = 28;

/// The family.
#[derive(Debug)]
pub enum Qwen2 {}

impl DecoderFamily for Qwen2 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        keys.know(VISION_KEYS);
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let windows = later_windows(keys, sizes.layers)?;
        let attention = AttentionDesign { bias: true, ..sizes.attention() };
        let layer = LayerDesign::new(attention, Rc::new(mlp));
        Ok(Design::new(sizes, &layer, rope).with_windows(&windows))
    }
}

/// Windows from layer `max_window_layers` on, where `use_sliding_window` says so.
pub fn later_windows(keys: &Keys<'_>, layers: usize) -> Result<Vec<Option<i64>>, String> {
    let window = windows::width(keys, Some(4096), true)?;
    let first = keys.whole_or("max_window_layers", FIRST_WINDOW)?;
    windows::read(keys, layers, window, |layer| limits::signed(layer) >= first)
}
