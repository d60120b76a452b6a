//! What a block drafter is made of: the `draft` section of a configuration, and the shape that follows from it and from the
//! target.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::heads::{self, HeadKind};
use super::losses::{Compound, Denominators, FirstErrorFocal, Labels, Objective, Weighting};
use crate::draft::vocabulary::VocabularyKeys;
use crate::error::{Error, Result};
use crate::models::{LayerShape, TargetInfo};
use crate::nn::RopeConfig;
use crate::strict;

/// The `draft` section of a block drafter's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlockConfig {
    /// The head, by its name: `dflash`, `dflash2`, `dspark`, ...
    pub algorithm: String,
    /// Layers of the backbone.
    pub num_layers: usize,
    /// `B`, rows of a block, the anchor's included.
    pub block_size: i64,
    /// Most anchors of an epoch's document.
    pub num_anchors: usize,
    /// Which token a row predicts; the head's own layout where this is not given.
    pub layout: Option<Layout>,
    /// Target layers whose outputs are read, from 0, -1 for the embedding; spread over the target where this is not given.
    pub target_layer_ids: Option<Vec<i64>>,
    /// Token that stands for what is to be drafted.
    pub mask_token_id: Option<i64>,
    /// Whether what is to be drafted stands as a trained row of the draft's own, not as the target's mask token.
    pub mask_embedding: bool,
    /// `full_attention` or `sliding_attention` for each layer; all full where this is not given.
    pub layer_types: Option<Vec<LayerType>>,
    /// `W`, tokens that a sliding layer's row sees, itself included.
    pub sliding_window: Option<i64>,
    /// Whether rows of a block see only the rows before them: in all layers alike. Where this is not given, sliding layers
    /// are causal and full ones are not, as every engine has it.
    pub is_causal: Option<bool>,
    /// Width of the MLP; the target's where this is not given.
    pub intermediate_size: Option<i64>,
    /// Query heads, key and value heads, and their size; the target's where they are not given.
    pub num_attention_heads: Option<i64>,
    /// See `num_attention_heads`.
    pub num_key_value_heads: Option<i64>,
    /// See `num_attention_heads`.
    pub head_dim: Option<i64>,
    /// Epsilon of the norms; the target's where this is not given.
    pub rms_norm_eps: Option<f64>,
    /// Taps and channels of a group of the convolutions around attention and MLP; none where this is not given.
    pub conv: Option<Convolution>,
    /// `DV`, size of the draft's vocabulary; the target's where neither this key nor a map is given.
    pub draft_vocab_size: Option<i64>,
    /// File made by `specforge vocab`, or a `vocab_mapping.pt`.
    pub vocab_map: Option<PathBuf>,
    /// Which slots of a block are trained.
    pub mask: BlockMask,
    /// Loss of a row.
    pub loss: Compound,
    /// What rows learn from, where a loss wants one token.
    pub labels: Labels,
    /// What rows count.
    pub weights: Weighting,
    /// What sums are divided by.
    pub denominators: Denominators,
    /// An extra term for the first error of each block.
    pub first_error_focal: Option<FirstErrorFocal>,
    /// Keys of the head's own.
    pub head: Map<String, Value>,
    /// Folder of a published draft of the same kind to start from.
    pub init_from: Option<PathBuf>,
}

/// Rule that says which slots of a block are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockMask {
    /// The slot's token and all before it behind the anchor are supervised.
    #[default]
    Exact,
    /// The slot's token is supervised: what lies between is not looked at (parity with SpecForge's DFlash, speculators and
    /// Model-Optimizer).
    Label,
}

/// Which token a row of a block predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Row `j` predicts the token in its own place, `anchor + j`; the anchor's row predicts nothing.
    FillIn,
    /// Row `j` predicts the token behind it, `anchor + j + 1`.
    Shift,
}

/// How far a layer of the backbone sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// Everything before the anchor.
    FullAttention,
    /// The last tokens before a row.
    SlidingAttention,
}

