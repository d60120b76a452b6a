//! What a P-EAGLE draft is made of: the `draft` section of a configuration, and the shape that follows from it and from the
//! target.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ALGORITHM;
use super::loss::PeagleLoss;
use crate::draft::distillation::DistillationLoss;
use crate::draft::eagle3::config::rotary;
use crate::draft::eagle3::{Eagle3Config, Eagle3Shape, HeadStart};
use crate::draft::losses::Labels;
use crate::error::{Error, Result};
use crate::models::{LayerShape, TargetInfo};
use crate::strict;

/// Layers where nobody says how many, as in SpecForge's drafts.
const LAYERS: usize = 4;
/// Most predictions of an anchor.
const MOST_DEPTHS: usize = 32;

/// The `draft` section of a P-EAGLE configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeagleConfig {
    /// "peagle"
    pub algorithm: String,
    /// Architecture of the draft in the form of a Hugging Face config.json of Llama's or Qwen3's layers: a file or its
    /// content. Without one, the draft has layers shaped like the target's.
    pub config: Option<Value>,
    /// Layers; those of the draft's config.json where this key is not given, else 4.
    pub num_layers: Option<usize>,
    /// The first layer's residual is the normed feature. Without this key the draft's config.json decides; without both, yes.
    pub norm_before_residual: Option<bool>,
    /// All captured layers are normed together before `fc`. Without this key the draft's config.json decides; without both,
    /// no.
    pub norm_before_fc: Option<bool>,
    /// Captured layers by Hugging Face's `hidden_states` index, low to high, as EAGLE-3's.
    pub capture: Option<Vec<usize>>,
    /// Token that stands for those that are not known yet: one that no text has. The draft learns its own embedding of it.
    pub mask_token_id: Option<i64>,
    /// `DV`, size of the draft's vocabulary.
    pub draft_vocab_size: Option<i64>,
    /// File made by `specforge vocab`, or a `vocab_mapping.pt`.
    pub vocab_map: Option<PathBuf>,
    /// Where the vocabulary projection starts.
    pub lm_head: HeadStart,
    /// Folder of a published P-EAGLE draft to start from.
    pub init_from: Option<PathBuf>,
    /// Predictions that an anchor is trained for: depths 0 to `num_depths - 1`.
    pub num_depths: usize,
    /// Share of the anchors of a depth that are trained at the next one, too.
    pub down_sample_ratio: f64,
    /// The least share of all anchors that are trained at a depth.
    pub down_sample_ratio_min: f64,
    /// Objective of a row.
    pub loss: PeagleLoss,
    /// The right token of losses that look at one: what the target would have chosen, or the text's.
    pub labels: Labels,
    /// `lk_lambda`: weight of the cross-entropy is `lk_scale * exp(-lk_decay * acceptance)`.
    pub lk_scale: f64,
    /// See `lk_scale`.
    pub lk_decay: f64,
    /// What the sum of losses is divided by.
    pub normalisation: RowCount,
}

/// What the sum of a step's losses is divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowCount {
    /// The trained rows of the whole optimizer step.
    #[default]
    TrainedRows,
    /// Those of each batch that have a loss: whose right token, the most likely one, the draft can name (parity with SpecForge).
    CoveredRows,
}

impl Default for PeagleConfig {
    fn default() -> Self {
        Self {
            algorithm: ALGORITHM.name.to_owned(),
            config: None,
            num_layers: None,
            norm_before_residual: None,
            norm_before_fc: None,
            capture: None,
            mask_token_id: None,
            draft_vocab_size: None,
            vocab_map: None,
            lm_head: HeadStart::Target,
            init_from: None,
            num_depths: 8,
            down_sample_ratio: 0.7,
            down_sample_ratio_min: 0.2,
            loss: PeagleLoss::Compiled(DistillationLoss::Kl),
            labels: Labels::Teacher,
            lk_scale: 1.0,
            lk_decay: 1.0,
            normalisation: RowCount::TrainedRows,
        }
    }
}

impl PeagleConfig {
    /// Reads and checks a `draft` section. A draft configuration in a file of its own becomes part of the section.
    pub fn read(section: &Value) -> Result<Self> {
        let mut config: Self = strict::from_value(section, "draft")?;
        let base = config.base()?;
        (config.config, config.draft_vocab_size) = (base.config, base.draft_vocab_size);
        config.check()?;
        Ok(config)
    }

