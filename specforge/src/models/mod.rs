//! Target models: one file each, with the Hugging Face names of its tensors and its configuration struct beside it.
//!
//! A model is immutable in its forward pass; the cache is an argument.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::{AttentionMask, KvCache, RopeConfig, RopeScaling};
use crate::strict;
use crate::weights::{SharedCopies, WeightsFolder};

pub mod identity;
pub mod limits;
pub mod llama;
pub mod shared_target;

pub use identity::TargetIdentity;
pub use llama::{LlamaConfig, LlamaTarget};
pub use shared_target::{SharedTarget, TargetInUse};

/// Which rows get logits. Rows count over the flattened batch: row `b * T + t`.
#[derive(Debug)]
pub enum LogitRows<'a> {
    /// None: the vocabulary projection is not run.
    None,
    /// Every row.
    All,
    /// The rows of an int64 tensor `[R]`.
    Rows(&'a Tensor),
}

/// Input of a forward pass.
#[derive(Debug)]
pub struct ForwardInput<'a> {
    /// `[B, T]` int64
    pub ids: &'a Tensor,
    /// `[B, T]` int64
    pub positions: &'a Tensor,
    /// What each token sees.
    pub mask: &'a AttentionMask,
    /// Hidden states to return, by Hugging Face's `hidden_states` index: 0 the embeddings, `k` the output of layer
    /// `k - 1`, and the number of layers the output after the final norm.
    pub capture: &'a [usize],
    /// Rows to project onto the vocabulary.
    pub logits: LogitRows<'a>,
}

/// Output of a forward pass.
#[derive(Debug)]
pub struct ForwardOutput {
    /// One `[B, T, H]` for each captured index, in the order asked for.
    pub hidden: Vec<Tensor>,
    /// `[R, V]`, where rows were asked for.
    pub logits: Option<Tensor>,
}

/// A model that drafts are trained for. It may run on another thread than the one that loaded it.
pub trait TargetModel: Send {
    /// Sizes the rest of the program needs.
    fn dimensions(&self) -> Dimensions;
    /// An empty cache for `rows` sequences with room for `capacity` tokens each.
    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache;
    /// One pass. With a cache, the new tokens are written to it and its lengths stay: the caller advances them.
    fn forward(&self, input: &ForwardInput<'_>, cache: Option<&mut KvCache>) -> Result<ForwardOutput>;
    /// The token embedding, `[V, H]`.
    fn embedding(&self) -> &Tensor;
    /// The vocabulary projection, `[V, H]`.
    fn head(&self) -> &Tensor;
    /// Element type of the weights.
    fn kind(&self) -> Kind;
    /// Where the weights are.
    fn device(&self) -> Device;
}

/// Sizes of a target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dimensions {
    /// `H`
    pub hidden_size: i64,
    /// `V`
    pub vocab_size: i64,
    /// Number of layers.
    pub num_layers: usize,
    /// Longest context.
    pub max_position_embeddings: i64,
    /// Shape of one layer: what a draft made of such layers is like where its configuration is silent.
    pub layer: LayerShape,
}

impl Dimensions {
    /// Sizes of a target whose layers nobody looks into: one head of the whole width.
    pub fn of(hidden_size: i64, vocab_size: i64, num_layers: usize, max_position_embeddings: i64) -> Self {
        let rope = RopeConfig {
            theta: 10_000.0,
            head_dim: hidden_size,
            max_position_embeddings,
            scaling: RopeScaling::Default,
        };
        let layer = LayerShape {
            intermediate_size: 4 * hidden_size,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: hidden_size,
            rms_norm_eps: 1e-6,
            rope,
        };
        Self { hidden_size, vocab_size, num_layers, max_position_embeddings, layer }
    }
}

/// Shape of one transformer layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// `N`
    pub num_attention_heads: i64,
    /// `G`
    pub num_key_value_heads: i64,
    /// `D`
    pub head_dim: i64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
}

impl LayerShape {
    /// Refuses sizes that no layer has, and those that do not fit each other: they may come from a file.
    pub fn check(&self) -> Result<(), String> {
        let heads = self.num_attention_heads;
        limits::within(&[
            ("intermediate_size", self.intermediate_size, limits::WIDEST),
            ("num_attention_heads", heads, limits::MOST_HEADS),
            ("num_key_value_heads", self.num_key_value_heads, limits::MOST_HEADS),
            ("head_dim", self.head_dim, limits::WIDEST / heads.max(1)),
            ("max_position_embeddings", self.rope.max_position_embeddings, limits::LONGEST_CONTEXT),
        ])?;
        if heads % self.num_key_value_heads != 0 {
            let groups = self.num_key_value_heads;
            return Err(format!("`num_key_value_heads`: expected a divisor of the {heads} heads, got {groups}"));
        }
        if self.head_dim % 2 != 0 {
            return Err(format!("`head_dim`: expected an even number, got {}", self.head_dim));
        }
        if self.rope.head_dim != self.head_dim {
            let (heads, rope) = (self.head_dim, self.rope.head_dim);
            return Err(format!("rope: `head_dim`: expected {heads}, the width of a head, got {rope}"));
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            return Err(format!("`rms_norm_eps`: expected a number from 0 to below 1, got {}", self.rms_norm_eps));
        }
        self.rope.check()
    }
}

