//! How a target wants to be sampled: its generation_config.json.
//!
//! The rule is Hugging Face's: without `do_sample` a target answers greedily, whatever temperature stands beside it. What
//! the file does not name is not done (Hugging Face falls back to a top-k of 50 there, serving engines do not).

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::gguf::packed;
use crate::nn::Processors;

const FILE: &str = "generation_config.json";

/// Keys that change what a target says and are not supported, with the value that changes nothing.
const UNSUPPORTED: [(&str, f64); 17] = [
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("top_h", 0.0),
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("penalty_alpha", 0.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("min_new_tokens", 0.0),
    ("min_length", 0.0),
    ("guidance_scale", 1.0),
    ("diversity_penalty", 0.0),
];
/// The same for keys that hold no number.
const UNSUPPORTED_LISTS: [&str; 8] = [
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "stop_strings",
    "exponential_decay_length_penalty",
];

/// What a target's own file says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// How tokens are chosen. Greedy without `do_sample`, with what else the file names.
    pub processors: Processors,
    /// What the file asks for and does not get.
    pub warnings: Vec<String>,
}

impl GenerationConfig {
    /// Reads the file of a model folder; a folder without one is sampled greedily.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let Some(text) = packed::read_file(folder, FILE)? else {
            return Ok(Self::default());
        };
        let config: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|error| Error::bad_file(&path, format!("expected a JSON object: {error}")))?;
        Self::from_object(&config).map_err(|problem| {
            Error::bad_file(&path, problem).with_hint("correct it; options of `regen` replace single values")
        })
    }

    fn from_object(config: &Map<String, Value>) -> Result<Self, String> {
        let number = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("{key}: expected a number, got {value}")),
        };
        let sample = match config.get("do_sample") {
            None | Some(Value::Null) => false,
            Some(value) => value.as_bool().ok_or_else(|| format!("do_sample: expected true or false, got {value}"))?,
        };
        let unset = Processors::default();
        let top_k = match config.get("top_k") {
            None | Some(Value::Null) => unset.top_k,
            // -1 is all of them, too.
            Some(value) if value.as_i64() == Some(-1) => 0,
            Some(value) => {
                value.as_u64().ok_or_else(|| format!("top_k: expected a whole number, got {value}"))? as usize
            }
        };
        let temperature = number("temperature")?;
        let processors = Processors {
            temperature: if sample { temperature.unwrap_or(1.0) } else { 0.0 },
            top_k,
            top_p: number("top_p")?.unwrap_or(unset.top_p),
            repetition_penalty: number("repetition_penalty")?.unwrap_or(unset.repetition_penalty),
        };
        processors.check()?;
        let mut warnings = Vec::new();
        for (key, neutral) in UNSUPPORTED {
            if config.get(key).is_some_and(|value| !value.is_null() && value.as_f64() != Some(neutral)) {
                warnings.push(format!("{FILE}: `{key}` = {} is not supported; answers are made without", config[key]));
            }
        }
        let set =
            |value: &Value| !matches!(value, Value::Null | Value::Bool(false)) && *value != Value::Array(Vec::new());
        for key in UNSUPPORTED_LISTS.iter().filter(|key| config.get(**key).is_some_and(set)) {
            warnings.push(format!("{FILE}: `{key}` is not supported; answers are made without"));
        }
        if !sample && temperature.is_some_and(|temperature| temperature != 0.0 && temperature != 1.0) {
            warnings.push(format!(
                "{FILE}: names a temperature and not `do_sample`, so answers are greedy; --temperature samples"
            ));
        }
        Ok(Self { processors, warnings })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Value) -> Result<GenerationConfig, String> {
        GenerationConfig::from_object(config.as_object().unwrap())
    }

    #[test]
    fn a_target_is_sampled_as_its_file_says() {
        let llama = read(json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]})).unwrap();
        let want = Processors { temperature: 0.6, top_p: 0.9, ..Processors::default() };
        assert_eq!((llama.processors, llama.warnings.len()), (want, 0));
        let qwen = json!({"do_sample": true, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0, "num_beams": 1});
        let want = Processors { temperature: 1.0, top_k: 20, top_p: 1.0, repetition_penalty: 1.05 };
        assert_eq!(read(qwen).unwrap(), GenerationConfig { processors: want, warnings: vec![] });
        assert_eq!(read(json!({"bos_token_id": 1, "_from_model_config": true})).unwrap(), GenerationConfig::default());
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(folder.path()).unwrap(), GenerationConfig::default());
        std::fs::write(folder.path().join(FILE), r#"{"repetition_penalty": 1.3}{"top_k": 2}"#).unwrap();
        assert!(GenerationConfig::read(folder.path()).unwrap_err().to_string().contains("expected a JSON object"));
    }

    #[test]
    fn what_is_not_done_is_said() {
        let greedy = read(json!({"temperature": 0.7, "top_p": 0.8})).unwrap();
        assert!(greedy.processors.is_greedy() && greedy.warnings[0].contains("so answers are greedy"), "{greedy:?}");
        let many = read(json!({"do_sample": true, "min_p": 0.05, "no_repeat_ngram_size": 3, "stop_strings": ["x"],
                               "suppress_tokens": [], "typical_p": 1.0, "num_beams": null}))
        .unwrap();
        assert_eq!(many.warnings.len(), 3, "{many:?}");
        assert!(many.warnings[0].contains("`min_p` = 0.05"), "{many:?}");
        for (config, problem) in [
            (json!({"do_sample": 1}), "do_sample: expected true or false, got 1"),
            (json!({"top_k": 1.5}), "top_k: expected a whole number"),
            (json!({"top_p": 0}), "top_p: expected above 0"),
            (json!({"temperature": "warm"}), "temperature: expected a number"),
        ] {
            assert!(read(config).unwrap_err().contains(problem), "{problem}");
        }
    }
}
