//! The `draft` section of a next-scale transformer, and the transformer that follows from it and from the target.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::draft::{DraftSize, Footprint};
use crate::error::{Error, Result};
use crate::models::var::{VarConfig, training};
use crate::models::{Pictures, TargetInfo};
use crate::strict;

/// What a transformer learns from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Teacher {
    /// The codes of real pictures: cross-entropy.
    #[default]
    Codes,
    /// The target's distribution at every position: Kullback-Leibler divergence from it.
    Target,
}

/// The `draft` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NextScaleConfig {
    /// "next_scale"
    pub algorithm: String,
    /// Blocks.
    pub depth: i64,
    /// `C`, width of the hidden states.
    pub embed_dim: i64,
    /// Heads of each block.
    pub num_heads: i64,
    /// Width of the MLPs in multiples of `C`.
    pub mlp_ratio: f64,
    /// One projection of the label for the norms of all blocks.
    pub shared_aln: bool,
    /// Queries and keys of length 1.
    pub attn_l2_norm: bool,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Labels, from 0; those of the target where it is a transformer.
    pub num_classes: Option<i64>,
    /// What it learns from.
    pub teacher: Teacher,
    /// Weight of a code's loss at each scale; all equal without it.
    pub scale_weights: Option<Vec<f64>>,
    /// How often a picture is trained without its label, which guidance needs.
    pub label_dropout: f64,
    /// For models of text.
    pub vocab_map: Option<PathBuf>,
    /// For models of text.
    pub draft_vocab_size: Option<i64>,
}

impl Default for NextScaleConfig {
    fn default() -> Self {
        Self {
            algorithm: super::ALGORITHM.name.to_owned(),
            depth: 4,
            embed_dim: 64,
            num_heads: 4,
            mlp_ratio: 4.0,
            shared_aln: false,
            attn_l2_norm: true,
            norm_eps: 1e-6,
            num_classes: None,
            teacher: Teacher::Codes,
            scale_weights: None,
            label_dropout: 0.1,
            vocab_map: None,
            draft_vocab_size: None,
        }
    }
}

impl NextScaleConfig {
    /// Reads and checks a `draft` section, as far as that needs no target.
    pub fn read(section: &Value) -> Result<Self> {
        let config: Self = strict::from_value(section, "draft")?;
        for (key, is_set) in
            [("vocab_map", config.vocab_map.is_some()), ("draft_vocab_size", config.draft_vocab_size.is_some())]
        {
            if is_set {
                let problem = "pictures have no smaller vocabulary: a next-scale transformer names all codes";
                return Err(Error::config(format!("draft.{key}"), problem));
            }
        }
        if !(0.0..1.0).contains(&config.label_dropout) {
            let problem = format!("expected a share from 0 to below 1, got {}", config.label_dropout);
            return Err(Error::config("draft.label_dropout", problem));
        }
        if config.num_classes.is_some_and(|classes| classes < 1) {
            return Err(Error::config("draft.num_classes", "expected at least 1 label"));
        }
        if let Some(weights) = &config.scale_weights
            && !weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0)
        {
            let problem = format!("expected numbers of at least 0, got {weights:?}");
            return Err(Error::config("draft.scale_weights", problem));
        }
        // With scales of any image tokenizer; what is wrong with the transformer's own numbers shows here.
        config.of(&Pictures { patch_nums: vec![1], z_channels: 1, num_classes: None }, 1)?;
        Ok(config)
    }

    /// States of the target that are asked for: with the label, and without it where a picture may lose its own.
    pub fn capture(&self) -> Vec<usize> {
        match (self.teacher, self.label_dropout > 0.0) {
            (Teacher::Codes, _) => Vec::new(),
            (Teacher::Target, false) => vec![0],
            (Teacher::Target, true) => vec![0, 1],
        }
    }

    /// The transformer for a target.
    pub fn transformer(&self, target: &TargetInfo) -> Result<VarConfig> {
        let pictures = pictures(target)?;
        match (self.num_classes, pictures.num_classes) {
            (Some(own), Some(of_target)) if own != of_target => {
                let problem = format!("expected {of_target}, the labels of the target, got {own}");
                return Err(Error::config("draft.num_classes", problem));
            }
            (None, None) => {
                let problem = "the target is an image tokenizer alone and knows no labels";
                return Err(Error::config("draft.num_classes", problem).with_hint("say how many labels there are"));
            }
            _ => {}
        }
        if self.teacher == Teacher::Target && pictures.num_classes.is_none() {
            let problem = "target: the target is an image tokenizer alone, there is no transformer to learn from";
            let hint = "name a transformer's folder with the tokenizer in its folder `vae`, or learn from codes";
            return Err(Error::config("draft.teacher", problem).with_hint(hint));
        }
        let config = self.of(pictures, target.vocab_size)?;
        let _ = self.weights(&config)?;
        Ok(config)
    }

    fn of(&self, pictures: &Pictures, vocabulary: i64) -> Result<VarConfig> {
        let values = json!({
            "depth": self.depth,
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "shared_aln": self.shared_aln,
            "attn_l2_norm": self.attn_l2_norm,
            "norm_eps": self.norm_eps,
            "patch_nums": pictures.patch_nums,
            "vocab_size": vocabulary,
            "z_channels": pictures.z_channels,
            "num_classes": self.num_classes.or(pictures.num_classes).unwrap_or(1),
        });
        let (config, _) = VarConfig::read(Some(&values), &|_| None, None).map_err(|problem| named(&problem))?;
        Ok(config)
    }

    /// Weight of each code's loss, `[L]` float64; they sum to 1.
    pub fn weights(&self, transformer: &VarConfig) -> Result<tch::Tensor> {
        let equal = || vec![1.0; transformer.scales()];
        training::token_weights(transformer, &self.scale_weights.clone().unwrap_or_else(equal))
    }

    /// What it takes to train it.
    pub fn size(&self, target: &TargetInfo) -> Result<DraftSize> {
        let transformer = self.transformer(target)?;
        let trainable = transformer.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
        let frozen = target.vocab_size * transformer.z_channels;
        // Forward, and gradients of inputs and of weights.
        let row_multiply_adds = 3 * row_multiply_adds(&transformer);
        Ok(DraftSize { trainable, frozen: frozen as u64, captured: self.capture().len() as u64, row_multiply_adds })
    }

    /// Numbers that a micro-batch keeps for the backward pass, estimated: in every block the inputs of its products, norms
    /// and gates, and a row of scores for each head; and logits of both sides at the end.
    pub fn footprint(&self, target: &TargetInfo, tokens: u64) -> Result<Footprint> {
        let config = self.transformer(target)?;
        let (width, hidden) = (config.embed_dim as u64, config.mlp_hidden as u64);
        let block = 14 * width + 2 * hidden + (config.num_heads * config.length()) as u64;
        let logits = 6 * config.vocab_size as u64;
        Ok(Footprint {
            numbers: tokens * (config.depth as u64 * block + logits),
            lines: vec![("scales", format!("{:?}, {} codes a picture", config.patch_nums, config.length()))],
            ..Footprint::default()
        })
    }
}

