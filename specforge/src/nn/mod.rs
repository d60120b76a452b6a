//! Mathematics of transformer layers. No model names here.
//!
//! Shape legend, used in every file of this room:
//! `B` rows, `T` new tokens of a row, `S` key slots, `H` hidden size, `N` query heads, `G` key/value heads,
//! `D` head dimension, `V` vocabulary, `R` selected rows.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod decoder_layer;
#[cfg(test)]
pub mod drawn;
pub mod embedding;
pub mod experts;
pub mod group_norm;
pub mod head;
pub mod kv_cache;
pub mod linear;
pub mod mask;
pub mod merged_attention;
pub mod mixed_precision;
pub mod noise;
pub mod processors;
pub mod rms_norm;
pub mod rope;
pub mod sampling;

pub use activation::Activation;
pub use attention::{Options, attention};
pub use decoder_layer::{
    DecoderLayer, FeedForward, GateUp, GatedMlp, HeadNorms, LayerNorms, QueryKeyValue, SelfAttention,
};
pub use embedding::Embedding;
pub use experts::{Experts, Router, Scoring, SharedExpert};
pub use head::{Head, HeadForm};
pub use kv_cache::{KvCache, LayerCache};
pub use linear::{Linear, add_product, compact, gated_linear, linear, linear_each, trained_linear};
pub use mask::{AttentionMask, Masks, PreparedMask, TreeMask};
pub use mixed_precision::MixedPrecision;
pub use processors::Processors;
pub use rms_norm::RmsNorm;
pub use rope::{LongRope, Rope, RopeConfig, RopeScaling};
