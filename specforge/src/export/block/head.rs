//! What stands behind the backbone, as far as files say it: sizes, numbers that no tensor shows, and tensors.
//!
//! Names of keys are those of `draft.head` in training. Keys that only training reads are passed over.
//!
//! Shape legend: `H` hidden size, `V` vocabulary, `DV` the draft's own, `B` rows of a block, `r` rank.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::method::Method;
use crate::draft::block::config::BlockShape;
use crate::models::limits;

/// The head of a drafter.
#[derive(Debug, Clone, PartialEq)]
pub enum Head {
    /// None: DFlash.
    Plain,
    /// DFlash2's.
    Selector(Selector),
    /// DSpark's.
    Markov(Markov),
    /// LiLiCorr's.
    Lilicorr(Lilicorr),
    /// XPress'.
    Xpress(Xpress),
    /// Domino's.
    Domino(Domino),
}

/// DFlash2's selector of candidates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selector {
    /// `r`
    pub selector_rank: i64,
    /// `K`
    pub selector_top_k: i64,
    /// Multiplies the rows of the target's embedding.
    pub input_embedding_scale: f64,
    /// Multiplies logits.
    pub output_multiplier: f64,
    /// `c` of `c tanh(x / c)`, which bends multiplied logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_logit_softcapping: Option<f64>,
}

/// How a Markov head makes a state of the tokens before a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MarkovKind {
    /// The last token's embedding.
    #[default]
    Vanilla,
    /// The same, gated by the slot's row.
    Gated,
    /// A recurrent state.
    Rnn,
}

/// DSpark's heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Markov {
    /// `r`
    pub markov_rank: i64,
    /// How the state is made.
    pub markov_head_type: MarkovKind,
    /// Whether there is a confidence head.
    pub confidence_head: bool,
    /// Whether it reads the last token's embedding too.
    pub confidence_head_with_markov: bool,
    /// Whether the anchor's row, where it drafts nothing, writes a recurrent state before the first draft does.
    pub anchor_row_writes_state: bool,
}

/// LiLiCorr's scorer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lilicorr {
    /// `K`
    pub lilicorr_candidate_topk: i64,
    /// Width; 0 for the draft's.
    pub lilicorr_hidden_size: i64,
    /// Layers.
    pub lilicorr_num_layers: i64,
    /// Attention heads.
    pub lilicorr_num_heads: i64,
    /// Width of an MLP by that of the head.
    pub lilicorr_mlp_ratio: f64,
    /// Size of the factors.
    pub lilicorr_factor_dim: i64,
    /// Least length that a factor is divided by.
    pub lilicorr_vector_eps: f64,
    /// Multiplies cosines.
    pub lilicorr_logit_scale: f64,
}

/// XPress' refiner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Xpress {
    /// `r`
    pub xpress_rank: i64,
    /// Width of the MLP by the rank.
    pub xpress_mlp_ratio: i64,
    /// Passes of the iteration.
    pub xpress_num_passes: i64,
    /// Candidates of a slot; 0 for the whole vocabulary.
    pub xpress_topc: i64,
}

/// Domino's correction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Domino {
    /// `g`, width of the state.
    pub gru_hidden_dim: i64,
    /// `m`, what lies between state and vocabulary.
    pub emb_dim: i64,
    /// Proposals without a correction.
    pub pure_draft_prefix_len: i64,
}

impl Default for Selector {
    fn default() -> Self {
        Self {
            selector_rank: 256,
            selector_top_k: 16,
            input_embedding_scale: 1.0,
            output_multiplier: 1.0,
            final_logit_softcapping: None,
        }
    }
}

impl Default for Markov {
    fn default() -> Self {
        Self {
            markov_rank: 256,
            markov_head_type: MarkovKind::Vanilla,
            confidence_head: true,
            confidence_head_with_markov: true,
            anchor_row_writes_state: false,
        }
    }
}

impl Default for Lilicorr {
    fn default() -> Self {
        Self {
            lilicorr_candidate_topk: 8,
            lilicorr_hidden_size: 1024,
            lilicorr_num_layers: 2,
            lilicorr_num_heads: 8,
            lilicorr_mlp_ratio: 2.0,
            lilicorr_factor_dim: 1024,
            lilicorr_vector_eps: 1e-4,
            lilicorr_logit_scale: 8.0,
        }
    }
}

