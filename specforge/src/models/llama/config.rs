//! config.json of a Llama: what it says, what it may say, and which tensors follow from it.
//!
//! Its numbers come from a file of somebody else's: each is compared with a limit before anything is computed from it,
//! and the tensors it asks for with those that are there before anything is made as large as it says.

use std::rc::Rc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::models::decoder::design::tensors;
use crate::models::decoder::{AttentionDesign, Design, GatedDesign, HeadNormDesign, LayerDesign, Sizes};
use crate::models::rope_keys::{RopeDesign, RopeSource};
use crate::models::{LayerShape, PlainModel, TargetInfo, limits};
use crate::nn::{Activation, RopeConfig};
use crate::weights::quantised;

/// The keys of config.json that the network depends on. Other keys are Hugging Face's own business.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// `H`
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// `N`
    pub num_attention_heads: i64,
    /// `G`; equal to `N` where the key is absent.
    pub num_key_value_heads: Option<i64>,
    /// `D`; `H / N` where the key is absent.
    pub head_dim: Option<i64>,
    /// `V`
    pub vocab_size: i64,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Epsilon of the norms.
    #[serde(default = "default_epsilon")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies (in newer files inside `rope_parameters`).
    pub rope_theta: Option<f64>,
    /// Rotary variant, older key.
    pub rope_scaling: Option<Value>,
    /// Rotary variant and base, newer key.
    pub rope_parameters: Option<Value>,
    /// Context length of pretraining, where a file has it outside the rotary keys.
    pub original_max_position_embeddings: Option<f64>,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Activation of the MLP.
    #[serde(default = "default_activation")]
    pub hidden_act: String,
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_activation() -> String {
    "silu".to_owned()
}

impl LlamaConfig {
    /// Reads and checks a value with the keys of config.json.
    pub fn from_value(value: &Value) -> Result<Self, String> {
        if let Some(problem) = quantised::unreadable(value) {
            return Err(problem);
        }
        let config: Self = serde_path_to_error::deserialize(value).map_err(|error| {
            let key = error.path().to_string();
            if key == "." { error.inner().to_string() } else { format!("`{key}`: {}", error.inner()) }
        })?;
        config.check()?;
        Ok(config)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        limits::within(&[
            ("hidden_size", self.hidden_size, limits::MOST_HIDDEN),
            ("intermediate_size", self.intermediate_size, limits::WIDEST),
            ("num_hidden_layers", limits::signed(self.num_hidden_layers), limits::MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, limits::MOST_HEADS),
            ("num_key_value_heads", self.groups(), limits::MOST_HEADS),
            ("head_dim", self.head_dim(), limits::WIDEST / self.num_attention_heads.max(1)),
            ("vocab_size", self.vocab_size, limits::MOST_TOKENS),
            ("max_position_embeddings", self.max_position_embeddings, limits::LONGEST_CONTEXT),
        ])?;
        if self.head_dim.is_none() && self.hidden_size % self.num_attention_heads != 0 {
            let (heads, hidden) = (self.num_attention_heads, self.hidden_size);
            return Err(format!(
                "`num_attention_heads`: expected a divisor of hidden_size ({hidden}) where there is no `head_dim`, got {heads}"
            ));
        }
        if self.hidden_act != "silu" {
            return Err(format!("`hidden_act`: expected silu, got {}", self.hidden_act));
        }
        self.plain()?.layer.check()
    }

    /// `D`
    pub fn head_dim(&self) -> i64 {
        self.head_dim.unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    /// `G`
    pub fn groups(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// The rotary configuration. As in the reference, `rope_scaling` goes before `rope_parameters`, and an
    /// `original_max_position_embeddings` beside them before one inside.
    pub fn rope(&self) -> Result<RopeConfig, String> {
        let filled = |values: &&Value| values.as_object().is_some_and(|keys| !keys.is_empty());
        let sources = [&self.rope_scaling, &self.rope_parameters];
        let source = RopeSource {
            variant: sources.into_iter().flatten().find(filled).unwrap_or(&Value::Null),
            theta: self.rope_theta.unwrap_or(10_000.0),
            head_dim: self.head_dim(),
            share: 1.0,
            turns_parts: false,
            max_position_embeddings: self.max_position_embeddings,
            pretrained: self.original_max_position_embeddings,
            long_by_other_names: false,
        };
        match source.design()? {
            RopeDesign::Plain(rope) => Ok(rope),
            RopeDesign::Long(_) => {
                Err("`rope_type`: expected default, linear, dynamic, llama3 or yarn, got longrope".to_owned())
            }
        }
    }

    /// The model.
    pub fn design(&self) -> Result<Design, String> {
        let sizes = Sizes {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position_embeddings,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            groups: self.groups(),
            head_dim: self.head_dim(),
            epsilon: self.rms_norm_eps,
            tied: self.tie_word_embeddings,
        };
        Ok(Design::new(sizes, &self.layer(), RopeDesign::Plain(self.rope()?)))
    }

    /// What the rest of the program needs to know.
    pub fn info(&self) -> Result<TargetInfo, String> {
        Ok(self.design()?.info())
    }

    fn layer(&self) -> LayerDesign {
        let attention = AttentionDesign {
            heads: self.num_attention_heads,
            groups: self.groups(),
            head_dim: self.head_dim(),
            joined: false,
            bias: self.attention_bias,
            output_bias: self.attention_bias,
            norms: HeadNormDesign::None,
            scale: None,
            softcap: None,
            sinks: false,
        };
        let mlp = GatedDesign::new(self.hidden_size, self.intermediate_size, Activation::Silu);
        LayerDesign::new(attention, Rc::new(GatedDesign { bias: self.mlp_bias, ..mlp }))
    }

    /// The sizes of a model that is nothing but plain layers.
    pub fn plain(&self) -> Result<PlainModel, String> {
        Ok(PlainModel {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            num_layers: self.num_hidden_layers,
            max_position_embeddings: self.max_position_embeddings,
            layer: LayerShape {
                intermediate_size: self.intermediate_size,
                num_attention_heads: self.num_attention_heads,
                num_key_value_heads: self.groups(),
                head_dim: self.head_dim(),
                rms_norm_eps: self.rms_norm_eps,
                rope: self.rope()?,
            },
        })
    }

    /// Every tensor of the model with its shape, under its Hugging Face name.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let layers = vec![self.layer(); self.num_hidden_layers];
        tensors(&layers, [self.vocab_size, self.hidden_size], self.tie_word_embeddings)
    }
}
