//! The run configuration: the sum of the rooms' own sections, read strictly from one JSON file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Kind;

use crate::checkpoint::RetentionConfig;
use crate::data::DataConfig;
use crate::dist::ParallelConfig;
use crate::draft;
use crate::draft::vocabulary::VocabularyKeys;
use crate::error::{Error, Result};
use crate::eval::acceptance::in_training::EvalConfig;
use crate::optim::OptimConfig;
use crate::strict;
use crate::train::TrainConfig;

/// A whole configuration file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The model to draft for.
    pub target: TargetConfig,
    /// The draft; its keys depend on `algorithm`.
    pub draft: Value,
    /// Conversations and how they become tokens.
    pub data: DataConfig,
    /// Optimizer and schedule.
    #[serde(default)]
    pub optim: OptimConfig,
    /// The loop.
    #[serde(default)]
    pub train: TrainConfig,
    /// Which checkpoints are kept.
    #[serde(default)]
    pub checkpoint: RetentionConfig,
    /// Decoding of held-out prompts on the way.
    #[serde(default)]
    pub eval: EvalConfig,
    /// Several processes that train together.
    #[serde(default)]
    pub parallel: ParallelConfig,
}

/// The `target` section.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Hugging Face folder.
    pub path: PathBuf,
    /// Element type of target and draft; the optimizer's masters are float32 in any case.
    #[serde(default)]
    pub dtype: Dtype,
    /// Keep every document's hidden states in memory, so that later epochs do not run the target again.
    #[serde(default)]
    pub keep_hidden_states: bool,
    /// A store that `specforge capture` made: hidden states are read from it, and the target's layers are not loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_store: Option<PathBuf>,
    /// The target's config.json, for `--plan` where the folder is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
}

/// Element types a model can run in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single.
    #[default]
    Float32,
    /// Brain float.
    Bfloat16,
    /// IEEE half.
    Float16,
}

impl Dtype {
    /// Name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }

    /// libtorch's name.
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Float32 => Kind::Float,
            Dtype::Bfloat16 => Kind::BFloat16,
            Dtype::Float16 => Kind::Half,
        }
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "float32" | "f32" => Ok(Dtype::Float32),
            "bfloat16" | "bf16" => Ok(Dtype::Bfloat16),
            "float16" | "f16" => Ok(Dtype::Float16),
            other => Err(format!("expected float32, bfloat16 or float16, got `{other}`")),
        }
    }
}

impl RunConfig {
    /// Reads a file, applies `--set` overrides, fills in defaults and checks everything that needs no other file.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let mut value: Value = serde_json::from_str(&text).map_err(|error| Error::BadLine {
            path: path.to_path_buf(),
            line: error.line(),
            problem: format!("not valid JSON: {error}"),
        })?;
        for text in overrides {
            set(&mut value, text)?;
        }
        Self::from_value(&value)
    }

    /// Reads a configuration value.
    pub fn from_value(value: &Value) -> Result<Self> {
        let mut config: Self = strict::from_value(value, "")?;
        config.draft = (draft::algorithm(&config.draft)?.resolve)(&config.draft)?;
        VocabularyKeys::read(&config.draft)?;
        if config.target.keep_hidden_states && config.target.feature_store.is_some() {
            let problem = "cannot be used with target.feature_store, which holds the states already";
            return Err(Error::config("target.keep_hidden_states", problem).with_hint("remove one of the two"));
        }
        config.train.validate()?;
        config.optim.validate()?;
        config.eval.validate()?;
        config.parallel.validate()?;
        Ok(config)
    }
}

/// Deepest key that is set. What is nested deeper than a file may be ends the program when it is walked.
const DEEPEST_KEY: usize = 32;

/// Applies one `a.b=c`. `c` is JSON where it parses as such, text otherwise.
fn set(root: &mut Value, text: &str) -> Result<()> {
    let (key, value) = text
        .split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .ok_or_else(|| Error::Usage(format!("--set: expected key=value, got `{text}`")))?;
    if key.split('.').count() > DEEPEST_KEY {
        return Err(Error::Usage(format!("--set: expected a key of at most {DEEPEST_KEY} parts, got `{key}`")));
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    let mut place = root;
    for part in key.split('.') {
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let object = place
            .as_object_mut()
            .ok_or_else(|| Error::Usage(format!("--set {text}: `{part}` is inside a value that has no keys")))?;
        place = object.entry(part).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn minimal() -> Value {
        json!({"target": {"path": "model"}, "draft": {"algorithm": "medusa"}, "data": {"train": ["a.jsonl"]}})
    }

    #[test]
    fn overrides_are_checked_like_the_file() {
        let mut value = minimal();
        set(&mut value, "optim.learning_rate=1e-4").unwrap();
        set(&mut value, "train.output_dir=runs/x").unwrap();
        set(&mut value, "draft.num_heads=5").unwrap();
        let config = RunConfig::from_value(&value).unwrap();
        assert_eq!(config.optim.learning_rate, 1e-4);
        assert_eq!(config.train.output_dir, Path::new("runs/x"));
        assert_eq!(config.draft["num_heads"], 5);
        set(&mut value, "train.output_dri=x").unwrap();
        let error = RunConfig::from_value(&value).unwrap_err().to_string();
        assert_eq!(error, "configuration: `train.output_dri`: unknown key; did you mean `output_dir`?");
        assert!(set(&mut value, "train").is_err());
        assert!(set(&mut value, "train.seed.x=1").is_err() || RunConfig::from_value(&value).is_err());
    }

    #[test]
    fn a_wrong_algorithm_or_draft_key_is_named() {
        let mut value = minimal();
        set(&mut value, "draft.num_hedas=5").unwrap();
        let error = RunConfig::from_value(&value).unwrap_err().to_string();
        assert_eq!(error, "configuration: `draft.num_hedas`: unknown key; did you mean `num_heads`?");
        set(&mut value, "draft.algorithm=medsua").unwrap();
        let error = RunConfig::from_value(&value).unwrap_err().to_string();
        assert_eq!(error, "configuration: `draft.algorithm`: expected one of medusa, eagle3, got `medsua`");
    }
}
