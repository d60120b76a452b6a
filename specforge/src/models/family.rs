//! Families of models: how a folder is recognised, what its configuration says, and how its weights become a model.
//!
//! A family is one file with a [`Family`] in it, and a line of `FAMILIES`. A program around this library adds others with
//! [`add_family`]. Everything else asks the table, by way of [`TargetConfig`]: a configuration together with its family.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::parts::{LoadedPart, Part};
use super::spread::{self, Spread, layer_of};
use super::text_model;
use super::{
    TargetInfo, TargetModel, TargetTables, dream, gemma, gemma2, gemma3, gpt_oss, granite, llada, llama, mistral,
    mixtral, olmo2, olmo3, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, smollm3,
};
use crate::device;
use crate::error::{Error, Result};
use crate::gguf::packed;
use crate::nn::{Embedding, Head};
use crate::progress;
use crate::strict;
use crate::table::Table;
use crate::weights::{SharedCopies, WeightsFolder, quantised};

/// Gives the tensor of a name, which must have this shape.
pub type GetTensor<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor> + 'a;

/// Names of tensors with their shapes.
pub type Shapes = Vec<(String, Vec<i64>)>;

/// Builds a layer, or the norm behind the last one.
pub type BuildPart = fn(&Value, Part, Device, &mut GetTensor<'_>) -> Result<Box<dyn LoadedPart>>;

/// The configuration that checked files show to be meant, and what the user should know of it.
pub type Correct = fn(Value, &WeightsFolder) -> Result<(Value, Vec<String>)>;

/// A family of models. Functions take the values of config.json; what is wrong with those is a problem in words that names
/// the key.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// What a model is. Refuses everything that the family cannot run.
    pub info: fn(&Value) -> Result<TargetInfo, String>,
    /// Every tensor of a model under its Hugging Face name.
    pub tensors: fn(&Value) -> Result<Shapes, String>,
    /// Refuses files whose tensors are not these, by their headers alone; without it, files hold exactly
    /// [`Family::tensors`].
    pub check: Option<fn(&Value, &WeightsFolder) -> Result<()>>,
    /// Corrects a configuration by checked files that are known to say it better, and tells the user; mostly none do.
    pub correct: Option<Correct>,
    /// Whether layers run wherever their tensors are, so that they may be on several devices; the rest is on one.
    pub spreads: bool,
    /// A model from its tensors.
    pub build: fn(&Value, Device, &mut GetTensor<'_>) -> Result<Box<dyn TargetModel>>,
    /// One layer, or the norm behind the last, from its tensors, for targets that are run one layer at a time; `None` where a
    /// family cannot.
    pub part: Option<BuildPart>,
    /// Embedding and head alone.
    pub tables: fn(&Value, &mut GetTensor<'_>) -> Result<(Embedding, Head)>,
    /// Names of the tensors behind [`Family::tables`], the embedding's first; a tied head is not there.
    pub table_names: &'static [&'static str],
    /// Keys that the `text_config` of a folder of several models may leave out, with their values.
    pub text_defaults: Option<fn() -> Value>,
}

/// Families that this program can run. Adding one is adding a line.
static FAMILIES: Table<Family> = Table::new(
    "a family of models",
    |family| family.model_type,
    &[
        llama::FAMILY,
        mistral::FAMILY,
        qwen2::FAMILY,
        qwen2::VISION_FAMILY,
        qwen2::FLAT_VISION_FAMILY,
        qwen3::FAMILY,
        qwen3::VISION_FAMILY,
        phi3::FAMILY,
        smollm3::FAMILY,
        olmo2::FAMILY,
        olmo3::FAMILY,
        granite::FAMILY,
        gemma::FAMILY,
        gemma2::FAMILY,
        gemma3::FAMILY,
        mixtral::FAMILY,
        qwen2_moe::FAMILY,
        qwen3_moe::FAMILY,
        gpt_oss::FAMILY,
        llada::FAMILY,
        dream::FAMILY,
    ],
);

/// Every family, in the order of the table.
pub fn families() -> Vec<&'static Family> {
    FAMILIES.rows()
}

/// Adds a family, before any model is loaded. Refuses a `model_type` that is taken.
pub fn add_family(family: &'static Family) -> Result<()> {
    FAMILIES.add(family)
}

/// A configuration of a target, checked, and its family.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    family: &'static Family,
    values: Value,
    info: TargetInfo,
}

