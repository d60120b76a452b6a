//! The file of answers: one line a finished row, appended as it finishes, put into the prompts' order at the end.
//!
//! A line is handed to the system whole, so a killed run leaves at most one torn line, the last. The next run cuts it
//! off and generates that row again.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::OnLength;
use super::prompts::{Prompts, bad_line};
use super::run_record::RunRecord;
use crate::data::Finish;
use crate::data::conversation::{Message, Sample, parse_sample};
use crate::error::{Error, Result};
use crate::files;

/// Rows are forced to disk after this many, or after [`SYNC_TIME`].
const SYNC_ROWS: usize = 16;
const SYNC_TIME: Duration = Duration::from_secs(5);

/// An open file of answers.
#[derive(Debug)]
pub(super) struct AnswerFile {
    path: PathBuf,
    file: File,
    /// Bytes written.
    length: u64,
    /// Row, offset and length of every line, in the order of the file.
    lines: Vec<(usize, u64, usize)>,
    unsynced: usize,
    synced: Instant,
}

impl AnswerFile {
    /// Begins a file or goes on with one. With `restart` an older one is moved out of the way first.
    pub(super) fn open(path: &Path, prompts: &Prompts, record: &RunRecord, restart: bool) -> Result<Self> {
        let record_path = beside(path, ".run.json");
        if path.exists() && !path.is_file() {
            return Err(Error::bad_file(path, "expected a file to write to, found a folder or a device")
                .with_hint("choose another --out"));
        }
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            files::create_dir_all(parent)?;
        }
        if restart && (path.exists() || beside(path, ".cut.jsonl").exists()) {
            // Whoever still writes to the old file keeps it locked.
            drop(open_locked(path)?);
            move_aside(path)?;
        }
        let length = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        if length(path) == 0 && length(&beside(path, ".cut.jsonl")) == 0 {
            record.write(&record_path)?;
        } else if record_path.exists() {
            record.check_same(&record_path)?;
        } else {
            let problem = format!("is there already, and {} that tells how it was made is not", record_path.display());
            return Err(Error::bad_file(path, problem)
                .with_hint("choose another --out, or start over with --restart, which keeps the old file as .bak"));
        }
        let file = open_locked(path)?;
        let mut answers =
            Self { path: path.to_path_buf(), file, length: 0, lines: Vec::new(), unsynced: 0, synced: Instant::now() };
        answers.read_back(prompts, record.on_length()?)?;
        Ok(answers)
    }

    /// Rows that are answered already.
    pub(super) fn rows(&self) -> impl Iterator<Item = usize> {
        self.lines.iter().map(|(row, _, _)| *row)
    }

    /// Adds the line of one row.
    pub(super) fn append(&mut self, row: usize, line: &str) -> Result<()> {
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.lines.push((row, self.length, text.len()));
        self.length += text.len() as u64;
        self.unsynced += 1;
        if self.unsynced >= SYNC_ROWS || self.synced.elapsed() >= SYNC_TIME {
            self.sync()?;
        }
        Ok(())
    }

    /// Forces everything to disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("flush", &self.path))?;
        (self.unsynced, self.synced) = (0, Instant::now());
        Ok(())
    }

    /// Puts the lines into the order of the prompts, in one step that either happens or does not.
    pub(super) fn sort(mut self) -> Result<()> {
        self.sync()?;
        if self.lines.is_sorted() {
            return Ok(());
        }
        self.lines.sort_unstable();
        files::write_file(&self.path, |writer| {
            let mut buffer = Vec::new();
            for &(_, offset, length) in &self.lines {
                buffer.resize(length, 0);
                self.file.read_exact_at(&mut buffer, offset)?;
                writer.write_all(&buffer)?;
            }
            Ok(())
        })
    }

    /// Learns which rows are there, and cuts off a torn last line.
    fn read_back(&mut self, prompts: &Prompts, on_length: OnLength) -> Result<()> {
        let mut reader = BufReader::new(&self.file);
        let mut bytes = Vec::new();
        let mut seen = vec![None; prompts.rows.len()];
        let (mut offset, mut number) = (0u64, 0);
        loop {
            bytes.clear();
            let length = reader.read_until(b'\n', &mut bytes).map_err(Error::io("read", &self.path))?;
            if bytes.last() != Some(&b'\n') {
                break;
            }
            number += 1;
            let row = row_of(&bytes, prompts, on_length).map_err(|problem| self.unusable(number, &problem))?;
            if let Some(first) = seen[row].replace(number) {
                let problem = format!("row `{}` is there twice, first on line {first}", prompts.rows[row].id);
                return Err(self.unusable(number, &problem));
            }
            self.lines.push((row, offset, length));
            offset += length as u64;
        }
        if !bytes.is_empty() {
            self.file.set_len(offset).map_err(Error::io("cut the torn last line of", &self.path))?;
            self.sync()?;
        }
        self.length = offset;
        Ok(())
    }

    fn unusable(&self, line: usize, problem: &str) -> Error {
        let advice = "remove the line to have the row answered again, or start over with --restart";
        bad_line(&self.path, line, format!("{problem}; {advice}"))
    }
}

/// The row a line answers. What was asked must be what the prompts ask.
pub(super) fn row_of(bytes: &[u8], prompts: &Prompts, on_length: OnLength) -> Result<usize, String> {
    let Sample::Conversation(conversation) = parse_sample(bytes, String::new)? else {
        return Err("expected a conversation, got text".to_owned());
    };
    let id = &conversation.id;
    let row = prompts.find(id).ok_or_else(|| format!("row `{id}` is not among the prompts"))?;
    let prompt = &prompts.rows[row];
    let asked: Vec<_> = conversation.messages.iter().filter(|message| !message.is_assistant()).collect();
    let ends_there = |last: &Message| {
        // What stands behind a cut answer was not asked, and neither what stands behind a call of a tool.
        (on_length == OnLength::Stop && last.marks.finish == Some(Finish::Length)) || calls_tools(last)
    };
    let expected = match conversation.messages.last().is_some_and(ends_there) {
        true => &prompt.messages[..asked.len().min(prompt.messages.len())],
        false => &prompt.messages,
    };
    let same = conversation.tools == prompt.tools && conversation.template_arguments == prompt.template_arguments;
    if !same || !asked.into_iter().eq(expected) {
        return Err(format!("the prompt of row `{id}` has changed since it was answered"));
    }
    Ok(row)
}

/// Whether an answer calls tools, whose results nobody knows here: it ends its conversation.
pub(super) fn calls_tools(answer: &Message) -> bool {
    answer.extra.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty())
}

fn open_locked(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(Error::io("open", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::bad_file(path, "another run is writing to it")
            .with_hint("wait for that run to end, or choose another --out")),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

/// Moves a file and what belongs to it to a name ending in `.bak` that is free.
fn move_aside(path: &Path) -> Result<()> {
    let names = std::iter::once(".bak".to_owned()).chain((2..).map(|number| format!(".bak{number}")));
    let free = names.map(|name| beside(path, &name)).find(|name| !name.exists());
    let backup = free.expect("numbers do not run out");
    for suffix in [".run.json", ".errors.jsonl", ".cut.jsonl", ""] {
        let (from, to) = (beside(path, suffix), beside(&backup, suffix));
        if from.exists() {
            std::fs::rename(&from, &to).map_err(Error::io("move aside", &from))?;
        }
    }
    Ok(())
}

/// `answers.jsonl` and `.run.json` make `answers.jsonl.run.json`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
