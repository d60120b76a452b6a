//! What an EAGLE-3 draft is made of: the `draft` section of a configuration, and the shape that follows from it, from a
//! Hugging Face style draft configuration and from the target.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ALGORITHM;
use crate::draft::distillation::DistillationLoss;
use crate::draft::supervision::MaskAlignment;
use crate::draft::vocabulary::VocabularyKeys;
use crate::error::{Error, Result};
use crate::models::{LayerShape, PlainModel, TargetInfo, limits, plain_model};
use crate::nn::RopeConfig;
use crate::strict;

/// The `draft` section of an EAGLE-3 configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Eagle3Config {
    /// "eagle3"
    pub algorithm: String,
    /// Architecture of the draft in the form of a Hugging Face config.json, such as SpecForge's and SafeAILab's: a file
    /// or its content. Without one, the draft is one layer shaped like the target's.
    pub config: Option<Value>,
    /// Captured layers by Hugging Face's `hidden_states` index, low to high: `k` is what layer `k` reads. Without this
    /// key, and where the draft's config.json names none, `[2, N / 2, N - 3]` of a target of `N` layers.
    pub capture: Option<Vec<usize>>,
    /// `DV`, size of the draft's vocabulary; without this key the draft's config.json decides, or the target.
    pub draft_vocab_size: Option<i64>,
    /// File made by `specforge vocab`, or a `vocab_mapping.pt`. Without it, a map of `draft_vocab_size` tokens is made
    /// from the training documents.
    pub vocab_map: Option<PathBuf>,
    /// Where the vocabulary projection starts.
    pub lm_head: HeadStart,
    /// Layer of the target, from 0, whose weights the draft's first layer starts from; see [`super::start`].
    pub layer_from: Option<usize>,
    /// Folder or GGUF file of a published EAGLE-3 draft to start from.
    pub init_from: Option<PathBuf>,
    /// `K`, steps of the training-time test.
    pub ttt_steps: usize,
    /// Share of the rows of a step that the next one trains as well, by chance; weighted so that gradients are on average
    /// those of all rows.
    pub step_share: f64,
    /// Share of the run by which all steps are trained: until then they are added one by one. 0 trains all from the start.
    pub grow_until: f64,
    /// Objective of a step.
    pub loss: DistillationLoss,
    /// `lk_lambda`: weight of the cross-entropy is `lk_scale * exp(-lk_decay * acceptance)`.
    pub lk_scale: f64,
    /// See `lk_scale`.
    pub lk_decay: f64,
    /// Weight of step `k` is `loss_decay^k`, unless `loss_weights` lists them.
    pub loss_decay: f64,
    /// One weight for each step.
    pub loss_weights: Option<Vec<f64>>,
    /// Which rows are trained.
    pub mask: MaskAlignment,
    /// What a step's loss is divided by.
    pub normalisation: Normalisation,
    /// Compute a step of the training-time test again when its gradient is due: less memory for more work.
    pub recompute: bool,
}

/// Where the vocabulary projection of a draft starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadStart {
    /// The target's rows of the draft's vocabulary. Random where the draft's hidden size is not the target's.
    #[default]
    Target,
    /// Normal noise of deviation 0.02, as the references do it.
    Random,
}

/// What a step's sum of losses is divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// The trained rows of the whole optimizer step.
    #[default]
    TrainedRows,
    /// All tokens of the optimizer step, prompts included (parity with SafeAILab and SpecForge).
    AllPositions,
}

impl Default for Eagle3Config {
    fn default() -> Self {
        Self {
            algorithm: ALGORITHM.name.to_owned(),
            config: None,
            capture: None,
            draft_vocab_size: None,
            vocab_map: None,
            lm_head: HeadStart::Target,
            layer_from: None,
            init_from: None,
            ttt_steps: 7,
            step_share: 1.0,
            grow_until: 0.0,
            loss: DistillationLoss::CrossEntropy,
            lk_scale: 1.0,
            lk_decay: 1.0,
            loss_decay: 0.8,
            loss_weights: None,
            mask: MaskAlignment::Exact,
            normalisation: Normalisation::TrainedRows,
            recompute: true,
        }
    }
}

