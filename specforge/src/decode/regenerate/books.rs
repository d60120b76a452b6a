//! What becomes of rows. The first process keeps the files; what the others answer comes to it through the
//! [`SharedWork`] that they take rows from, so that there is one file, one lock, and one order however many there are.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::answer_file::{AnswerFile, beside};
use super::cut_file::CutFile;
use super::prompts::{Prompt, Prompts};
use super::run_record::RunRecord;
use crate::dist::SharedWork;
use crate::error::{Error, Result};

/// What became of a row, or of a process's whole part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// It is answered: the line of the file.
    Answered { row: usize, line: String },
    /// It is left out, because an answer was cut off.
    Cut { row: usize, turn: usize },
    /// It cannot be answered.
    Failed {
        row: usize,
        turn: usize,
        error: String,
        /// Who was asked, and how often, where it was a server.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        asked: Option<Asked>,
    },
    /// What one process counted.
    Counted(Tally),
}

/// A server that did not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// How often the question was asked.
    pub(super) attempts: u32,
    /// Who was asked last.
    pub(super) server: String,
}

impl Outcome {
    /// Gives it to the first process.
    pub(super) fn hand_in(&self, work: &SharedWork<'_>) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|error| Error::Failed(format!("writing an outcome: {error}")))?;
        work.hand_in(text)
    }
}

/// Sums over answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Answers.
    pub(super) turns: usize,
    /// Of these, those that ended with a stop token.
    pub(super) stopped: usize,
    /// Of these, those without a visible character.
    pub(super) empty: usize,
    /// Verifications, and tokens that came of them.
    pub(super) rounds: usize,
    pub(super) verified: usize,
    pub(super) prompt_tokens: u64,
    pub(super) new_tokens: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.turns += other.turns;
        self.stopped += other.stopped;
        self.empty += other.empty;
        self.rounds += other.rounds;
        self.verified += other.verified;
        self.prompt_tokens += other.prompt_tokens;
        self.new_tokens += other.new_tokens;
    }
}

/// The files of a run, and its sums.
pub(super) struct Books<'a> {
    prompts: &'a Prompts,
    answers: AnswerFile,
    errors: ErrorFile,
    cut: CutFile,
    pub(super) answered_before: usize,
    pub(super) answered: usize,
    pub(super) dropped: usize,
    pub(super) failed: usize,
    pub(super) tally: Tally,
}

impl<'a> Books<'a> {
    /// Opens the files and learns what earlier runs did. The second value is the rows that are left, in their order.
    pub(super) fn open(
        out: &Path,
        restart: bool,
        prompts: &'a Prompts,
        record: &RunRecord,
    ) -> Result<(Self, Vec<usize>)> {
        let answers = AnswerFile::open(out, prompts, record, restart)?;
        let errors = ErrorFile::begin(beside(out, ".errors.jsonl"), prompts)?;
        let cut = CutFile::open(beside(out, ".cut.jsonl"), prompts)?;
        let mut done = vec![false; prompts.rows.len()];
        answers.rows().for_each(|row| done[row] = true);
        let answered_before = done.iter().filter(|&&done| done).count();
        cut.rows().iter().for_each(|&row| done[row] = true);
        let open: Vec<usize> = (0..done.len()).filter(|&row| !done[row]).collect();
        let dropped = done.len() - open.len() - answered_before;
        let (answered, failed, tally) = (0, 0, Tally::default());
        Ok((Self { prompts, answers, errors, cut, answered_before, answered, dropped, failed, tally }, open))
    }

    /// Rows of which something became.
    pub(super) fn done(&self) -> usize {
        self.answered_before + self.answered + self.dropped
    }

    /// Enters an outcome that came as text.
    pub(super) fn enter_text(&mut self, text: &[u8]) -> Result<()> {
        let foreign = |error: serde_json::Error| Error::Failed(format!("an outcome of a row: {error}"));
        self.enter(serde_json::from_slice(text).map_err(foreign)?)
    }

    /// Enters an outcome.
    pub(super) fn enter(&mut self, outcome: Outcome) -> Result<()> {
        let foreign = |problem: String| Error::Failed(format!("an outcome of a row: {problem}"));
        let prompt = |row: usize| {
            self.prompts.rows.get(row).ok_or_else(|| foreign(format!("row {row} of {}", self.prompts.rows.len())))
        };
        match outcome {
            Outcome::Answered { row, line } => {
                prompt(row)?;
                self.answers.append(row, &line)?;
                self.answered += 1;
            }
            Outcome::Cut { row, turn } => {
                let Prompt { id, line, .. } = prompt(row)?;
                self.dropped += 1;
                self.cut.append(id, *line, turn)?;
            }
            Outcome::Failed { row, turn, error, asked } => {
                let Prompt { id, line, .. } = prompt(row)?;
                self.failed += 1;
                let mut entry = json!({"id": id, "line": line, "turn": turn, "error": error});
                if let Some(Asked { attempts, server }) = asked {
                    entry["attempts"] = attempts.into();
                    entry["server"] = server.into();
                }
                self.errors.append(&entry)?;
            }
            Outcome::Counted(tally) => self.tally.add(tally),
        }
        Ok(())
    }

    /// Forces everything to disk, in the order of the prompts where nothing is left to do. Whether something is, and the
    /// file of errors where there is one.
    pub(super) fn close(self) -> Result<(bool, Option<PathBuf>)> {
        let interrupted = self.done() + self.failed < self.prompts.rows.len();
        let mut answers = self.answers;
        match interrupted {
            true => answers.sync()?,
            false => answers.sort()?,
        }
        Ok((interrupted, self.errors.file.is_some().then_some(self.errors.path)))
    }
}

/// Rows and lines without answer, with reasons. There is no file where there are none.
struct ErrorFile {
    path: PathBuf,
    file: Option<std::fs::File>,
}

impl ErrorFile {
    /// Replaces the file of an earlier run: its rows are tried again.
    fn begin(path: PathBuf, prompts: &Prompts) -> Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &path)(error));
            }
            _ => {}
        }
        let mut errors = Self { path, file: None };
        for error in &prompts.bad_lines {
            if let Error::BadLine { line, problem, .. } = error {
                errors.append(&json!({"line": line, "error": problem}))?;
            }
        }
        Ok(errors)
    }

    fn append(&mut self, value: &Value) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(std::fs::File::create(&self.path).map_err(Error::io("create", &self.path))?),
        };
        file.write_all(format!("{value}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}