    /// What an EAGLE-3 draft has too, read and checked as one's.
    fn base(&self) -> Result<Eagle3Config> {
        Eagle3Config::read(&json!({
            "config": self.config,
            "capture": self.capture,
            "draft_vocab_size": self.draft_vocab_size,
            "vocab_map": self.vocab_map,
            "lk_scale": self.lk_scale,
            "lk_decay": self.lk_decay,
        }))
    }

    fn check(&self) -> Result<()> {
        let refuse = |key: &str, problem: String| Err(Error::config(format!("draft.{key}"), problem));
        if !(1..=MOST_DEPTHS).contains(&self.num_depths) {
            return refuse("num_depths", format!("expected 1 to {MOST_DEPTHS}, got {}", self.num_depths));
        }
        let ratios =
            [("down_sample_ratio", self.down_sample_ratio), ("down_sample_ratio_min", self.down_sample_ratio_min)];
        for (key, ratio) in ratios {
            if !(0.0..=1.0).contains(&ratio) {
                return refuse(key, format!("expected a number from 0 to 1, got {ratio}"));
            }
        }
        if self.labels == Labels::Data && !self.loss.wants_label() {
            let problem = format!("no term of draft.loss, {}, looks at the text's token", json!(self.loss));
            return Err(
                Error::config("draft.labels", problem).with_hint("leave the key out, or add a term such as `ce`")
            );
        }
        match self.num_layers {
            Some(0) => refuse("num_layers", "expected at least 1, got 0".to_owned()),
            _ => Ok(()),
        }
    }

    /// Share of all anchors that are trained at a depth.
    pub fn ratio(&self, depth: usize) -> f64 {
        self.down_sample_ratio.powi(depth as i32).max(self.down_sample_ratio_min)
    }

    /// The draft for a target of these sizes.
    pub fn shape(&self, target: &TargetInfo) -> Result<PeagleShape> {
        let mut base = self.base()?.shape(target)?;
        let file = self.config.as_ref();
        base.num_layers = match (self.num_layers, file) {
            (Some(own), Some(_)) if own != base.num_layers => {
                let problem = format!("the draft's config.json says {}, this key {own}", base.num_layers);
                return Err(Error::config("draft.num_layers", problem).with_hint("leave one of them out"));
            }
            (own, None) => own.unwrap_or(LAYERS),
            _ => base.num_layers,
        };
        base.norm_before_residual = self.norm_before_residual.unwrap_or(match file {
            Some(_) => base.norm_before_residual,
            None => true,
        });
        base.norm_before_fc = self.norm_before_fc.unwrap_or(base.norm_before_fc);
        // No output is fed back, and the projection reads the normed one in every implementation.
        (base.norm_output, base.norm_feedback) = (true, false);
        base.head_norms = file.is_some_and(has_head_norms);
        let windows = match file {
            Some(file) => windows(file, base.num_layers).map_err(|problem| Error::config("draft.config", problem))?,
            None => vec![None; base.num_layers],
        };
        let mask_token_id = self.mask_token_id.ok_or_else(|| {
            Error::config("draft.mask_token_id", "expected a token, got nothing").with_hint(
                "name one that stands in no text, such as a reserved or unused one: `specforge inspect` lists a target's",
            )
        })?;
        let shape = PeagleShape { network: base, mask_token_id, num_depths: self.num_depths, windows };
        shape.check().map_err(|problem| Error::config("draft", problem))?;
        Ok(shape)
    }
}

/// Whether a config.json is of layers whose heads of queries and keys are normed.
pub fn has_head_norms(values: &Value) -> bool {
    values.get("model_type").is_some_and(|kind| kind == "qwen3")
}

/// Tokens that each layer of a config.json sees, itself included; nothing for all.
pub fn windows(values: &Value, layers: usize) -> Result<Vec<Option<i64>>, String> {
    let types = match values.get("layer_types").filter(|types| !types.is_null()) {
        None => return Ok(vec![None; layers]),
        Some(types) => types.as_array().filter(|types| types.len() == layers),
    };
    let types = types.ok_or_else(|| format!("`layer_types`: expected a list of {layers}, one for each layer"))?;
    let window = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => match values.get("sliding_window").and_then(Value::as_i64) {
            Some(window) => Ok(Some(window)),
            None => {
                Err("`sliding_window`: expected a number of tokens where `layer_types` has sliding layers".to_owned())
            }
        },
        _ => Err(format!("`layer_types`: expected full_attention or sliding_attention, got {kind}")),
    };
    types.iter().map(window).collect()
}

