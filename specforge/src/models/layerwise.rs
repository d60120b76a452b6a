//! A target that is run one layer at a time, so that it need not fit where it runs.
//!
//! [`super::TargetModel`] holds all its weights and takes a batch through them. Here it is the other way round: a part of
//! the weights is loaded, whoever has documents takes all of them through it, and it is dropped before the next one comes.
//! What is computed is the same, operator by operator.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::TargetInfo;
use super::family::{BuildPart, TargetConfig};
use super::parts::{LoadedPart, Part};
use super::spread::layer_of;
use crate::error::{Error, Result};
use crate::nn::{Embedding, Head};
use crate::weights::WeightsFolder;

/// Size of some tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Where they run.
    pub loaded: u64,
    /// In their files.
    pub stored: u64,
}

/// A target of which one part at a time is loaded.
#[derive(Debug)]
pub struct LayerWise {
    config: TargetConfig,
    weights: WeightsFolder,
    /// Every tensor of the model.
    names: Vec<String>,
    part: BuildPart,
    kind: Kind,
    device: Device,
}

impl LayerWise {
    /// Opens the model of a Hugging Face folder. Nothing is loaded yet.
    pub fn open(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        TargetConfig::read(path)?.causal(path)?;
        let (config, weights) = TargetConfig::open(path)?;
        let (family, _) = config.family();
        let part = family.part.ok_or_else(|| {
            let problem = format!("models of type `{}` cannot be run one layer at a time", family.model_type);
            Error::bad_file(path, problem).with_hint("capture without --stream-layers")
        })?;
        let names = config.tensors()?.into_iter().map(|(name, _)| name).collect();
        Ok(Self { config, weights, names, part, kind, device })
    }

    /// What the target is.
    pub fn info(&self) -> &TargetInfo {
        self.config.info()
    }

    /// Element type it runs in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Loads a part.
    pub fn load(&self, part: Part) -> Result<Box<dyn LoadedPart>> {
        let (_, values) = self.config.family();
        let mut get = |name: &str, _: &[i64]| self.weights.load(name, self.kind, self.device);
        match part {
            Part::Embedding => Ok(Box::new(self.tables(|name| name == self.table_names()[0])?.0)),
            Part::Layer(_) | Part::Norm => (self.part)(values, part, self.device, &mut get),
        }
    }

    /// Loads the vocabulary projection.
    pub fn head(&self) -> Result<Head> {
        let names = self.head_names();
        Ok(self.tables(|name| names.iter().any(|wanted| wanted == name))?.1)
    }

    /// Embedding and head, of which only the wanted tensors are loaded; what stands for the others is empty.
    fn tables(&self, is_wanted: impl Fn(&str) -> bool) -> Result<(Embedding, Head)> {
        let (family, values) = self.config.family();
        (family.tables)(values, &mut |name, _| match is_wanted(name) {
            true => self.weights.load(name, self.kind, self.device),
            false => Ok(Tensor::f_empty([0], (self.kind, self.device))?),
        })
    }

    fn table_names(&self) -> &'static [&'static str] {
        self.config.family().0.table_names
    }

    /// Names of the tensors of a part.
    pub fn names(&self, part: Part) -> Vec<String> {
        let tables = self.table_names();
        let is_part = |name: &&String| match part {
            Part::Embedding => tables.first() == Some(&name.as_str()),
            Part::Layer(index) => layer_of(name) == Some(index),
            Part::Norm => layer_of(name).is_none() && !tables.contains(&name.as_str()),
        };
        self.names.iter().filter(is_part).cloned().collect()
    }

    /// Names of the vocabulary projection's tensors; a tied one is the embedding's.
    pub fn head_names(&self) -> Vec<String> {
        let (embedding, others) =
            self.table_names().split_first().map_or(("", &[][..]), |(first, rest)| (*first, rest));
        let mut names: Vec<String> =
            self.names.iter().filter(|name| others.contains(&name.as_str())).cloned().collect();
        let has_matrix = names.iter().any(|name| self.weights.shape(name).is_some_and(|shape| shape.len() == 2));
        if !has_matrix {
            names.push(embedding.to_owned());
        }
        names
    }

    /// Bytes that tensors take when they are loaded, and in their files.
    pub fn bytes(&self, names: &[String]) -> Bytes {
        let mut bytes = Bytes::default();
        for name in names {
            let count: i64 = self.weights.shape(name).map_or(0, |shape| shape.iter().product());
            bytes.loaded += count as u64 * self.kind.elt_size_in_bytes() as u64;
            bytes.stored += self.weights.bytes(name).map_or(0, <[u8]>::len) as u64;
        }
        bytes
    }

    /// Says which part comes next: the system may read its file already.
    pub fn will_need(&self, part: Part) {
        self.weights.will_need(&self.names(part));
    }

    /// Says that a part has been dropped: the system may take its pages back.
    pub fn release(&self, part: Part) {
        self.weights.release(&self.names(part));
    }
}
