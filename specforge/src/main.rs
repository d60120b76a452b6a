//! The `specforge` command: parses the command line and turns errors into messages and exit codes.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or bad input.

use std::panic;
use std::process::ExitCode;

use clap::Parser;
use specforge::cli::Cli;
use specforge::error::Error;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // libtorch's operators panic where they fail (out of memory, say): such a panic is reported like any other error.
    panic::set_hook(Box::new(|_| {}));
    let outcome = panic::catch_unwind(|| cli.run()).unwrap_or_else(|payload| Err(from_panic(payload.as_ref())));
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}

fn from_panic(payload: &(dyn std::any::Any + Send)) -> Error {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown");
    Error::Torch(text.to_owned())
}
