//! Qwen3-MoE: Qwen3 whose MLPs are experts, on all layers or on some.
//!
//! Reference: `transformers/models/qwen3_moe/modeling_qwen3_moe.py` (Hugging Face transformers 5.8.1).

use super::Family;
use super::decoder::{self, DecoderFamily, Design, Silent, Sizes, windows};
use super::keys::Keys;
use super::qwen2_moe::{Counts, experts, mlps, with_mlps};
use super::qwen3::attention;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Qwen3Moe>("qwen3_moe");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: false };

/// The family.
#[derive(Debug)]
pub enum Qwen3Moe {}

impl DecoderFamily for Qwen3Moe {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        // The reference knows no layers of their own windows here, and older files say how many there would be.
        keys.know(["max_window_layers"]);
        let window = windows::width(keys, Some(4096), true)?;
        let windows = windows::read(keys, sizes.layers, window, |_| true)?;
        // Older files call them `num_experts`.
        let all = keys.whole_or("num_experts", 128)?;
        let counts = Counts { all: keys.whole_or("num_local_experts", all)?, chosen: 8, width: 768 };
        let mlps = mlps(keys, &sizes, experts(keys, &sizes, counts)?)?;
        let attention = attention(keys, &sizes)?;
        Ok(with_mlps(sizes, attention, &mlps, rope).with_windows(&windows))
    }
}
