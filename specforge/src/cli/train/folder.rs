//! The folder of a training run: what is there already, and whether this run goes on from it.

use serde_json::Value;

use super::super::note;
use crate::checkpoint::{self, Checkpoint, CheckpointStore, Choice};
use crate::config::RunConfig;
use crate::dist::Placement;
use crate::draft::Algorithm;
use crate::error::{Error, Result};
use crate::eval::acceptance::in_training;
use crate::tracking::{self, Tracker};
use crate::train::Writer;

/// Whether a run goes on from a checkpoint, and from which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// Begins anew; a checkpoint is an error.
    No,
    /// Goes on; no checkpoint is an error.
    From(Choice),
    /// Goes on from the newest where there is one: what a launcher's restart wants, whenever the first start ended, and
    /// wherever that one went on from.
    IfThere,
}

impl Resume {
    /// `--resume` and the number of restarts so far decide.
    pub(super) fn wanted(asked: Option<Choice>, placement: Option<&Placement>) -> Self {
        match (asked, placement) {
            (_, Some(placement)) if placement.attempt > 0 => Resume::IfThere,
            (Some(choice), _) => Resume::From(choice),
            (None, _) => Resume::No,
        }
    }
}

/// Keys that may differ between a run and its continuation: they change how long, how often, where and in what pieces,
/// never an update. The first three decide learning rates too, which are compared by themselves. A draft names further ones
/// of its own.
const FREE: &[&str] = &[
    "train.epochs",
    "train.max_steps",
    "optim.schedule.total_steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.micro_batch_tokens",
    "train.chunk_mib",
    "train.deterministic",
    "train.prefetch",
    // Where a run met more than it may skip, more may be allowed.
    "train.skip_non_finite",
    "train.gradient_noise",
    "train.output_dir",
    "checkpoint",
    "eval",
    "parallel",
    "target.config",
    "target.devices",
    "target.keep_hidden_states",
    "target.keep_hidden_mib",
    "data.cache_dir",
    // What is in these files is compared, and not where they lie.
    "data.train",
    "data.eval",
    "data.max_bad_share",
    "draft.vocab_map",
];

/// Further keys that say where something lies, where the checkpoint says what was there.
const PLACES: &[&str] = &["target.path", "target.feature_store", "data.chat_template", "draft.init_from"];

/// The folder, held by this process.
pub(super) struct RunFolder {
    store: CheckpointStore,
    /// What to go on from.
    pub(super) checkpoint: Option<Checkpoint>,
    /// Whether that one was asked for by name, so that later ones are not part of the run any more.
    went_back: bool,
}

impl RunFolder {
    /// Opens `train.output_dir` and compares what it holds with what is wanted.
    pub(super) fn open(config: &RunConfig, resolved: &Value, algorithm: &Algorithm, resume: Resume) -> Result<Self> {
        let out = &config.train.output_dir;
        let mut retention = config.checkpoint.clone();
        // What decoding really accepts goes before what the draft's own metrics promise.
        let chosen = if config.eval.every > 0 { in_training::METRIC } else { algorithm.selection_metric };
        retention.best_metric.get_or_insert_with(|| chosen.to_owned());
        let store = CheckpointStore::open(out, retention)?;
        let choice = match resume {
            Resume::From(choice) => choice,
            Resume::No | Resume::IfThere => Choice::Newest,
        };
        let (chosen, warnings) = store.choose(choice)?;
        warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
        let checkpoint = match (chosen, resume) {
            (Some(path), Resume::From(_) | Resume::IfThere) => Some(checkpoint::read(&path)?),
            (Some(path), Resume::No) => {
                return Err(Error::bad_file(
                    out,
                    format!("already holds a run, with {} as its newest checkpoint", path.display()),
                )
                .with_hint("continue it with --resume, or choose another train.output_dir"));
            }
            (None, Resume::From(_)) => {
                return Err(
                    Error::bad_file(out, "holds no checkpoint to resume from").with_hint("start without --resume")
                );
            }
            (None, Resume::No | Resume::IfThere) => None,
        };
        if let Some(checkpoint) = &checkpoint {
            let own: Vec<String> = algorithm.free_on_resume.iter().map(|key| format!("draft.{key}")).collect();
            let mut free: Vec<&str> = FREE.iter().copied().chain(own.iter().map(String::as_str)).collect();
            match checkpoint.names_inputs() {
                true => free.extend(PLACES),
                false => note(format!(
                    "warning: {} is of an older version and does not say what target, tokenizer and store it was trained \
                     with: they are not compared",
                    checkpoint.path.display()
                )),
            }
            checkpoint.same_configuration(resolved, &free)?;
            note(format!("resuming from {}", checkpoint.path.display()));
        }
        Ok(Self { store, checkpoint, went_back: choice != Choice::Newest })
    }

    /// Opens the run's log where its checkpoint was taken. Later checkpoints make room if the run goes back behind them.
    pub(super) fn start_log(self) -> Result<(Writer, Option<Checkpoint>)> {
        let Self { store, checkpoint, went_back } = self;
        let step = checkpoint.as_ref().map(|checkpoint| checkpoint.manifest.step);
        if let Some(step) = step.filter(|_| went_back)
            && let Some(aside) = store.set_aside_after(step, &[tracking::METRICS_FILE])?
        {
            note(format!("what came after step {step} was moved to {}", aside.display()));
        }
        // Rows of measurements that the checkpoint still owes are written when those are made up for.
        let unwritten =
            checkpoint.as_ref().filter(|checkpoint| !checkpoint.manifest.owed.is_nothing()).map(|_| "eval/");
        let tracker = Tracker::open_before(store.root(), step, unwritten)?;
        Ok((Writer { store, tracker }, checkpoint))
    }
}
