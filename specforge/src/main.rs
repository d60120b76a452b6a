//! The `specforge` command.

use std::ffi::{c_char, c_int};
use std::process::ExitCode;

use specforge::{cli, threads};

/// Called by the loader before libgomp reads how its threads shall wait.
#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) = threads::sleep_soon;

fn main() -> ExitCode {
    cli::main()
}
