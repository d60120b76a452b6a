//! What a config.json says of a drafter.
//!
//! | key | means |
//! |---|---|
//! | `target_layer_ids` | layer `k`: what the target's layer `k` gives |
//! | `aux_hidden_state_layer_ids` (speculators), `eagle_aux_hidden_state_layer_ids` (vLLM) | one more |
//! | `block_size` | rows of a block; of DSpark in z-lab's layout, tokens that are drafted |
//! | `is_causal`, then `dflash_config.causal` | rows of a block see only those before them, in all layers |
//! | neither | in sliding layers they do, in full ones not |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::head::Head;
use super::keys::{Keys, Places, merged};
use super::method::{Layout, Method};
use crate::draft::block::config::BlockShape;
use crate::error::{Error, Result};
use crate::export::eagle3::config::{named, one_rope};
use crate::models::{limits, plain_model};
use crate::weights::quantised;

mod block;
mod heads;

/// Qwen3's size of a head where none is given.
const HEAD_DIM: i64 = 128;
/// Largest block.
const MOST_ROWS: i64 = 256;

/// A config.json and what it says.
pub(super) struct Parsed {
    pub(super) layout: Layout,
    pub(super) method: Method,
    pub(super) shape: BlockShape,
    pub(super) head: Head,
    pub(super) keys: Keys,
    /// Where keys stand.
    pub(super) places: Places,
    pub(super) target: Option<PathBuf>,
    /// The length that engines make their rotary tables for.
    pub(super) max_position_embeddings: i64,
    pub(super) notes: Vec<String>,
}

/// What this program writes for itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnKeys {
    num_target_layers: Option<usize>,
    max_position_embeddings: Option<i64>,
}

/// Shapes of the tensors beside a config.json, by the names that engines load: what keys leave out, they tell.
pub(super) type Shapes = BTreeMap<String, Vec<i64>>;

/// Reads a config.json. `num_target_layers` is that of the target, where it is known.
pub(super) fn parse(
    path: &Path,
    (layout, method): (Layout, Method),
    config: &Value,
    shapes: &Shapes,
    num_target_layers: Option<usize>,
) -> Result<Parsed> {
    parsed((layout, method), config, shapes, num_target_layers).map_err(|problem| {
        let error = Error::bad_file(path, problem.clone());
        match quantised::configured(config) == Some(problem) {
            true => error.with_hint(quantised::HINT),
            false => error,
        }
    })
}

fn parsed(
    (layout, method): (Layout, Method),
    config: &Value,
    shapes: &Shapes,
    num_target_layers: Option<usize>,
) -> Result<Parsed, String> {
    if let Some(problem) = quantised::configured(config) {
        return Err(problem);
    }
    let all = merged(config, layout)?;
    let mut notes: Vec<String> =
        all.strange.iter().map(|key| format!("config.json: `{key}` is not known here and was not read")).collect();
    let values = Value::Object(all.values);
    let keys: Keys = named(&values, "")?;
    let own: OwnKeys = match config.get("specforge") {
        Some(own) => named(own, "specforge.")?,
        None => OwnKeys::default(),
    };
    let (sizes, rope_notes) = sizes(&values)?;
    notes.extend(rope_notes);
    unsupported(&keys, sizes.hidden_size)?;
    if let Some(kind) = keys.model_type.as_deref().filter(|kind| *kind != "qwen3") {
        notes.push(format!("`model_type` is {kind}: the layers are read as Qwen3's, as engines build them"));
    }
    let said = keys.num_target_layers.or(own.num_target_layers);
    if let (Some(said), Some(known)) = (said, num_target_layers)
        && said != known
    {
        return Err(format!("`num_target_layers`: made for a target of {said} layers, this one has {known}"));
    }
    let known_layers = said.or(num_target_layers);
    let layout_of_rows = block::rows(method, &keys)?;
    let block_size = block::block_size((layout, method), &keys, layout_of_rows)?;
    let target_layer_ids = block::layer_ids(&keys, known_layers, sizes.num_layers, &mut notes)?;
    let layers = block::layers((layout, method), &keys, sizes.num_layers, &mut notes)?;
    let mask_token_id = match keys.mask_token_id.or(keys.dspark_noise_token_id) {
        Some(id) if (0..sizes.vocab_size).contains(&id) => id,
        Some(id) => {
            let most = sizes.vocab_size;
            return Err(format!("`mask_token_id`: expected a token below `vocab_size`, which is {most}, got {id}"));
        }
        None => return Err("`mask_token_id`: expected a token id, got nothing; SGLang would add a token".to_owned()),
    };
    if let Some(token) = &keys.mask_token {
        notes.push(format!("`mask_token` is {token:?}: `mask_token_id`, {mask_token_id}, is what counts"));
    }
    let draft_vocab_size = keys.draft_vocab_size.unwrap_or(sizes.vocab_size);
    if !(1..=sizes.vocab_size).contains(&draft_vocab_size) {
        let most = sizes.vocab_size;
        return Err(format!("`draft_vocab_size`: expected 1 to `vocab_size`, which is {most}, got {draft_vocab_size}"));
    }
    if draft_vocab_size < sizes.vocab_size && !matches!(method, Method::Dflash | Method::Dspark) {
        let (most, name) = (sizes.vocab_size, method.name());
        return Err(format!("`draft_vocab_size`: {name} names all {most} tokens, got {draft_vocab_size}"));
    }
    let mut layer = sizes.layer;
    layer.rope.max_position_embeddings = own.max_position_embeddings.unwrap_or(layer.rope.max_position_embeddings);
    let shape = BlockShape {
        hidden_size: sizes.hidden_size,
        num_target_layers: known_layers.unwrap_or(0),
        vocab_size: sizes.vocab_size,
        draft_vocab_size,
        block_size,
        layout: layout_of_rows,
        target_layer_ids,
        mask_token_id,
        layers,
        layer,
        conv: block::convolution(&keys, sizes.hidden_size)?,
        mask_embedding: false,
        input_embedding_scale: keys.input_embedding_scale.unwrap_or(1.0),
    };
    if !(shape.input_embedding_scale.is_finite() && shape.input_embedding_scale != 0.0) {
        return Err(format!("`input_embedding_scale`: expected a number, got {}", shape.input_embedding_scale));
    }
    sound(&shape)?;
    let head = heads::head((layout, method), &values, &keys, shapes, &mut notes)?;
    head.check(&shape)?;
    let target = match layout {
        Layout::Zlab => config.get("base_model_name_or_path"),
        Layout::Speculators => config.pointer("/speculators_config/verifier/name_or_path"),
    };
    let target = target.and_then(Value::as_str).filter(|name| !name.is_empty()).map(PathBuf::from);
    if layout == Layout::Speculators {
        proposed(config, &shape, &mut notes);
    }
    let max_position_embeddings = sizes.max_position_embeddings;
    let places = all.places;
    Ok(Parsed { layout, method, shape, head, keys, places, target, max_position_embeddings, notes })
}

