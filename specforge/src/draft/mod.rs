//! Draft models: everything an algorithm decides. Parameters, which rows are trained, loss, gradients, metrics.
//!
//! The trainer knows [`DraftModel`] and no algorithm. Adding an algorithm is adding a file here and a line to
//! [`ALGORITHMS`]; `docs/adding-an-algorithm.md` walks through it.

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Embedding, Head};
use crate::vocab::VocabMap;

pub mod distillation;
pub mod eagle3;
pub mod gradients;
mod lift;
pub mod loss;
pub mod medusa;
pub mod supervision;
pub mod vocabulary;

pub use gradients::Gradients;

/// A trainable tensor. Order of creation is the order everywhere: optimizer, checkpoint, reduction.
#[derive(Debug)]
pub struct Parameter {
    /// Name in checkpoints and exports.
    pub name: String,
    /// Value in the compute type, a leaf that requires gradients.
    pub value: Tensor,
    /// Whether weight decay applies: matrices yes, biases and norms no.
    pub decay: bool,
}

/// Sums over the rows of a batch, kept on the device; averages are taken once, over global counts.
#[derive(Debug)]
pub struct Tally {
    /// This batch's share of the objective: a float64 scalar, already divided by the global counts.
    pub objective: Tensor,
    /// `[M]` float64, in the order of [`DraftModel::metrics`].
    pub sums: Tensor,
    /// `[M]` rows behind each sum.
    pub counts: Vec<f64>,
}

/// A draft model in training.
pub trait DraftModel {
    /// Row of the table of algorithms.
    fn algorithm(&self) -> &'static Algorithm;
    /// Hidden states the target must hand over, by Hugging Face's index.
    fn capture(&self) -> Vec<usize>;
    /// Trainable parameters.
    fn parameters(&self) -> &[Parameter];
    /// Names of the metrics, each an average over rows.
    fn metrics(&self) -> Vec<String>;
    /// Figures derived from the averages of [`DraftModel::metrics`], the selection metric among them.
    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)>;
    /// Trained rows of each loss term: those of several documents are the sum of each one's. Looks at the host side of the
    /// batch alone, so that global counts are known before anything is computed.
    fn count_rows(&self, batch: &PackedBatch) -> Vec<f64>;
    /// Adds this batch's gradients (in parameter order; see [`Gradients::zeros`] for their types) for an objective
    /// divided by `global_counts`, and announces each one as soon as it is complete.
    fn accumulate(
        &self,
        features: &FeatureBatch,
        global_counts: &[f64],
        gradients: &mut Gradients<'_>,
    ) -> Result<Tally>;
    /// Objective and metrics without gradients.
    fn evaluate(&self, features: &FeatureBatch, global_counts: &[f64]) -> Result<Tally>;
    /// What a checkpoint must hold to rebuild this draft without the training configuration.
    fn description(&self) -> Value;
    /// Tensors of the draft's own that are not trained and that a checkpoint must hold too.
    fn buffers(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
    /// Refuses documents longer than the draft is made for.
    fn check_length(&self, _longest: i64) -> Result<()> {
        Ok(())
    }
    /// What the draft takes for granted about its target, a line each: shown before the first step.
    fn contract(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What a draft is built on.
#[derive(Debug)]
pub struct DraftContext<'a> {
    /// Sizes of the target.
    pub target: TargetInfo,
    /// The target's token embedding.
    pub embedding: &'a Embedding,
    /// The target's vocabulary projection.
    pub head: &'a Head,
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<&'a VocabMap>,
    /// Element type of the draft's parameters.
    pub kind: Kind,
    /// Where they are.
    pub device: Device,
    /// Seed of random initial values.
    pub seed: u64,
    /// Most bytes that one chunk of logits may take.
    pub chunk_bytes: usize,
}

/// Size of a draft, known from configuration alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DraftSize {
    /// Trainable parameters.
    pub trainable: u64,
    /// Frozen parameters that are the draft's own (not counting what it shares with the target).
    pub frozen: u64,
    /// Hidden states captured for each token.
    pub captured: u64,
    /// Multiply-adds of forward and backward for one trained row, of all terms together.
    pub row_multiply_adds: u64,
}

/// One row of the table of algorithms.
pub struct Algorithm {
    /// Value of `draft.algorithm`.
    pub name: &'static str,
    /// One line for help texts.
    pub summary: &'static str,
    /// The figure of [`DraftModel::summary`] that decides which checkpoint is best; higher is better.
    pub selection_metric: &'static str,
    /// Names of all figures of an evaluation, from a configuration alone: `loss`, those of [`DraftModel::metrics`] and those
    /// of [`DraftModel::summary`].
    pub figures: fn(&Value) -> Result<Vec<String>>,
    /// Keys of the `draft` section that change memory and speed, never an update: a resumed run may have others.
    pub free_on_resume: &'static [&'static str],
    /// Checks a configuration and fills in defaults.
    pub resolve: fn(&Value) -> Result<Value>,
    /// Size from configuration and target dimensions, before any weight is loaded.
    pub size: fn(&Value, &TargetInfo) -> Result<DraftSize>,
    /// Hidden states the draft will ask for, by Hugging Face's index: those of [`DraftModel::capture`], from
    /// configuration alone.
    pub capture: fn(&Value, &TargetInfo) -> Result<Vec<usize>>,
    /// Builds the draft.
    pub build: fn(&Value, &DraftContext<'_>) -> Result<Box<dyn DraftModel>>,
}

impl Algorithm {
    /// What [`Algorithm::figures`] gives for a draft with these metrics and the selection metric as its summary.
    fn figures_with(&self, metrics: Vec<String>) -> Vec<String> {
        let mut figures = vec!["loss".to_owned(), self.selection_metric.to_owned()];
        figures.extend(metrics);
        figures
    }
}

/// Every algorithm this program can train.
pub const ALGORITHMS: &[Algorithm] = &[medusa::ALGORITHM, eagle3::ALGORITHM];

/// Key of the draft section that names the algorithm.
pub const ALGORITHM_KEY: &str = "algorithm";

/// Finds the algorithm of a `draft` section.
pub fn algorithm(section: &Value) -> Result<&'static Algorithm> {
    let known = || ALGORITHMS.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ");
    let key = format!("draft.{ALGORITHM_KEY}");
    let name = section
        .get(ALGORITHM_KEY)
        .and_then(Value::as_str)
        .ok_or_else(|| Error::config(&key, format!("expected one of {}, got nothing", known())))?;
    ALGORITHMS
        .iter()
        .find(|entry| entry.name == name)
        .ok_or_else(|| Error::config(&key, format!("expected one of {}, got `{name}`", known())))
}
