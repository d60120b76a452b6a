//! Which checkpoints stay.

use serde::{Deserialize, Serialize};

use super::scan::{Found, Scan};

/// Whether more is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// As for an acceptance length.
    #[default]
    Higher,
    /// As for a loss.
    Lower,
}

/// Which checkpoints stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// How many of the newest stay; 0 keeps all.
    pub keep_last: usize,
    /// The metric of the manifest by which the best one is chosen, which stays too. `null` chooses none.
    pub best_metric: Option<String>,
    /// Whether the best one has the highest or the lowest metric.
    pub best_is: Direction,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { keep_last: 3, best_metric: None, best_is: Direction::default() }
    }
}

impl RetentionConfig {
    /// The best checkpoint of a scan; the earlier one where two are equally good.
    pub fn best_of<'a>(&self, scan: &'a Scan) -> Option<(&'a Found, f64)> {
        let metric = self.best_metric.as_ref()?;
        let mut best: Option<(&Found, f64)> = None;
        for found in &scan.checkpoints {
            let Some(&value) = found.manifest.metrics.get(metric) else { continue };
            if self.is_better(value, best.map(|(_, record)| record)) {
                best = Some((found, value));
            }
        }
        best
    }

    /// Whether a value beats the record, where there is one.
    pub fn is_better(&self, value: f64, record: Option<f64>) -> bool {
        match (record, self.best_is) {
            (None, _) => !value.is_nan(),
            (Some(record), Direction::Higher) => value > record,
            (Some(record), Direction::Lower) => value < record,
        }
    }
}
