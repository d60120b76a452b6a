//! A family of models that only tests have. It does what the built-in one does not: a sliding window on every other layer,
//! no positions on the others, scores bent by a soft cap, a sink for each head, a scaled embedding, and a head with a bias,
//! a scale and a soft cap. Half of a head's channels turn.
//!
//! Shape legend: see `nn`.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use specforge::error::{Error, Result};
use specforge::models::{
    Family, ForwardInput, ForwardOutput, GetTensor, LayerKind, LayerShape, LogitRows, ParameterCounts, TargetInfo,
    TargetModel,
};
use specforge::nn::rope::RopeTables;
use specforge::nn::{
    Embedding, Head, HeadForm, KvCache, LayerCache, Linear, Masks, Options, PreparedMask, RmsNorm, Rope, RopeConfig,
    RopeScaling, attention, noise,
};
use specforge::{models, weights};
use tch::{Device, Kind, Tensor};

const EMBEDDING: &str = "embedding.weight";
const HEAD: &str = "head.weight";
const BIAS: &str = "head.bias";
const EPSILON: f64 = 1e-5;
/// Soft caps of scores and of logits.
const SCORES: f64 = 6.0;
const LOGITS: f64 = 9.0;

/// Row of the table of families.
pub static FAMILY: Family = Family {
    model_type: "windowed",
    info: |values| Ok(Config::read(values)?.info()),
    tensors: |values| Ok(Config::read(values)?.tensors()),
    check: None,
    correct: None,
    build: |values, device, tensor| Ok(Box::new(Windowed::build(values, device, tensor)?)),
    spreads: false,
    part: None,
    tables,
    table_names: &[EMBEDDING, HEAD, BIAS],
    text_defaults: None,
};

/// Adds the family to the program's table.
pub fn register() {
    models::add_family(&FAMILY).unwrap();
}

#[derive(Debug, Clone, Deserialize)]
struct Config {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: i64,
    head_dim: i64,
    vocab_size: i64,
    max_position_embeddings: i64,
    sliding_window: i64,
}

impl Config {
    fn read(values: &Value) -> Result<Self, String> {
        let config: Self = Self::deserialize(values).map_err(|error| error.to_string())?;
        match config.num_attention_heads % config.num_key_value_heads.max(1) == 0 && config.sliding_window > 0 {
            true => Ok(config),
            false => {
                Err("`num_key_value_heads`, `sliding_window`: expected a divisor of the heads, a width".to_owned())
            }
        }
    }

    fn window(&self, layer: usize) -> Option<i64> {
        layer.is_multiple_of(2).then_some(self.sliding_window)
    }

    fn rope(&self, channels: i64) -> RopeConfig {
        let (theta, max_position_embeddings) = (1000.0, self.max_position_embeddings);
        RopeConfig { theta, head_dim: channels, max_position_embeddings, scaling: RopeScaling::Default }
    }

    fn embedding_scale(&self) -> f64 {
        (self.hidden_size as f64).sqrt()
    }

    fn form(&self) -> HeadForm {
        HeadForm { bias: true, scale: 0.5, softcap: Some(LOGITS) }
    }

    fn info(&self) -> TargetInfo {
        let numbers = |shape: &[i64]| shape.iter().product::<i64>() as u64;
        let all = self.tensors().iter().map(|(_, shape)| numbers(shape)).sum();
        let tables = numbers(&[2 * self.vocab_size, self.hidden_size]) + self.vocab_size as u64;
        let kind = |layer| self.window(layer).map_or(LayerKind::Full, LayerKind::Window);
        TargetInfo {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            layers: (0..self.num_hidden_layers).map(kind).collect(),
            max_position_embeddings: self.max_position_embeddings,
            parameters: ParameterCounts { all, tables, a_token: all - tables },
            widest: self.intermediate_size,
            head: self.form(),
            embedding_scale: self.embedding_scale(),
            template: LayerShape {
                intermediate_size: self.intermediate_size,
                num_attention_heads: self.num_attention_heads,
                num_key_value_heads: self.num_key_value_heads,
                head_dim: self.head_dim,
                rms_norm_eps: EPSILON,
                rope: self.rope(self.head_dim),
            },
            diffusion: None,
            pictures: None,
        }
    }

    fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let (hidden, width) = (self.hidden_size, self.intermediate_size);
        let (query, group) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut tensors = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            let mut push = |name: &str, shape: &[i64]| tensors.push((format!("layers.{layer}.{name}"), shape.to_vec()));
            push("norm.weight", &[hidden]);
            push("query.weight", &[query, hidden]);
            push("key.weight", &[group, hidden]);
            push("value.weight", &[group, hidden]);
            push("output.weight", &[hidden, query]);
            push("sinks", &[self.num_attention_heads]);
            push("after.norm.weight", &[hidden]);
            push("up.weight", &[width, hidden]);
            push("down.weight", &[hidden, width]);
        }
        tensors.push(("norm.weight".to_owned(), vec![hidden]));
        tensors.push((HEAD.to_owned(), vec![self.vocab_size, hidden]));
        tensors.push((BIAS.to_owned(), vec![self.vocab_size]));
        tensors
    }
}

fn read(values: &Value) -> Result<Config> {
    Config::read(values).map_err(Error::Failed)
}

fn tables(values: &Value, tensor: &mut GetTensor<'_>) -> Result<(Embedding, Head)> {
    let config = read(values)?;
    let shape = [config.vocab_size, config.hidden_size];
    let embedding = Embedding { table: tensor(EMBEDDING, &shape)?, scale: config.embedding_scale() };
    let HeadForm { scale, softcap, .. } = config.form();
    let bias = Some(tensor(BIAS, &shape[..1])?);
    Ok((embedding, Head { weight: tensor(HEAD, &shape)?, bias, scale, softcap }))
}

struct Layer {
    norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    sinks: Tensor,
    after: RmsNorm,
    up: Linear,
    down: Linear,
    window: Option<i64>,
}

impl Layer {
    fn build(layer: usize, config: &Config, get: &mut dyn FnMut(String) -> Result<Tensor>) -> Result<Self> {
        let mut at = |name: &str| get(format!("layers.{layer}.{name}"));
        let (norm, after) = (at("norm.weight")?, at("after.norm.weight")?);
        let mut linear = |name: &str| Ok::<_, Error>(Linear { weight: at(&format!("{name}.weight"))?, bias: None });
        let [query, key, value, output] = ["query", "key", "value", "output"].map(&mut linear);
        let [up, down] = ["up", "down"].map(&mut linear);
        Ok(Self {
            norm: RmsNorm { weight: norm, epsilon: EPSILON },
            query: query?,
            key: key?,
            value: value?,
            output: output?,
            sinks: at("sinks")?,
            after: RmsNorm { weight: after, epsilon: EPSILON },
            up: up?,
            down: down?,
            window: config.window(layer),
        })
    }

    /// `[B, T, H]` to `[B, T, H]`
    fn forward(
        &self,
        hidden: &Tensor,
        config: &Config,
        rope: &RopeTables,
        mask: &PreparedMask,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Tensor {
        let (rows, tokens, _) = hidden.size3().unwrap();
        let normed = self.norm.forward(hidden);
        let split = |linear: &Linear| {
            linear.forward(&normed).view([rows, tokens, -1, config.head_dim]).transpose(1, 2) // [B, heads, T, D]
        };
        let (mut query, mut key, value) = (split(&self.query), split(&self.key), split(&self.value));
        if self.window.is_some() {
            (query, key) = (rope.rotate(&query), rope.rotate(&key));
        }
        let (key, value) = match cache {
            Some((cache, layer)) => cache.write(layer, &key, &value),
            None => (key, value),
        };
        let options = Options { softcap: Some(SCORES), sinks: Some(&self.sinks), ..Options::default() };
        let attended = attention(&query, &key, &value, mask, &options); // [B, N, T, D]
        let hidden = hidden + self.output.forward(&attended.transpose(1, 2).reshape([rows, tokens, -1]));
        &hidden + self.down.forward(&self.up.forward(&self.after.forward(&hidden)).tanh())
    }
}

/// A model with its weights.
pub struct Windowed {
    config: Config,
    info: TargetInfo,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Head,
    rope: Rope,
}

impl Windowed {
    fn build(values: &Value, device: Device, tensor: &mut GetTensor<'_>) -> Result<Self> {
        let config = read(values)?;
        let (embedding, head) = tables(values, tensor)?;
        let shapes: std::collections::HashMap<String, Vec<i64>> = config.tensors().into_iter().collect();
        let mut get = |name: String| tensor(&name, &shapes[&name]);
        let norm = RmsNorm { weight: get("norm.weight".to_owned())?, epsilon: EPSILON };
        let layers = (0..config.num_hidden_layers).map(|layer| Layer::build(layer, &config, &mut get));
        let layers = layers.collect::<Result<_>>()?;
        let (info, rope) = (config.info(), Rope::new(config.rope(config.head_dim / 2), device));
        Ok(Self { config, info, embedding, layers, norm, head, rope })
    }
}

impl TargetModel for Windowed {
    fn info(&self) -> &TargetInfo {
        &self.info
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let (groups, dim) = (self.config.num_key_value_heads, self.config.head_dim);
        let layer =
            |layer: &Layer| LayerCache::Attention { groups, key_dim: dim, value_dim: dim, window: layer.window };
        let layers: Vec<LayerCache> = self.layers.iter().map(layer).collect();
        KvCache::new(&layers, rows, capacity, (self.kind(), self.device()))
    }