/// Multiply-adds of one code in a forward pass, attention included.
pub(super) fn row_multiply_adds(transformer: &VarConfig) -> u64 {
    let attention = 2 * transformer.depth * transformer.embed_dim * transformer.length();
    transformer.token_multiply_adds() + attention as u64
}

/// What documents of a target are; an error where it is one of text.
pub(super) fn pictures(target: &TargetInfo) -> Result<&Pictures> {
    target.pictures.as_ref().ok_or_else(|| {
        Error::config(
            "target.path",
            "is a model of text; a next-scale transformer is trained on an image model's codes",
        )
    })
}

/// A problem with a key of config.json, under the name that the key has in a configuration.
fn named(problem: &str) -> Error {
    let key = problem.strip_prefix('`').and_then(|rest| rest.split_once('`'));
    match key {
        Some((key, rest)) => Error::config(format!("draft.{key}"), rest.trim_start_matches(':').trim_start()),
        None => Error::config("draft", problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(num_classes: Option<i64>) -> TargetInfo {
        let pictures = Pictures { patch_nums: vec![1, 2, 3], z_channels: 8, num_classes };
        TargetInfo { pictures: Some(pictures), ..TargetInfo::of(16, 32, 2, 15) }
    }

    #[test]
    fn what_cannot_be_is_named_with_its_key() {
        let said = |section: Value, target: &TargetInfo| {
            let transformer = NextScaleConfig::read(&section).and_then(|config| config.transformer(target));
            transformer.unwrap_err().to_string()
        };
        for (section, key) in [
            (json!({"num_heads": 3}), "`draft.num_heads`: expected a divisor of the width 64, got 3"),
            (json!({"depth": 0}), "`draft.depth`"),
            (json!({"norm_eps": 0.0}), "`draft.norm_eps`"),
            (json!({"label_dropout": 1.0}), "`draft.label_dropout`"),
            (json!({"scale_weights": [1.0, -1.0]}), "`draft.scale_weights`"),
            (json!({"num_classes": 9}), "`draft.num_classes`: expected 10, the labels of the target, got 9"),
            (json!({"scale_weights": [1.0, 1.0]}), "`draft.scale_weights`: expected 3 numbers"),
            (json!({"vocab_map": "x"}), "`draft.vocab_map`"),
            (json!({"teacher": "teacher"}), "`draft.teacher`"),
        ] {
            assert!(said(section, &target(Some(10))).contains(key), "{key}");
        }
        assert!(said(json!({}), &target(None)).contains("`draft.num_classes`"));
        let alone = said(json!({"teacher": "target", "num_classes": 10}), &target(None));
        assert!(alone.contains("`draft.teacher`"), "{alone}");
        assert!(said(json!({}), &TargetInfo::of(16, 32, 2, 15)).contains("`target.path`: is a model of text"));
    }

    #[test]
    fn a_transformer_is_known_from_configurations_alone() {
        let config = NextScaleConfig::read(&json!({"embed_dim": 8, "num_heads": 2, "depth": 1})).unwrap();
        let transformer = config.transformer(&target(Some(10))).unwrap();
        assert_eq!((transformer.length(), transformer.vocab_size, transformer.mlp_hidden), (14, 32, 32));
        let size = config.size(&target(Some(10))).unwrap();
        let numbers: i64 = transformer.tensors().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        assert_eq!((size.trainable, size.captured), (numbers as u64, 0));
        let states = |section: Value| NextScaleConfig::read(&section).unwrap().capture();
        assert_eq!(states(json!({"teacher": "target"})), [0, 1]);
        assert_eq!(states(json!({"teacher": "target", "label_dropout": 0.0})), [0]);
    }
}
