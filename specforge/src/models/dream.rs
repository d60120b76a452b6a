//! Dream: a Qwen2 without the causal mask, which fills masked tokens in; each row says what stands one position behind it.
//!
//! Reference: `dream/model/generation_utils.py` of NVlabs/Fast-dLLM, commit 24cc59e75f20a6384bae8c905965bb090b96388e.

use super::decoder::{self, DecoderFamily, Design};
use super::keys::Keys;
use super::qwen2::Qwen2;
use super::{Family, MaskedDiffusion};

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<Dream>("Dream");

/// The family.
#[derive(Debug)]
pub enum Dream {}

impl DecoderFamily for Dream {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let mask = keys.whole("mask_token_id")?;
        keys.only("use_mrope", &false.into())?;
        keys.only("use_sliding_window", &false.into())?;
        let design = Qwen2::design(keys)?;
        match design.layers.iter().all(|layer| layer.window.is_none()) {
            true => Ok(Design { diffusion: Some(MaskedDiffusion { mask, shift: true }), ..design }),
            false => {
                Err("`layer_types`: a masked diffusion model has no windows, which end where a token stands".to_owned())
            }
        }
    }
}