    fn forward(&self, input: &ForwardInput<'_>, mut cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        let _guard = tch::no_grad_guard();
        input.check(self.layers.len(), cache.as_deref())?;
        let mut hidden = self.embedding.look_up(input.ids)?; // [B, T, H]
        let rope = self.rope.tables(input.positions, self.kind());
        let mut masks = match cache.as_deref_mut() {
            Some(cache) => cache.masks(input.mask, input.positions),
            None => Masks::new(input.mask, input.positions),
        };
        let mut states = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            states.push(hidden.shallow_clone());
            let cache = cache.as_mut().map(|cache| (&mut **cache, index));
            hidden = layer.forward(&hidden, &self.config, &rope, masks.of(layer.window), cache);
        }
        hidden = self.norm.forward(&hidden);
        states.push(hidden.shallow_clone());
        let rows = hidden.flatten(0, 1); // [B * T, H]
        let logits = match input.logits {
            LogitRows::None => None,
            LogitRows::All => Some(self.head.logits(&rows)),
            LogitRows::Rows(index) => Some(self.head.logits(&rows.index_select(0, index))),
        };
        let hidden = input.capture.iter().map(|&index| states[index].shallow_clone()).collect();
        Ok(ForwardOutput { hidden, logits })
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

/// config.json of a small model that sees four tokens through its windows.
pub fn config(vocab_size: i64) -> Value {
    json!({
        "model_type": FAMILY.model_type, "architectures": ["Windowed"], "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": vocab_size, "max_position_embeddings": 256, "sliding_window": 4,
    })
}

/// A random tensor of a model, by its place among all.
pub fn random(name: &str, shape: &[i64], stream: u64) -> Tensor {
    match name {
        name if name.ends_with("norm.weight") => noise::normal(shape, 0.1, 9, stream) + 1.0,
        EMBEDDING => noise::normal(shape, 0.2, 9, stream),
        HEAD => noise::normal(shape, 1.0, 9, stream),
        _ => noise::normal(shape, 0.3, 9, stream),
    }
}

/// Writes a random model's configuration and weights.
pub fn write(folder: &Path, vocab_size: i64) {
    fs::create_dir_all(folder).unwrap();
    let config = config(vocab_size);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors = Config::read(&config).unwrap().tensors().into_iter().zip(0..);
    let tensors: Vec<(String, Tensor)> =
        tensors.map(|((name, shape), stream)| (name.clone(), random(&name, &shape, stream))).collect();
    weights::write_tensors(&folder.join("model.safetensors"), &tensors, &[]).unwrap();
}

/// The same model in an element type.
pub fn model(vocab_size: i64, kind: Kind) -> Box<dyn TargetModel> {
    let mut stream = 0..;
    let config = config(vocab_size);
    let streams: std::collections::HashMap<String, u64> =
        Config::read(&config).unwrap().tensors().into_iter().map(|(name, _)| name).zip(&mut stream).collect();
    let mut tensor = |name: &str, shape: &[i64]| Ok(random(name, shape, streams[name]).to_kind(kind));
    (FAMILY.build)(&config, Device::Cpu, &mut tensor).unwrap()
}