/// Refuses sizes that no backbone has. Which of the target's layers are read is looked at elsewhere: a folder may leave their
/// number open, and what its trainer made of the last one is its own business.
fn sound(shape: &BlockShape) -> Result<(), String> {
    let (layers, ids) = (limits::MOST_LAYERS as usize, vec![0]);
    BlockShape { num_target_layers: layers, target_layer_ids: ids, ..shape.clone() }.check()
}

/// The sizes of any Qwen3.
fn sizes(values: &Value) -> Result<(crate::models::PlainModel, Vec<String>), String> {
    const KEYS_OF_ROPE: [&str; 18] = [
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "attn_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "mrope_section",
        "mrope_interleaved",
        "finetuned",
    ];
    let mut values = values.clone();
    if let Some(values) = values.as_object_mut()
        && !values.contains_key("head_dim")
    {
        values.insert("head_dim".to_owned(), HEAD_DIM.into());
    }
    let places = ["/rope_theta", "/rope_parameters/rope_theta", "/rope_scaling/rope_theta"];
    if !places.iter().any(|place| values.pointer(place).is_some_and(|value| !value.is_null())) {
        let problem = "`rope_theta`: expected a number, got nothing: transformers takes 10000 there, vLLM 1000000";
        return Err(problem.to_owned());
    }
    one_rope(&values)?;
    let mut notes = Vec::new();
    for section in ["rope_parameters", "rope_scaling"] {
        let keys = values.get(section).and_then(Value::as_object).into_iter().flatten();
        for (key, _) in keys.filter(|(key, _)| !KEYS_OF_ROPE.contains(&key.as_str())) {
            notes.push(format!("config.json: `{section}.{key}` is not known here and was not read"));
        }
    }
    Ok((plain_model(&values)?, notes))
}

/// Refuses what a draft of this program cannot be.
fn unsupported(keys: &Keys, hidden_size: i64) -> Result<(), String> {
    let off = [
        ("attention_bias", keys.attention_bias),
        ("mlp_bias", keys.mlp_bias),
        ("attention_sink_bias", keys.attention_sink_bias),
        ("add_swa_attention_sink_bias", keys.add_swa_attention_sink_bias),
        ("use_gemma_norm", keys.use_gemma_norm),
    ];
    let on = [
        ("is_neox_style", keys.is_neox_style),
        ("rope_is_neox_style", keys.rope_is_neox_style),
        ("use_aux_hidden_state", keys.use_aux_hidden_state),
        ("lilicorr_enabled", keys.lilicorr_enabled),
    ];
    let one = [
        ("partial_rotary_factor", keys.partial_rotary_factor),
        ("logit_scale", keys.logit_scale),
        ("attention_value_scale", keys.attention_value_scale),
    ];
    if let Some((key, _)) = off.iter().find(|(_, value)| *value == Some(true)) {
        return Err(format!("`{key}`: expected false, drafts with it are not supported"));
    }
    if let Some((key, _)) = on.iter().find(|(_, value)| *value == Some(false)) {
        return Err(format!("`{key}`: expected true, drafts without it are not supported"));
    }
    if let Some((key, Some(got))) = one.iter().find(|(_, value)| value.is_some_and(|value| value != 1.0)) {
        return Err(format!("`{key}`: expected 1, got {got}; drafts with another are not supported"));
    }
    match keys.target_hidden_size.filter(|size| *size != hidden_size) {
        Some(size) => Err(format!("`target_hidden_size`: expected `hidden_size`, {hidden_size}, got {size}")),
        None => Ok(()),
    }
}

/// What a speculators folder proposes by default.
fn proposed(config: &Value, shape: &BlockShape, notes: &mut Vec<String>) {
    let tokens = config.pointer("/speculators_config/proposal_methods/0/speculative_tokens").and_then(Value::as_i64);
    match tokens {
        Some(tokens) if tokens == shape.slots() => {}
        Some(tokens) => notes.push(format!(
            "`speculators_config.proposal_methods[0].speculative_tokens` is {tokens}; the block has {} drafts",
            shape.slots()
        )),
        None => notes.push("`speculators_config` names no number of proposed tokens: vLLM does not load it".to_owned()),
    }
}