impl Default for Xpress {
    fn default() -> Self {
        Self { xpress_rank: 256, xpress_mlp_ratio: 2, xpress_num_passes: 6, xpress_topc: 512 }
    }
}

impl Default for Domino {
    fn default() -> Self {
        Self { gru_hidden_dim: 1024, emb_dim: 256, pure_draft_prefix_len: 1 }
    }
}

impl Head {
    /// The head of `draft.head`.
    pub fn of_training(method: Method, keys: &Map<String, Value>) -> Result<Self, String> {
        fn read<T: DeserializeOwned>(keys: &Map<String, Value>) -> Result<T, String> {
            let value = Value::Object(keys.clone());
            serde_path_to_error::deserialize(value)
                .map_err(|error| format!("`draft.head.{}`: {}", error.path(), error.inner()))
        }
        Ok(match method {
            Method::Dflash => Self::Plain,
            Method::Dflash2 => Self::Selector(read(keys)?),
            Method::Dspark => Self::Markov(read(keys)?),
            Method::Lilicorr => Self::Lilicorr(read(keys)?),
            Method::Xpress => Self::Xpress(read(keys)?),
            Method::Domino => Self::Domino(read(keys)?),
        })
    }

    /// The keys of `draft.head` that say the same.
    pub fn training_keys(&self) -> Map<String, Value> {
        let value = match self {
            Self::Plain => Ok(Value::Null),
            Self::Selector(keys) => serde_json::to_value(keys),
            Self::Markov(keys) => serde_json::to_value(keys),
            Self::Lilicorr(keys) => serde_json::to_value(keys),
            Self::Xpress(keys) => serde_json::to_value(keys),
            Self::Domino(keys) => serde_json::to_value(keys),
        };
        match value {
            Ok(Value::Object(keys)) => keys,
            _ => Map::new(),
        }
    }

