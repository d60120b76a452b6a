//! The run configuration: the sum of the rooms' own sections, read strictly from one JSON file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::checkpoint::RetentionConfig;
use crate::data::DataConfig;
use crate::dist::ParallelConfig;
use crate::draft;
use crate::draft::vocabulary::VocabularyKeys;
use crate::error::{Error, Result};
use crate::eval::acceptance::in_training::{self, EvalConfig};
use crate::gguf::packed;
use crate::hub;
use crate::models;
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
    /// Hugging Face folder, or a GGUF file.
    pub path: PathBuf,
    /// Element type of target and draft; the optimizer's masters are float32 in any case. Without one, [`RunConfig::on`]
    /// puts that of the device here: float32 on the CPU, that of the target's files on CUDA.
    #[serde(default)]
    pub dtype: Option<Dtype>,
    /// Keep documents' hidden states in the host's memory, so that later epochs do not run the target again.
    #[serde(default)]
    pub keep_hidden_states: bool,
    /// Most MiB of them that a process keeps; half of what is free at its start, shared with the machine's other processes,
    /// without a number.
    #[serde(default)]
    pub keep_hidden_mib: Option<u64>,
    /// A store that `specforge capture` made: hidden states are read from it, and the target's layers are not loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_store: Option<PathBuf>,
    /// Devices that share the target's layers, such as `cuda:0` or `cuda:0=20`; all layers are with the draft where there
    /// are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// The target's config.json, for `--plan` where the folder is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
}

impl TargetConfig {
    /// Element type of target and draft; float32 as long as no device has been chosen.
    pub fn element_type(&self) -> Dtype {
        self.dtype.unwrap_or_default()
    }
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

    /// The type that a target in this folder runs in: what was `given`, else float32 on the CPU, which computes fastest in
    /// it, and that of its files on CUDA, which computes fastest in 16 bits and need not hold more than was trained.
    pub fn of_target(given: Option<Self>, folder: &Path, device: Device) -> Result<Self> {
        match (given, device) {
            (Some(given), _) => Ok(given),
            (None, Device::Cuda(_)) => models::stored_kind(folder).map(Self::holding),
            (None, _) => Ok(Dtype::default()),
        }
    }

    /// The type that holds numbers of this kind.
    fn holding(kind: Kind) -> Self {
        match kind {
            Kind::BFloat16 => Dtype::Bfloat16,
            Kind::Half => Dtype::Float16,
            _ => Dtype::Float32,
        }
    }

    /// The type that a config.json names as its files'.
    fn named(config: &Value) -> Option<Self> {
        let name = config.get("dtype").or_else(|| config.get("torch_dtype"))?.as_str()?;
        name.strip_prefix("torch.").unwrap_or(name).parse().ok()
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
        let value: Value = serde_json::from_str(&text).map_err(|error| Error::BadLine {
            path: path.to_path_buf(),
            line: error.line(),
            problem: format!("not valid JSON: {error}"),
        })?;
        Self::with(value, overrides)
    }

    /// Reads a configuration value with `--set` overrides.
    pub fn with(mut value: Value, overrides: &[String]) -> Result<Self> {
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
        models::Spread::parse(&config.target.devices).map_err(|problem| Error::config("target.devices", problem))?;
        config.train.validate()?;
        config.optim.validate()?;
        config.eval.validate()?;
        config.parallel.validate()?;
        config.checkpoint.best_metric = config.best_metric()?;
        Ok(config)
    }

    /// The configuration of a run on this device, with the target's element type decided.
    pub fn on(&self, device: Device) -> Result<Self> {
        let mut config = self.clone();
        config.target.dtype = Some(Dtype::of_target(self.target.dtype, &self.target.path, device)?);
        Ok(config)
    }

    /// The same for a plan, which needs neither device nor files where the type is given, and takes the word of
    /// `target.config` where there are no files.
    pub fn planned(&self, device: impl FnOnce() -> Result<Device>) -> Result<Self> {
        if self.target.dtype.is_some() {
            return Ok(self.clone());
        }
        let device = device()?;
        let path = &self.target.path;
        let named = match &self.target.config {
            Some(named) if !packed::has_file(path, "config.json") => Some(named.clone()),
            // Of a model on a hub, a plan has no weights.
            _ if hub::named(path).is_some() => {
                packed::read_file(path, "config.json")?.and_then(|text| serde_json::from_slice(&text).ok())
            }
            _ => None,
        };
        match named {
            Some(named) if device.is_cuda() => {
                let mut config = self.clone();
                config.target.dtype = Dtype::named(&named);
                Ok(config)
            }
            _ => self.on(device),
        }
    }

