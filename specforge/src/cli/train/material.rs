//! What the documents of a run are made of, and what they are trained for: conversations and a model of text, or pictures and
//! an image model. Behind this, the run knows tokens and features alone.

use std::path::PathBuf;

use serde_json::Value;

use super::super::devices::Devices;
use super::super::{LazyProgress, note};
use super::content::Content;
use super::inputs::{self, Source, Target};
use super::page;
use crate::config::{Dtype, RunConfig};
use crate::data::{ChatTokenizer, TokenCache};
use crate::decode::engine::Decoded;
use crate::draft::Algorithm;
use crate::draft::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::features::ScaleFeatures;
use crate::features::store::Share;
use crate::files::Digests;
use crate::images;
use crate::models::{PictureTarget, TargetInfo, TargetTables, vqvae};
use crate::nn::{Embedding, Head};
use crate::tracking::page::SampleText;

/// One of the two.
pub(super) enum Material {
    Text(Box<ChatTokenizer>),
    Pictures(Box<PictureMaterial>),
}

/// An image model, of which nothing is loaded yet.
pub(super) struct PictureMaterial {
    target: PictureTarget,
    info: TargetInfo,
    /// Digests of the image tokenizer and of the transformer.
    digests: (String, Option<String>),
}

impl Material {
    pub(super) fn open(config: &RunConfig, algorithm: &Algorithm) -> Result<Self> {
        if !algorithm.pictures {
            return Ok(Self::Text(Box::new(config.data.tokenizer(&config.target.path)?)));
        }
        Ok(Self::Pictures(Box::new(PictureMaterial::open(config, algorithm)?)))
    }

    /// Says what turns data into tokens.
    pub(super) fn name(&self, content: &mut Content<'_>) -> Result<()> {
        match self {
            Self::Text(tokenizer) => content.tokenizer(tokenizer),
            Self::Pictures(pictures) => content.pictures(&pictures.digests.0, pictures.digests.1.as_deref()),
        }
    }

    /// Opens or builds the token cache of some files.
    pub(super) fn tokens(&self, config: &RunConfig, files: &[PathBuf]) -> Result<TokenCache> {
        match self {
            Self::Text(tokenizer) => inputs::tokens(config, files, tokenizer),
            Self::Pictures(pictures) => pictures.tokens(config, files),
        }
    }

    /// The draft's own vocabulary, where the configuration asks for one.
    pub(super) fn vocabulary(
        &self,
        config: &RunConfig,
        cache: &TokenCache,
        documents: &[usize],
    ) -> Result<Option<Vocabulary>> {
        match self {
            Self::Text(tokenizer) => inputs::vocabulary(config, tokenizer, cache, documents),
            Self::Pictures(_) => Ok(None),
        }
    }

    /// Loads the target and compares it with that of the run's checkpoint.
    pub(super) fn target(
        &self,
        config: &RunConfig,
        devices: &Devices,
        local: Share,
        content: &mut Content<'_>,
    ) -> Result<Target> {
        match self {
            Self::Text(tokenizer) => {
                let identity = content.target()?;
                let target = inputs::target(config, devices, local, tokenizer, &identity)?;
                inputs::fits_vocabulary(tokenizer, target.tables.info.vocab_size, &config.target.path)?;
                Ok(target)
            }
            Self::Pictures(pictures) => pictures.target(config, devices, local),
        }
    }

    /// Tokens that end an answer.
    pub(super) fn stop_tokens(&self) -> &[u32] {
        match self {
            Self::Text(tokenizer) => tokenizer.eos_token_ids(),
            Self::Pictures(_) => &[],
        }
    }

    /// Answers of the last decode, for the page.
    pub(super) fn samples(&self, answers: &[Decoded], prompts: &[Vec<u32>]) -> Result<Vec<SampleText>> {
        match self {
            Self::Text(tokenizer) => page::samples(answers, prompts, tokenizer),
            Self::Pictures(_) => Ok(Vec::new()),
        }
    }
}

impl PictureMaterial {
    fn open(config: &RunConfig, algorithm: &Algorithm) -> Result<Self> {
        check(config)?;
        let target = PictureTarget::find(&config.target.path)?;
        let info = target.info()?;
        // What does not fit the target shows before anything is encoded.
        (algorithm.size)(&config.draft, &info)?;
        let noted = Digests::in_cache(&config.data.cache_dir);
        let digests = target.digests(&noted, &inputs::check_progress("read the target"))?;
        Ok(Self { target, info, digests })
    }

    fn tokens(&self, config: &RunConfig, files: &[PathBuf]) -> Result<TokenCache> {
        let patch_nums = self.patch_nums();
        let own = config.draft.get("num_classes").and_then(Value::as_i64);
        let of_target = self.info.pictures.as_ref().and_then(|pictures| pictures.num_classes);
        let num_classes = of_target.or(own).unwrap_or_default();
        let codes = images::Codes { patch_nums, vocab_size: self.info.vocab_size, num_classes };
        let load = || self.target.load_tokenizer(patch_nums, tch::Device::Cpu);
        let progress = LazyProgress::new("encode", "pictures");
        let report = |done, total| progress.set(done, total);
        let pictures = images::Pictures::read(files)?;
        let (cache, report) = pictures.documents(codes, (&self.digests.0, &load), &config.data, &report)?;
        progress.finish(&inputs::data_line(&cache, &report));
        report.note.iter().for_each(|line| note(format!("warning: {line}")));
        Ok(cache)
    }

    fn patch_nums(&self) -> &[i64] {
        self.info.pictures.as_ref().map(|pictures| pictures.patch_nums.as_slice()).unwrap_or_default()
    }

    fn target(&self, config: &RunConfig, devices: &Devices, local: Share) -> Result<Target> {
        let device = devices.home;
        let weights = self.target.open_tokenizer()?;
        let kind = config.target.element_type().kind();
        let quantizer = vqvae::load_quantizer(&weights, self.patch_nums(), kind, device)?;
        let codebook = quantizer.embedding().shallow_clone(); // [V, Z]
        let transformer = self.target.load_transformer(device)?;
        // Without a transformer nobody asks what its head would say.
        let head = transformer.as_ref().map_or_else(|| Head::plain(codebook.shallow_clone()), |model| model.head());
        let tables = TargetTables { info: self.info.clone(), embedding: Embedding::plain(codebook), head };
        let features = ScaleFeatures::new(transformer.map(|transformer| (transformer, quantizer)));
        let source = Source::computed(Box::new(features), config, device, local.of);
        Ok(Target { tables, source, model: None, weights })
    }
}

/// Refuses keys that mean nothing for pictures.
fn check(config: &RunConfig) -> Result<()> {
    let refuse = |key: &str, problem: &str| Err(Error::config(key, problem));
    if config.target.feature_store.is_some() {
        return refuse(
            "target.feature_store",
            "there is no store of pictures' states; target.keep_hidden_states keeps them",
        );
    }
    if !config.target.devices.is_empty() {
        return refuse("target.devices", "an image model is on one device");
    }
    if config.eval.every > 0 {
        let problem = "pictures are not decoded in training; `specforge images eval` decodes with an exported draft";
        return refuse("eval.every", problem);
    }
    if config.data.chat_template.is_some() {
        return refuse("data.chat_template", "pictures have no conversations");
    }
    if config.target.dtype.is_some_and(|dtype| dtype != Dtype::Float32) {
        return refuse("target.dtype", "image models are trained in float32");
    }
    Ok(())
}