/// Convolutions within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Convolution {
    /// Rows that a row is mixed of: itself and those before it.
    pub kernel_size: i64,
    /// Channels that share a coefficient.
    pub group_size: i64,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            algorithm: "dflash".to_owned(),
            num_layers: 5,
            block_size: 16,
            num_anchors: 512,
            layout: None,
            target_layer_ids: None,
            mask_token_id: None,
            mask_embedding: false,
            layer_types: None,
            sliding_window: None,
            is_causal: None,
            intermediate_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            rms_norm_eps: None,
            conv: None,
            draft_vocab_size: None,
            vocab_map: None,
            mask: BlockMask::Exact,
            loss: Compound::default(),
            labels: Labels::default(),
            weights: Weighting::default(),
            denominators: Denominators::default(),
            first_error_focal: None,
            head: Map::new(),
            init_from: None,
        }
    }
}

/// The architecture of a block drafter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockShape {
    /// `H`, the target's.
    pub hidden_size: i64,
    /// Layers of the target.
    pub num_target_layers: usize,
    /// `V`
    pub vocab_size: i64,
    /// `DV`; `V` where the draft can name every token.
    pub draft_vocab_size: i64,
    /// `B`
    pub block_size: i64,
    /// Which token a row predicts.
    pub layout: Layout,
    /// Target layers whose outputs are read, from 0, -1 for the embedding, in the order in which they are joined.
    pub target_layer_ids: Vec<i64>,
    /// Token that stands for what is to be drafted.
    pub mask_token_id: i64,
    /// Each layer of the backbone.
    pub layers: Vec<BlockLayer>,
    /// Shape of a layer.
    pub layer: LayerShape,
    /// Convolutions around attention and MLP.
    pub conv: Option<Convolution>,
    /// Whether what is to be drafted stands as a trained row of the draft's own, not as the target's mask token.
    pub mask_embedding: bool,
    /// Multiplies the rows of the target's embedding.
    pub input_embedding_scale: f64,
}

/// What a layer of the backbone sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockLayer {
    /// `W`: a row at position `p` sees tokens from `p - (W - 1)` on; everything where there is none.
    pub window: Option<i64>,
    /// Whether a row sees only the rows of its block before it.
    pub causal: bool,
}

impl Layout {
    /// The first row of a block that predicts a token.
    pub fn first_row(self) -> i64 {
        match self {
            Self::FillIn => 1,
            Self::Shift => 0,
        }
    }

    /// Rows that predict one.
    pub fn slots(self, block_size: i64) -> i64 {
        block_size - self.first_row()
    }
}

impl BlockShape {
    /// `S`, rows of a block that predict a token.
    pub fn slots(&self) -> i64 {
        self.layout.slots(self.block_size)
    }

    /// The first row that predicts one.
    pub fn first_row(&self) -> i64 {
        self.layout.first_row()
    }

    /// Captured states by Hugging Face's index: what the layers give.
    pub fn capture(&self) -> Vec<usize> {
        self.target_layer_ids.iter().map(|id| (id + 1) as usize).collect()
    }

    /// Refuses sizes that no backbone has: they may come from a file.
    pub fn check(&self) -> Result<(), String> {
        self.layer.check()?;
        if !(2..=MOST_ROWS).contains(&self.block_size) {
            return Err(format!("`block_size`: expected 2 to {MOST_ROWS}, got {}", self.block_size));
        }
        if !(0..self.vocab_size).contains(&self.mask_token_id) {
            let (size, got) = (self.vocab_size, self.mask_token_id);
            return Err(format!("`mask_token_id`: expected a token of the target, below {size}, got {got}"));
        }
        if let Some(window) = self.layers.iter().filter_map(|layer| layer.window).find(|&window| window < 1) {
            return Err(format!("`sliding_window`: expected at least 1, got {window}"));
        }
        if let Some(conv) = self.conv {
            let fits = conv.group_size >= 1 && self.hidden_size % conv.group_size == 0;
            if !fits || !(1..=self.block_size).contains(&conv.kernel_size) {
                let hidden = self.hidden_size;
                return Err(format!(
                    "convolution: expected taps within a block and groups that divide {hidden}: {conv:?}"
                ));
            }
        }
        let last = self.num_target_layers as i64 - 1;
        match self.target_layer_ids.iter().find(|id| !(-1..last).contains(*id)) {
            None if self.target_layer_ids.is_empty() => Err("`target_layer_ids`: expected at least one".to_owned()),
            None => Ok(()),
            Some(id) if *id == last => Err(format!(
                "`target_layer_ids`: {id} is the target's last layer, whose output is normed in training and not in engines"
            )),
            Some(id) => Err(format!("`target_layer_ids`: expected -1 to {}, got {id}", last - 1)),
        }
    }

