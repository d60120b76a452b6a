//! Llama: the family of Llama 1-3, SmolLM2 and every model with `"model_type": "llama"`.
//!
//! Reference: `transformers/models/llama/modeling_llama.py` (Hugging Face transformers 5.8.1), checked against its
//! hidden states, logits and greedy tokens by `tests/goldens`. Shape legend: see `nn`.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::{Dimensions, ForwardInput, ForwardOutput, Loading, LogitRows, TargetModel, TargetTables};
use crate::error::{Error, Result};
use crate::nn::rope::RopeTables;
use crate::nn::{AttentionMask, KvCache, Linear, PreparedMask, RmsNorm, Rope, attention, linear};
use crate::progress;
use crate::weights::WeightsFolder;

mod config;

pub use config::LlamaConfig;
pub(super) use config::{EMBEDDING, HEAD};

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

/// Reads a model folder's configuration and headers, and says what the user should know of them.
fn open(path: &Path) -> Result<(LlamaConfig, WeightsFolder)> {
    let config = LlamaConfig::read(&path.join("config.json"))?;
    let weights = WeightsFolder::open(path)?;
    let (config, warnings) = config.fit(&weights)?;
    warnings.iter().for_each(|warning| progress::say(&format!("warning: {warning}")));
    Ok((config, weights))
}

/// Loads a model folder.
pub fn load(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    let (config, weights) = open(path)?;
    let names: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    let weights = loading.arrange(weights, &names);
    let (kind, device) = (loading.kind, loading.device);
    Ok(Box::new(LlamaTarget::build(config, device, &mut |name, _| weights.load(name, kind, device))?))
}

/// Sizes of the model of a folder.
pub fn read_dimensions(path: &Path) -> Result<Dimensions> {
    let path = path.join("config.json");
    LlamaConfig::read(&path)?.dimensions().map_err(|problem| Error::bad_file(&path, problem))
}

/// Refuses a folder whose weights are not what config.json says.
pub fn check(path: &Path) -> Result<()> {
    let weights = WeightsFolder::open(path)?;
    LlamaConfig::read(&path.join("config.json"))?.check_tensors(&weights)
}

/// Loads embedding and head of a model folder.
pub fn load_tables(path: &Path, loading: &Loading<'_>) -> Result<TargetTables> {
    let (config, weights) = open(path)?;
    let dimensions = config.dimensions().map_err(Error::Failed)?;
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