impl Eagle3Config {
    /// Reads and checks a `draft` section. A draft configuration in a file of its own becomes part of the section.
    pub fn read(section: &Value) -> Result<Self> {
        let mut config: Self = strict::from_value(section, "draft")?;
        config.config = config.config.map(|value| inline(&value)).transpose()?;
        if let Some(value) = &config.config {
            let keys = DraftKeys::read(value)?;
            match (config.draft_vocab_size, keys.draft_vocab_size) {
                (None, size) => config.draft_vocab_size = size,
                (Some(own), Some(file)) if own != file => {
                    let problem = format!("the draft's config.json says {file}, this key {own}");
                    return Err(Error::config("draft.draft_vocab_size", problem).with_hint("leave one of them out"));
                }
                _ => {}
            }
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if !(1..=32).contains(&self.ttt_steps) {
            return Err(Error::config("draft.ttt_steps", format!("expected 1 to 32, got {}", self.ttt_steps)));
        }
        if !(self.step_share > 0.0 && self.step_share <= 1.0) {
            let problem = format!("expected a share above 0 and up to 1, got {}", self.step_share);
            return Err(Error::config("draft.step_share", problem));
        }
        if !(0.0..=1.0).contains(&self.grow_until) {
            let problem = format!("expected a share of the run from 0 to 1, got {}", self.grow_until);
            return Err(Error::config("draft.grow_until", problem));
        }
        let positive = [("loss_decay", self.loss_decay), ("lk_scale", self.lk_scale)];
        if let Some((key, value)) = positive.iter().find(|(_, value)| !value.is_finite() || *value <= 0.0) {
            return Err(Error::config(format!("draft.{key}"), format!("expected a positive number, got {value}")));
        }
        if !self.lk_decay.is_finite() || self.lk_decay < 0.0 {
            let problem = format!("expected 0 or a positive number, got {}", self.lk_decay);
            return Err(Error::config("draft.lk_decay", problem));
        }
        if let Some(weights) = &self.loss_weights {
            let sound =
                weights.len() == self.ttt_steps && weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
            if !sound {
                let problem = format!("expected {} numbers, none negative, got {weights:?}", self.ttt_steps);
                return Err(Error::config("draft.loss_weights", problem));
            }
        }
        if let Some(size) = self.draft_vocab_size.filter(|&size| size < 1) {
            return Err(Error::config("draft.draft_vocab_size", format!("expected at least 1, got {size}")));
        }
        let ascending = |capture: &Vec<usize>| capture.windows(2).all(|pair| pair[0] < pair[1]);
        if let Some(capture) = self.capture.as_ref().filter(|capture| capture.is_empty() || !ascending(capture)) {
            let problem = format!("expected one or more indices, low to high, got {capture:?}");
            return Err(Error::config("draft.capture", problem));
        }
        Ok(())
    }

    /// Refuses a layer that the target lacks, or that is of another shape.
    fn check_layer_from(&self, layer: usize, shape: &Eagle3Shape, target: &TargetInfo) -> Result<()> {
        let refuse = |problem: String| Err(Error::config("draft.layer_from", problem));
        if layer >= target.num_layers() {
            return refuse(format!("expected a layer below {}, the target's layers, got {layer}", target.num_layers()));
        }
        if shape.hidden_size != shape.target_hidden_size {
            return refuse("the draft's layer has another shape than the target's".to_owned());
        }
        match &self.init_from {
            Some(path) => refuse(format!("the draft starts from {} already", path.display())),
            None => Ok(()),
        }
    }

    /// Steps that are trained when this share of the run is over.
    pub fn steps_at(&self, progress: f64) -> usize {
        match progress < self.grow_until {
            true => (1 + (self.ttt_steps as f64 * progress / self.grow_until) as usize).min(self.ttt_steps),
            false => self.ttt_steps,
        }
    }

    /// Weight of each step in the objective.
    pub fn weights(&self) -> Vec<f64> {
        let decayed = || (0..self.ttt_steps as i32).map(|step| self.loss_decay.powi(step)).collect();
        self.loss_weights.clone().unwrap_or_else(decayed)
    }

    /// The draft for a target of these sizes.
    pub fn shape(&self, target: &TargetInfo) -> Result<Eagle3Shape> {
        Eagle3Shape::new(self, target)
    }
}

/// A draft configuration: the value itself, or the file it names.
pub(in crate::draft) fn inline(value: &Value) -> Result<Value> {
    let Some(path) = value.as_str() else {
        return Ok(value.clone());
    };
    let path = Path::new(path);
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text).map_err(|error| Error::BadLine {
        path: path.to_path_buf(),
        line: error.line(),
        problem: format!("not valid JSON: {error}"),
    })
}

