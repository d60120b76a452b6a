//! Which checkpoint a run goes on from.

use std::path::PathBuf;
use std::str::FromStr;

use super::scan::Scan;
use super::store::CheckpointStore;
use crate::error::{Error, Result};

/// Which checkpoint of a run's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The one with the highest step.
    Newest,
    /// The best by the run's metric.
    Best,
    /// The one of this step.
    Step(u64),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "newest" => Ok(Choice::Newest),
            "best" => Ok(Choice::Best),
            // A folder's name is as good as its number.
            _ => match text.strip_prefix("step-").unwrap_or(text).parse() {
                Ok(step) => Ok(Choice::Step(step)),
                Err(_) => Err("expected a step, `best` or `newest`".to_owned()),
            },
        }
    }
}

impl CheckpointStore {
    /// The folder of a whole checkpoint, and warnings about damaged ones that were passed over. Nothing where the newest is
    /// wanted and there is none; any other wish that cannot be met is an error that says what there is.
    pub fn choose(&self, choice: Choice) -> Result<(Option<PathBuf>, Vec<String>)> {
        let scan = self.scan()?;
        let found = match choice {
            Choice::Newest => scan.latest().map(|found| found.path.clone()),
            Choice::Step(step) => {
                let found = scan.checkpoints.iter().find(|found| found.manifest.step == step);
                let found = found.map(|found| found.path.clone());
                Some(found.ok_or_else(|| self.absent(&format!("holds no whole checkpoint of step {step}"), &scan))?)
            }
            Choice::Best => {
                let metric = self.retention().best_metric.as_deref().unwrap_or("any metric");
                let best = self.best()?;
                Some(best.ok_or_else(|| self.absent(&format!("holds no checkpoint with a `{metric}`"), &scan))?)
            }
        };
        Ok((found, scan.warnings))
    }

    fn absent(&self, problem: &str, scan: &Scan) -> Error {
        let steps: Vec<String> = scan.checkpoints.iter().map(|found| found.manifest.step.to_string()).collect();
        let (there, hint) = match steps.is_empty() {
            true => ("there is none".to_owned(), "start without --resume"),
            false => (
                format!("there are steps {}", steps.join(", ")),
                "name one of these steps, or take the newest with --resume alone",
            ),
        };
        let damaged: String = scan.warnings.iter().map(|warning| format!("; {warning}")).collect();
        Error::bad_file(self.root(), format!("{problem}: {there}{damaged}")).with_hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_a_step_or_a_word() {
        let read = |text: &str| text.parse::<Choice>();
        assert_eq!(read("20"), Ok(Choice::Step(20)));
        assert_eq!(read("step-00000020"), Ok(Choice::Step(20)));
        assert_eq!(read("best"), Ok(Choice::Best));
        assert_eq!(read("newest"), Ok(Choice::Newest));
        for bad in ["", "last", "-1", "step-", "2.5"] {
            assert!(read(bad).unwrap_err().contains("expected a step, `best` or `newest`"), "{bad}");
        }
    }
}
