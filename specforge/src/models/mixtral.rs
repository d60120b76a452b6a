//! Mixtral: Mistral whose MLPs are experts.
//!
//! Reference: `transformers/models/mixtral/modeling_mixtral.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{
    self, DecoderFamily, Design, ExpertCounts, ExpertsDesign, GatedDesign, LayerDesign, Silent, Sizes, windows,
};
use super::keys::Keys;
use super::rope_keys::RopeSource;
use crate::nn::Scoring;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Mixtral>("mixtral");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-5, tied: false };

/// The family.
#[derive(Debug)]
pub enum Mixtral {}

impl DecoderFamily for Mixtral {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let expert = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let counts = ExpertCounts {
            all: keys.whole_or("num_local_experts", 8)?,
            chosen: keys.whole_or("num_experts_per_tok", 2)?,
        };
        let experts = ExpertsDesign {
            router: "block_sparse_moe.gate".to_owned(),
            prefix: "block_sparse_moe.experts".to_owned(),
            expert: GatedDesign { names: ["w1", "w3", "w2"], ..expert },
            counts: counts.check("num_local_experts", sizes.layers)?,
            scoring: Scoring::OfChosen,
            shared: None,
        };
        let rope = RopeSource::read(keys, 1_000_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let window = windows::width(keys, None, false)?;
        let windows = windows::read(keys, sizes.layers, window, |_| true)?;
        let layer = LayerDesign::new(sizes.attention(), Rc::new(experts));
        Ok(Design::new(sizes, &layer, rope).with_windows(&windows))
    }
}
