//! Gemma 2: Gemma with norms on both sides of each block, a window on every other layer, and soft caps of scores and logits.
//!
//! Reference: `transformers/models/gemma2/modeling_gemma2.py` (Hugging Face transformers 5.8.1) with its own attention: the
//! one by PyTorch's kernel leaves out the cap of the scores.

use std::rc::Rc;

use super::Family;
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, NormNames, Sizes, windows,
};
use super::gemma::{ACTIVATION, SILENT, attention, with_embedding};
use super::keys::{Keys, positive};
use super::rope_keys::RopeSource;
use crate::nn::HeadForm;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Gemma2>("gemma2");

/// The family.
#[derive(Debug)]
pub enum Gemma2 {}

impl DecoderFamily for Gemma2 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        keys.know(["hidden_act"]);
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_activation", ACTIVATION)?;
        let rope = RopeSource::read(keys, 10_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        let window = windows::width(keys, Some(4096), false)?;
        let windows = windows::read(keys, sizes.layers, window, |layer| layer % 2 == 0)?;
        let attention = AttentionDesign {
            scale: Some(scale(keys)?),
            softcap: softcap(keys, "attn_logit_softcapping", Some(50.0))?,
            ..attention(keys, &sizes)?
        };
        let layer = LayerDesign { norms: NormNames::AROUND, ..LayerDesign::new(attention, Rc::new(mlp)) };
        let head = HeadForm { softcap: softcap(keys, "final_logit_softcapping", Some(30.0))?, ..HeadForm::PLAIN };
        let design = with_embedding(Design::new(sizes, &layer, rope)).with_windows(&windows);
        Ok(Design { head, ..design })
    }
}

/// What scores are multiplied with.
pub fn scale(keys: &Keys<'_>) -> Result<f64, String> {
    Ok(keys.positive_or("query_pre_attn_scalar", 256.0)?.powf(-0.5))
}

/// A soft cap; none where the key is `null`.
pub fn softcap(keys: &Keys<'_>, key: &str, silent: Option<f64>) -> Result<Option<f64>, String> {
    keys.maybe_number(key, silent)?.map(|cap| positive(key, cap)).transpose()
}
