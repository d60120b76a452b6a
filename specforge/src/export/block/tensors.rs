//! Names and shapes of tensors: those that engines load, and what trainers and converters call them.
//!
//! Shape legend: `H` hidden size, `I` width of the MLP, `N` heads of size `D`, `G` key and value heads, `F` captured layers,
//! `c` taps of a convolution, `g` its groups.

use super::head::Head;
use super::method::Method;
use crate::draft::block::config::BlockShape;

/// An embedding of the draft's own, or a copy of the target's.
pub(super) const EMBEDDING: &str = "embed_tokens.weight";
/// A vocabulary projection of the draft's own, or a copy of the target's, `[DV, H]`.
pub(super) const LM_HEAD: &str = "lm_head.weight";
/// Draft id to what must be added to get the target's, `[DV]` int64.
pub(super) const D2T: &str = "d2t";
/// Whether a token of the target is in the draft's vocabulary, `[V]` bool.
pub(super) const T2D: &str = "t2d";
/// In training, the row that stands for what is to be drafted, `[H]`. Folders have a file of its own for it.
pub const MASK_EMBEDDING: &str = "mask_embedding";

/// What a drafter's file must hold, by the engines' names.
pub(super) fn needed(shape: &BlockShape, head: &Head) -> Vec<(String, Vec<i64>)> {
    let (hidden, layer) = (shape.hidden_size, &shape.layer);
    let (dim, inner) = (layer.head_dim, layer.intermediate_size);
    let (queries, keys) = (layer.num_attention_heads * dim, layer.num_key_value_heads * dim);
    let captured = shape.target_layer_ids.len() as i64;
    let mut all = vec![
        ("fc.weight".to_owned(), vec![hidden, captured * hidden]),
        ("hidden_norm.weight".to_owned(), vec![hidden]),
        ("norm.weight".to_owned(), vec![hidden]),
    ];
    for index in 0..shape.layers.len() {
        let of_layer = [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![queries, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, queries]),
            ("self_attn.q_norm", vec![dim]),
            ("self_attn.k_norm", vec![dim]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ];
        all.extend(of_layer.map(|(name, shape)| (format!("layers.{index}.{name}.weight"), shape)));
        for (conv, name) in shape.conv.iter().flat_map(|conv| [(conv, "attention_conv"), (conv, "mlp_conv")]) {
            let groups = hidden / conv.group_size.max(1);
            all.push((format!("layers.{index}.{name}.base_kernel"), vec![2, conv.kernel_size, hidden]));
            let projection = vec![2 * conv.kernel_size * groups, hidden];
            all.push((format!("layers.{index}.{name}.kernel_projection.weight"), projection));
        }
    }
    all.extend(head.tensors(shape));
    all
}

/// Where a name in a file comes from, when it is not the one that engines load everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Spelling {
    /// `model.` before it.
    Prefixed,
    /// `encoder.fc`, `encoder.output_norm_enc`.
    Encoder,
    /// A codebook that is kept as an embedding: `.weight` behind it.
    Codebook,
    /// ModelOpt's trainer's LiLiCorr: parts of an MLP by their number.
    NumberedParts,
    /// ModelOpt's DSpark: no `markov_head.` before it.
    FlatMarkov,
    /// speculators' XPress: `refiner_head.`.
    Refiner,
}

/// What a tensor of a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    /// One of the drafter's, by the name that engines load.
    Tensor(String),
    /// Nothing that a drafter is made of.
    Unused,
}

/// The meaning of a name in a file, and the spellings that were met.
pub(super) fn meaning(method: Method, stored: &str) -> (Named, Vec<Spelling>) {
    let mut spellings = Vec::new();
    let mut name = stored.to_owned();
    if let Some(rest) = name.strip_prefix("model.") {
        name = rest.to_owned();
        spellings.push(Spelling::Prefixed);
    }
    // Buffers of the rotary embedding, and frozen parts of the target that trainers keep.
    if name.ends_with("rotary_emb.inv_freq") || name.starts_with("verifier_") {
        return (Named::Unused, Vec::new());
    }
    let renamed = match method {
        Method::Dflash2 => codebook(&name).map(|name| (name, Spelling::Codebook)),
        Method::Lilicorr => numbered_parts(&name).map(|name| (name, Spelling::NumberedParts)),
        Method::Dspark => flat_markov(&name).map(|name| (name, Spelling::FlatMarkov)),
        Method::Xpress => refiner(&name).map(|name| (name, Spelling::Refiner)),
        Method::Dflash | Method::Domino => None,
    };
    let renamed = renamed.or_else(|| encoder(&name).map(|name| (name, Spelling::Encoder)));
    if let Some((engines, spelling)) = renamed {
        name = engines;
        spellings.push(spelling);
    }
    (Named::Tensor(name), spellings)
}

fn encoder(name: &str) -> Option<String> {
    match name {
        "encoder.fc.weight" => Some("fc.weight".to_owned()),
        "encoder.output_norm_enc.weight" => Some("hidden_norm.weight".to_owned()),
        _ => None,
    }
}

fn codebook(name: &str) -> Option<String> {
    let rest = name.strip_suffix(".weight")?;
    rest.ends_with("_codebook").then(|| rest.to_owned())
}

/// `feature_mlp.0`, `.1` and `.3` are norm, up and down; in a layer's MLP `.0` and `.2` are up and down.
fn numbered_parts(name: &str) -> Option<String> {
    let rest = name.strip_prefix("lilicorr.")?;
    let parts = [
        ("feature_mlp.0.", "feature_norm."),
        ("feature_mlp.1.", "feature_mlp.up_proj."),
        ("feature_mlp.3.", "feature_mlp.down_proj."),
    ];
    let of_features = parts.iter().find_map(|(old, new)| Some(format!("{new}{}", rest.strip_prefix(old)?)));
    let of_layer = || {
        let (layer, part) = rest.split_once(".mlp.")?;
        let (number, part) = part.split_once('.')?;
        let new = match number {
            "0" => "up_proj",
            "2" => "down_proj",
            _ => return None,
        };
        layer.starts_with("layers.").then(|| format!("{layer}.mlp.{new}.{part}"))
    };
    of_features.or_else(of_layer).map(|name| format!("lilicorr.{name}"))
}

fn flat_markov(name: &str) -> Option<String> {
    let (first, part) = name.split_once('.')?;
    match first {
        "markov_w1" | "markov_w2" | "gate_proj" | "joint_proj" => Some(format!("markov_head.{name}")),
        "confidence_proj" => Some(format!("confidence_head.proj.{part}")),
        _ => None,
    }
}

fn refiner(name: &str) -> Option<String> {
    let engines = match name.strip_prefix("refiner_head.")? {
        "token_embed.weight" => "w1.weight",
        "readout.weight" => "w2.weight",
        "mix_l" => "mix.L",
        "mlp_gate.weight" => "mlp.gate_proj.weight",
        "mlp_up.weight" => "mlp.up_proj.weight",
        "mlp_down.weight" => "mlp.down_proj.weight",
        other => other,
    };
    Some(format!("xpress_head.{engines}"))
}
