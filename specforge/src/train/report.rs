//! What a run reports in the end.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::seconds::Seconds;

/// What a run did.
#[derive(Debug, Clone, Serialize)]
pub struct TrainReport {
    /// Optimizer steps finished, earlier parts of a resumed run included.
    pub steps: u64,
    /// Steps the configuration asks for.
    pub total_steps: u64,
    /// Steps among them that changed nothing, because something was not finite.
    pub skipped_steps: u64,
    /// Tokens that passed through the draft in this part, on all ranks.
    pub tokens: u64,
    /// Tokens a second of training alone, evaluations and checkpoints left out.
    pub tokens_per_second: f64,
    /// Wall time of this part.
    pub seconds: f64,
    /// Where that time went, on this rank.
    #[serde(flatten)]
    pub time: Seconds,
    /// Held-out metrics before the first step; empty in a resumed run.
    pub start: BTreeMap<String, f64>,
    /// Held-out metrics after the last step.
    pub end: BTreeMap<String, f64>,
    /// Share of held-out supervised tokens that are the commonest supervised token of the training split.
    pub commonest_token_share: f64,
    /// Newest checkpoint; empty on a rank that writes none, and where there is none yet.
    pub checkpoint: PathBuf,
    /// Signal that ended the run early.
    pub stopped_by: Option<i32>,
}

impl TrainReport {
    /// That of a run that has come to `steps` of `total_steps` and does nothing more.
    pub(super) fn of_no_steps(steps: u64, total_steps: u64) -> Self {
        Self {
            steps,
            skipped_steps: 0,
            total_steps,
            tokens: 0,
            tokens_per_second: 0.0,
            seconds: 0.0,
            time: Seconds::default(),
            start: BTreeMap::new(),
            end: BTreeMap::new(),
            commonest_token_share: 0.0,
            checkpoint: PathBuf::new(),
            stopped_by: None,
        }
    }
}
