//! Llama: the family of Llama 1-3, SmolLM2 and every model with `"model_type": "llama"`.
//!
//! Reference: `transformers/models/llama/modeling_llama.py` (Hugging Face transformers 5.8.1), checked against its
//! hidden states, logits and greedy tokens by `tests/goldens`. Shape legend: see `nn`.

use serde_json::{Value, json};
use tch::{Device, Kind};

use super::decoder::{self, Decoder, DecoderFamily, Design};
use super::keys::Keys;
use super::rope_keys;
use super::{Family, ForwardInput, ForwardOutput, GetTensor, PlainModel, TargetInfo, TargetModel};
use crate::error::{Error, Result};
use crate::nn::{Embedding, Head, KvCache};
use crate::weights::quantised;

mod config;

pub use config::LlamaConfig;

/// Row of the table of families.
pub const FAMILY: Family = Family { text_defaults: Some(text_defaults), ..decoder::family::<LlamaConfig>("llama") };

impl DecoderFamily for LlamaConfig {
    fn design(keys: &Keys<'_>) -> Result<Design, String> {
        let config = Self::from_value(keys.values())?;
        let known = serde_json::to_value(&config).map_err(|error| error.to_string())?;
        keys.know(known.as_object().into_iter().flat_map(serde_json::Map::keys).map(String::as_str));
        keys.know(["is_llama_config"]);
        keys.only("rope_interleaved", &Value::Bool(false))?;
        rope_keys::wonder(keys, rope_keys::variant(keys));
        config.design()
    }
}

/// What the text model of a folder of several leaves out: the sizes of the first Llama.
fn text_defaults() -> Value {
    json!({
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 2048,
    })
}

/// Sizes of a model of plain layers, as drafts are, whose configuration has the keys of this family.
pub fn plain_model(values: &Value) -> Result<PlainModel, String> {
    // What drafts are made like is never quantised.
    if let Some(problem) = quantised::configured(values) {
        return Err(problem);
    }
    LlamaConfig::from_value(values)?.plain()
}

/// A Llama model with its weights.
pub struct LlamaTarget {
    config: LlamaConfig,
    decoder: Decoder,
}

impl LlamaTarget {
    /// Builds the model from a function that gives each tensor by name and shape.
    pub fn build(config: LlamaConfig, tensor: &mut GetTensor<'_>) -> Result<Self> {
        let decoder = Decoder::build(&config.design().map_err(Error::Failed)?, tensor)?;
        Ok(Self { config, decoder })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }
}

impl TargetModel for LlamaTarget {
    fn info(&self) -> &TargetInfo {
        self.decoder.info()
    }

    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        self.decoder.new_cache(rows, capacity)
    }

    fn forward(&self, input: &ForwardInput<'_>, cache: Option<&mut KvCache>) -> Result<ForwardOutput> {
        self.decoder.forward(input, cache)
    }

    fn embedding(&self) -> &Embedding {
        self.decoder.embedding()
    }

    fn head(&self) -> &Head {
        self.decoder.head()
    }

    fn kind(&self) -> Kind {
        self.decoder.kind()
    }

    fn device(&self) -> Device {
        self.decoder.device()
    }

    fn devices(&self) -> Vec<Device> {
        self.decoder.devices()
    }
}

#[cfg(test)]
mod tests;