/// The architecture of a P-EAGLE draft.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeagleShape {
    /// Its layers, which are an EAGLE-3 draft's.
    pub network: Eagle3Shape,
    /// Token that stands for those that are not known yet.
    pub mask_token_id: i64,
    /// Predictions that an anchor was trained for.
    pub num_depths: usize,
    /// Tokens that a row sees in each layer, itself included; nothing for all. Rows of its own anchor are always seen.
    pub windows: Vec<Option<i64>>,
}

/// The table of token embeddings.
pub const EMBEDDING: &str = "embed_tokens.weight";
/// What stands for the features of tokens that are not known yet, before `fc`.
pub const MASK_HIDDEN: &str = "mask_hidden";

impl PeagleShape {
    /// Reads what a checkpoint says of its draft.
    pub fn from_description(description: &Value) -> Result<Self, String> {
        let shape = description.get("shape").unwrap_or(&Value::Null);
        let shape: Self = serde_path_to_error::deserialize(shape).map_err(|error| {
            let key = error.path().to_string();
            let key = if key == "." { "shape".to_owned() } else { format!("shape.{key}") };
            format!("`{key}`: {}", error.inner())
        })?;
        shape.check().map_err(|problem| format!("`shape`: {problem}"))?;
        Ok(shape)
    }

    /// Refuses sizes that no draft has, and those that do not fit each other: they may come from a file.
    pub fn check(&self) -> Result<(), String> {
        self.network.check()?;
        let (tokens, layers) = (self.network.vocab_size, self.network.num_layers);
        if !(0..tokens).contains(&self.mask_token_id) {
            let token = self.mask_token_id;
            return Err(format!("`mask_token_id`: expected one of the target's {tokens} tokens, got {token}"));
        }
        if !(1..=MOST_DEPTHS).contains(&self.num_depths) {
            return Err(format!("`num_depths`: expected 1 to {MOST_DEPTHS}, got {}", self.num_depths));
        }
        if self.windows.len() != layers || self.windows.iter().flatten().any(|&window| window < 1) {
            let got = &self.windows;
            return Err(format!("windows: expected one of at least 1 token for each of {layers} layers, got {got:?}"));
        }
        Ok(())
    }

    /// Width of the captured features, `nf TH`.
    pub fn captured_width(&self) -> i64 {
        self.network.target_hidden_size * self.network.capture.len() as i64
    }

    /// Every trained tensor with its shape, in the order of creation; the vocabulary projection is the last.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let mut tensors = vec![
            (EMBEDDING.to_owned(), vec![self.network.vocab_size, self.network.hidden_size]),
            (MASK_HIDDEN.to_owned(), vec![1, 1, self.captured_width()]),
        ];
        tensors.extend(self.network.tensors().into_iter().filter(|(name, _)| name != EMBEDDING));
        tensors
    }
}

/// What the draft takes for granted about its target, a line each.
pub(super) fn contract(config: &PeagleConfig, shape: &PeagleShape, target: &TargetInfo) -> Vec<String> {
    let network = &shape.network;
    let LayerShape { num_attention_heads: heads, num_key_value_heads: groups, head_dim, rope, .. } = network.layer;
    let layers = network.capture.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let vocabulary = match network.draft_vocab_size == network.vocab_size {
        true => format!("all {} tokens", network.vocab_size),
        false => format!("{} of {} tokens", network.draft_vocab_size, network.vocab_size),
    };
    let (depths, ratio, least) = (config.num_depths, config.down_sample_ratio, config.down_sample_ratio_min);
    vec![
        format!("features      what layers {layers} of {} read (hidden_states index)", network.num_target_layers),
        format!("rotary        {}", rotary(&rope, target)),
        format!("heads         {heads} with {groups} for keys and values, of {head_dim}"),
        format!("vocabulary    {vocabulary}; token {} stands for unknown ones", shape.mask_token_id),
        format!("embedding     its own, trained; projection of its own, started from {:?}", config.lm_head)
            .to_lowercase(),
        format!(
            "rows          {depths} depths, {ratio} of a depth at the next, {least} at least, {}",
            json!(config.loss)
        )
        .to_lowercase(),
    ]
}
