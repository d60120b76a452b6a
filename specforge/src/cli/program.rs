//! The whole command, for a program to be: parses the command line and turns errors into messages and exit codes.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or bad input.

use std::any::Any;
use std::backtrace::Backtrace;
use std::env;
use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;

use clap::Parser;

use super::Cli;
use crate::error::Error;
use crate::error::foreign::{self, panic_text};
use crate::files;
use crate::launch;
use crate::memory;
use crate::threads;

/// Where the latest panic happened, as FILE:LINE. The panic itself, which may cross threads, does not carry it. Some are
/// caught and no mistake, so the first need not be the one that ends the program.
static PANICKED_AT: Mutex<String> = Mutex::new(String::new());

/// Runs the command that the arguments of this process ask for. To be called once, by `main`, with nothing done before but
/// what adds rows to the tables of this library.
pub fn main() -> ExitCode {
    memory::keep_freed();
    let with_backtrace = take_backtrace_wish();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(refusal) => return refuse(&refusal),
    };
    threads::watch_neighbours();
    // libtorch's operators panic where they fail (out of memory, say): such a panic is reported like any other error.
    panic::set_hook(Box::new(move |info| note_panic(info, with_backtrace)));
    let outcome = panic::catch_unwind(|| files::on_shrunk(report).and_then(|()| cli.run()));
    let outcome = outcome.unwrap_or_else(|payload| {
        Err(from_panic(payload.as_ref(), &PANICKED_AT.lock().unwrap_or_else(PoisonError::into_inner)))
    });
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    // A signal ends this process just now, and whatever failed did because of that.
    while files::is_abandoned() {
        thread::park();
    }
    report(&error);
    ExitCode::from(error.exit_code())
}

/// Says what went wrong, to the user and to a launcher.
fn report(error: &Error) {
    eprintln!("error: {error}");
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
    if let Err(problem) = launch::leave(error) {
        eprintln!("warning: the launcher will not know why: {problem}");
    }
}

/// Reads the command line. Where it is refused, it is refused once more with what a terminal would obey written as what it
/// is: the parser quotes what it was given.
fn parse() -> Result<Cli, clap::Error> {
    Cli::try_parse().map_err(|refusal| {
        let shown = env::args_os().map(|argument| foreign::name(&argument.to_string_lossy()));
        Cli::try_parse_from(shown).err().unwrap_or(refusal)
    })
}

/// Prints what the parser says: help on stdout, a refusal on stderr.
fn refuse(refusal: &clap::Error) -> ExitCode {
    // A reader that went away is no error.
    let _ = refusal.print();
    ExitCode::from(if refusal.use_stderr() { 2 } else { 0 })
}

/// Whether the environment asks for backtraces. The wish is ours to fulfil from here on, and the standard library's no
/// longer: printing one takes memory and a lock, and where that memory is not there, the library would wait for its own
/// lock to print another one. Without the wish it says that memory is exhausted and aborts.
fn take_backtrace_wish() -> bool {
    let wish = ["RUST_LIB_BACKTRACE", "RUST_BACKTRACE"].into_iter().find_map(env::var_os);
    // SAFETY: nothing has run yet that could have started a thread.
    unsafe { env::remove_var("RUST_BACKTRACE") };
    wish.is_some_and(|wish| wish != "0")
}

/// Says nothing yet, unless a backtrace was asked for and there is memory to make one.
fn note_panic(info: &PanicHookInfo<'_>, with_backtrace: bool) {
    if let Some(location) = info.location() {
        let place = format!("{}:{}", location.file(), location.line());
        *PANICKED_AT.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }
    let out_of_memory = libtorch_message(panic_text(info.payload())).is_some_and(|text| Error::Torch(text).is_memory());
    if with_backtrace && !out_of_memory {
        eprintln!("{info}\n{}", Backtrace::force_capture());
    }
}

fn from_panic(payload: &(dyn Any + Send), location: &str) -> Error {
    let text = panic_text(payload);
    match libtorch_message(text) {
        Some(message) => Error::Torch(message),
        None => Error::Internal { location: location.to_owned(), message: text.to_owned() },
    }
}

/// What libtorch said, where a panic is an operator of tch that unwrapped libtorch's refusal.
fn libtorch_message(text: &str) -> Option<String> {
    let quoted = text.strip_prefix("called `Result::unwrap()` on an `Err` value: Torch(\"")?.strip_suffix("\")")?;
    let mut message = String::new();
    let mut letters = quoted.chars();
    while let Some(letter) = letters.next() {
        // Undoes Rust's quoting.
        message.push(match letter {
            '\\' => match letters.next()? {
                'n' => '\n',
                't' => '\t',
                other => other,
            },
            letter => letter,
        });
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    fn caught(body: fn()) -> Error {
        let payload = panic::catch_unwind(body).unwrap_err();
        from_panic(payload.as_ref(), "src/some.rs:7")
    }

    #[test]
    fn a_refusal_of_libtorch_is_its_first_line() {
        let error = caught(|| {
            let zeros = |size: i64| Tensor::zeros([size], (Kind::Float, Device::Cpu));
            drop(zeros(2) + zeros(3));
        });
        let want =
            "libtorch: The size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 0";
        assert_eq!(error.to_string(), want);
        assert_eq!(error.exit_code(), 1);
        let quoted = "called `Result::unwrap()` on an `Err` value: Torch(\"a \\\"b\\\" c\\nException raised from x\")";
        assert_eq!(from_panic(&quoted.to_owned(), "").to_string(), "libtorch: a \"b\" c");
    }

    #[test]
    fn every_other_panic_is_one_line_with_its_place() {
        let error = caught(|| panic!("3 heads,\nbut 2 rows"));
        assert_eq!(error.to_string(), "internal error at src/some.rs:7: 3 heads, but 2 rows");
        assert!(error.hint().unwrap().contains("RUST_BACKTRACE=1"));
        assert_eq!(error.exit_code(), 1);
        let error = caught(|| assert_eq!(1, 2));
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
