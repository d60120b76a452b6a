//! A transformer from its files. The original names are kept: a checkpoint of the paper's authors is read as it is, as safetensors
//! or as `torch.save` wrote it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::config::VarConfig;
use super::model::Var;
use crate::error::{Error, Result};
use crate::strict;
use crate::weights::{WeightsFolder, torch};

/// Buffer of each token's scale.
const LEVELS: &str = "lvl_1L";
/// Buffer of what each token sees of the others: 0, or minus infinity.
const MASK: &str = "attn_bias_for_masking";
/// End of the name of the bias that keys do not have: zeros.
const NO_BIAS: &str = ".attn.zero_k_bias";

/// A transformer, and what its user should be told of its files.
#[derive(Debug)]
pub struct LoadedVar {
    /// The model.
    pub model: Var,
    /// Keys of config.json that nobody read.
    pub strange: Vec<String>,
}

/// Loads the transformer of a folder with `model.safetensors` or a `.pth`, and config.json where there is one; or of a file of
/// weights, whose configuration is the file of its name that ends in `.json`.
pub fn load_var(path: &Path, device: Device) -> Result<LoadedVar> {
    let weights = torch::open_either(path)?;
    let (config, strange) = config_at(path, &weights)?;
    Ok(LoadedVar { model: var_of(&weights, config, device)?, strange })
}

/// The configuration of the same, from its config.json and headers alone.
pub fn read_config(path: &Path) -> Result<VarConfig> {
    Ok(config_at(path, &torch::open_either(path)?)?.0)
}

fn config_at(path: &Path, weights: &WeightsFolder) -> Result<(VarConfig, Vec<String>)> {
    let (values, place) = match beside(path) {
        Some(file) => (Some(read_json(&file)?), file),
        None => (None, path.to_path_buf()),
    };
    config_of(weights, values.as_ref()).map_err(|problem| Error::bad_file(&place, problem))
}

/// The configuration of tensors and, where there is one, of a config.json; and the keys that nobody read.
pub fn config_of(weights: &WeightsFolder, values: Option<&Value>) -> Result<(VarConfig, Vec<String>), String> {
    let levels = match weights.contains(LEVELS) {
        true => Some(levels_of(weights)?),
        false => None,
    };
    VarConfig::read(values, &|name| weights.shape(name).map(<[i64]>::to_vec), levels.as_deref())
}

/// The model of tensors, in float32 or, where they are stored so, float64. Derived buffers are compared with what they should
/// be; what is neither a parameter nor one of them is refused.
pub fn var_of(weights: &WeightsFolder, config: VarConfig, device: Device) -> Result<Var> {
    let expected = config.tensors();
    weights.check(&expected, |name| name == LEVELS || name == MASK || name.ends_with(NO_BIAS))?;
    weights.check_numbers(&expected)?;
    check_buffers(weights, &config)?;
    let is_double = expected.iter().any(|(name, _)| weights.kind(name) == Some(Kind::Double));
    let kind = if is_double { Kind::Double } else { Kind::Float };
    Var::build(config, &mut |name, _| weights.load(name, kind, device))
}

/// The configuration that lies beside weights.
fn beside(path: &Path) -> Option<PathBuf> {
    let file = if path.is_dir() { path.join("config.json") } else { path.with_extension("json") };
    Some(file).filter(|file| file.is_file())
}

fn read_json(file: &Path) -> Result<Value> {
    let text = std::fs::read(file).map_err(Error::io("read", file))?;
    let values: Value = strict::from_json(&text).map_err(|problem| Error::bad_file(file, problem))?;
    match values.is_object() {
        true => Ok(values),
        false => Err(Error::bad_file(file, "expected a JSON object")),
    }
}

/// A buffer as it is stored: unlike a weight, one may hold infinity.
fn buffer(weights: &WeightsFolder, name: &str) -> Result<Option<Tensor>, String> {
    let (Some(bytes), Some(shape), Some(kind)) = (weights.bytes(name), weights.shape(name), weights.kind(name)) else {
        return Ok(None);
    };
    let stored = Tensor::f_from_data_size(bytes, shape, kind).map_err(|error| format!("`{name}`: {error}"))?;
    Ok(Some(stored))
}

/// The levels of a file's tokens.
fn levels_of(weights: &WeightsFolder) -> Result<Vec<i64>, String> {
    let stored = buffer(weights, LEVELS)?.ok_or_else(|| format!("`{LEVELS}` is not there"))?;
    if !matches!(stored.kind(), Kind::Int64 | Kind::Int) {
        return Err(format!("`{LEVELS}`: expected whole numbers, got {:?}", stored.kind()));
    }
    let flat = stored.to_kind(Kind::Int64).flatten(0, -1);
    Vec::try_from(flat).map_err(|error| format!("`{LEVELS}`: {error}"))
}

