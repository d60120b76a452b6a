//! llama.cpp b11434, after its converter: DFlash, DFlash2 and DSpark.

use super::{Lines, shared, types_or_full};
use crate::draft::block::config::{LayerType, Layout as Rows};
use crate::export::block::Method;
use crate::export::block::head::{Head, MarkovKind};
use crate::export::block::read::Folder;

pub(super) fn look(folder: &Folder, lines: &mut Lines) {
    let (parsed, shape, keys) = (&folder.parsed, &folder.parsed.shape, &folder.parsed.keys);
    match parsed.method {
        Method::Lilicorr => return lines.fails("has no LiLiCorr"),
        Method::Xpress => return lines.fails("has no XPress"),
        Method::Domino => return lines.fails("has no Domino: its converter knows no names of the head's tensors"),
        Method::Dflash | Method::Dflash2 if !folder.is_zlab() => {
            return lines.fails("converts the speculators format of DSpark only");
        }
        _ => {}
    }
    lines.says(
        "after convert_hf_to_gguf.py with --target-model-dir, with -md and --spec-type draft-dflash or draft-dspark",
    );
    shared(folder, None, lines);
    // The graph has one flag for all layers, off where the file has none.
    let nested = keys.causal.filter(|_| folder.is_zlab());
    let causal = keys.is_causal.or(nested).unwrap_or(false);
    let why = "one flag for all layers, of `is_causal`, else off";
    lines.causality(&vec![causal; shape.layers.len()], shape, why);
    let on = keys.use_sliding_window == Some(true) || keys.use_swa == Some(true);
    let window = keys.swa_window_size.or(keys.sliding_window).filter(|_| on);
    let forced = keys.use_swa == Some(true);
    let sliding = |kind: &LayerType| forced || *kind == LayerType::SlidingAttention;
    let windows: Vec<Option<i64>> = types_or_full(folder).iter().map(|kind| window.filter(|_| sliding(kind))).collect();
    lines.windows(&windows, shape, "`use_swa`, or `layer_types` where `use_sliding_window` is on");
    if parsed.method != Method::Dspark && parsed.places.only_at_top("mask_token_id") {
        lines.fails("looks for `mask_token_id` in `dflash_config`, not at the top of config.json");
    }
    if shape.mask_embedding && folder.mask_token.is_none() {
        lines.fails("takes a mask_embedding.pt only as a table with `mask_token_id` and `embedding`");
    }
    if shape.draft_vocab_size < shape.vocab_size && parsed.method != Method::Dspark {
        lines.fails("converts a smaller vocabulary of DSpark only");
    }
    match folder.head() {
        Head::Plain if shape.conv.is_some() => lines.fails("takes convolutions for DFlash2's and misses the selector"),
        Head::Selector(_) if shape.conv.is_none() => lines.fails("needs convolutions for DFlash2"),
        Head::Selector(selector) => {
            let lattice = selector.selector_top_k * (selector.selector_top_k + 1);
            if shape.hidden_size < lattice {
                let (hidden, count) = (shape.hidden_size, selector.selector_top_k);
                lines.fails(format!(
                    "has no room for {count} candidates in hidden states of {hidden} numbers: {lattice} are needed"
                ));
            }
        }
        Head::Markov(markov) => {
            if markov.markov_head_type != MarkovKind::Vanilla {
                lines.fails("has the vanilla Markov head only");
            }
            if shape.conv.is_some() {
                lines.fails("has no DSpark with convolutions");
            }
            if folder.is_zlab() && shape.layout == Rows::FillIn {
                let (rows, drafts) = (shape.slots(), shape.slots() - 1);
                lines.says(format!(
                    "takes `block_size` for {rows} rows, the anchor's included, and drafts at most {drafts}"
                ));
            }
        }
        _ => {}
    }
}
