//! How a process of a run failed: the file in which it says so, and which of several failures was the first.
//!
//! The file is the one that PyTorch's elastic agent gives to every worker and reads when one fails, so a run under
//! torchrun shows the same message as one under `specforge launch`.

use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::files;

/// Names the file in which a process leaves its error.
pub(super) const ERROR_FILE: &str = "TORCHELASTIC_ERROR_FILE";

/// What ended a process, or a whole machine's share of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// Which rank, with its process id, or which node.
    pub(super) who: String,
    pub(super) message: String,
    pub(super) hint: Option<String>,
    /// Exit code; 1 for a process that a signal ended.
    pub(super) code: u8,
    /// The signal that ended the process.
    #[serde(default)]
    pub(super) signal: Option<i32>,
    /// Whether it only tells of a peer's end.
    pub(super) is_echo: bool,
    /// When, on this machine's clock, in milliseconds since 1970.
    pub(super) milliseconds: u64,
}

impl Failure {
    pub(super) fn new(who: String, message: String) -> Self {
        Self { who, message, hint: None, code: 1, signal: None, is_echo: false, milliseconds: now() }
    }

    pub(super) fn into_error(self) -> Error {
        let Self { who, message, hint, code, signal, .. } = self;
        Error::Launched { who, message, hint, code, signal }
    }

    /// Sorts failures of one machine: the first one is the reason for the others.
    pub(super) fn order(&self) -> (bool, u64) {
        (self.is_echo, self.milliseconds)
    }

    /// What an ended process left behind; nothing where it ended well.
    pub(super) fn of_process(who: String, status: ExitStatus, error_file: &Path) -> Option<Self> {
        if status.success() {
            return None;
        }
        let code = status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
        if let Some(words) = read(error_file) {
            return Some(Self { who, code, ..words });
        }
        let Some(signal) = status.signal() else {
            let message = format!("ended with exit code {code} and left no message");
            return Some(Self { code, ..Self::new(who, message) });
        };
        let name = signal_hook::low_level::signal_name(signal).map_or(format!("signal {signal}"), str::to_owned);
        let hint = (signal == signal_hook::consts::SIGKILL).then(|| {
            "the system kills processes when memory runs out (`dmesg` says so): lower train.micro_batch_tokens, or start \
             fewer processes"
                .to_owned()
        });
        Some(Self { hint, signal: Some(signal), ..Self::new(who, format!("ended by {name}")) })
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Leaves an error for the launcher of this process, where it has one that asks for it.
pub fn leave(error: &Error) -> Result<()> {
    match env::var_os(ERROR_FILE).filter(|path| !path.is_empty()) {
        Some(path) => write(&PathBuf::from(path), error, now()),
        None => Ok(()),
    }
}

fn write(path: &Path, error: &Error, milliseconds: u64) -> Result<()> {
    let is_echo = matches!(error, Error::Peer { .. });
    // The agent compares whole seconds. An echo is rounded up, so that it never comes before what it echoes.
    let seconds = milliseconds / 1000 + u64::from(is_echo);
    let mut text = error.to_string();
    if let Some(hint) = error.hint() {
        text = format!("{text}\nhint: {hint}");
    }
    let words = Failure {
        who: String::new(),
        message: error.to_string(),
        hint: error.hint(),
        code: error.exit_code(),
        signal: None,
        is_echo,
        milliseconds,
    };
    // The agent prints `py_callstack` where there is one, and hands on what it does not know.
    let extra = json!({"py_callstack": text, "timestamp": seconds.to_string(), "specforge": words});
    files::write_json(path, &json!({"message": {"message": text, "extraInfo": extra}}))
}

fn read(path: &Path) -> Option<Failure> {
    let value: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    serde_json::from_value(value.pointer("/message/extraInfo/specforge")?.clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(raw: i32) -> ExitStatus {
        ExitStatus::from_raw(raw)
    }

    #[test]
    fn an_error_comes_back_as_it_was_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        write(&path, &Error::config("train.epochs", "must be 1 or more").with_hint("set it"), 5_999).unwrap();
        let failure = Failure::of_process("rank 1".to_owned(), ended(2 << 8), &path).unwrap();
        assert_eq!(failure.message, "configuration: `train.epochs`: must be 1 or more");
        assert_eq!((failure.hint.as_deref(), failure.code, failure.is_echo), (Some("set it"), 2, false));
        let error = failure.into_error();
        assert_eq!(error.to_string(), "rank 1 failed: configuration: `train.epochs`: must be 1 or more");
        assert_eq!((error.hint().as_deref(), error.exit_code()), (Some("set it"), 2));
        assert!(Failure::of_process("rank 1".to_owned(), ended(0), &path).is_none());
    }

    /// What torch/distributed/elastic/multiprocessing/errors reads of it, and how it chooses the first.
    #[test]
    fn the_agent_of_torch_finds_text_and_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        let left = |error: &Error, milliseconds| {
            write(&path, error, milliseconds).unwrap();
            let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let extra = &value["message"]["extraInfo"];
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            (text(&extra["py_callstack"]), text(&extra["timestamp"]).parse::<u64>().unwrap())
        };
        let peer = Error::Peer { rank: 0, operation: "all-reduce", problem: "closed".to_owned() };
        let (cause, at) = left(&Error::Failed("the disk is full".to_owned()), 7_400);
        let (echo, later) = left(&peer, 7_500);
        assert_eq!(cause, "the disk is full");
        assert!(echo.starts_with("rank 0: all-reduce: closed\nhint: another process"), "{echo}");
        assert!(at < later, "{at} {later}");
    }

    #[test]
    fn a_process_without_words_is_described_by_its_end() {
        let nowhere = Path::new("/nowhere/error.json");
        let of = |raw| Failure::of_process("rank 0".to_owned(), ended(raw), nowhere).unwrap();
        assert_eq!((of(9).message.as_str(), of(9).code, of(9).is_echo), ("ended by SIGKILL", 1, false));
        assert!(of(9).hint.unwrap().contains("memory"));
        assert_eq!((of(6).message.as_str(), of(6).hint), ("ended by SIGABRT", None));
        assert_eq!((of(3 << 8).message.as_str(), of(3 << 8).code), ("ended with exit code 3 and left no message", 3));
        let folder = tempfile::tempdir().unwrap();
        let half = folder.path().join("error.json");
        fs::write(&half, "{\"message\": {").unwrap();
        let failure = Failure::of_process("rank 0".to_owned(), ended(6), &half).unwrap();
        assert_eq!(failure.message, "ended by SIGABRT");
    }
}