/// Refuses derived buffers that are not what they are derived from: whoever wrote them computed something else.
fn check_buffers(weights: &WeightsFolder, config: &VarConfig) -> Result<()> {
    let bad = |name: &str, problem: String| {
        Error::bad_file(weights.file_of(name), format!("`{name}`: {problem}")).with_hint(
            "the buffer follows from patch_nums and is not needed: remove it, or find out which of the two is meant",
        )
    };
    let (levels, length) = (Tensor::from_slice(&config.levels()), config.length());
    let check = |name: &str, want: &Tensor| -> Result<()> {
        let Some(stored) = buffer(weights, name).map_err(|problem| bad(name, problem))? else { return Ok(()) };
        if stored.size() != want.size() {
            return Err(bad(name, format!("expected shape {:?}, got {:?}", want.size(), stored.size())));
        }
        let wrong = stored.to_kind(want.kind()).not_equal_tensor(want).flatten(0, -1).nonzero();
        if wrong.size()[0] == 0 {
            return Ok(());
        }
        let place = wrong.int64_value(&[0, 0]);
        let at = |tensor: &Tensor| tensor.to_kind(Kind::Double).flatten(0, -1).double_value(&[place]);
        Err(bad(name, format!("element {place}: expected {}, got {}", at(want), at(&stored))))
    };
    check(LEVELS, &levels.view([1, length]))?;
    let hidden = levels.unsqueeze(1).lt_tensor(&levels.unsqueeze(0)); // [L, L]: a later scale than one's own
    let mask = Tensor::zeros([length, length], (Kind::Float, Device::Cpu)).masked_fill(&hidden, f64::NEG_INFINITY);
    check(MASK, &mask.view([1, 1, length, length]))?;
    let zeros = Tensor::zeros([config.embed_dim], (Kind::Float, Device::Cpu));
    (0..config.depth).try_for_each(|block| check(&format!("blocks.{block}{NO_BIAS}"), &zeros))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::files;
    use crate::models::var::tiny;
    use crate::nn::noise;
    use crate::weights::write_tensors;

    /// The tensors of a small model, its buffers among them.
    fn tensors() -> Vec<(String, Tensor)> {
        let config = tiny::config();
        let mut tensors: Vec<(String, Tensor)> = config
            .tensors()
            .into_iter()
            .enumerate()
            .map(|(stream, (name, shape))| (name, noise::normal(&shape, 0.3, 3, stream as u64 + 1)))
            .collect();
        let levels = Tensor::from_slice(&config.levels()).view([1, -1]);
        let hidden = levels.transpose(0, 1).lt_tensor(&levels);
        let mask = Tensor::zeros([14, 14], (Kind::Float, Device::Cpu)).masked_fill(&hidden, f64::NEG_INFINITY);
        tensors.push((LEVELS.to_owned(), levels));
        tensors.push((MASK.to_owned(), mask.view([1, 1, 14, 14])));
        let zeros = Tensor::zeros([16], (Kind::Float, Device::Cpu));
        tensors.push((format!("blocks.1{NO_BIAS}"), zeros));
        tensors
    }

    fn load(change: impl Fn(&str, Tensor) -> Option<Tensor>, config: Option<Value>) -> Result<LoadedVar> {
        let folder = tempfile::tempdir().unwrap();
        let changed = tensors().into_iter().filter_map(|(name, tensor)| Some((name.clone(), change(&name, tensor)?)));
        write_tensors(&folder.path().join("model.safetensors"), &changed.collect::<Vec<_>>(), &[]).unwrap();
        if let Some(config) = config {
            files::write_json(&folder.path().join("config.json"), &config).unwrap();
        }
        load_var(folder.path(), Device::Cpu)
    }

    #[test]
    fn a_file_is_read_with_and_without_a_configuration() {
        for config in [None, Some(json!({"depth": 2, "patch_nums": [1, 2, 3]}))] {
            let loaded = load(|_, tensor| Some(tensor), config).unwrap();
            assert_eq!(loaded.model.config(), &tiny::config());
            assert!(loaded.strange.is_empty());
        }
        // The buffers may be left out where config.json says what they say.
        let without = load(
            |name, tensor| (name != LEVELS && name != MASK).then_some(tensor),
            Some(json!({"patch_nums": [1, 2, 3], "odd": 1})),
        );
        assert_eq!(without.unwrap().strange, ["odd"]);
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let refused = |change: &dyn Fn(&str, Tensor) -> Option<Tensor>, words: &[&str]| {
            let problem = load(change, None).unwrap_err().to_string();
            assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
        };
        let changed = |wanted: &'static str, by: fn(Tensor) -> Option<Tensor>| {
            move |name: &str, tensor: Tensor| if name == wanted { by(tensor) } else { Some(tensor) }
        };
        refused(&changed("head.bias", |_| None), &["missing", "head.bias [32]"]);
        refused(&changed("head.bias", |mut bias| Some(bias.fill_(f64::NAN))), &["head.bias", "NaN"]);
        refused(&changed("pos_1LC", |table| Some(table.narrow(1, 0, 13))), &["pos_1LC", "[1, 14, 16]", "[1, 13, 16]"]);
        refused(&changed(MASK, |mask| Some(mask.zeros_like())), &[MASK, "expected -inf, got 0"]);
        refused(&changed("blocks.1.attn.zero_k_bias", |bias| Some(bias + 1.0)), &["zero_k_bias", "expected 0, got 1"]);
        refused(&changed(LEVELS, |levels| Some(levels + 1)), &[LEVELS, "squares"]);
        refused(&changed("blocks.1.attn.mat_qkv.weight", |_| None), &["surplus", "blocks.1"]);
        let strange =
            load(|name, tensor| Some(if name == "head.weight" { tensor.to_kind(Kind::Int64) } else { tensor }), None);
        assert!(strange.unwrap_err().to_string().contains("head.weight"));
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        write_tensors(&file, &tensors(), &[]).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        for length in [0, 7, 100, bytes.len() - 1] {
            std::fs::write(&file, &bytes[..length]).unwrap();
            let problem = load_var(folder.path(), Device::Cpu).unwrap_err();
            assert_eq!(problem.exit_code(), 2, "{problem}");
        }
    }
}