    /// Reads what a checkpoint says of its draft.
    pub fn from_description(description: &Value) -> Result<Self, String> {
        let shape = description.get("shape").unwrap_or(&Value::Null);
        let shape: Self = serde_path_to_error::deserialize(shape).map_err(|error| {
            let key = error.path().to_string();
            let key = if key == "." { "shape".to_owned() } else { format!("shape.{key}") };
            format!("`{key}`: {}", error.inner())
        })?;
        shape.check()?;
        Ok(shape)
    }
}

/// Longest block.
const MOST_ROWS: i64 = 256;

/// Layers that are read where a configuration names none: `count` of them, spread over a target of `layers` as z-lab does
/// it, from the second to the fourth last; halves go to the even layer, as in Python.
pub fn default_target_layers(layers: usize, count: usize) -> Vec<i64> {
    let (layers, count) = (layers as i64, count as i64);
    if count == 1 || layers < 5 {
        return vec![(layers / 2).min(layers - 2).max(-1)];
    }
    let spread = (layers - 4) as f64 / (count - 1) as f64;
    let mut ids: Vec<i64> = (0..count).map(|index| (1.0 + index as f64 * spread).round_ties_even() as i64).collect();
    ids.dedup();
    ids
}

impl BlockConfig {
    /// Reads and checks a `draft` section: what is not given is what the head's own row of the table says.
    pub fn read(section: &Value) -> Result<Self> {
        let name = section.get("algorithm").and_then(Value::as_str).unwrap_or_default();
        let kind = heads::find(name).ok_or_else(|| {
            let names: Vec<&str> = heads::HEADS.iter().map(|kind| kind.name).collect();
            Error::config("draft.algorithm", format!("expected one of {}, got `{name}`", names.join(", ")))
        })?;
        let mut whole = (kind.defaults)();
        if let (Some(whole), Some(given)) = (whole.as_object_mut(), section.as_object()) {
            // A resolved section has every key; those that say nothing leave the head's own.
            whole.extend(
                given.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())),
            );
        }
        let config: Self = strict::from_value(&whole, "draft")?;
        config.check()?;
        (kind.check)(&config)?;
        Ok(config)
    }

    /// The head.
    pub fn kind(&self) -> &'static HeadKind {
        heads::find(&self.algorithm).unwrap_or(&heads::plain::KIND) // a name that was read is known
    }

    /// Which token a row predicts.
    pub fn layout(&self) -> Layout {
        self.layout.unwrap_or(self.kind().layout)
    }

    /// Whether the target's own predictions are wanted.
    pub fn wants_teacher(&self) -> bool {
        let labels = self.first_error_focal.and_then(|focal| focal.labels);
        let by_loss = self.loss.wants_teacher() || self.weights.wants_teacher();
        by_loss || [Some(self.labels), labels].contains(&Some(Labels::Teacher)) || (self.kind().wants_teacher)(self)
    }

    fn check(&self) -> Result<()> {
        Objective::of(self)?;
        if !(1..=64).contains(&self.num_layers) {
            return Err(Error::config("draft.num_layers", format!("expected 1 to 64, got {}", self.num_layers)));
        }
        if self.num_anchors == 0 {
            return Err(Error::config("draft.num_anchors", "expected at least 1, got 0".to_owned()));
        }
        if !(2..=MOST_ROWS).contains(&self.block_size) {
            let problem = format!("expected 2 to {MOST_ROWS}, got {}", self.block_size);
            return Err(Error::config("draft.block_size", problem));
        }
        if let Some(size) = self.draft_vocab_size.filter(|&size| size < 1) {
            return Err(Error::config("draft.draft_vocab_size", format!("expected at least 1, got {size}")));
        }
        let types = self.layer_types.as_deref().unwrap_or_default();
        if !types.is_empty() && types.len() != self.num_layers {
            let problem = format!("expected one for each of {} layers, got {}", self.num_layers, types.len());
            return Err(Error::config("draft.layer_types", problem));
        }
        match (types.contains(&LayerType::SlidingAttention), self.sliding_window) {
            (true, None) => Err(Error::config("draft.sliding_window", "sliding layers need a window".to_owned())),
            (false, Some(_)) => Err(Error::config("draft.sliding_window", "no layer is sliding".to_owned())
                .with_hint("name sliding layers in draft.layer_types")),
            _ => Ok(()),
        }
    }

    /// The draft for a target of these sizes.
    pub fn shape(&self, target: &TargetInfo) -> Result<BlockShape> {
        let template = target.draft_template();
        let head_dim = self.head_dim.unwrap_or(template.head_dim);
        let layer = LayerShape {
            intermediate_size: self.intermediate_size.unwrap_or(template.intermediate_size),
            num_attention_heads: self.num_attention_heads.unwrap_or(template.num_attention_heads),
            num_key_value_heads: self.num_key_value_heads.unwrap_or(template.num_key_value_heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(template.rms_norm_eps),
            rope: RopeConfig { head_dim, ..template.rope },
        };
        let types = self.layer_types.clone().unwrap_or_else(|| vec![LayerType::FullAttention; self.num_layers]);
        let layers = types.iter().map(|kind| {
            let sliding = *kind == LayerType::SlidingAttention;
            let window = self.sliding_window.filter(|_| sliding);
            BlockLayer { window, causal: self.is_causal.unwrap_or(sliding) }
        });
        let vocabulary = VocabularyKeys { vocab_map: self.vocab_map.clone(), draft_vocab_size: self.draft_vocab_size };
        let ids = self.target_layer_ids.clone();
        let mask_token_id = self.mask_token_id.ok_or_else(|| {
            Error::config("draft.mask_token_id", "which token stands for what is to be drafted is not given".to_owned())
                .with_hint("name one that texts do not have, such as a reserved one; its embedding is read as it is")
        })?;
        let shape = BlockShape {
            hidden_size: target.hidden_size,
            num_target_layers: target.num_layers(),
            vocab_size: target.vocab_size,
            draft_vocab_size: vocabulary.draft_size(target.vocab_size)?,
            block_size: self.block_size,
            layout: self.layout(),
            target_layer_ids: ids.unwrap_or_else(|| default_target_layers(target.num_layers(), self.num_layers)),
            mask_token_id,
            layers: layers.collect(),
            layer,
            conv: self.conv,
            mask_embedding: self.mask_embedding,
            // A key of some heads; they check it.
            input_embedding_scale: self.head.get("input_embedding_scale").and_then(Value::as_f64).unwrap_or(1.0),
        };
        shape.check().map_err(|problem| Error::config("draft", problem))?;
        Ok(shape)
    }
}

/// What a draft takes for granted, a line each.
pub(super) fn contract(config: &BlockConfig, shape: &BlockShape) -> Vec<String> {
    let see = |layer: &BlockLayer| {
        let width = layer.window.map_or_else(|| "all".to_owned(), |window| format!("{window}"));
        format!("{width}{}", if layer.causal { " causal" } else { "" })
    };
    let layers: Vec<String> = shape.layers.iter().map(see).collect();
    let predicts = match shape.layout {
        Layout::FillIn => "row j predicts the token in its own place",
        Layout::Shift => "row j predicts the token behind it",
    };
    vec![
        format!("features: outputs of target layers {:?}, of tokens before the anchor alone", shape.target_layer_ids),
        format!("block: the anchor and {} rows of token {}; {predicts}", shape.block_size - 1, shape.mask_token_id),
        format!("layers see: {}", layers.join(", ")),
        format!("at most {} anchors a document", config.num_anchors),
    ]
}