/// What a draft takes from its target where the target itself is not run: its sizes and the two tables on either side
/// of its layers.
#[derive(Debug)]
pub struct TargetTables {
    /// Sizes of the target.
    pub dimensions: Dimensions,
    /// The token embedding, `[V, H]`.
    pub embedding: Tensor,
    /// The vocabulary projection, `[V, H]`; the embedding itself where the two are tied.
    pub head: Tensor,
}

impl TargetTables {
    /// Those of a loaded target; nothing is copied.
    pub fn of(target: &dyn TargetModel) -> Self {
        let (embedding, head) = (target.embedding().shallow_clone(), target.head().shallow_clone());
        Self { dimensions: target.dimensions(), embedding, head }
    }
}

/// A family of models: `model_type` of config.json, and how its folders are read.
struct Family {
    model_type: &'static str,
    read_dimensions: fn(&Path) -> Result<Dimensions>,
    check: fn(&Path) -> Result<()>,
    load: fn(&Path, &Loading<'_>) -> Result<Box<dyn TargetModel>>,
    load_tables: fn(&Path, &Loading<'_>) -> Result<TargetTables>,
    /// Names of the tensors behind [`TargetTables`]; a tied head is not there.
    table_names: &'static [&'static str],
}

/// Families this program can run. Adding one is adding an entry.
const FAMILIES: &[Family] = &[Family {
    model_type: "llama",
    read_dimensions: llama::read_dimensions,
    check: llama::check,
    load: llama::load,
    load_tables: llama::load_tables,
    table_names: &[llama::EMBEDDING, llama::HEAD],
}];

#[derive(Deserialize)]
struct ModelType {
    model_type: String,
}

/// How the weights of a model are loaded.
#[derive(Debug, Clone, Copy)]
pub struct Loading<'a> {
    /// Element type of the weights.
    pub kind: Kind,
    /// Where they go.
    pub device: Device,
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

/// Loads the model of a Hugging Face folder.
pub fn load_target(path: &Path, kind: Kind, device: Device) -> Result<Box<dyn TargetModel>> {
    load_target_with(path, &Loading { kind, device, copies: None })
}

/// Loads the model of a Hugging Face folder, perhaps together with the other processes of this machine.
pub fn load_target_with(path: &Path, loading: &Loading<'_>) -> Result<Box<dyn TargetModel>> {
    (family(path)?.load)(path, loading)
}

/// Loads embedding and head of a Hugging Face folder. The layers must be in its files and are not read.
pub fn load_tables(path: &Path, kind: Kind, device: Device) -> Result<TargetTables> {
    load_tables_with(path, &Loading { kind, device, copies: None })
}

/// As [`load_tables`], perhaps together with the other processes of this machine.
pub fn load_tables_with(path: &Path, loading: &Loading<'_>) -> Result<TargetTables> {
    (family(path)?.load_tables)(path, loading)
}

/// Sizes of the model of a Hugging Face folder, from config.json alone.
pub fn read_dimensions(path: &Path) -> Result<Dimensions> {
    (family(path)?.read_dimensions)(path)
}

/// Refuses a Hugging Face folder whose weights are not what config.json says. Reads headers alone; to be asked before
/// anything is made as large as config.json says.
pub fn check(path: &Path) -> Result<()> {
    (family(path)?.check)(path)
}

/// The family of a Hugging Face folder.
fn family(path: &Path) -> Result<&'static Family> {
    let config_path = path.join("config.json");
    if !config_path.is_file() {
        let hint = match path.join("snapshots").is_dir() {
            true => "this is a folder of the hub's cache: name one of those in `snapshots`",
            false => "name a Hugging Face folder, or make one from a GGUF file with `specforge import`",
        };
        return Err(Error::bad_file(path, "is not a model folder: config.json is not there").with_hint(hint));
    }
    let text = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
    let config: ModelType = strict::from_json(&text).map_err(|problem| Error::bad_file(&config_path, problem))?;
    FAMILIES.iter().find(|family| family.model_type == config.model_type).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        let problem = format!("model_type `{}` is not supported; supported: {}", config.model_type, known.join(", "));
        Error::bad_file(&config_path, problem)
    })
}
