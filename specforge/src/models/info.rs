//! What a target is, as far as the rest of the program needs to know: from its configuration alone.
//!
//! A target's own layers are its own business. What a *draft* layer is like where its configuration is silent is another
//! question, and each family answers it with a plain layer of about the same shape: [`TargetInfo::draft_template`].

use serde::{Deserialize, Serialize};

use super::limits;
use crate::nn::{HeadForm, RopeConfig, RopeScaling};

/// How a layer lets tokens learn from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Attention on every token before.
    Full,
    /// Attention on the last so many tokens, the one that looks included.
    Window(i64),
    /// A state that every token changes: recurrent layers, convolutions.
    State,
}

/// Numbers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ParameterCounts {
    /// All of them.
    pub all: u64,
    /// Those of embedding and head, which count once where they are tied.
    pub tables: u64,
    /// Those of the layers that one token passes through: fewer than are there where experts are chosen.
    pub a_token: u64,
}

/// What makes a model one of masked diffusion (LLaDA, Nie et al. 2025, <https://arxiv.org/abs/2502.09992>): every token sees
/// its whole text, and what is not known yet is a mask token whose row says what stands there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskedDiffusion {
    /// Id of the mask token.
    pub mask: i64,
    /// Whether a row says what stands one position behind it, as in a model that was causal before (Dream).
    pub shift: bool,
}

impl MaskedDiffusion {
    /// Refuses a mask token that the vocabulary has not.
    pub(super) fn check(&self, vocabulary: i64) -> Result<(), String> {
        match (0..vocabulary).contains(&self.mask) {
            true => Ok(()),
            false => Err(format!("`mask_token_id`: expected a token from 0 to {}, got {}", vocabulary - 1, self.mask)),
        }
    }
}

/// What documents are where a target's are pictures: maps of codes, scale by scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Pictures {
    /// Side of each scale's map, in codes.
    pub patch_nums: Vec<i64>,
    /// Channels of a code.
    pub z_channels: i64,
    /// The labels that the target knows; nothing where it is an image tokenizer alone, whose pictures have any.
    pub num_classes: Option<i64>,
}

impl Pictures {
    /// Codes of a picture, over all scales.
    pub fn codes(&self) -> i64 {
        self.patch_nums.iter().map(|side| side * side).sum()
    }
}

/// What a target is.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetInfo {
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Each layer in order.
    pub layers: Vec<LayerKind>,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Numbers of the model.
    pub parameters: ParameterCounts,
    /// Numbers that a token becomes at the widest place of a layer, mostly the MLP's.
    pub widest: i64,
    /// What the head does beside the product with its matrix.
    pub head: HeadForm,
    /// What rows of the embedding are multiplied with.
    pub embedding_scale: f64,
    /// See [`TargetInfo::draft_template`].
    pub template: LayerShape,
    /// What it is beside its layers, where its tokens see those behind them; nothing for a causal model.
    pub diffusion: Option<MaskedDiffusion>,
    /// What its documents are where they are pictures; nothing for a model of text.
    pub pictures: Option<Pictures>,
}

impl TargetInfo {
    /// A target of full attention whose layers nobody looks into: one head of the whole width.
    pub fn of(hidden_size: i64, vocab_size: i64, num_layers: usize, max_position_embeddings: i64) -> Self {
        let rope = RopeConfig {
            theta: 10_000.0,
            head_dim: hidden_size,
            max_position_embeddings,
            scaling: RopeScaling::Default,
        };
        let template = LayerShape {
            intermediate_size: 4 * hidden_size,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: hidden_size,
            rms_norm_eps: 1e-6,
            rope,
        };
        Self {
            hidden_size,
            vocab_size,
            layers: vec![LayerKind::Full; num_layers],
            max_position_embeddings,
            parameters: ParameterCounts::default(),
            widest: template.intermediate_size,
            head: HeadForm::PLAIN,
            embedding_scale: 1.0,
            template,
            diffusion: None,
            pictures: None,
        }
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// What a layer of a draft is like where the draft's configuration is silent: a plain one of about the target's shape,
    /// with its positions. It says nothing of the target's own layers.
    pub fn draft_template(&self) -> LayerShape {
        self.template
    }
}

/// Shape of one plain transformer layer: root mean square norms, grouped attention with rotary positions, a gated MLP with
/// SiLU, no biases.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// `N`
    pub num_attention_heads: i64,
    /// `G`
    pub num_key_value_heads: i64,
    /// `D`
    pub head_dim: i64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
}

impl LayerShape {
    /// Refuses sizes that no layer has, and those that do not fit each other: they may come from a file.
    pub fn check(&self) -> Result<(), String> {
        let heads = self.num_attention_heads;
        limits::within(&[
            ("intermediate_size", self.intermediate_size, limits::WIDEST),
            ("num_attention_heads", heads, limits::MOST_HEADS),
            ("num_key_value_heads", self.num_key_value_heads, limits::MOST_HEADS),
            ("head_dim", self.head_dim, limits::WIDEST / heads.max(1)),
            ("max_position_embeddings", self.rope.max_position_embeddings, limits::LONGEST_CONTEXT),
        ])?;
        if heads % self.num_key_value_heads != 0 {
            let groups = self.num_key_value_heads;
            return Err(format!("`num_key_value_heads`: expected a divisor of the {heads} heads, got {groups}"));
        }
        if self.head_dim % 2 != 0 {
            return Err(format!("`head_dim`: expected an even number, got {}", self.head_dim));
        }
        if self.rope.head_dim != self.head_dim {
            let (heads, rope) = (self.head_dim, self.rope.head_dim);
            return Err(format!("rope: `head_dim`: expected {heads}, the width of a head, got {rope}"));
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            return Err(format!("`rms_norm_eps`: expected a number from 0 to below 1, got {}", self.rms_norm_eps));
        }
        self.rope.check()
    }
}

/// A model of plain layers and nothing else, which is what drafts are: its sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlainModel {
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Number of layers.
    pub num_layers: usize,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Each of its layers.
    pub layer: LayerShape,
}
