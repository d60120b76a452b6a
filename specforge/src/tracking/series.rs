//! What a run has logged, read back.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// A logged value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Optimizer steps before it.
    pub step: f64,
    /// Seconds since 1970.
    pub time: f64,
    /// The value; not finite where none was logged.
    pub value: f64,
}

/// Values by name, in the order they were logged.
pub type Series = BTreeMap<String, Vec<Point>>;

/// The values of a metrics file.
pub fn read(path: &Path) -> Result<Series> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut series = Series::new();
    for (index, line) in text.lines().enumerate() {
        let row: BTreeMap<String, Value> = serde_json::from_str(line).map_err(|error| Error::BadLine {
            path: path.to_path_buf(),
            line: index + 1,
            problem: error.to_string(),
        })?;
        let number = |key: &str| row.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let (step, time) = (number("step"), number("time"));
        for (name, value) in row.iter().filter(|(name, _)| !matches!(name.as_str(), "step" | "time")) {
            let value = value.as_f64().unwrap_or(f64::NAN);
            series.entry(name.clone()).or_default().push(Point { step, time, value });
        }
    }
    Ok(series)
}
