//! The folder of a training run: what is there already, and whether this run goes on from it.

use serde_json::Value;

use super::super::note;
use super::RESUMABLE;
use crate::checkpoint::{self, Checkpoint, CheckpointStore};
use crate::config::RunConfig;
use crate::dist::Placement;
use crate::draft::Algorithm;
use crate::error::{Error, Result};
use crate::eval::acceptance::in_training;

/// Whether a run goes on from the newest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// Begins anew; a checkpoint is an error.
    No,
    /// Goes on; no checkpoint is an error.
    Yes,
    /// Goes on where there is one: what a launcher's restart wants, whenever the first start ended.
    IfThere,
}

impl Resume {
    /// `--resume` and the number of restarts so far decide.
    pub(super) fn wanted(asked: bool, placement: Option<&Placement>) -> Self {
        match placement {
            Some(placement) if placement.attempt > 0 => Resume::IfThere,
            _ if asked => Resume::Yes,
            _ => Resume::No,
        }
    }
}

/// The folder, held by this process.
pub(super) struct RunFolder {
    pub(super) store: CheckpointStore,
    /// What to go on from.
    pub(super) checkpoint: Option<Checkpoint>,
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
        let (latest, warnings) = store.latest()?;
        warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
        let checkpoint = match (latest, resume) {
            (Some(path), Resume::Yes | Resume::IfThere) => Some(checkpoint::read(&path)?),
            (Some(path), Resume::No) => {
                return Err(Error::bad_file(
                    out,
                    format!("already holds a run, with {} as its newest checkpoint", path.display()),
                )
                .with_hint("continue it with --resume, or choose another train.output_dir"));
            }
            (None, Resume::Yes) => {
                return Err(
                    Error::bad_file(out, "holds no checkpoint to resume from").with_hint("start without --resume")
                );
            }
            (None, Resume::No | Resume::IfThere) => None,
        };
        if let Some(checkpoint) = &checkpoint {
            checkpoint.same_configuration(resolved, RESUMABLE)?;
            note(format!("resuming from {}", checkpoint.path.display()));
        }
        Ok(Self { store, checkpoint })
    }
}
