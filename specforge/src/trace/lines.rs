//! What all traces have in common: a JSON object a line, the first of which says what was decoded how, and the last how many
//! records there are.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::StagedFile;

/// A kind of trace: what its first line calls it, and the version of its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    pub kind: &'static str,
    pub version: u32,
}

impl Format {
    /// Whether a file's first line says that it is a trace of this kind.
    pub fn is_of(self, path: &Path) -> bool {
        let Ok(file) = File::open(path) else { return false };
        let mut first = String::new();
        let _ = BufReader::new(file.take(200)).read_line(&mut first);
        first.contains(&format!("\"{}\"", self.kind))
    }
}

/// First line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Opening<H> {
    pub kind: String,
    pub format: u32,
    /// The program that wrote the file.
    pub program: String,
    pub header: H,
}

/// Writes records. Nothing appears under the file's name before [`LineWriter::close`].
#[derive(Debug)]
pub(super) struct LineWriter {
    lines: StagedFile,
    records: u64,
}

impl LineWriter {
    /// Starts a trace.
    pub fn create<H: Serialize>(path: &Path, format: Format, header: H) -> Result<Self> {
        let mut writer = Self { lines: StagedFile::new(path)?, records: 0 };
        let program = format!("specforge {}", env!("CARGO_PKG_VERSION"));
        writer.line(&Opening { kind: format.kind.to_owned(), format: format.version, program, header })?;
        Ok(writer)
    }

    /// Adds a record.
    pub fn record(&mut self, record: &impl Serialize) -> Result<()> {
        self.records += 1;
        self.line(record)
    }

    /// Adds the last line, made from the number of records, and gives the file its name.
    pub fn close<C: Serialize>(mut self, last: impl FnOnce(u64) -> C) -> Result<()> {
        let close = last(self.records);
        self.line(&close)?;
        self.lines.commit()
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).map_err(|error| Error::Failed(error.to_string()))?;
        line.push(b'\n');
        self.lines.write(&line)
    }
}

/// Last line of a trace that has nothing else to say there.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename = "close")]
pub(super) struct Close {
    pub records: u64,
}

/// What a line is, before anything else of it is looked at.
#[derive(Deserialize)]
struct Outline {
    record: Option<String>,
    records: Option<u64>,
}

/// Reads a trace whose last line is a [`Close`]. `begin` makes it of the header, `add` adds a record with its line number; what is
/// wrong is a problem in words. A file that was not written to its end is refused.
pub(super) fn read<H: DeserializeOwned, R: DeserializeOwned, T>(
    path: &Path,
    format: Format,
    begin: impl FnOnce(H) -> Result<T, String>,
    add: impl Fn(&mut T, R, usize) -> Result<(), String>,
) -> Result<T> {
    let bad = |line: usize, problem: String| Error::BadLine { path: path.to_path_buf(), line, problem };
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut lines = BufReader::new(file).lines().zip(1..);
    let first = lines.next().ok_or_else(|| Error::bad_file(path, format!("is empty; expected a {}", format.kind)))?;
    let first = first.0.map_err(Error::io("read", path))?;
    let opening: Opening<H> = serde_json::from_str(&first).map_err(|error| bad(1, error.to_string()))?;
    if (opening.kind.as_str(), opening.format) != (format.kind, format.version) {
        let (Format { kind, version }, Opening { kind: got, format, .. }) = (format, opening);
        return Err(bad(1, format!("expected a {kind} of format {version}, got {got} of format {format}")));
    }
    let mut trace = begin(opening.header).map_err(|problem| bad(1, problem))?;
    let (mut count, mut closed) = (0, false);
    for (text, line) in lines {
        let text = text.map_err(Error::io("read", path))?;
        if closed {
            return Err(bad(line, "stands behind the last record".to_owned()));
        }
        let wrong = |error: serde_json::Error| bad(line, error.to_string());
        let outline: Outline = serde_json::from_str(&text).map_err(wrong)?;
        if outline.record.as_deref() == Some("close") {
            if outline.records != Some(count) {
                let said = outline.records.unwrap_or_default();
                return Err(bad(line, format!("expected {said} records before it, got {count}")));
            }
            closed = true;
            continue;
        }
        add(&mut trace, serde_json::from_str(&text).map_err(wrong)?, line).map_err(|problem| bad(line, problem))?;
        count += 1;
    }
    match closed {
        true => Ok(trace),
        false => Err(Error::bad_file(path, "has no last line: it was not written to its end")),
    }
}
