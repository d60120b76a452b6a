//! Keys of the head.

use serde_json::{Map, Value};

use super::super::head::{Domino, Head, Lilicorr, Markov, MarkovKind, Selector, Xpress};
use super::super::keys::Keys;
use super::super::method::{Layout, Method};
use super::Shapes;
use crate::export::eagle3::config::named;
use crate::models::limits;

/// The head.
pub(super) fn head(
    (layout, method): (Layout, Method),
    values: &Value,
    keys: &Keys,
    shapes: &Shapes,
    notes: &mut Vec<String>,
) -> Result<Head, String> {
    let need = |key: &str, value: Option<i64>| {
        value.ok_or_else(|| format!("`{key}`: expected a number, got nothing: the head is built by it"))
    };
    Ok(match method {
        Method::Dflash => Head::Plain,
        Method::Dflash2 => Head::Selector(Selector {
            selector_rank: need("selector_rank", keys.selector_rank)?,
            selector_top_k: need("selector_top_k", keys.selector_top_k)?,
            input_embedding_scale: keys.input_embedding_scale.unwrap_or(1.0),
            output_multiplier: keys.output_multiplier.unwrap_or(1.0),
            final_logit_softcapping: keys.final_logit_softcapping.filter(|cap| *cap > 0.0),
        }),
        Method::Dspark => Head::Markov(markov(layout, keys, shapes, notes)?),
        Method::Lilicorr => {
            for key in Lilicorr::KEYS {
                if values.get(key).is_none() {
                    return Err(format!("`dflash_config.{key}`: expected a number, got nothing: no tensor shows it"));
                }
            }
            let values = values.as_object().cloned().unwrap_or_default();
            let keys: Map<String, Value> =
                values.into_iter().filter(|(key, _)| Lilicorr::KEYS.contains(&key.as_str())).collect();
            Head::Lilicorr(named(&Value::Object(keys), "dflash_config.")?)
        }
        Method::Xpress => {
            let xpress_rank = need("xpress_rank", keys.xpress_rank)?;
            let passes = match layout {
                Layout::Zlab => keys.xpress_num_passes,
                Layout::Speculators => keys.num_jacobi_passes.or(keys.xpress_num_passes),
            };
            let ratio = match (keys.xpress_mlp_hidden, keys.xpress_mlp_ratio) {
                (Some(hidden), _) if xpress_rank < 1 || hidden % xpress_rank != 0 => {
                    return Err(format!(
                        "`xpress_mlp_hidden`: expected a multiple of `xpress_rank` {xpress_rank}, got {hidden}"
                    ));
                }
                (Some(hidden), Some(ratio)) if hidden / xpress_rank != ratio => {
                    return Err(format!("`xpress_mlp_ratio`: {ratio}, but `xpress_mlp_hidden` is {hidden}"));
                }
                (Some(hidden), _) => hidden / xpress_rank,
                (None, ratio) => need("xpress_mlp_hidden", ratio)?,
            };
            let default = Xpress::default();
            Head::Xpress(Xpress {
                xpress_rank,
                xpress_mlp_ratio: ratio,
                xpress_num_passes: passes.unwrap_or(default.xpress_num_passes),
                xpress_topc: keys.xpress_topc.unwrap_or(default.xpress_topc).min(whole(values)),
            })
        }
        Method::Domino => Head::Domino(Domino {
            gru_hidden_dim: need("gru_hidden_dim", keys.gru_hidden_dim)?,
            emb_dim: need("emb_dim", keys.emb_dim)?,
            pure_draft_prefix_len: need("pure_draft_prefix_len", keys.pure_draft_prefix_len)?,
        }),
    })
}

/// `V`, for a default that may be larger.
fn whole(values: &Value) -> i64 {
    values.get("vocab_size").and_then(Value::as_i64).unwrap_or(limits::MOST_TOKENS)
}

/// Markov and confidence heads. What keys leave out, the tensors say.
fn markov(layout: Layout, keys: &Keys, shapes: &Shapes, notes: &mut Vec<String>) -> Result<Markov, String> {
    let Some(markov_rank) = keys.markov_rank else {
        return Err("`markov_rank`: expected a number, got nothing: the head is built by it".to_owned());
    };
    let kind = keys.markov_head_type.unwrap_or_else(|| {
        notes.push("`markov_head_type` is missing: vanilla is taken".to_owned());
        Default::default()
    });
    let weight = shapes.get("confidence_head.proj.weight").and_then(|shape| shape.last()).copied();
    let said = keys.enable_confidence_head.or(keys.use_confidence_head);
    if said == Some(false) && weight.is_some() {
        notes.push("`enable_confidence_head` is false, but the file has the head: it is read".to_owned());
    }
    let confidence_head = weight.is_some() || said == Some(true);
    if markov_rank == 0 && !(confidence_head && kind == MarkovKind::Vanilla) {
        return Err("`markov_rank`: expected at least 1, got 0: without a confidence head that is DFlash".to_owned());
    }
    let width = |with: bool| if with { markov_rank } else { 0 };
    // The rows' width is told by the tensors that are there in any case.
    let hidden = shapes.get("norm.weight").and_then(|shape| shape.first()).copied();
    let shown = weight.zip(hidden).and_then(|(weight, hidden)| match weight - hidden {
        0 => Some(false),
        more if more == width(true) => Some(true),
        _ => None,
    });
    let confidence_head_with_markov = keys.confidence_head_with_markov.or(shown).unwrap_or(true);
    // speculators trains its recurrent heads so, where the anchor's row drafts nothing.
    let anchor_row_writes_state =
        layout == Layout::Speculators && kind == MarkovKind::Rnn && keys.sample_from_anchor == Some(false);
    Ok(Markov {
        markov_rank,
        markov_head_type: kind,
        confidence_head,
        confidence_head_with_markov,
        anchor_row_writes_state,
    })
}