    /// Refuses sizes that no head has: they may come from a file.
    pub(super) fn check(&self, shape: &BlockShape) -> Result<(), String> {
        let positive = |key: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(format!("`{key}`: expected a number above 0, got {value}")),
        };
        let most = shape.vocab_size;
        match self {
            Self::Plain => Ok(()),
            Self::Selector(keys) => {
                limits::within(&[
                    ("selector_rank", keys.selector_rank, limits::WIDEST),
                    ("selector_top_k", keys.selector_top_k, most),
                ])?;
                positive("output_multiplier", keys.output_multiplier)?;
                keys.final_logit_softcapping.map_or(Ok(()), |cap| positive("final_logit_softcapping", cap))
            }
            Self::Markov(keys) if keys.markov_rank == 0 && keys.confidence_head => Ok(()),
            Self::Markov(keys) => limits::within(&[("markov_rank", keys.markov_rank, limits::WIDEST)]),
            Self::Lilicorr(keys) => {
                let width = keys.width(shape);
                limits::within(&[
                    ("lilicorr_candidate_topk", keys.lilicorr_candidate_topk, most),
                    ("lilicorr_hidden_size", width, limits::MOST_HIDDEN),
                    ("lilicorr_num_layers", keys.lilicorr_num_layers, limits::MOST_LAYERS),
                    ("lilicorr_num_heads", keys.lilicorr_num_heads, limits::MOST_HEADS),
                    ("lilicorr_factor_dim", keys.lilicorr_factor_dim, limits::WIDEST),
                ])?;
                positive("lilicorr_mlp_ratio", keys.lilicorr_mlp_ratio)?;
                positive("lilicorr_vector_eps", keys.lilicorr_vector_eps)?;
                positive("lilicorr_logit_scale", keys.lilicorr_logit_scale)?;
                limits::within(&[("lilicorr_mlp_ratio x lilicorr_hidden_size", keys.inner(shape), limits::WIDEST)])?;
                match width % keys.lilicorr_num_heads {
                    0 => Ok(()),
                    _ => Err(format!(
                        "`lilicorr_num_heads`: expected a divisor of the head's width {width}, got {}",
                        keys.lilicorr_num_heads
                    )),
                }
            }
            Self::Xpress(keys) => {
                limits::within(&[
                    ("xpress_rank", keys.xpress_rank, limits::WIDEST),
                    ("xpress_mlp_ratio", keys.xpress_mlp_ratio, limits::WIDEST / keys.xpress_rank.max(1)),
                    ("xpress_num_passes", keys.xpress_num_passes, limits::MOST_LAYERS),
                ])?;
                match (0..=most).contains(&keys.xpress_topc) {
                    true => Ok(()),
                    false => Err(format!("`xpress_topc`: expected 0 to {most}, got {}", keys.xpress_topc)),
                }
            }
            Self::Domino(keys) => {
                limits::within(&[
                    ("gru_hidden_dim", keys.gru_hidden_dim, limits::MOST_HIDDEN),
                    ("emb_dim", keys.emb_dim, limits::WIDEST),
                ])?;
                match keys.pure_draft_prefix_len {
                    1 => Ok(()),
                    other => Err(format!("`pure_draft_prefix_len`: expected 1, got {other}")),
                }
            }
        }
    }

    /// Its tensors by the engines' names.
    pub(super) fn tensors(&self, shape: &BlockShape) -> Vec<(String, Vec<i64>)> {
        let (hidden, vocabulary) = (shape.hidden_size, shape.vocab_size);
        let named = |prefix: &str, list: Vec<(&str, Vec<i64>)>| {
            list.into_iter().map(|(name, shape)| (format!("{prefix}.{name}"), shape)).collect::<Vec<_>>()
        };
        match self {
            Self::Plain => Vec::new(),
            Self::Selector(Selector { selector_rank: r, .. }) => named(
                "candidate_selector",
                vec![
                    ("predecessor_codebook", vec![vocabulary, *r]),
                    ("successor_codebook", vec![vocabulary, *r]),
                    ("hidden_projection.weight", vec![*r, hidden]),
                ],
            ),
            Self::Markov(keys) => {
                let r = keys.markov_rank;
                // A rank of 0 has no tables: the confidence is all there is.
                let tables = [("markov_w1.weight", vocabulary), ("markov_w2.weight", shape.draft_vocab_size)];
                let mut list: Vec<_> =
                    tables.into_iter().filter(|_| r > 0).map(|(name, rows)| (name, vec![rows, r])).collect();
                list.extend(match keys.markov_head_type {
                    MarkovKind::Vanilla => Vec::new(),
                    MarkovKind::Gated => {
                        vec![("gate_proj.weight", vec![r, hidden + r]), ("gate_proj.bias", vec![r])]
                    }
                    MarkovKind::Rnn => {
                        vec![("joint_proj.weight", vec![3 * r, 2 * r + hidden]), ("joint_proj.bias", vec![3 * r])]
                    }
                });
                let mut all = named("markov_head", list);
                if keys.confidence_head {
                    let width = if keys.confidence_head_with_markov { hidden + r } else { hidden };
                    let list = vec![("proj.weight", vec![1, width]), ("proj.bias", vec![1])];
                    all.extend(named("confidence_head", list));
                }
                all
            }
            Self::Lilicorr(keys) => keys.tensors(shape),
            Self::Xpress(keys) => {
                let (r, inner, block) = (keys.xpress_rank, keys.xpress_rank * keys.xpress_mlp_ratio, shape.block_size);
                named(
                    "xpress_head",
                    vec![
                        ("w1.weight", vec![vocabulary, r]),
                        ("down_h.weight", vec![r, hidden]),
                        ("down_g.weight", vec![r, hidden]),
                        ("in_proj.weight", vec![r, 3 * r]),
                        ("mix.L", vec![r, block, block]),
                        ("mlp.gate_proj.weight", vec![inner, r]),
                        ("mlp.up_proj.weight", vec![inner, r]),
                        ("mlp.down_proj.weight", vec![r, inner]),
                        ("w2.weight", vec![vocabulary, r]),
                    ],
                )
            }
            Self::Domino(Domino { gru_hidden_dim: g, emb_dim: m, .. }) => vec![
                ("prefix_gru.weight_ih_l0".to_owned(), vec![3 * g, hidden]),
                ("prefix_gru.weight_hh_l0".to_owned(), vec![3 * g, *g]),
                ("embed_proj.0.weight".to_owned(), vec![*m, hidden + g]),
                ("embed_proj.2.weight".to_owned(), vec![vocabulary, *m]),
            ],
        }
    }

    /// It in words.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Plain => "no head: each row by itself".to_owned(),
            Self::Selector(keys) => {
                format!("selector of rank {} among {} candidates", keys.selector_rank, keys.selector_top_k)
            }
            Self::Markov(keys) => {
                let kind = match keys.markov_head_type {
                    MarkovKind::Vanilla => "vanilla",
                    MarkovKind::Gated => "gated",
                    MarkovKind::Rnn => "recurrent",
                };
                let confidence = match (keys.confidence_head, keys.confidence_head_with_markov) {
                    (false, _) => "no confidence head",
                    (true, false) => "a confidence head",
                    (true, true) => "a confidence head that reads the last token",
                };
                format!("{kind} Markov head of rank {}, {confidence}", keys.markov_rank)
            }
            Self::Lilicorr(keys) => {
                format!("{} layers that score {} candidates", keys.lilicorr_num_layers, keys.lilicorr_candidate_topk)
            }
            Self::Xpress(keys) => format!("refiner of rank {}, {} passes", keys.xpress_rank, keys.xpress_num_passes),
            Self::Domino(keys) => format!("recurrent correction of width {}", keys.gru_hidden_dim),
        }
    }
}

