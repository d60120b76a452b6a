//! Gemma 3: Gemma 2 with norms over heads instead of capped scores, mostly layers with windows, and two rotary embeddings:
//! layers with a window have one of their own.
//!
//! Reference: `transformers/models/gemma3/modeling_gemma3.py` (Hugging Face transformers 5.8.1), the text model.

use std::rc::Rc;

use serde_json::{Value, json};

use super::Family;
use super::decoder::{
    self, AttentionDesign, DecoderFamily, Design, GatedDesign, HeadNormDesign, LayerDesign, NormNames, Sizes, windows,
};
use super::gemma::{ACTIVATION, SILENT, attention, with_embedding};
use super::gemma2::{scale, softcap};
use super::keys::Keys;
use super::limits;
use super::rope_keys::{RopeDesign, RopeSource, by_kind, variant};
use crate::nn::HeadForm;

/// Row of the table of families.
pub const FAMILY: Family = Family { text_defaults: Some(text_defaults), ..decoder::family::<Gemma3>("gemma3_text") };

/// Bases of layers without and with a window.
const THETAS: [f64; 2] = [1_000_000.0, 10_000.0];
/// One of so many layers has no window.
const PATTERN: i64 = 6;

/// The family.
#[derive(Debug)]
pub enum Gemma3 {}

impl DecoderFamily for Gemma3 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        keys.know(["hidden_act"]);
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_activation", ACTIVATION)?;
        let window = windows::width(keys, Some(4096), false)?;
        let pattern = keys.whole_or("sliding_window_pattern", PATTERN)?.max(1);
        let windows = windows::read(keys, sizes.layers, window, |layer| (limits::signed(layer) + 1) % pattern != 0)?;
        keys.only("attn_logit_softcapping", &Value::Null)?;
        let attention =
            AttentionDesign { scale: Some(scale(keys)?), norms: HeadNormDesign::EachHead, ..attention(keys, &sizes)? };
        let layer = LayerDesign { norms: NormNames::AROUND, ..LayerDesign::new(attention, Rc::new(mlp)) };
        let head = HeadForm { softcap: softcap(keys, "final_logit_softcapping", None)?, ..HeadForm::PLAIN };
        let [full, local] = ropes(keys, &sizes)?;
        let mut design = with_embedding(Design::new(sizes, &layer, full)).with_windows(&windows);
        design.ropes.push(local);
        for layer in &mut design.layers {
            layer.rope = Some(usize::from(layer.window.is_some()));
        }
        Ok(Design { head, ..design })
    }
}

/// Rotary embeddings of layers without and with a window. The newer spelling has a variant for each kind of layer, the older
/// one a variant and a base for those without a window, and the other's base beside them.
fn ropes(keys: &Keys<'_>, sizes: &Sizes) -> Result<[RopeDesign; 2], String> {
    let [full, local] = by_kind(keys)?.unwrap_or_else(|| [variant(keys), &Value::Null]);
    let sizes = [sizes.head_dim, sizes.max_position_embeddings];
    let full = RopeSource::of(keys, full, keys.positive_or("rope_theta", THETAS[0])?, sizes);
    let local = RopeSource::of(keys, local, keys.positive_or("rope_local_base_freq", THETAS[1])?, sizes);
    Ok([full.design()?, local.design()?])
}

/// What the text model of a folder with images leaves out.
fn text_defaults() -> Value {
    json!({
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072,
    })
}