/// Keys of a draft's config.json beside those of any model of plain layers. Others are the engines' own business.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct DraftKeys {
    draft_vocab_size: Option<i64>,
    target_hidden_size: Option<i64>,
    num_aux_hidden_states: Option<usize>,
    fc_norm: bool,
    norm_before_fc: bool,
    norm_before_residual: bool,
    norm_output: Option<bool>,
    norm_feedback: bool,
    attention_bias: bool,
    mlp_bias: bool,
    tie_word_embeddings: bool,
    /// As vLLM reads it: what layer `k` reads.
    eagle_aux_hidden_state_layer_ids: Option<Vec<usize>>,
    eagle_config: EagleKeys,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct EagleKeys {
    norm_before_fc: bool,
    /// As SGLang and SpecForge read it: what layer `k` gives.
    eagle_aux_hidden_state_layer_ids: Option<Vec<usize>>,
}

impl DraftKeys {
    fn read(value: &Value) -> Result<Self> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let key = error.path().to_string();
            let key = if key == "." { "draft.config".to_owned() } else { format!("draft.config.{key}") };
            Error::config(key, error.inner().to_string())
        })
    }

    /// Captured layers by Hugging Face's index, where the file names them.
    fn capture(&self) -> Result<Option<Vec<usize>>> {
        let outputs = self.eagle_config.eagle_aux_hidden_state_layer_ids.as_ref();
        // A layer beyond all numbers is refused as one beyond the target.
        let shifted = outputs.map(|ids| ids.iter().map(|id| id.saturating_add(1)).collect::<Vec<_>>());
        match (&self.eagle_aux_hidden_state_layer_ids, shifted) {
            (Some(inputs), Some(outputs)) if *inputs != outputs => {
                let problem = format!(
                    "`eagle_aux_hidden_state_layer_ids` names the inputs of layers {inputs:?}, the key of that name in \
                     `eagle_config` the outputs of the layers before {outputs:?}"
                );
                Err(Error::config("draft.config", problem).with_hint("set draft.capture and remove both"))
            }
            (Some(inputs), _) => Ok(Some(inputs.clone())),
            (None, outputs) => Ok(outputs),
        }
    }
}

/// The architecture of an EAGLE-3 draft.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eagle3Shape {
    /// `H`, width of the draft.
    pub hidden_size: i64,
    /// `TH`, width of the target.
    pub target_hidden_size: i64,
    /// Layers of the target.
    pub num_target_layers: usize,
    /// `V`
    pub vocab_size: i64,
    /// `DV`; `V` where the draft can name every token.
    pub draft_vocab_size: i64,
    /// Layers of the draft. The first reads embedding and feature, the others are plain ones.
    pub num_layers: usize,
    /// Longest context of the draft.
    pub max_position_embeddings: i64,
    /// Shape of a layer.
    pub layer: LayerShape,
    /// Captured layers by Hugging Face's `hidden_states` index, low to high.
    pub capture: Vec<usize>,
    /// Each captured layer is normed by itself before `fc` (EAGLE-3.1).
    pub fc_norm: bool,
    /// All captured layers are normed together before `fc`.
    pub norm_before_fc: bool,
    /// The first layer's residual is the normed feature.
    pub norm_before_residual: bool,
    /// The vocabulary projection reads the normed output (SpecForge's `norm_output`).
    pub norm_output: bool,
    /// The next step's feature is the normed output (the engines' `norm_output`).
    pub norm_feedback: bool,
    /// Heads of queries and keys are normed each by itself, as Qwen3's are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub head_norms: bool,
}

