//! `metrics.jsonl`: one JSON object a line, `{"step": 10, "time": 1700000000.5, "train/loss": 2.5}`.
//!
//! A value that is not finite is `null`, since JSON has no NaN.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files;

/// Keys that every line has, so no metric may be called so.
const RESERVED: [&str; 2] = ["step", "time"];

/// A metrics file, open for appending.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens or creates the file, without the lines of steps after `resumed_at`; `None` starts it empty. `unwritten` is the
    /// beginning of names that the step itself is to have no line of yet.
    pub fn open(path: &Path, resumed_at: Option<u64>, unwritten: Option<&str>) -> Result<Self> {
        match resumed_at {
            Some(step) => drop_later(path, step, unwritten)?,
            None => files::write_text(path, "")?,
        }
        let file = File::options().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends one line in one write.
    pub fn log(&mut self, step: u64, time: f64, metrics: &[(String, f64)]) -> Result<()> {
        let mut row = Map::new();
        row.insert("step".to_owned(), step.into());
        row.insert("time".to_owned(), time.into());
        for (name, value) in metrics {
            if RESERVED.contains(&name.as_str()) {
                return Err(Error::Failed(format!("a metric cannot be called `{name}`")));
            }
            row.insert(name.clone(), (*value).into());
        }
        let mut line = Value::Object(row).to_string();
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))
    }

    /// Waits until the lines are on disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }
}

/// Rewrites the file, atomically, without lines of later steps and without a last line that a kill cut off.
fn drop_later(path: &Path, step: u64, unwritten: Option<&str>) -> Result<()> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut kept = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let row: Option<Value> = serde_json::from_str(line).ok();
        match row.as_ref().and_then(|row| row["step"].as_u64()) {
            _ if !line.ends_with('\n') => {}
            Some(at) if at > step => {}
            Some(at) if at == step && unwritten.is_some_and(|prefix| has_name(row.as_ref(), prefix)) => {}
            Some(_) => kept.push_str(line),
            None => {
                let problem = "expected an object with a whole number `step`".to_owned();
                return Err(Error::BadLine { path: path.to_path_buf(), line: index + 1, problem });
            }
        }
    }
    if kept.len() < text.len() { files::write_text(path, &kept) } else { Ok(()) }
}

/// Whether a line has a metric whose name begins with `prefix`.
fn has_name(row: Option<&Value>, prefix: &str) -> bool {
    row.and_then(Value::as_object).is_some_and(|row| row.keys().any(|name| name.starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(value: f64) -> Vec<(String, f64)> {
        vec![("train/loss".to_owned(), value), ("lr".to_owned(), 1e-4)]
    }

    #[test]
    fn a_line_is_one_object_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = JsonLines::open(&path, None, None).unwrap();
        lines.log(10, 1.5, &metrics(0.1)).unwrap();
        lines.log(11, 2.5, &metrics(f64::NAN)).unwrap();
        lines.sync().unwrap();
        let expected = "{\"step\":10,\"time\":1.5,\"train/loss\":0.1,\"lr\":0.0001}\n\
                        {\"step\":11,\"time\":2.5,\"train/loss\":null,\"lr\":0.0001}\n";
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        assert!(lines.log(12, 3.5, &[("step".to_owned(), 1.0)]).is_err());
    }

    #[test]
    fn resuming_drops_later_lines_and_a_line_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let row = |step: u64| format!("{{\"step\":{step},\"x\":1}}\n");
        let (one, two, three) = (row(1), row(2), row(3));
        let cut_off = "{\"step\":2,\"x\"";
        for (before, at, after) in [
            (format!("{one}{two}{three}"), 2, format!("{one}{two}")),
            (format!("{one}{two}{cut_off}"), 5, format!("{one}{two}")),
            // A whole object without its newline would swallow the next line.
            (format!("{one}{}", two.trim_end()), 5, one.clone()),
            (format!("{one}{two}"), 0, String::new()),
            (format!("{one}{three}{two}"), 2, format!("{one}{two}")),
            (String::new(), 3, String::new()),
        ] {
            std::fs::write(&path, &before).unwrap();
            let mut lines = JsonLines::open(&path, Some(at), None).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after, "{before}");
            lines.log(9, 0.0, &[]).unwrap();
            assert!(std::fs::read_to_string(&path).unwrap().starts_with(&after));
        }
        std::fs::write(&path, format!("{one}what is this\n{two}")).unwrap();
        let error = JsonLines::open(&path, Some(2), None).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:2:"), "{error}");
        assert!(JsonLines::open(&folder.path().join("new.jsonl"), Some(3), None).is_ok());
    }
}
