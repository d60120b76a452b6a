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
use crate::table::Table;
use crate::vocab::VocabMap;
use crate::weights::WeightsFolder;

pub mod block;
pub mod distillation;
pub mod eagle3;
pub mod gradients;
mod lift;
pub mod loss;
pub mod losses;
pub mod masked_diffusion;
pub mod medusa;
pub mod next_scale;
mod objective;
mod parameter;
pub mod peagle;
mod plan;
mod row_losses;
pub mod samples;
pub mod supervision;
pub mod vocabulary;

pub use gradients::Gradients;
pub use parameter::{Parameter, ParameterGroup};
pub use plan::{Draws, RowPlan, StepKey, add_counts};
pub use samples::{Compared, Documents, Footprint, SampleSize, Samples, Timed, Work};

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
    /// Decides which rows of a batch each loss term trains, and everything else that can be decided before anything is
    /// computed. Looks at the host side of the batch alone, and what it says of a document depends on the document and the
    /// key: its neighbours in the batch change nothing.
    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan>;
    /// The counts of [`DraftModel::plan`] alone: for documents that another rank trains.
    fn count(&self, batch: &PackedBatch, key: StepKey) -> Result<Vec<f64>> {
        Ok(self.plan(batch, key)?.counts)
    }
    /// Adds a planned batch's gradients (in parameter order; see [`Gradients::zeros`] for their types) for an objective
    /// divided by `global_counts`, those of the whole optimizer step, and announces each one as soon as it is complete.
    fn accumulate(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: &mut Gradients<'_>,
    ) -> Result<Tally>;
    /// Objective and metrics without gradients.
    fn evaluate(&self, features: &FeatureBatch, plan: &RowPlan, global_counts: &[f64]) -> Result<Tally>;
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
    /// The files of the target, for drafts that begin with tensors of its own; nothing where there is no folder.
    pub weights: Option<&'a WeightsFolder>,
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

impl DraftContext<'_> {
    /// A parameter that begins as a copy of the target's tensor of this name, in the draft's element type. It is trained and
    /// saved as every other; see [`Parameter::target_name`].
    pub fn target_parameter(&self, name: &str, shape: &[i64]) -> Result<Parameter> {
        let weights = self.weights.ok_or_else(|| {
            Error::Failed(format!("the draft begins with the target's `{name}`, and the target is in no folder"))
        })?;
        weights.check(&[(name.to_owned(), shape.to_vec())], |_| true)?;
        // A copy: what is loaded may lie in the file.
        let value = weights.load(name, self.kind, Device::Cpu)?.f_to_device(self.device)?.copy();
        Ok(Parameter::of_target(name, value))
    }
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
#[derive(Clone, Copy)]
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
    /// Whether updates depend on how much of the run is over ([`StepKey::progress`]): the run then keeps its length.
    pub follows_length: fn(&Value) -> bool,
    /// Whether documents are pictures as codes of an image tokenizer, and the target an image model; else they are text.
    pub pictures: bool,
    /// Checks a configuration and fills in defaults.
    pub resolve: fn(&Value) -> Result<Value>,
    /// Size from configuration and target dimensions, before any weight is loaded.
    pub size: fn(&Value, &TargetInfo) -> Result<DraftSize>,
    /// Hidden states the draft will ask for, by Hugging Face's index: those of [`DraftModel::capture`], from
    /// configuration alone.
    pub capture: fn(&Value, &TargetInfo) -> Result<Vec<usize>>,
    /// What a micro-batch of such documents takes, for a plan; the default where that is no more than for any draft.
    pub footprint: fn(&Value, &TargetInfo, Documents) -> Result<Footprint>,
    /// Configurations by which the algorithm is checked and timed on a device; none where it needs more than a target.
    pub samples: fn(SampleSize) -> Samples,
    /// What a step on documents computes, from configuration and target; the last is the most bytes of a chunk of logits.
    pub work: fn(&Value, &TargetInfo, &PackedBatch, usize) -> Result<Work>,
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

/// The algorithms that this program is built with; see [`algorithms`].
pub const ALGORITHMS: &[Algorithm] = &BUILT_IN;

const BUILT_IN: [Algorithm; OTHERS.len() + block::heads::HEADS.len()] = {
    let mut rows = [medusa::ALGORITHM; OTHERS.len() + block::heads::HEADS.len()];
    let mut place = 0;
    while place < rows.len() {
        rows[place] = match place.checked_sub(OTHERS.len()) {
            Some(head) => block::algorithm(&block::heads::HEADS[head]),
            None => OTHERS[place],
        };
        place += 1;
    }
    rows
};

/// Those that are no block drafters: an algorithm of its own is a line here.
const OTHERS: &[Algorithm] =
    &[medusa::ALGORITHM, eagle3::ALGORITHM, peagle::ALGORITHM, next_scale::ALGORITHM, masked_diffusion::ALGORITHM];

static TABLE: Table<Algorithm> = Table::new("the algorithm", |row| row.name, ALGORITHMS);

/// Every algorithm that can be trained: those of [`ALGORITHMS`], and those that were added.
pub fn algorithms() -> Vec<&'static Algorithm> {
    TABLE.rows()
}

/// Adds an algorithm of a program around this library, before anything else is done. Refuses a name that is taken.
pub fn add_algorithm(row: &'static Algorithm) -> Result<()> {
    TABLE.add(row)
}

/// Key of the draft section that names the algorithm.
pub const ALGORITHM_KEY: &str = "algorithm";

/// Finds the algorithm of a `draft` section.
pub fn algorithm(section: &Value) -> Result<&'static Algorithm> {
    let unknown = |got: String| {
        let expected = format!("expected one of {}, got {got}", TABLE.names());
        Error::config(format!("draft.{ALGORITHM_KEY}"), expected)
    };
    let name = section.get(ALGORITHM_KEY).and_then(Value::as_str).ok_or_else(|| unknown("nothing".to_owned()))?;
    TABLE.find(name).ok_or_else(|| unknown(format!("`{name}`")))
}
