//! SGLang 0.5.23.

use super::{Lines, layer_types, shared, types_or_full};
use crate::draft::block::config::{LayerType, Layout as Rows};
use crate::export::block::head::Head;
use crate::export::block::read::Folder;
use crate::export::block::tensors::Spelling;
use crate::export::block::{Method, ZLAB};
use crate::export::eagle3::config::Target;

pub(super) fn look(folder: &Folder, target: Option<&Target>, lines: &mut Lines) {
    let (parsed, shape, keys) = (&folder.parsed, &folder.parsed.shape, &folder.parsed.keys);
    if !folder.is_zlab() {
        return lines.fails(format!("does not read the speculators format; write --format {}", ZLAB.name));
    }
    if parsed.method == Method::Xpress {
        return lines.fails("has no XPress");
    }
    match parsed.method {
        Method::Dspark => lines.says(format!(
            "--speculative-algorithm DSPARK, --speculative-num-draft-tokens {}, the drafts and one",
            shape.slots() + 1
        )),
        _ => lines.says(format!(
            "--speculative-algorithm DFLASH, --speculative-num-draft-tokens {}, the rows of a block",
            shape.block_size
        )),
    }
    lines.says(
        "drops tensors that it does not know in silence, LiLiCorr's and Domino's heads apart: none is in the file",
    );
    shared(folder, target, lines);
    lines.says(format!("captures what layers {:?} give", shape.target_layer_ids));
    // Neither `causal` nor `use_swa` of `dflash_config` is read.
    let types = types_or_full(folder);
    let sliding = |kind: &LayerType| *kind == LayerType::SlidingAttention && layer_types(folder).is_some();
    let causal: Vec<bool> =
        types.iter().map(|kind| keys.is_causal.unwrap_or(sliding(kind)) && layer_types(folder).is_some()).collect();
    lines.causality(&causal, shape, if keys.is_causal.is_some() { "`is_causal`" } else { "by the type of each layer" });
    let window = keys.sliding_window.filter(|_| keys.use_sliding_window == Some(true));
    let windows: Vec<Option<i64>> = types.iter().map(|kind| window.filter(|_| sliding(kind))).collect();
    lines.windows(&windows, shape, "`layer_types`, and `sliding_window` where `use_sliding_window` is on");
    if shape.draft_vocab_size < shape.vocab_size {
        lines.fails("has no smaller vocabulary for block drafters: it drops `d2t` in silence");
    }
    if shape.input_embedding_scale != 1.0 {
        lines.fails("does not read `input_embedding_scale`");
    }
    if folder.spellings.contains(&Spelling::Codebook) {
        lines.fails("drops codebooks with `.weight` behind their names in silence, and selects by random numbers");
    }
    if shape.target_layer_ids.contains(&-1) {
        lines.fails("refuses -1, the target's embedding, in `target_layer_ids`");
    }
    if shape.mask_embedding && folder.mask_token.is_none() {
        lines.fails("takes a mask_embedding.pt only as a table with `mask_token_id` and `embedding`");
    }
    rows(folder, lines);
    head(folder, lines);
}

/// Which token a row predicts.
fn rows(folder: &Folder, lines: &mut Lines) {
    let (parsed, keys) = (&folder.parsed, &folder.parsed.keys);
    let trained = parsed.shape.layout;
    match parsed.method {
        Method::Dspark => {
            let said = keys.sample_from_anchor.filter(|_| !parsed.places.only_in_section("sample_from_anchor"));
            let shifts = said.unwrap_or(true);
            if shifts != (trained == Rows::Shift) {
                lines.fails(format!("takes `sample_from_anchor` for {shifts}: write it at the top of config.json"));
            }
        }
        Method::Domino => {}
        _ if trained == Rows::Shift => {
            lines.fails("takes row j for the token in its place, whatever `sample_from_anchor` says")
        }
        _ => {}
    }
}

fn head(folder: &Folder, lines: &mut Lines) {
    let (shape, keys) = (&folder.parsed.shape, &folder.parsed.keys);
    match folder.head() {
        Head::Plain | Head::Selector(_) | Head::Xpress(_) => {}
        Head::Markov(markov) => {
            if keys.markov_head_type.is_none() {
                lines.fails("needs `markov_head_type`");
            }
            if folder.spellings.contains(&Spelling::Prefixed) && markov.confidence_head {
                lines.fails("misses a confidence head whose names begin with `model.`");
            }
            if !markov.confidence_head {
                lines.says("asks for a confidence head unless the lengths of its verifications are static");
            }
            let with_markov = keys.confidence_head_with_markov.unwrap_or(true);
            if markov.confidence_head && with_markov != markov.confidence_head_with_markov {
                lines.fails(format!(
                    "takes `confidence_head_with_markov` for {with_markov}; the tensor has another width"
                ));
            }
            if shape.mask_embedding {
                lines.fails("reads no mask_embedding.pt with DSpark: the mask is a row of the target's embedding");
            }
        }
        Head::Lilicorr(_) => lines.says("no data-parallel attention beside LiLiCorr; candidates are chosen greedily"),
        Head::Domino(_) => {
            lines.says("needs CUDA, target and head in bfloat16");
            lines.says(format!("{} proposals a block, the first without a correction", shape.block_size - 1));
        }
    }
}
