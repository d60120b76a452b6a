//! config.json of a Llama: what it says, what it may say, and which tensors follow from it.
//!
//! Its numbers come from a file of somebody else's: each is compared with a limit before anything is computed from it,
//! and the tensors it asks for with those that are there before anything is made as large as it says.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::models::{LayerKind, LayerShape, ParameterCounts, PlainModel, TargetInfo, limits};
use crate::nn::{HeadForm, RopeConfig, RopeScaling};
use crate::weights::{WeightsFolder, is_old_buffer, quantised};

/// Name of the token embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the vocabulary projection, where it is not the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

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
        let nothing = Value::Null;
        let sources = [&self.rope_scaling, &self.rope_parameters];
        let values = sources.into_iter().flatten().find(filled).unwrap_or(&nothing);
        let number = |key: &str| values.get(key).and_then(Value::as_f64);
        let need = |key: &str| match number(key) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(format!("rope scaling: `{key}`: expected a number above 0, got {value}")),
            None => Err(format!("rope scaling: `{key}` is missing or no number")),
        };
        if let Some(partial) = number("partial_rotary_factor").filter(|&share| share != 1.0) {
            return Err(format!(
                "`partial_rotary_factor`: expected 1, got {partial}; partial rotation is not supported"
            ));
        }
        let theta = number("rope_theta").or(self.rope_theta).unwrap_or(10_000.0);
        if theta <= 0.0 {
            return Err(format!("`rope_theta`: expected a number above 0, got {theta}"));
        }
        let kind = values.get("rope_type").or_else(|| values.get("type")).and_then(Value::as_str).unwrap_or("default");
        let pretrained = self.original_max_position_embeddings.or(number("original_max_position_embeddings"));
        if let Some(length) = pretrained.filter(|length| *length < 1.0) {
            return Err(format!("`original_max_position_embeddings`: expected a number from 1, got {length}"));
        }
        let original_max_position_embeddings = pretrained.unwrap_or(self.max_position_embeddings as f64);
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings,
            },
            "yarn" => {
                let stretch = pretrained.map(|original| self.max_position_embeddings as f64 / original);
                let factor = number("factor").or(stretch).map_or_else(|| need("factor"), Ok)?;
                RopeScaling::Yarn {
                    factor,
                    attention_factor: number("attention_factor")
                        .unwrap_or_else(|| yarn_attention_factor(factor, number("mscale"), number("mscale_all_dim"))),
                    beta_fast: number("beta_fast").filter(|&beta| beta != 0.0).unwrap_or(32.0),
                    beta_slow: number("beta_slow").filter(|&beta| beta != 0.0).unwrap_or(1.0),
                    original_max_position_embeddings,
                    truncate: values.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            other => {
                return Err(format!("`rope_type`: expected default, linear, dynamic, llama3 or yarn, got {other}"));
            }
        };
        let max_position_embeddings = self.max_position_embeddings;
        Ok(RopeConfig { theta, head_dim: self.head_dim(), max_position_embeddings, scaling })
    }

    /// What the rest of the program needs to know.
    pub fn info(&self) -> Result<TargetInfo, String> {
        let all: u64 = self.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let tables = heads * (self.vocab_size * self.hidden_size) as u64;
        Ok(TargetInfo {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            layers: vec![LayerKind::Full; self.num_hidden_layers],
            max_position_embeddings: self.max_position_embeddings,
            parameters: ParameterCounts { all, tables, a_token: all - tables },
            widest: self.intermediate_size,
            head: HeadForm::PLAIN,
            embedding_scale: 1.0,
            template: self.plain()?.layer,
        })
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
        let (hidden, width) = (self.hidden_size, self.intermediate_size);
        let (query, group) = (self.num_attention_heads * self.head_dim(), self.groups() * self.head_dim());
        let mut tensors = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            let mut linear = |name: &str, out: i64, input: i64, bias: bool| {
                tensors.push((format!("{prefix}.{name}.weight"), vec![out, input]));
                if bias {
                    tensors.push((format!("{prefix}.{name}.bias"), vec![out]));
                }
            };
            linear("self_attn.q_proj", query, hidden, self.attention_bias);
            linear("self_attn.k_proj", group, hidden, self.attention_bias);
            linear("self_attn.v_proj", group, hidden, self.attention_bias);
            linear("self_attn.o_proj", hidden, query, self.attention_bias);
            linear("mlp.gate_proj", width, hidden, self.mlp_bias);
            linear("mlp.up_proj", width, hidden, self.mlp_bias);
            linear("mlp.down_proj", hidden, width, self.mlp_bias);
            tensors.push((format!("{prefix}.input_layernorm.weight"), vec![hidden]));
            tensors.push((format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            tensors.push((HEAD.to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Refuses files whose tensors are not this model's, by their headers alone. A tied head may be there and must fit.
    pub(super) fn check_tensors(&self, weights: &WeightsFolder) -> Result<()> {
        let is_tied = self.tie_word_embeddings && !weights.contains(HEAD);
        let expected = Self { tie_word_embeddings: is_tied, ..self.clone() }.tensors();
        weights.check_numbers(&expected)?;
        weights.check(&expected, is_old_buffer)
    }

    /// The configuration that is that of checked files, and what a user should know: a file's head that is not the
    /// embedding counts, whatever config.json says of it, as with other readers.
    pub(super) fn fit(self, weights: &WeightsFolder) -> Result<(Self, Vec<String>)> {
        let mut warnings: Vec<String> = self.other_frequencies(weights)?.into_iter().collect();
        if self.tie_word_embeddings && weights.contains(HEAD) && !weights.same_content(HEAD, EMBEDDING)? {
            warnings.push(format!(
                "{}: config.json says that the head is the embedding, but `{HEAD}` holds other numbers: they are used",
                weights.path().display()
            ));
            return Ok((Self { tie_word_embeddings: false, ..self }, warnings));
        }
        Ok((self, warnings))
    }

    /// What old rotary buffers say, where that is not what the configuration says, which counts.
    fn other_frequencies(&self, weights: &WeightsFolder) -> Result<Option<String>> {
        let rope = self.rope().map_err(Error::Failed)?;
        // Before it was decided that they are of no use, they were stored with and without the scaling.
        let plain = RopeConfig { scaling: RopeScaling::Default, ..rope };
        let known = [rope, plain].map(|rope| rope.frequencies());
        let mut seen: Option<&[u8]> = None;
        for name in weights.names().filter(|name| is_old_buffer(name)) {
            let bytes = weights.bytes(name);
            if bytes.is_some() && bytes == seen {
                continue;
            }
            seen = bytes;
            let is_short = weights.kind(name).is_some_and(|kind| kind.elt_size_in_bytes() < 4);
            let (share, least) = if is_short { (0.05, 1e-6) } else { (1e-4, 1e-12) };
            let is_known = |values: &Tensor, known: &Tensor| {
                values.size() == known.size() && values.allclose(known, share, least, false)
            };
            let values = weights.load(name, Kind::Float, Device::Cpu);
            if !values.is_ok_and(|values| known.iter().any(|known| is_known(&values, known))) {
                let folder = weights.path().display();
                return Ok(Some(format!(
                    "{folder}: `{name}` holds other frequencies than follow from config.json, which counts"
                )));
            }
        }
        Ok(None)
    }
}

/// What YaRN multiplies cos and sin with where the file does not say it.
fn yarn_attention_factor(factor: f64, scale: Option<f64>, scale_all: Option<f64>) -> f64 {
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (scale, scale_all) {
        (Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => magnitude(scale) / magnitude(all),
        _ => magnitude(1.0),
    }
}