impl Eagle3Shape {
    fn new(config: &Eagle3Config, target: &TargetInfo) -> Result<Self> {
        let keys = config.config.as_ref().map(DraftKeys::read).transpose()?.unwrap_or_default();
        let own = match &config.config {
            Some(value) => {
                let own = plain_model(value).map_err(|problem| Error::config("draft.config", problem))?;
                refuse_unsupported(&keys, &own, target)?;
                own
            }
            None => PlainModel {
                hidden_size: target.hidden_size,
                vocab_size: target.vocab_size,
                num_layers: 1,
                max_position_embeddings: target.max_position_embeddings,
                layer: target.draft_template(),
            },
        };
        let capture = match config.capture.clone() {
            Some(capture) => capture,
            None => keys.capture()?.map_or_else(|| default_capture(target.num_layers()), Ok)?,
        };
        if let Some(index) = capture.iter().find(|&&index| index > target.num_layers()) {
            let problem = format!("expected indices up to {}, the target's layers, got {index}", target.num_layers());
            return Err(Error::config("draft.capture", problem));
        }
        if let Some(count) = keys.num_aux_hidden_states.filter(|&count| count != capture.len()) {
            let problem = format!("`num_aux_hidden_states` is {count}, but layers {capture:?} are captured");
            return Err(Error::config("draft.config", problem));
        }
        let vocabulary =
            VocabularyKeys { vocab_map: config.vocab_map.clone(), draft_vocab_size: config.draft_vocab_size };
        let draft_vocab_size = vocabulary.draft_size(target.vocab_size)?;
        let shape = Self {
            hidden_size: own.hidden_size,
            target_hidden_size: target.hidden_size,
            num_target_layers: target.num_layers(),
            vocab_size: target.vocab_size,
            draft_vocab_size,
            num_layers: own.num_layers,
            max_position_embeddings: own.max_position_embeddings,
            layer: own.layer,
            capture,
            fc_norm: keys.fc_norm,
            norm_before_fc: keys.norm_before_fc || keys.eagle_config.norm_before_fc,
            norm_before_residual: keys.norm_before_residual,
            norm_output: keys.norm_output.unwrap_or(true),
            norm_feedback: keys.norm_feedback,
            head_norms: false,
        };
        shape.check().map_err(|problem| Error::config("draft.config", problem))?;
        if let Some(layer) = config.layer_from {
            config.check_layer_from(layer, &shape, target)?;
        }
        Ok(shape)
    }

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
        limits::within(&[
            ("hidden_size", self.hidden_size, limits::MOST_HIDDEN),
            ("target_hidden_size", self.target_hidden_size, limits::MOST_HIDDEN),
            ("vocab_size", self.vocab_size, limits::MOST_TOKENS),
            ("draft_vocab_size", self.draft_vocab_size, self.vocab_size),
            ("num_layers", limits::signed(self.num_layers), limits::MOST_LAYERS),
            ("max_position_embeddings", self.max_position_embeddings, limits::LONGEST_CONTEXT),
        ])?;
        let last = match self.num_target_layers {
            // Not every file says it.
            0 => limits::MOST_LAYERS as usize,
            layers => layers,
        };
        if last > limits::MOST_LAYERS as usize {
            return Err(format!("`num_target_layers`: expected at most {}, got {last}", limits::MOST_LAYERS));
        }
        let ascending = !self.capture.is_empty() && self.capture.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.capture.last().is_some_and(|&index| index > last) {
            return Err(format!("captured layers: expected indices up to {last}, low to high, got {:?}", self.capture));
        }
        self.layer.check()
    }

    /// Prefix of the tensors of a layer.
    pub fn layer_prefix(layer: usize) -> String {
        if layer == 0 { "midlayer".to_owned() } else { format!("layers.{layer}") }
    }

    /// Every trained tensor with its shape, in the order of creation, under the names of the reference's files.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let (hidden, wide) = (self.hidden_size, self.target_hidden_size * self.capture.len() as i64);
        let LayerShape { intermediate_size: width, num_attention_heads, num_key_value_heads, head_dim, .. } =
            self.layer;
        let (query, group) = (num_attention_heads * head_dim, num_key_value_heads * head_dim);
        let mut tensors = Vec::new();
        if self.hidden_size != self.target_hidden_size {
            // The target's embedding does not fit: the draft has one of its own.
            tensors.push(("embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        if self.norm_before_fc {
            tensors.push(("input_norm.weight".to_owned(), vec![wide]));
        }
        if self.fc_norm {
            let norms = 0..self.capture.len();
            tensors.extend(norms.map(|index| (format!("fc_norm.{index}.weight"), vec![self.target_hidden_size])));
        }
        tensors.push(("fc.weight".to_owned(), vec![hidden, wide]));
        for layer in 0..self.num_layers {
            let input = if layer == 0 { 2 * hidden } else { hidden };
            let prefix = Self::layer_prefix(layer);
            let mut push =
                |name: &str, shape: &[i64]| tensors.push((format!("{prefix}.{name}.weight"), shape.to_vec()));
            if layer == 0 {
                push("hidden_norm", &[hidden]);
            }
            push("input_layernorm", &[hidden]);
            push("self_attn.q_proj", &[query, input]);
            push("self_attn.k_proj", &[group, input]);
            push("self_attn.v_proj", &[group, input]);
            if self.head_norms {
                push("self_attn.q_norm", &[head_dim]);
                push("self_attn.k_norm", &[head_dim]);
            }
            push("self_attn.o_proj", &[hidden, query]);
            push("post_attention_layernorm", &[hidden]);
            push("mlp.gate_proj", &[width, hidden]);
            push("mlp.up_proj", &[width, hidden]);
            push("mlp.down_proj", &[hidden, width]);
        }
        if self.norm_output || self.norm_feedback {
            tensors.push(("norm.weight".to_owned(), vec![hidden]));
        }
        tensors.push(("lm_head.weight".to_owned(), vec![self.draft_vocab_size, hidden]));
        tensors
    }
}

