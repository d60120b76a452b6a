//! A VQVAE in files: config.json and weights, as safetensors or as the reference's `.pth`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::config::{MODEL_TYPE, PUBLISHED_PATCHES, VqvaeConfig, inferred};
use super::{Quantizer, Vqvae};
use crate::error::{Error, Result};
use crate::files;
use crate::progress;
use crate::strict;
use crate::weights::{self, WeightsFolder, torch};

/// How often each code was used in training, `[S, V]`: nothing reads it.
pub const COUNTERS: &str = "quantize.ema_vocab_hit_SV";

/// What the names of the quantiser's tensors begin with.
const PREFIX: &str = "quantize.";

/// Loads a model: a folder with config.json and `model.safetensors` or a `.pth`, or a file of weights, whose configuration is
/// the file of its name that ends in `.json`. What no configuration says is taken from the shapes of the tensors.
///
/// `patch_nums` are the scales of the model that uses this one, for files that say nothing of them.
pub fn load(path: &Path, patch_nums: Option<&[i64]>, kind: Kind, device: Device) -> Result<Vqvae> {
    let weights = torch::open_either(path)?;
    let (config, notes) = read_config(path, &weights, patch_nums)?;
    notes.iter().for_each(|note| progress::say(&format!("warning: {}: {note}", path.display())));
    weights.check_numbers(&Vqvae::tensors(&config)?)?;
    Vqvae::build(config, &mut |name, _| weights.load(name, kind, device))
}

/// Loads the quantiser of an opened model alone; everything is copied out of the file.
pub fn load_quantizer(weights: &WeightsFolder, patch_nums: &[i64], kind: Kind, device: Device) -> Result<Quantizer> {
    let (config, _) = read_config(weights.path(), weights, Some(patch_nums))?;
    weights.check_numbers(&config.quantizer.tensors(PREFIX))?;
    let load = |name: &str| Ok(weights.load(name, kind, Device::Cpu)?.f_to_device(device)?.copy());
    Quantizer::build(config.quantizer, PREFIX, &mut |name, _| load(name))
}

/// What a model is by its configuration and the shapes of its weights, which must agree; and what the user should know.
pub fn read_config(
    path: &Path,
    weights: &WeightsFolder,
    patch_nums: Option<&[i64]>,
) -> Result<(VqvaeConfig, Vec<String>)> {
    let file = config_file(path);
    let mut values = if file.is_file() { read_values(&file)? } else { Map::new() };
    let mut notes = Vec::new();
    for (key, found) in inferred(|name| weights.shape(name)) {
        match values.get(&key).filter(|value| !value.is_null()) {
            None => drop(values.insert(key, found)),
            Some(said) if *said == found => {}
            Some(said) => {
                let problem =
                    format!("`{key}`: the configuration says {said}, the weights of {} {found}", path.display());
                return Err(Error::bad_file(&file, problem).with_hint("the weights are those of another model"));
            }
        }
    }
    let counted = weights.shape(COUNTERS).and_then(|shape| shape.first().copied());
    if values.get("patch_nums").is_none_or(Value::is_null) {
        let patches = assumed_patches(path, patch_nums, counted, &mut notes)?;
        values.insert("patch_nums".to_owned(), patches.into());
    }
    let named = if file.is_file() { file.as_path() } else { path };
    let read = VqvaeConfig::read(&Value::Object(values));
    let (config, strange) = read.map_err(|problem| Error::bad_file(named, problem))?;
    if !strange.is_empty() {
        notes.push(format!("config.json: passed over what is not known: `{}`", strange.join("`, `")));
    }
    if let Some(scales) = counted.filter(|&scales| scales != config.quantizer.scales() as i64) {
        let problem = format!(
            "`patch_nums`: expected {scales} scales, which `{COUNTERS}` has, got {}",
            config.quantizer.scales()
        );
        return Err(Error::bad_file(named, problem));
    }
    weights.check(&Vqvae::tensors(&config)?, |name| name == COUNTERS)?;
    Ok((config, notes))
}

/// The scales of a model whose files do not say them.
fn assumed_patches(
    path: &Path,
    patch_nums: Option<&[i64]>,
    counted: Option<i64>,
    notes: &mut Vec<String>,
) -> Result<Vec<i64>> {
    if let Some(patches) = patch_nums {
        return Ok(patches.to_vec());
    }
    if counted != Some(PUBLISHED_PATCHES.len() as i64) {
        let problem = "nothing says how many patches its scales have: `patch_nums` is missing";
        return Err(Error::bad_file(path, problem)
            .with_hint("write it into config.json beside the weights, such as {\"patch_nums\": [1, 2, 3]}"));
    }
    notes.push(format!("`patch_nums` stands nowhere: taken to be those of VAR at 256 pixels, {PUBLISHED_PATCHES:?}"));
    Ok(PUBLISHED_PATCHES.to_vec())
}

/// Where the configuration of a model stands, if it does.
fn config_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("config.json") } else { path.with_extension("json") }
}

fn read_values(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let values: Value = strict::from_json(&text).map_err(|problem| Error::bad_file(path, problem))?;
    match values {
        Value::Object(values) => Ok(values),
        other => Err(Error::bad_file(path, format!("expected an object with `model_type` {MODEL_TYPE}, got {other}"))),
    }
}

/// Writes a folder that [`load`] reads: `model.safetensors` with the reference's names, then config.json.
pub fn write(folder: &Path, config: &VqvaeConfig, tensors: &[(String, Tensor)]) -> Result<()> {
    files::create_dir_all(folder)?;
    weights::write_tensors(&folder.join("model.safetensors"), tensors, &[])?;
    files::write_json(&folder.join("config.json"), &config.values())
}