impl Lilicorr {
    /// Its keys, which files must have all of.
    pub(super) const KEYS: [&str; 8] = [
        "lilicorr_candidate_topk",
        "lilicorr_hidden_size",
        "lilicorr_num_layers",
        "lilicorr_num_heads",
        "lilicorr_mlp_ratio",
        "lilicorr_factor_dim",
        "lilicorr_vector_eps",
        "lilicorr_logit_scale",
    ];

    /// `h`
    pub(super) fn width(&self, shape: &BlockShape) -> i64 {
        if self.lilicorr_hidden_size == 0 { shape.hidden_size } else { self.lilicorr_hidden_size }
    }

    /// Width of an MLP, which both engines round down.
    fn inner(&self, shape: &BlockShape) -> i64 {
        (self.width(shape) as f64 * self.lilicorr_mlp_ratio) as i64
    }

    fn tensors(&self, shape: &BlockShape) -> Vec<(String, Vec<i64>)> {
        let (h, inner, hidden, block) = (self.width(shape), self.inner(shape), shape.hidden_size, shape.block_size);
        let (heads, factor) = (self.lilicorr_num_heads, self.lilicorr_factor_dim);
        let mut all: Vec<(String, Vec<i64>)> = Vec::new();
        let mut add = |name: &str, shape: Vec<i64>| all.push((format!("lilicorr.{name}"), shape));
        let mut linears = vec![("pass_hidden_proj".to_owned(), h, hidden), ("context_proj".to_owned(), h, hidden)];
        // A head as wide as the draft reads its embeddings as they are.
        if h != hidden {
            linears.push(("token_proj".to_owned(), h, hidden));
        }
        linears.extend([("feature_mlp.up_proj".to_owned(), h, 5), ("feature_mlp.down_proj".to_owned(), h, h)]);
        linears.extend([("factor_input_proj", h, 3 * h), ("out_head", factor, h), ("in_head", factor, h)].map(owned));
        linears.push(owned(("anchor_out_head", factor, h)));
        for layer in 0..self.lilicorr_num_layers {
            let at = |name: &str| format!("layers.{layer}.{name}");
            add(&at("attn_norm.weight"), vec![h]);
            add(&at("attn.in_proj_weight"), vec![3 * h, h]);
            add(&at("attn.in_proj_bias"), vec![3 * h]);
            add(&at("mlp_norm.weight"), vec![h]);
            linears.extend([
                (at("attn.out_proj"), h, h),
                (at("mlp.up_proj"), inner, h),
                (at("mlp.down_proj"), h, inner),
            ]);
        }
        for (name, rows, columns) in linears {
            add(&format!("{name}.weight"), vec![rows, columns]);
            add(&format!("{name}.bias"), vec![rows]);
        }
        for (name, shape) in [
            ("feature_norm.weight", vec![5]),
            ("feature_norm.bias", vec![5]),
            ("slot_embedding", vec![1, 1, block - 1, 1, h]),
            ("rank_embedding", vec![1, 1, 1, self.lilicorr_candidate_topk, h]),
            ("relative_slot_bias", vec![heads, 2 * block - 1]),
            ("same_slot_bias", vec![heads]),
            ("output_norm.weight", vec![h]),
            ("anchor_norm.weight", vec![h]),
        ] {
            add(name, shape);
        }
        all
    }
}

fn owned((name, rows, columns): (&str, i64, i64)) -> (String, i64, i64) {
    (name.to_owned(), rows, columns)
}
