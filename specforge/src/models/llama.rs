//! Llama: the family of Llama 1-3, SmolLM2 and every model with `"model_type": "llama"`.
//!
//! Reference: `transformers/models/llama/modeling_llama.py` (Hugging Face transformers 5.8.1), checked against its
//! hidden states, logits and greedy tokens by `tests/goldens`. Shape legend: see `nn`.

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Family, ForwardInput, ForwardOutput, GetTensor, LogitRows, PlainModel, TargetInfo, TargetModel};
use crate::error::{Error, Result};
use crate::nn::rope::RopeTables;
use crate::nn::{Embedding, Head, KvCache, LayerCache, Linear, Masks, Options, PreparedMask, RmsNorm, Rope, attention};
use crate::weights::{WeightsFolder, quantised};

mod config;
mod streamed;

pub use config::LlamaConfig;
use config::{EMBEDDING, HEAD};

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
        let attended = attention(&query, &key, &value, mask, &Options::default()); // [B, N, T, D]
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

impl Layer {
    /// `[B, T, H]` to `[B, T, H]`
    fn forward(
        &self,
        input: &Tensor,
        rope: &RopeTables,
        mask: &PreparedMask,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor {
        // Each block's own output takes the sum: the input itself may have been captured.
        let hidden = self.attention.forward(&self.input_norm.forward(input), rope, mask, cache).g_add_(input);
        self.mlp.forward(&self.post_attention_norm.forward(&hidden)).g_add_(&hidden)
    }
}

/// A Llama model with its weights.
pub struct LlamaTarget {
    config: LlamaConfig,
    info: TargetInfo,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Head,
    rope: Rope,
}

/// Row of the table of families.
pub const FAMILY: Family = Family {
    model_type: "llama",
    info: |values| LlamaConfig::from_value(values)?.info(),
    tensors: |values| Ok(LlamaConfig::from_value(values)?.tensors()),
    check: Some(|values, weights| read(values)?.check_tensors(weights)),
    correct: Some(correct),
    build: |values, device, tensor| Ok(Box::new(LlamaTarget::build(read(values)?, device, tensor)?)),
    part: Some(streamed::part),
    tables,
    table_names: &[EMBEDDING, HEAD],
};

fn read(values: &Value) -> Result<LlamaConfig> {
    LlamaConfig::from_value(values).map_err(Error::Failed)
}

/// Takes the head from the files, whatever config.json says of it.
fn correct(mut values: Value, weights: &WeightsFolder) -> Result<(Value, Vec<String>)> {
    let (config, warnings) = read(&values)?.fit(weights)?;
    values["tie_word_embeddings"] = config.tie_word_embeddings.into();
    Ok((values, warnings))
}

fn tables(values: &Value, tensor: &mut GetTensor<'_>) -> Result<(Embedding, Head)> {
    let config = read(values)?;
    let shape = [config.vocab_size, config.hidden_size];
    let embedding = tensor(EMBEDDING, &shape)?;
    let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { tensor(HEAD, &shape)? };
    Ok((Embedding::plain(embedding), Head::plain(head)))
}

/// Sizes of a model of plain layers, as drafts are, whose configuration has the keys of this family.
pub fn plain_model(values: &Value) -> Result<PlainModel, String> {
    // What drafts are made like is never quantised.
    if let Some(problem) = quantised::configured(values) {
        return Err(problem);
    }
    LlamaConfig::from_value(values)?.plain()
}

impl LlamaTarget {
    /// Builds the model from a function that gives each tensor by name and shape.
    pub fn build(config: LlamaConfig, device: Device, tensor: &mut GetTensor<'_>) -> Result<Self> {
        let shapes: std::collections::HashMap<String, Vec<i64>> = config.tensors().into_iter().collect();
        let mut get = |name: String| tensor(&name, &shapes[&name]);
        let embedding = get(EMBEDDING.to_owned())?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            layers.push(build_layer(&config, &format!("model.layers.{index}"), &mut get)?);
        }
        let norm = RmsNorm { weight: get("model.norm.weight".to_owned())?, epsilon: config.rms_norm_eps };
        let head = if config.tie_word_embeddings { embedding.shallow_clone() } else { get(HEAD.to_owned())? };
        let info = config.info().map_err(Error::Failed)?;
        let rope = Rope::new(info.template.rope, device);
        let (embedding, head) = (Embedding::plain(embedding), Head::plain(head));
        Ok(Self { config, info, embedding, layers, norm, head, rope })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
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
    fn info(&self) -> &TargetInfo {
        &self.info
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let options = (self.kind(), self.device());
        let layer = LayerCache::full(self.config.groups(), self.config.head_dim());
        KvCache::new(&vec![layer; self.layers.len()], rows, capacity, options)
    }

    fn forward(&self, input: &ForwardInput<'_>, mut cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        let _guard = tch::no_grad_guard();
        input.check(self.layers.len(), cache.as_deref())?;
        let (rows, tokens) = input.ids.size2()?;
        let last = self.layers.len();
        let mut masks = match cache.as_deref_mut() {
            Some(cache) => cache.masks(input.mask, input.positions),
            None => Masks::new(input.mask, input.positions),
        };
        let mask = masks.of(None);
        let rope = self.rope.tables(input.positions, self.kind());
        let mut captured: Vec<(usize, Tensor)> = Vec::new();
        let mut keep = |index: usize, hidden: &Tensor| {
            if input.capture.contains(&index) {
                captured.push((index, hidden.shallow_clone()));
            }
        };

        // A token id outside the vocabulary is an error of libtorch here, and the only one an input can cause from now on.
        let mut hidden = self.embedding.look_up(input.ids)?; // [B, T, H]
        for (index, layer) in self.layers.iter().enumerate() {
            keep(index, &hidden);
            let cache = cache.as_mut().map(|cache| (&mut **cache, index));
            hidden = layer.forward(&hidden, &rope, mask, cache);
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
            return Ok(output(input, &captured, logits.map(|rows| self.head.logits(&rows))));
        }
        let logits = match input.logits {
            LogitRows::Rows(index) => {
                let chosen = hidden.view([rows * tokens, -1]).index_select(0, index); // [R, H]
                Some(self.head.logits(&self.norm.forward(&chosen))) // [R, V]
            }
            LogitRows::None | LogitRows::All => None,
        };
        Ok(output(input, &captured, logits))
    }

    fn embedding(&self) -> &Embedding {
        &self.embedding
    }

    fn head(&self) -> &Head {
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