/// What the draft takes for granted about its target, a line each.
pub(super) fn contract(config: &Eagle3Config, shape: &Eagle3Shape, target: &TargetInfo) -> Vec<String> {
    let LayerShape { num_attention_heads: heads, num_key_value_heads: groups, head_dim, rope, .. } = shape.layer;
    let layers = shape.capture.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let vocabulary = match shape.draft_vocab_size == shape.vocab_size {
        true => format!("all {} tokens", shape.vocab_size),
        false => format!("{} of {} tokens", shape.draft_vocab_size, shape.vocab_size),
    };
    let embedding = match shape.hidden_size == shape.target_hidden_size {
        true => "the target's, frozen",
        false => "its own, trained",
    };
    vec![
        format!("features      what layers {layers} of {} read (hidden_states index)", shape.num_target_layers),
        format!("rotary        {}", rotary(&rope, target)),
        format!("heads         {heads} with {groups} for keys and values, of {head_dim}"),
        format!("vocabulary    {vocabulary}"),
        format!("embedding     {embedding}; projection of its own, started from {:?}", config.lm_head).to_lowercase(),
        format!("mask          {:?}, {} steps, {:?}", config.mask, config.ttt_steps, config.loss).to_lowercase(),
    ]
}

/// The rotary embedding in words, and the target's where it is another: a draft may have one of its own, but who wants
/// the target's should see that.
pub(in crate::draft) fn rotary(rope: &RopeConfig, target: &TargetInfo) -> String {
    let words = |rope: &RopeConfig| format!("base {}, {:?}", rope.theta, rope.scaling).to_lowercase();
    let theirs = target.draft_template().rope;
    match rope.theta == theirs.theta && rope.scaling == theirs.scaling {
        true => format!("{}, as the target's", words(rope)),
        false => format!("{}; the target's: {}", words(rope), words(&theirs)),
    }
}

/// SafeAILab's choice: what layers `2`, `N / 2` and `N - 3` read.
fn default_capture(layers: usize) -> Result<Vec<usize>> {
    let capture = vec![2, layers / 2, layers.saturating_sub(3)];
    if capture.windows(2).all(|pair| pair[0] < pair[1]) {
        return Ok(capture);
    }
    let problem = format!("a target of {layers} layers is too shallow for the usual three captured layers");
    Err(Error::config("draft.capture", problem).with_hint("name the layers, such as draft.capture=[0,1,2]"))
}

fn refuse_unsupported(keys: &DraftKeys, draft: &PlainModel, target: &TargetInfo) -> Result<()> {
    let refuse = |problem: String, hint: &str| Err(Error::config("draft.config", problem).with_hint(hint));
    if draft.vocab_size != target.vocab_size {
        let problem = format!("`vocab_size`: the target has {} tokens, got {}", target.vocab_size, draft.vocab_size);
        return refuse(problem, "vocab_size is the target's; the draft's own is draft_vocab_size");
    }
    if let Some(width) = keys.target_hidden_size.filter(|&width| width != target.hidden_size) {
        let problem = format!("`target_hidden_size`: the target's is {}, got {width}", target.hidden_size);
        return refuse(problem, "this draft configuration is for another target");
    }
    if draft.hidden_size != target.hidden_size && keys.target_hidden_size.is_none() {
        let problem = format!("`hidden_size`: the target's is {}, got {}", target.hidden_size, draft.hidden_size);
        return refuse(problem, "a draft of another width says the target's in `target_hidden_size`");
    }
    if keys.attention_bias || keys.mlp_bias {
        return refuse("biases are not supported in a draft".to_owned(), "set attention_bias and mlp_bias to false");
    }
    if keys.tie_word_embeddings {
        let problem = "`tie_word_embeddings`: expected false, a draft has a projection of its own";
        return refuse(
            problem.to_owned(),
            "an engine that reads true replaces the trained projection by the embedding",
        );
    }
    Ok(())
}