    /// `checkpoint.best_metric` as checkpoints name it: the log has the same names behind `eval/`. A name that no
    /// evaluation of this run measures would choose nothing, without a word.
    fn best_metric(&self) -> Result<Option<String>> {
        let Some(asked) = &self.checkpoint.best_metric else {
            return Ok(None);
        };
        let name = asked.strip_prefix("eval/").unwrap_or(asked);
        let refuse = |problem: String| Error::config("checkpoint.best_metric", problem);
        if self.data.eval.is_empty() && self.data.eval_fraction == 0.0 {
            let problem = format!("nothing is held out, so `{name}` is never measured");
            return Err(refuse(problem).with_hint("set data.eval_fraction or data.eval, or best_metric to null"));
        }
        let known = (draft::algorithm(&self.draft)?.figures)(&self.draft)?;
        let decodes = self.eval.every > 0;
        if known.iter().any(|figure| figure == name) || decodes && in_training::can_measure(name) {
            return Ok(Some(name.to_owned()));
        }
        let decoded = if decodes { format!("{}, depthN/accepted, ", in_training::METRIC) } else { String::new() };
        let error = refuse(format!("expected one of {decoded}{}, got `{asked}`", known.join(", ")));
        Err(match in_training::can_measure(name) {
            true => error.with_hint("it is measured where eval.every is above 0"),
            false => error,
        })
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

    /// Where a device is decided, so is the type; a plan takes config.json's word where there are no files.
    #[test]
    fn the_targets_type_follows_the_device() {
        let mut value = minimal();
        let dtype = |config: Result<RunConfig>| config.unwrap().target.element_type().name();
        let read = |value: &Value| RunConfig::from_value(value).unwrap();
        assert_eq!(dtype(read(&value).on(Device::Cpu)), "float32");
        assert!(read(&value).on(Device::Cuda(0)).is_err(), "there are no files to look at");
        set(&mut value, "target.config={\"torch_dtype\": \"bfloat16\"}").unwrap();
        assert_eq!(dtype(read(&value).planned(|| Ok(Device::Cuda(0)))), "bfloat16");
        assert_eq!(dtype(read(&value).planned(|| Ok(Device::Cpu))), "float32");
        set(&mut value, "target.dtype=float16").unwrap();
        let never = || Err(Error::Usage("no device is needed".to_owned()));
        assert_eq!(dtype(read(&value).planned(never)), "float16");
        assert_eq!(dtype(read(&value).on(Device::Cuda(0))), "float16");
    }

    #[test]
    fn the_best_metric_is_one_that_is_measured() {
        let read = |changes: &[&str]| {
            let mut value = minimal();
            changes.iter().for_each(|change| set(&mut value, change).unwrap());
            RunConfig::from_value(&value).map(|config| config.checkpoint.best_metric)
        };
        let best =
            |name: &str, more: &[&str]| read(&[&[format!("checkpoint.best_metric={name}").as_str()], more].concat());
        assert_eq!(read(&[]).unwrap(), None);
        for name in ["loss", "simulated_acceptance_length", "head1/loss", "head3/chain"] {
            assert_eq!(best(name, &[]).unwrap().as_deref(), Some(name));
            assert_eq!(best(&format!("eval/{name}"), &[]).unwrap().as_deref(), Some(name));
        }
        for name in ["acceptance_length", "depth1/accepted", "eval/depth12/accepted"] {
            let error = best(name, &[]).unwrap_err();
            assert!(error.hint().unwrap().contains("eval.every"), "{error}");
            assert!(best(name, &["eval.every=5"]).unwrap().is_some());
        }
        for name in ["los", "eval/", "train/loss", "head4/loss", "step1/loss", "eval/eval/loss", "depth0/accepted"] {
            let error = best(name, &["eval.every=5"]).unwrap_err().to_string();
            assert!(error.contains("checkpoint.best_metric") && error.contains("head2/top5"), "{error}");
            assert!(error.contains("acceptance_length, depthN/accepted, loss, simulated_acceptance_length"), "{error}");
        }
        assert!(best("step7/loss", &["draft.algorithm=eagle3"]).unwrap().is_some());
        assert!(best("loss", &["data.eval_fraction=0"]).unwrap_err().to_string().contains("nothing is held out"));
    }

    #[test]
    fn a_wrong_algorithm_or_draft_key_is_named() {
        let mut value = minimal();
        set(&mut value, "draft.num_hedas=5").unwrap();
        let error = RunConfig::from_value(&value).unwrap_err().to_string();
        assert_eq!(error, "configuration: `draft.num_hedas`: unknown key; did you mean `num_heads`?");
        set(&mut value, "draft.algorithm=medsua").unwrap();
        let error = RunConfig::from_value(&value).unwrap_err().to_string();
        let names =
            "medusa, eagle3, peagle, next_scale, masked_diffusion, dflash, dflash2, dspark, lilicorr, domino, xpress";
        assert_eq!(error, format!("configuration: `draft.algorithm`: expected one of {names}, got `medsua`"));
    }
}
