//! Metrics of a run, written twice: `metrics.jsonl` for programs, TensorBoard event files for people. At the end of a run a
//! page shows them (`report.html`).
//!
//! ```text
//! metrics.jsonl                 one object a line, the source of truth
//! tensorboard/events.out.tfevents.<time>.<host>.<process>.<count>
//! ```
//!
//! Both are on their way to the disk when [`Tracker::log`] returns. A resumed run goes on where its checkpoint was
//! taken: what was logged after that is dropped, so no step appears twice.

pub mod jsonl;
pub mod page;
pub mod scale;
pub mod series;
pub mod tensorboard;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::Result;
use crate::files;
use jsonl::JsonLines;
use tensorboard::EventFile;

/// Name of the metrics file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Name of the folder of event files in a run's folder.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";

/// Writes the metrics of a run. With several processes, only the first has one.
#[derive(Debug)]
pub struct Tracker {
    lines: JsonLines,
    events: EventFile,
}

impl Tracker {
    /// Starts logging into a run's folder. `resumed_at` is the step of the checkpoint the run goes on from: lines of
    /// later steps are dropped. `None` starts afresh and drops everything an earlier run left there.
    pub fn open(folder: &Path, resumed_at: Option<u64>) -> Result<Self> {
        Self::open_before(folder, resumed_at, None)
    }

    /// The same for a run that is to log something at the step itself first: names that begin with `unwritten`. A line of
    /// the kind that is there was written by a part that was killed before it could save.
    pub fn open_before(folder: &Path, resumed_at: Option<u64>, unwritten: Option<&str>) -> Result<Self> {
        files::create_dir_all(folder)?;
        let lines = JsonLines::open(&folder.join(METRICS_FILE), resumed_at, unwritten)?;
        let first_step = resumed_at.map_or(0, |step| step + 1);
        let events = EventFile::create(&folder.join(TENSORBOARD_FOLDER), first_step, now())?;
        Ok(Self { lines, events })
    }

    /// Writes the metrics of a step. Names such as `train/loss` group by their first part in TensorBoard.
    pub fn log(&mut self, step: u64, metrics: &[(String, f64)]) -> Result<()> {
        let time = now();
        self.lines.log(step, time, metrics)?;
        self.events.log(step, time, metrics)
    }

    /// Waits until everything logged is on disk.
    pub fn flush(&mut self) -> Result<()> {
        self.lines.sync()?;
        self.events.sync()
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_goes_on_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let loss = |value: f64| vec![("train/loss".to_owned(), value)];
        let mut first = Tracker::open(folder.path(), None).unwrap();
        for step in 1..=6 {
            first.log(step, &loss(step as f64)).unwrap();
        }
        let mut resumed = Tracker::open(folder.path(), Some(4)).unwrap();
        resumed.log(5, &loss(50.0)).unwrap();
        resumed.flush().unwrap();
        let text = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let losses: Vec<f64> = rows.iter().map(|row| row["train/loss"].as_f64().unwrap()).collect();
        assert_eq!(losses, [1.0, 2.0, 3.0, 4.0, 50.0]);
        assert_eq!(std::fs::read_dir(folder.path().join(TENSORBOARD_FOLDER)).unwrap().count(), 2);
        Tracker::open(folder.path(), None).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap(), "");
    }
}
