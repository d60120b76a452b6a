//! The `specforge` command with what `mod.rs` lists: whole runs of it, in as many processes as they take.

// What is added cannot be refused; and tests use more of it than this program.
#![allow(clippy::unwrap_used, dead_code)]

use std::process::ExitCode;

#[path = "mod.rs"]
mod plugins;

fn main() -> ExitCode {
    plugins::register();
    specforge::cli::main()
}
