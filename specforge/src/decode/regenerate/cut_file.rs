//! Rows that were left out because an answer was cut off: one line each, so that the next run knows them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::prompts::Prompts;
use crate::error::{Error, Result};

/// The list, which begins to exist with its first row.
#[derive(Debug)]
pub(super) struct CutFile {
    path: PathBuf,
    file: Option<File>,
    rows: Vec<usize>,
}

impl CutFile {
    /// Learns which rows an earlier run left out. A torn last line is a row that is tried again.
    pub(super) fn open(path: PathBuf, prompts: &Prompts) -> Result<Self> {
        let (rows, whole, length) = Self::read(&path, prompts)?;
        if whole < length {
            let file = OpenOptions::new().write(true).open(&path).map_err(Error::io("open", &path))?;
            file.set_len(whole as u64).map_err(Error::io("cut the torn last line of", &path))?;
        }
        Ok(Self { path, file: None, rows })
    }

    /// Rows of a file, the bytes of its whole lines, and all of its bytes. Changes nothing.
    pub(super) fn read(path: &Path, prompts: &Prompts) -> Result<(Vec<usize>, usize, usize)> {
        let mut rows = Vec::new();
        if !path.exists() {
            return Ok((rows, 0, 0));
        }
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let lines = text[..whole].split(|&byte| byte == b'\n').enumerate();
        for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
            let line: Value = serde_json::from_slice(line).map_err(|error| Error::BadLine {
                path: path.to_path_buf(),
                line: number + 1,
                problem: format!("is not JSON: {error}; remove the file to have its rows answered again"),
            })?;
            // A row that is no longer asked was not answered either.
            rows.extend(line.get("id").and_then(Value::as_str).and_then(|id| prompts.find(id)));
        }
        Ok((rows, whole, text.len()))
    }

    /// Rows that earlier runs left out.
    pub(super) fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Leaves a row out.
    pub(super) fn append(&mut self, id: &str, line: usize, turn: usize) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = OpenOptions::new().append(true).create(true).open(&self.path);
                none.insert(file.map_err(Error::io("open", &self.path))?)
            }
        };
        let text = json!({"id": id, "line": line, "turn": turn, "finish": "length"});
        file.write_all(format!("{text}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}