impl TargetConfig {
    /// Reads config.json of a Hugging Face folder, or makes that of a GGUF file.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let Some(text) = packed::read_file(folder, "config.json")? else {
            let hint = match folder.join("snapshots").is_dir() {
                true => "this is a folder of the hub's cache: name one of those in `snapshots`",
                false => "name a Hugging Face folder, or a GGUF file",
            };
            return Err(Error::bad_file(folder, "is not a model folder: config.json is not there").with_hint(hint));
        };
        let refuse = |problem: String| Error::bad_file(&path, problem);
        let values: Value = strict::from_json(&text).map_err(refuse)?;
        let (family, own) = resolved(&values).map_err(refuse)?;
        if let Some(problem) = quantised::unreadable(&values) {
            return Err(refuse(problem).with_hint(quantised::HINT));
        }
        if let Some(name) = quantised::file_beside(folder) {
            let problem = format!("the weights are quantised: {name} lies beside it");
            return Err(refuse(problem).with_hint(quantised::HINT));
        }
        Self::of(family, own).map_err(refuse)
    }

    /// The same from values.
    pub fn from_value(values: &Value) -> Result<Self, String> {
        if let Some(problem) = quantised::unreadable(values) {
            return Err(problem);
        }
        let (family, own) = resolved(values)?;
        Self::of(family, own)
    }

    fn of(family: &'static Family, values: Value) -> Result<Self, String> {
        let info = (family.info)(&values)?;
        Ok(Self { family, values, info })
    }

    /// What the target is.
    pub fn info(&self) -> &TargetInfo {
        &self.info
    }

    /// Refuses a masked diffusion model where texts grow token by token: nothing that is trained or decoded so fits one.
    pub fn causal(&self, path: &Path) -> Result<()> {
        match self.info.diffusion {
            None => Ok(()),
            Some(_) => Err(not_causal(path, self.family.model_type)),
        }
    }

    /// Its family, and what that reads.
    pub(super) fn family(&self) -> (&'static Family, &Value) {
        (self.family, &self.values)
    }

    /// Every tensor of the model with its shape, under its Hugging Face name.
    pub fn tensors(&self) -> Result<Shapes> {
        (self.family.tensors)(&self.values).map_err(Error::Failed)
    }

    /// Builds the model from a function that gives each tensor by name and shape.
    pub fn build(&self, device: Device, tensor: &mut GetTensor<'_>) -> Result<Box<dyn TargetModel>> {
        (self.family.build)(&self.values, device, tensor)
    }

    /// The layers of each device of several, with the bytes of their weights in elements of this kind. Tables and last norm
    /// are on `home`.
    pub fn blocks(&self, spread: &Spread, home: Device, kind: Kind) -> Result<Vec<Block>, String> {
        if !self.family.spreads {
            let family = self.family.model_type;
            return Err(format!("layers of type `{family}` cannot be spread over devices (target.devices)"));
        }
        let tensors = (self.family.tensors)(&self.values)?;
        let (bytes, beside) = spread::bytes(&tensors, self.info.num_layers(), kind);
        let blocks = spread.blocks(&bytes, (home, beside)).map_err(|problem| format!("target.devices: {problem}"))?;
        let block = |(device, layers): (Device, Range<usize>)| {
            let bytes = bytes[layers.clone()].iter().sum();
            Block { device, layers, bytes }
        };
        Ok(blocks.into_iter().map(block).collect())
    }

    /// Device of each layer.
    fn devices(&self, spread: &Spread, loading: &Loading<'_>) -> Result<Vec<Device>, String> {
        let blocks = self.blocks(spread, loading.device, loading.kind)?;
        let words = blocks.iter().map(|block| format!("{} on {}", block.words(), device::name(block.device)));
        progress::say(&format!("target: {}", words.collect::<Vec<_>>().join(", ")));
        Ok(blocks.iter().flat_map(|block| vec![block.device; block.layers.len()]).collect())
    }

    /// Refuses files whose tensors are not this model's.
    pub fn check(&self, weights: &WeightsFolder) -> Result<()> {
        match self.family.check {
            Some(check) => check(&self.values, weights),
            None => {
                let expected = self.tensors()?;
                weights.check_numbers(&expected)?;
                weights.check(&expected, |_| false)
            }
        }
    }

    /// Opens and checks the files of a folder. The configuration becomes that of the files, where they know better, and
    /// the user hears of it.
    pub(super) fn open(folder: &Path) -> Result<(Self, WeightsFolder)> {
        let config = Self::read(folder)?;
        let weights = text_model::open_weights(folder)?;
        config.check(&weights)?;
        if let Some(words) = weights.scaled_words() {
            progress::say(&format!("warning: {}: {words}", folder.display()));
        }
        Ok((config.corrected(&weights)?, weights))
    }

    /// The same for embedding and head alone: the layers need not be in the files.
    fn open_tables(folder: &Path) -> Result<(Self, WeightsFolder)> {
        let weights = text_model::open_weights(folder)?;
        let config = Self::read(folder)?.corrected(&weights)?;
        weights.check(&config.tables()?, |_| true)?;
        Ok((config, weights))
    }

    /// Embedding and head among [`TargetConfig::tensors`].
    fn tables(&self) -> Result<Shapes> {
        let mut tensors = self.tensors()?;
        tensors.retain(|(name, _)| self.family.table_names.contains(&name.as_str()));
        Ok(tensors)
    }

    /// As the files of weights say, where they know better.
    fn corrected(self, weights: &WeightsFolder) -> Result<Self> {
        let Some(correct) = self.family.correct else { return Ok(self) };
        let (values, warnings) = correct(self.values, weights)?;
        warnings.iter().for_each(|warning| progress::say(&format!("warning: {warning}")));
        Self::of(self.family, values).map_err(Error::Failed)
    }
}

