//! SmolLM3: a Llama some of whose layers have no positions.
//!
//! Reference: `transformers/models/smollm3/modeling_smollm3.py` (Hugging Face transformers 5.8.1).

use std::rc::Rc;

use super::Family;
use super::decoder::{self, AttentionDesign, DecoderFamily, Design, GatedDesign, LayerDesign, Silent, Sizes, windows};
use super::keys::Keys;
use super::limits;
use super::rope_keys::RopeSource;

/// Row of the table of families.
pub const FAMILY: Family = decoder::family::<SmolLm3>("smollm3");

/// What a configuration leaves out.
const SILENT: Silent = Silent { head_dim: None, epsilon: 1e-6, tied: true };

/// The family.
#[derive(Debug)]
pub enum SmolLm3 {}

impl DecoderFamily for SmolLm3 {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let sizes = Sizes::read(keys, SILENT)?;
        let mlp = GatedDesign::read(keys, sizes.hidden_size, "hidden_act", "silu")?;
        let mlp = GatedDesign { bias: keys.flag_or("mlp_bias", false)?, ..mlp };
        let rope = RopeSource::read(keys, 2_000_000.0, sizes.head_dim, sizes.max_position_embeddings)?.design()?;
        keys.know(["max_window_layers"]); // of Qwen: nothing follows from it here
        let turns = turning_layers(keys, sizes.layers)?;
        let window = windows::width(keys, None, true)?;
        let windows = windows::read(keys, sizes.layers, window, |layer| !turns[layer])?;
        let bias = keys.flag_or("attention_bias", false)?;
        let attention = AttentionDesign { bias, output_bias: bias, ..sizes.attention() };
        let layer = LayerDesign::new(attention, Rc::new(mlp));
        let mut design = Design::new(sizes, &layer, rope).with_windows(&windows);
        for (layer, turns) in design.layers.iter_mut().zip(turns) {
            layer.rope = turns.then_some(0);
        }
        Ok(design)
    }
}

/// Whether each layer's heads turn: `no_rope_layers` says 1 where they do, else all but every so many do.
fn turning_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, String> {
    let interval = keys.whole_or("no_rope_layer_interval", 4)?.max(1);
    match keys.whole_list("no_rope_layers")? {
        Some(list) if list.len() == layers => Ok(list.into_iter().map(|turns| turns != 0).collect()),
        Some(list) => {
            let got = list.len();
            Err(format!("`no_rope_layers`: expected {layers} numbers, one for each layer, got {got}"))
        }
        None => Ok((1..=limits::signed(layers)).map(|layer| layer % interval != 0).collect()),
    }
}
