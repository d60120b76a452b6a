//! Llama: the family of Llama 1-3, SmolLM2 and every model with `"model_type": "llama"`.
//!
//! Reference: `transformers/models/llama/modeling_llama.py` (Hugging Face transformers 5.8.1), checked against its
//! hidden states, logits and greedy tokens by `tests/goldens`. Shape legend: see `nn`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Dimensions, ForwardInput, ForwardOutput, LayerShape, Loading, LogitRows, TargetModel, TargetTables};
use crate::error::{Error, Result};
use crate::nn::rope::RopeTables;
use crate::nn::{
    AttentionMask, KvCache, Linear, PreparedMask, RmsNorm, Rope, RopeConfig, RopeScaling, attention, linear,
};
use crate::weights::WeightsFolder;

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
    /// Reads and checks config.json of a model folder.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let config: Self = serde_json::from_str(&text).map_err(|error| Error::bad_file(path, error.to_string()))?;
        config.check().map_err(|problem| Error::bad_file(path, problem))?;
        Ok(config)
    }

    /// Reads and checks a value with the keys of config.json.
    pub fn from_value(value: &Value) -> Result<Self, String> {
        let config: Self = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        // The limits are far beyond any model, and keep parameters, bytes and operations within 64 bits.
        const WIDEST: i64 = 1 << 22;
        let sizes = [
            ("hidden_size", self.hidden_size, WIDEST / 4),
            ("intermediate_size", self.intermediate_size, WIDEST),
            ("num_hidden_layers", i64::try_from(self.num_hidden_layers).unwrap_or(i64::MAX), 10_000),
            ("num_attention_heads", self.num_attention_heads, 10_000),
            ("num_key_value_heads", self.groups(), 10_000),
            ("head_dim", self.head_dim(), WIDEST / self.num_attention_heads.max(1)),
            ("vocab_size", self.vocab_size, i64::from(i32::MAX)),
            ("max_position_embeddings", self.max_position_embeddings, i64::MAX),
        ];
        if let Some((name, value, limit)) = sizes.iter().find(|(_, value, limit)| !(1..=*limit).contains(value)) {
            return Err(format!("`{name}`: expected a number from 1 to {limit}, got {value}"));
        }
        if self.num_attention_heads % self.groups() != 0 {
            let (heads, groups) = (self.num_attention_heads, self.groups());
            return Err(format!("`num_key_value_heads`: expected a divisor of the {heads} heads, got {groups}"));
        }
        if self.head_dim.is_none() && self.hidden_size % self.num_attention_heads != 0 {
            let (heads, hidden) = (self.num_attention_heads, self.hidden_size);
            return Err(format!(
                "`num_attention_heads`: expected a divisor of hidden_size ({hidden}) where there is no `head_dim`, got {heads}"
            ));
        }
        if self.head_dim() % 2 != 0 {
            return Err(format!("`head_dim`: expected an even number, got {}", self.head_dim()));
        }
        if self.hidden_act != "silu" {
            return Err(format!("`hidden_act`: expected silu, got {}", self.hidden_act));
        }
        self.rope().map(|_| ())
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

    /// The sizes the rest of the program needs.
    pub fn dimensions(&self) -> Result<Dimensions, String> {
        Ok(Dimensions {
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

    /// Refuses files whose tensors are not this model's.
    fn check_tensors(&self, weights: &WeightsFolder) -> Result<()> {
        // Files may keep a tied head and old rotary buffers: both carry no information of their own.
        let ignored = |name: &str| (name == HEAD && self.tie_word_embeddings) || name.ends_with("rotary_emb.inv_freq");
        weights.check(&self.tensors(), ignored)
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

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: i64,
    groups: i64,
    head_dim: i64,
}

impl Attention {
    /// `[B, T, H]` to `[B, T, H]`
    fn forward(
        &self,
        input: &Tensor,
        rope: &RopeTables,
        mask: &PreparedMask,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor {
        let (rows, tokens, _) = input.size3().expect("hidden states are [B, T, H]");
        // 1. Project and split into heads.
        let split =
            |projected: Tensor, heads: i64| projected.view([rows, tokens, heads, self.head_dim]).transpose(1, 2);
        let query = split(self.query.forward(input), self.heads); // [B, N, T, D]
        let key = split(self.key.forward(input), self.groups); // [B, G, T, D]
        let value = split(self.value.forward(input), self.groups); // [B, G, T, D]
        // 2. Rotate.
        let (query, key) = (rope.rotate(&query), rope.rotate(&key));
        // 3. Add the past.
        let (key, value) = match cache {
            Some((cache, layer)) => cache.write(layer, &key, &value), // [B, G, S, D]
            None => (key, value),
        };
        // 4. Attend and join the heads.
        let attended = attention(&query, &key, &value, mask); // [B, N, T, D]
        let joined = attended.transpose(1, 2).reshape([rows, tokens, self.heads * self.head_dim]);
        self.output.forward(&joined) // [B, T, H]
    }
}

struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// `[B, T, H]` to `[B, T, H]`
    fn forward(&self, input: &Tensor) -> Tensor {
        let gated = self.gate.forward(input).silu_() * self.up.forward(input); // [B, T, width]
        self.down.forward(&gated)
    }
}

struct Layer {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

/// A Llama model with its weights.
pub struct LlamaTarget {
    config: LlamaConfig,
    dimensions: Dimensions,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Tensor,
    rope: Rope,
}

/// Loads a model folder.
pub fn load(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    let config = LlamaConfig::read(&path.join("config.json"))?;
    let weights = WeightsFolder::open(path)?;
    config.check_tensors(&weights)?;
    let names: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    let weights = loading.arrange(weights, &names);
    Ok(Box::new(LlamaTarget::from_weights(config, &weights, loading.kind, loading.device)?))
}

/// Sizes of the model of a folder.
pub fn read_dimensions(path: &Path) -> Result<Dimensions> {
    let path = path.join("config.json");
    LlamaConfig::read(&path)?.dimensions().map_err(|problem| Error::bad_file(&path, problem))
}

/// Loads embedding and head of a model folder.
pub fn load_tables(path: &Path, loading: &Loading<'_>) -> Result<TargetTables> {
    let config = LlamaConfig::read(&path.join("config.json"))?;
    let weights = WeightsFolder::open(path)?;
    config.check_tensors(&weights)?;
    let dimensions = read_dimensions(path)?;
    let mut names = vec![EMBEDDING.to_owned()];
    if !config.tie_word_embeddings {
        names.push(HEAD.to_owned());
    }
    let weights = loading.arrange(weights, &names);
    let load = |name| weights.load(name, loading.kind, loading.device);
    let embedding = load(EMBEDDING)?;
    let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { load(HEAD)? };
    Ok(TargetTables { dimensions, embedding, head })
}

impl LlamaTarget {
    /// Builds the model from the tensors of a folder.
    pub fn from_weights(config: LlamaConfig, weights: &WeightsFolder, kind: Kind, device: Device) -> Result<Self> {
        config.check_tensors(weights)?;
        Self::build(config.clone(), device, &mut |name, _| weights.load(name, kind, device))
    }

    /// Builds the model from a function that gives each tensor by name and shape.
    pub fn build(
        config: LlamaConfig,
        device: Device,
        tensor: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        let shapes: std::collections::HashMap<String, Vec<i64>> = config.tensors().into_iter().collect();
        let mut get = |name: String| tensor(&name, &shapes[&name]);
        let embedding = get(EMBEDDING.to_owned())?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            layers.push(build_layer(&config, &format!("model.layers.{index}"), &mut get)?);
        }
        let norm = RmsNorm { weight: get("model.norm.weight".to_owned())?, epsilon: config.rms_norm_eps };
        let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { get(HEAD.to_owned())? };
        let dimensions = config.dimensions().map_err(Error::Failed)?;
        let rope = Rope::new(dimensions.layer.rope, device);
        Ok(Self { config, dimensions, embedding, layers, norm, head, rope })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Everything a caller can get wrong, checked once.
    fn check_input(&self, input: &ForwardInput<'_>, cache: Option<&KvCache>) -> Result<()> {
        let (rows, tokens) = input.ids.size2()?;
        let last = self.layers.len();
        if let Some(index) = input.capture.iter().find(|&&index| index > last) {
            return Err(Error::Failed(format!("hidden state {index} was asked for; this model has 0 to {last}")));
        }
        if input.positions.size() != [rows, tokens] {
            let got = input.positions.size();
            return Err(Error::Failed(format!(
                "positions: expected the shape of the ids, [{rows}, {tokens}], got {got:?}"
            )));
        }
        if let Some(cached) = cache.map(KvCache::rows).filter(|&cached| cached != rows) {
            return Err(Error::Failed(format!("the cache holds {cached} rows, the ids {rows}")));
        }
        match input.mask {
            AttentionMask::Documents(lengths) if lengths.iter().sum::<i64>() != tokens => {
                let sum: i64 = lengths.iter().sum();
                Err(Error::Failed(format!("the documents of a pack have {sum} tokens, the ids {tokens}")))
            }
            AttentionMask::Documents(_) if cache.is_some_and(|cache| !cache.is_empty()) => {
                Err(Error::Failed("packed documents cannot follow cached tokens".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

fn build_layer(config: &LlamaConfig, prefix: &str, get: &mut dyn FnMut(String) -> Result<Tensor>) -> Result<Layer> {
    let mut linear = |name: &str, bias: bool| {
        let weight = get(format!("{prefix}.{name}.weight"))?;
        let bias = if bias { Some(get(format!("{prefix}.{name}.bias"))?) } else { None };
        Ok::<_, Error>(Linear { weight, bias })
    };
    let attention = Attention {
        query: linear("self_attn.q_proj", config.attention_bias)?,
        key: linear("self_attn.k_proj", config.attention_bias)?,
        value: linear("self_attn.v_proj", config.attention_bias)?,
        output: linear("self_attn.o_proj", config.attention_bias)?,
        heads: config.num_attention_heads,
        groups: config.groups(),
        head_dim: config.head_dim(),
    };
    let mlp = Mlp {
        gate: linear("mlp.gate_proj", config.mlp_bias)?,
        up: linear("mlp.up_proj", config.mlp_bias)?,
        down: linear("mlp.down_proj", config.mlp_bias)?,
    };
    let mut norm = |name: &str| {
        let weight = get(format!("{prefix}.{name}.weight"))?;
        Ok::<_, Error>(RmsNorm { weight, epsilon: config.rms_norm_eps })
    };
    let input_norm = norm("input_layernorm")?;
    let post_attention_norm = norm("post_attention_layernorm")?;
    Ok(Layer { input_norm, attention, post_attention_norm, mlp })
}

impl TargetModel for LlamaTarget {
    fn dimensions(&self) -> Dimensions {
        self.dimensions
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let options = (self.kind(), self.device());
        KvCache::new(self.layers.len(), rows, self.config.groups(), self.config.head_dim(), capacity, options)
    }

    fn forward(&self, input: &ForwardInput<'_>, mut cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        let _guard = tch::no_grad_guard();
        self.check_input(input, cache.as_deref())?;
        let (rows, tokens) = input.ids.size2()?;
        let last = self.layers.len();
        let empty = vec![0; rows as usize];
        let past = cache.as_ref().map_or(empty.as_slice(), |cache| cache.lengths());
        let mask = input.mask.prepare(past, tokens, self.device());
        let rope = self.rope.tables(input.positions, self.kind());
        let mut captured: Vec<(usize, Tensor)> = Vec::new();
        let mut keep = |index: usize, hidden: &Tensor| {
            if input.capture.contains(&index) {
                captured.push((index, hidden.shallow_clone()));
            }
        };

        // A token id outside the vocabulary is an error of libtorch here, and the only one an input can cause from now on.
        let mut hidden = Tensor::f_embedding(&self.embedding, input.ids, -1, false, false)?; // [B, T, H]
        for (index, layer) in self.layers.iter().enumerate() {
            keep(index, &hidden);
            let cache = cache.as_mut().map(|cache| (&mut **cache, index));
            // Each block's own output takes the sum: `hidden` itself may have been captured.
            hidden = layer.attention.forward(&layer.input_norm.forward(&hidden), &rope, &mask, cache).g_add_(&hidden);
            hidden = layer.mlp.forward(&layer.post_attention_norm.forward(&hidden)).g_add_(&hidden);
        }
        // The final norm works row by row: where only some rows are projected, only those are normed.
        if input.capture.contains(&last) || matches!(input.logits, LogitRows::All) {
            hidden = self.norm.forward(&hidden);
            keep(last, &hidden);
            let logits = match input.logits {
                LogitRows::None => None,
                LogitRows::All => Some(hidden.view([rows * tokens, -1])),
                LogitRows::Rows(index) => Some(hidden.view([rows * tokens, -1]).index_select(0, index)),
            };
            return Ok(output(input, &captured, logits.map(|rows| linear(&rows, &self.head, None))));
        }
        let logits = match input.logits {
            LogitRows::Rows(index) => {
                let chosen = hidden.view([rows * tokens, -1]).index_select(0, index); // [R, H]
                Some(linear(&self.norm.forward(&chosen), &self.head, None)) // [R, V]
            }
            LogitRows::None | LogitRows::All => None,
        };
        Ok(output(input, &captured, logits))
    }

    fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    fn head(&self) -> &Tensor {
        &self.head
    }

    fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    fn device(&self) -> Device {
        self.embedding.device()
    }
}

/// Puts captured states into the order they were asked for.
fn output(input: &ForwardInput<'_>, captured: &[(usize, Tensor)], logits: Option<Tensor>) -> ForwardOutput {
    let find = |index: &usize| captured.iter().find(|(at, _)| at == index).map(|(_, hidden)| hidden.shallow_clone());
    ForwardOutput { hidden: input.capture.iter().filter_map(find).collect(), logits }
}

#[cfg(test)]
mod tests;
