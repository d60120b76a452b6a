//! The one error type of the library.
//!
//! Every message says what was wrong, where (path, line, tensor, key), what was expected and what was found.
//! What to do about it is kept apart as a hint, which `main` prints on a line of its own. Whatever a message quotes is
//! shown as [`foreign`] shows it, so that a file cannot write to the terminal what it likes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub mod foreign;

use foreign::{message, one_line};

/// Result of every fallible function of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, grouped by who has to act.
#[derive(Debug, Error)]
pub enum Error {
    // -- the user's files -------------------------------------------------------------------------------------------
    /// A file system operation failed.
    #[error("cannot {action} {}: {}", foreign::path(path), foreign::one_line(&source.to_string()))]
    Io {
        /// What was tried, as a verb: "read", "create", "rename".
        action: &'static str,
        /// The file or folder it was tried on.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file exists and is not what it should be.
    #[error("{}: {}", foreign::path(path), foreign::message(problem))]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with expected and got.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// One line of a text file is not what it should be.
    #[error("{}:{line}: {}", foreign::path(path), foreign::one_line(problem))]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it, with expected and got.
        problem: String,
    },
    /// The tensors of a folder are not the tensors of the model.
    #[error("{}: the tensors do not fit the model{}", foreign::path(path), mismatch)]
    Tensors {
        /// The weights folder or file.
        path: PathBuf,
        /// Names with expected and got.
        mismatch: TensorMismatch,
    },

    // -- the user's wishes ------------------------------------------------------------------------------------------
    /// A configuration value that cannot be used.
    #[error("configuration: `{}`: {}", foreign::name(key), foreign::message(problem))]
    Config {
        /// Dotted path of the key.
        key: String,
        /// What is wrong with it, with expected and got.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A command line that cannot be used.
    #[error("{}", foreign::message(.0))]
    Usage(String),

    // -- the run ----------------------------------------------------------------------------------------------------
    /// Training produced NaN or infinity and was stopped before anything was overwritten.
    #[error("step {step}: {what} is not finite; stopped before the update. Batch: {}", foreign::one_line(batch))]
    NonFinite {
        /// Optimizer step, from 1.
        step: u64,
        /// Which value.
        what: String,
        /// Names of the documents in the batch.
        batch: String,
    },
    /// Another process of the run is gone or did not answer in time.
    #[error("rank {rank}: {operation}: {}", foreign::one_line(problem))]
    Peer {
        /// Who noticed.
        rank: usize,
        /// What the ranks were doing together.
        operation: &'static str,
        /// What libtorch said.
        problem: String,
    },
    /// Something that lies on a hub could not be had.
    #[error("{}: {}", foreign::name(name), foreign::message(.problem))]
    Hub {
        /// Name of the repository, as the user wrote it.
        name: String,
        /// What was wrong.
        problem: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A process that this one started failed, and the run with it.
    #[error("{} failed: {}", foreign::name(who), foreign::message(.message))]
    Launched {
        /// Which rank, with its process id, or which machine.
        who: String,
        /// Its own message.
        message: String,
        /// Its own hint.
        hint: Option<String>,
        /// Its exit code.
        code: u8,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// libtorch refused an operation.
    #[error("libtorch: {}", foreign::one_line(first_line(.0)))]
    Torch(String),
    /// A mistake in this program.
    #[error("internal error at {location}: {}", joined(.message))]
    Internal {
        /// FILE:LINE of the source.
        location: String,
        /// What did not hold.
        message: String,
    },
    /// Something failed that no group above describes.
    #[error("{}", foreign::message(.0))]
    Failed(String),
}

/// Names of tensors that are missing, surplus or of another shape than the model's.
#[derive(Debug, Default)]
pub struct TensorMismatch {
    /// Expected and not there.
    pub missing: Vec<String>,
    /// There and not expected.
    pub surplus: Vec<String>,
    /// There in another shape: name, expected, got.
    pub misshaped: Vec<(String, Vec<i64>, Vec<i64>)>,
}

impl TensorMismatch {
    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.surplus.is_empty() && self.misshaped.is_empty()
    }
}

/// More names than these are counted, not listed.
const NAMES_SHOWN: usize = 8;

impl std::fmt::Display for TensorMismatch {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut list = |title: &str, rows: Vec<String>| {
            if rows.is_empty() {
                return Ok(());
            }
            write!(formatter, "\n  {title} ({}):", rows.len())?;
            for row in rows.iter().take(NAMES_SHOWN) {
                write!(formatter, "\n    {}", foreign::name(row))?;
            }
            match rows.len().checked_sub(NAMES_SHOWN) {
                Some(more) if more > 0 => write!(formatter, "\n    and {more} more"),
                _ => Ok(()),
            }
        };
        list("missing", self.missing.clone())?;
        list("surplus", self.surplus.clone())?;
        let misshaped = self.misshaped.iter();
        list(
            "wrong shape",
            misshaped.map(|(name, want, got)| format!("{name}: expected {want:?}, got {got:?}")).collect(),
        )
    }
}

impl Error {
    /// An I/O error with the path it happened on; use as `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// A file that is not what it should be.
    pub fn bad_file(path: impl AsRef<Path>, problem: impl Into<String>) -> Error {
        Error::BadFile { path: path.as_ref().to_path_buf(), problem: problem.into(), hint: None }
    }