fn not_causal(path: &Path, family: &str) -> Error {
    let problem = format!(
        "is a masked diffusion model (`{family}`): its tokens see those behind them, which no draft and no causal decoder can"
    );
    Error::bad_file(path, problem).with_hint("`specforge generate` decodes it, block by block")
}

/// Layers of a target that one device of several has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The device.
    pub device: Device,
    /// Which layers, from 0; at least one.
    pub layers: Range<usize>,
    /// Bytes of their weights.
    pub bytes: u64,
}

impl Block {
    /// Such as `layers 0 to 3`.
    pub fn words(&self) -> String {
        let Range { start, end } = self.layers;
        match end - start {
            1 => format!("layer {start}"),
            _ => format!("layers {start} to {}", end - 1),
        }
    }
}

/// The family that a configuration names, and its keys: those of its text model, where it has several.
fn resolved(values: &Value) -> Result<(&'static Family, Value), String> {
    let Some(text) = text_model::keys(values) else { return Ok((family_of(values)?, values.clone())) };
    let family = family_of(text).map_err(|problem| format!("text_config: {problem}"))?;
    Ok((family, text_model::filled(text, values, family.text_defaults)))
}

/// The family that the values of a config.json name.
fn family_of(values: &Value) -> Result<&'static Family, String> {
    let name = match values.get("model_type") {
        Some(Value::String(name)) => name,
        Some(other) => return Err(format!("`model_type`: expected one of {}, got {other}", FAMILIES.names())),
        None => return Err(format!("missing field `model_type`: expected one of {}", FAMILIES.names())),
    };
    let unknown = || format!("model_type `{name}` is not supported; supported: {}", FAMILIES.names());
    FAMILIES.find(name).ok_or_else(unknown)
}

/// How the weights of a model are loaded.
#[derive(Debug, Clone, Copy)]
pub struct Loading<'a> {
    /// Element type of the weights.
    pub kind: Kind,
    /// Where they go.
    pub device: Device,
    /// Where the layers go instead; mostly nothing is spread.
    pub layers: Option<&'a Spread>,
    /// Where the processes of this machine keep what they share of weights on the CPU, if there are several.
    pub copies: Option<SharedCopies<'a>>,
}

impl Loading<'_> {
    /// Where the tensors of these names are best loaded from.
    fn arrange(&self, weights: WeightsFolder, names: &[String]) -> WeightsFolder {
        match &self.copies {
            Some(copies) if self.device == Device::Cpu => copies.of(weights, names, self.kind),
            _ => weights,
        }
    }
}

/// Loads the causal model of a Hugging Face folder.
pub fn load_target(path: &Path, kind: Kind, device: Device) -> Result<Box<dyn TargetModel>> {
    load_target_with(path, &Loading { kind, device, layers: None, copies: None })
}

/// Loads the causal model of a Hugging Face folder, perhaps over several devices, perhaps together with the other processes of this machine.
pub fn load_target_with(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    TargetConfig::read(path)?.causal(path)?;
    load(path, loading)
}

