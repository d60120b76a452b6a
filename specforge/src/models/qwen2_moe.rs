//! Qwen2-MoE and Qwen1.5-MoE: Qwen2 whose MLPs are experts beside one that all tokens share, on all layers or on some.
//!
//! Reference: `transformers/models/qwen2_moe/modeling_qwen2_moe.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::mlp::{activation, of_layers};
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, ExpertCounts, ExpertsDesign, GatedDesign, LayerDesign, MlpDesign,
    Silent, Sizes, windows,
};
use super::keys::Keys;
use super::limits;
use super::rope_keys::{RopeDesign, RopeSource};
use crate::nn::Scoring;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Qwen2Moe>("qwen2_moe");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: false };
/// Layers before which every other one has a window, where the configuration does not say it.
const LAST_WINDOW: i64 = 28;

/// The family.
#[derive(Debug)]
pub enum Qwen2Moe {}

impl DecoderFamily for Qwen2Moe {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let window = windows::width(keys, Some(4096), true)?;
        let last = keys.whole_or("max_window_layers", LAST_WINDOW)?;
        let windows =
            windows::read(keys, sizes.layers, window, |layer| layer % 2 == 0 && limits::signed(layer) < last)?;
        let attention = AttentionDesign { bias: keys.flag_or("qkv_bias", true)?, ..sizes.attention() };
        let width = keys.whole_or("shared_expert_intermediate_size", 5632)?;
        limits::within(&[("shared_expert_intermediate_size", width, limits::WIDEST)])?;
        let shared = GatedDesign::new(sizes.hidden_size, width, activation(keys, "hidden_act", "silu")?);
        let shared = GatedDesign { prefix: "mlp.shared_expert".to_owned(), ..shared };
        let counts = Counts { all: keys.whole_or("num_experts", 60)?, chosen: 4, width: 1408 };
        let experts = experts(keys, &sizes, counts)?;
        let experts = ExpertsDesign { shared: Some((shared, "mlp.shared_expert_gate".to_owned())), ..experts };
        let mlps = mlps(keys, &sizes, experts)?;
        Ok(with_mlps(sizes, attention, &mlps, rope).with_windows(&windows))
    }
}

/// Numbers of experts where the configuration does not say them.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// `E`, which is read already.
    pub all: i64,
    /// `k`
    pub chosen: i64,
    /// Width of one.
    pub width: i64,
}

/// The experts of a layer.
pub fn experts(keys: &Keys<'_>, sizes: &Sizes, silent: Counts) -> Result<ExpertsDesign, String> {
    let width = keys.whole_or("moe_intermediate_size", silent.width)?;
    limits::within(&[("moe_intermediate_size", width, limits::WIDEST)])?;
    let counts = ExpertCounts { all: silent.all, chosen: keys.whole_or("num_experts_per_tok", silent.chosen)? };
    Ok(ExpertsDesign {
        router: "mlp.gate".to_owned(),
        prefix: "mlp.experts".to_owned(),
        expert: GatedDesign::new(sizes.hidden_size, width, activation(keys, "hidden_act", "silu")?),
        counts: counts.check("num_experts", sizes.layers)?,
        scoring: if keys.flag_or("norm_topk_prob", false)? { Scoring::OfChosen } else { Scoring::OfAll },
        shared: None,
    })
}

/// The MLP of each layer: experts on every `decoder_sparse_step`-th but for `mlp_only_layers`, else one of
/// `intermediate_size`.
pub fn mlps(keys: &Keys<'_>, sizes: &Sizes, experts: ExpertsDesign) -> Result<Vec<Rc<dyn MlpDesign>>, String> {
    let dense = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
    let step = keys.whole_or("decoder_sparse_step", 1)?;
    let plain = keys.whole_list("mlp_only_layers")?.unwrap_or_default();
    Ok(of_layers(sizes.layers, (step, &plain), Rc::new(dense), Rc::new(experts)))
}

/// A model of layers that differ in their MLPs.
pub fn with_mlps(sizes: Sizes, attention: AttentionDesign, mlps: &[Rc<dyn MlpDesign>], rope: RopeDesign) -> Design {
    let mut design = Design::new(sizes, &LayerDesign::new(attention, Rc::clone(&mlps[0])), rope);
    for (layer, mlp) in design.layers.iter_mut().zip(mlps) {
        layer.mlp = Rc::clone(mlp);
    }
    design.draft_width = mlps.iter().map(|mlp| mlp.a_token()).max().unwrap_or(design.draft_width);
    design
}