    /// A configuration value that cannot be used.
    pub fn config(key: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Config { key: key.into(), problem: problem.into(), hint: None }
    }

    /// Something on a hub that could not be had.
    pub fn hub(name: impl std::fmt::Display, problem: impl Into<String>) -> Error {
        Error::Hub { name: name.to_string(), problem: problem.into(), hint: None }
    }

    /// The same error with a line that says what to do. Errors without room for a hint are left as they are.
    pub fn with_hint(mut self, text: impl Into<String>) -> Error {
        if let Error::BadFile { hint, .. } | Error::Config { hint, .. } | Error::Hub { hint, .. } = &mut self {
            *hint = Some(text.into());
        }
        self
    }

    /// Whether libtorch did not get the memory it asked for.
    pub fn is_memory(&self) -> bool {
        matches!(self, Error::Torch(text) if text.contains("out of memory") || text.contains("can't allocate memory"))
    }

    /// What to do, where that can be said.
    pub fn hint(&self) -> Option<String> {
        self.hint_text().map(|text| message(&text))
    }

    fn hint_text(&self) -> Option<String> {
        match self {
            Error::BadFile { hint, .. }
            | Error::Config { hint, .. }
            | Error::Hub { hint, .. }
            | Error::Launched { hint, .. } => hint.clone(),
            Error::Io { source, path, .. } => match source.kind() {
                ErrorKind::StorageFull => Some("free some space or choose another folder".to_owned()),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    Some(format!("choose a folder you can write to instead of {}", path.display()))
                }
                _ => None,
            },
            Error::NonFinite { .. } => {
                Some("lower optim.learning_rate, look at the named documents with `specforge inspect`, or pass over single steps with train.skip_non_finite".to_owned())
            }
            Error::Peer { .. } => Some(
                "another process of the run ended first, or could not be reached: the first message of the other ranks \
                 says why"
                    .to_owned(),
            ),
            Error::Torch(_) if self.is_memory() => {
                Some("lower train.micro_batch_tokens, or compare `--plan` with the free memory".to_owned())
            }
            Error::Internal { .. } => Some(
                "this is a mistake in specforge: report it, with what RUST_BACKTRACE=1 adds to this message".to_owned(),
            ),
            _ => None,
        }
    }

    /// 2 for wrong usage or bad input, 1 for a run that failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::BadFile { .. }
            | Error::BadLine { .. }
            | Error::Tensors { .. }
            | Error::Config { .. }
            | Error::Usage(_) => 2,
            Error::Launched { code, .. } => *code,
            Error::Io { source, .. } => match source.kind() {
                // A path that cannot be meant, or a text file that holds no text.
                ErrorKind::NotFound
                | ErrorKind::AlreadyExists
                | ErrorKind::NotADirectory
                | ErrorKind::IsADirectory
                | ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::InvalidData => 2,
                _ => 1,
            },
            _ => 1,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        match error {
            tch::TchError::Torch(text) => Error::Torch(text),
            other => Error::Torch(other.to_string()),
        }
    }
}

/// libtorch appends a C++ backtrace to its messages; the first line says what happened.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

fn joined(text: &str) -> String {
    one_line(&text.lines().map(str::trim).collect::<Vec<_>>().join(" "))
}