/// Loads the masked diffusion model of a Hugging Face folder.
pub fn load_diffusion(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    let config = TargetConfig::read(path)?;
    if config.info.diffusion.is_none() {
        let problem = format!("is a causal model (`{}`), no masked diffusion model", config.family.model_type);
        return Err(Error::bad_file(path, problem));
    }
    load(path, loading)
}

fn load(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    let (config, weights) = TargetConfig::open(path)?;
    let names: Vec<String> = config.tensors()?.into_iter().map(|(name, _)| name).collect();
    let weights = loading.arrange(weights, &names);
    let devices = match loading.layers.filter(|layers| !layers.is_empty()) {
        Some(layers) => config.devices(layers, loading).map_err(|problem| Error::bad_file(path, problem))?,
        None => Vec::new(),
    };
    let of = |name: &str| layer_of(name).and_then(|layer| devices.get(layer)).copied().unwrap_or(loading.device);
    config.build(loading.device, &mut |name, _| weights.load(name, loading.kind, of(name)))
}

/// Loads embedding and head of a Hugging Face folder. The layers must be in its files and are not read.
pub fn load_tables(path: &Path, kind: Kind, device: Device) -> Result<TargetTables> {
    load_tables_with(path, &Loading { kind, device, layers: None, copies: None })
}

/// As [`load_tables`], perhaps together with the other processes of this machine.
pub fn load_tables_with(path: &Path, loading: &Loading<'_>) -> Result<TargetTables> {
    TargetConfig::read(path)?.causal(path)?;
    tables_of(TargetConfig::open(path)?, loading)
}

/// As [`load_tables`], of a folder that need not have the layers; see [`write_tables`](super::write_tables).
pub fn load_tables_alone(path: &Path, kind: Kind, device: Device) -> Result<TargetTables> {
    TargetConfig::read(path)?.causal(path)?;
    tables_of(TargetConfig::open_tables(path)?, &Loading { kind, device, layers: None, copies: None })
}

fn tables_of((config, weights): (TargetConfig, WeightsFolder), loading: &Loading<'_>) -> Result<TargetTables> {
    let names: Vec<String> = config.tables()?.into_iter().map(|(name, _)| name).collect();
    let weights = loading.arrange(weights, &names);
    let mut load = |name: &str, _: &[i64]| weights.load(name, loading.kind, loading.device);
    let (embedding, head) = (config.family.tables)(&config.values, &mut load)?;
    Ok(TargetTables { info: config.info, embedding, head })
}

/// The vocabulary projection of a Hugging Face folder, in the element type it is stored in, on the CPU.
pub fn load_head(path: &Path) -> Result<Head> {
    let (names, weights) = (table_names(path)?, text_model::open_weights(path)?);
    // Of a head of a few bits, what it stands for.
    let plain = |kind: &Kind| matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
    let kind = names.iter().rev().find_map(|name| weights.kind(name)).filter(plain).unwrap_or(Kind::Float);
    Ok(load_tables(path, kind, Device::Cpu)?.head)
}

/// What the model of a Hugging Face folder is, from config.json alone.
pub fn read_info(path: &Path) -> Result<TargetInfo> {
    Ok(TargetConfig::read(path)?.info)
}

/// Refuses a Hugging Face folder whose weights are not what config.json says. Reads headers alone; to be asked before
/// anything is made as large as config.json says.
pub fn check(path: &Path) -> Result<()> {
    TargetConfig::read(path)?.check(&text_model::open_weights(path)?)
}

/// Embedding and head of a causal model's folder under their names, in the element types they are stored in.
pub(super) fn stored_tables(path: &Path) -> Result<Vec<(String, Tensor)>> {
    TargetConfig::read(path)?.causal(path)?;
    let (config, weights) = TargetConfig::open_tables(path)?;
    let plain = |kind: &Kind| matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
    let load = |(name, _): (String, Vec<i64>)| {
        // Of numbers of a few bits, what they stand for.
        let kind = weights.kind(&name).filter(plain).unwrap_or(Kind::Float);
        let value = weights.load(&name, kind, Device::Cpu)?;
        Ok((name, value))
    };
    config.tables()?.into_iter().map(load).collect()
}

/// Names of the tensors that embedding and head of a Hugging Face folder may be made of.
pub(super) fn table_names(path: &Path) -> Result<&'static [&'static str]> {
    Ok(TargetConfig::read(path)?.family.table_names)
}
