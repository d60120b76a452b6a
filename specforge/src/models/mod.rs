//! Target models: one file each, with the Hugging Face names of its tensors and its configuration struct beside it.
//!
//! A model is immutable in its forward pass; the cache is an argument.

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::{AttentionMask, Embedding, Head, KvCache};

pub mod decoder;
pub mod dream;
pub mod family;
pub mod gemma;
pub mod gemma2;
pub mod gemma3;
pub mod gpt_oss;
pub mod granite;
pub mod identity;
pub mod infilling;
pub mod info;
pub mod keys;
pub mod layerwise;
pub mod limits;
pub mod llada;
pub mod llama;
pub mod mistral;
pub mod mixtral;
pub mod olmo2;
pub mod olmo3;
pub mod parts;
pub mod phi3;
pub mod picture_target;
pub mod qwen2;
pub mod qwen2_moe;
pub mod qwen3;
pub mod qwen3_moe;
pub mod rope_keys;
pub mod shared_target;
pub mod smollm3;
pub mod spread;
pub mod stored_kind;
pub mod stretch;
pub mod tables;
pub mod text_model;
pub mod var;
pub mod vqvae;

pub use family::{
    Block, Correct, Family, GetTensor, Loading, TargetConfig, add_family, check, families, load_diffusion, load_head,
    load_tables, load_tables_alone, load_tables_with, load_target, load_target_with, read_info,
};
pub use identity::TargetIdentity;
pub use infilling::Infilling;
pub use info::{LayerKind, LayerShape, MaskedDiffusion, ParameterCounts, Pictures, PlainModel, TargetInfo};
pub use layerwise::LayerWise;
pub use llama::plain_model;
pub use picture_target::PictureTarget;
pub use shared_target::{SharedTarget, TargetInUse};
pub use spread::Spread;
pub use stored_kind::stored_kind;
pub use stretch::{InStretches, Stretch};
pub use tables::write_tables;
pub use text_model::open_weights;

/// config.json of a masked diffusion model of plain layers, as the family whose rows stand where its do writes it.
pub fn infilling_config(model: &Infilling) -> Value {
    if model.diffusion.shift { dream::written(model) } else { llada::written(model) }
}

/// The name of a tensor in that family's files, by its usual one.
pub fn infilling_name(model: &Infilling, usual: &str) -> String {
    if model.diffusion.shift { usual.to_owned() } else { llada::own_name(usual) }
}

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

impl ForwardInput<'_> {
    /// Refuses what a caller can get wrong, for a model of so many layers; a token id outside the vocabulary is an error of
    /// the look-up.
    pub fn check(&self, layers: usize, cache: Option<&KvCache>) -> Result<()> {
        let (rows, tokens) = self.ids.size2()?;
        if let Some(index) = self.capture.iter().find(|&&index| index > layers) {
            return Err(Error::Failed(format!("hidden state {index} was asked for; this model has 0 to {layers}")));
        }
        if self.positions.size() != [rows, tokens] {
            let got = self.positions.size();
            return Err(Error::Failed(format!(
                "positions: expected the shape of the ids, [{rows}, {tokens}], got {got:?}"
            )));
        }
        if let Some(cached) = cache.map(KvCache::rows).filter(|&cached| cached != rows) {
            return Err(Error::Failed(format!("the cache holds {cached} rows, the ids {rows}")));
        }
        self.mask.check((rows, tokens), cache.map(KvCache::lengths)).map_err(Error::Failed)
    }
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
    /// What it is.
    fn info(&self) -> &TargetInfo;
    /// An empty cache for `rows` sequences with room for `capacity` tokens each.
    fn new_cache(&self, rows: i64, capacity: i64) -> KvCache;
    /// One pass. With a cache, the new tokens are written to it and its lengths stay: the caller advances them.
    fn forward(&self, input: &ForwardInput<'_>, cache: Option<&mut KvCache>) -> Result<ForwardOutput>;
    /// The token embedding.
    fn embedding(&self) -> &Embedding;
    /// The vocabulary projection.
    fn head(&self) -> &Head;
    /// Element type of the weights.
    fn kind(&self) -> Kind;
    /// Where embedding and head are, inputs are read and outputs come; mostly all weights.
    fn device(&self) -> Device;
    /// Where the layers are, each device once.
    fn devices(&self) -> Vec<Device> {
        vec![self.device()]
    }
    /// The same model some layers at a time, where it can be run so: masked diffusion models are.
    fn in_stretches(&self) -> Option<&dyn InStretches> {
        None
    }
}

/// What a draft takes from its target where the target itself is not run: what it is, and the two tables on either
/// side of its layers.
#[derive(Debug)]
pub struct TargetTables {
    /// What the target is.
    pub info: TargetInfo,
    /// The token embedding.
    pub embedding: Embedding,
    /// The vocabulary projection; its matrix is the embedding's table where the two are tied.
    pub head: Head,
}

impl TargetTables {
    /// Those of a loaded target; nothing is copied.
    pub fn of(target: &dyn TargetModel) -> Self {
        let (embedding, head) = (target.embedding().share(), target.head().share());
        Self { info: target.info().clone(), embedding, head }
    }
}
