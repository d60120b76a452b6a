//! What every fuzz target stands on: a folder of sound files, one of which is replaced by fuzzed bytes before specforge
//! reads it, from the command line down.
//!
//! An input is a file's name on a line of its own, and the bytes that stand in its place. A finding is a panic, an abort,
//! a hang, too much memory, or a message that would write control characters to the terminal.

use std::any::Any;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::OnceLock;

use clap::Parser;
use specforge::cli::Cli;
use specforge::error::{Error, Result};
use specforge::progress;

#[allow(dead_code, missing_docs)]
#[path = "../../tests/fixture.rs"]
mod fixture;
pub mod mutate;
mod sound;

/// Where commands write; emptied after every input.
pub const SCRATCH: &str = "scratch";

/// The input that is being read.
const LAST_INPUT: &str = "input";

/// Longer messages are findings, too: foreign text must be shortened before it is shown.
const LONGEST_MESSAGE: usize = 10_000;

/// The folder of sound files, which is the working folder.
static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();

/// A fuzz target: the names of the files that are fuzzed, and what reads them.
#[macro_export]
macro_rules! target {
    ($files:expr, $read:expr) => {
        libfuzzer_sys::fuzz_target!(init: $crate::begin($files), |data: &[u8]| $crate::one(data, $files, $read));
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            $crate::mutate::mutate(data, size, max_size, seed)
        });
    };
}

/// Makes the folder of sound files, and seeds of them where the environment names a folder for seeds.
pub fn begin(files: &[&str]) {
    progress::silence();
    // libFuzzer's own hook ends the program at every panic, also at those that specforge turns into errors.
    panic::set_hook(Box::new(|info| eprintln!("{info}")));
    let named = std::env::var_os("SPECFORGE_FUZZ_FOLDER").map(PathBuf::from);
    let parent = named.unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new().prefix("specforge-fuzz-").tempdir_in(parent).expect("a temporary folder");
    sound::fill(folder.path());
    std::env::set_current_dir(folder.path()).expect("the new folder");
    let _ = FOLDER.set(folder);
    let seeds = std::env::var_os("SPECFORGE_FUZZ_SEEDS").map(PathBuf::from);
    for (number, name) in files.iter().enumerate() {
        let bytes = fs::read(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        if let Some(seeds) = &seeds {
            fs::write(seeds.join(number.to_string()), [name.as_bytes(), b"\n", &bytes].concat()).expect("a seed");
        }
    }
    panic::set_hook(Box::new(|info| {
        if let Some(place) = info.location() {
            *LAST_PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = place.to_string();
        }
    }));
}

static LAST_PANIC: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());

/// Reads one input.
pub fn one(data: &[u8], files: &[&str], read: fn() -> Result<()>) {
    let Some((name, bytes)) = mutate::split(data) else { return };
    let Some(name) = files.iter().find(|known| known.as_bytes() == name) else { return };
    // What is left of a process that dies without a word.
    fs::write(LAST_INPUT, data).expect("room for a file");
    let sound = fs::read(name).expect("a sound file");
    fs::write(name, bytes).expect("room for a file");
    let outcome = panic::catch_unwind(AssertUnwindSafe(read));
    fs::write(name, sound).expect("room for a file");
    let _ = fs::remove_dir_all(SCRATCH);
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => judge(&error),
        Err(payload) => {
            let place = LAST_PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            finding(&format!("panicked at {place}: {}", text_of(payload.as_ref())));
        }
    }
}

/// What `main` would print must be fit for a terminal.
fn judge(error: &Error) {
    let text = format!("{error}\n{}", error.hint().unwrap_or_default());
    if let Error::Internal { .. } = error {
        finding(&text);
    }
    if let Some(letter) = text.chars().find(|letter| letter.is_control() && *letter != '\n') {
        finding(&format!("a message with {letter:?}: {text:?}"));
    }
    if text.len() > LONGEST_MESSAGE {
        finding(&format!("a message of {} bytes: {:.200}", text.len(), text));
    }
}

fn finding(what: &str) -> ! {
    eprintln!("FINDING: {what}");
    if let Some(folder) = FOLDER.get() {
        let _ = fs::remove_dir_all(folder.path());
    }
    std::process::abort();
}

fn text_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}

/// Runs the program, as its command line would.
pub fn specforge(arguments: &[&str]) -> Result<()> {
    let arguments = std::iter::once(&"specforge").chain(arguments);
    match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.run(),
        // Refused by the parser, as far as a fuzzed value of an option is.
        Err(_) => Ok(()),
    }
}

/// Runs several commands, and fails as the last one that does.
pub fn all(commands: &[&[&str]]) -> Result<()> {
    commands.iter().fold(Ok(()), |before, arguments| specforge(arguments).and(before))
}
