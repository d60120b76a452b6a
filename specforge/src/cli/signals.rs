//! SIGINT and SIGTERM ask a command to stop; a second one ends the process at once.
//!
//! The first one is answered with one line that says what happens next. Where the work at hand looks at the wish to stop
//! it goes on to a good end. Everywhere else nothing would be lost: unfinished files are removed and the process ends as
//! the signal ends any process (a shell calls that exit code 130 or 143).

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::error::{Error, Result};
use crate::files;
use crate::stop::{Answer, Stop};

/// What this process watches with: a program that runs several commands watches for all of them at once.
static WATCH: Mutex<Option<Arc<Stop>>> = Mutex::new(None);

/// Starts watching, once in a process. Until the first signal arrives nothing changes.
pub(super) fn watch() -> Result<Arc<Stop>> {
    let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stop) = watch.as_ref() {
        stop.set_answer(Stop::default().answer());
        return Ok(Arc::clone(stop));
    }
    let stop = Arc::new(Stop::default());
    for signal in [SIGINT, SIGTERM] {
        // Registered first, so that it acts on the second signal only.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(stop.arrived())).map_err(failed)?;
        let wish = Arc::clone(&stop);
        // SAFETY: the action only stores to atomics, which a signal handler may do.
        unsafe { low_level::register(signal, move || wish.ask(signal)) }.map_err(failed)?;
    }
    let mut arriving = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let wish = Arc::clone(&stop);
    let answer = move || {
        if let Some(signal) = arriving.forever().next()
            && let Answer::EndNow(_) = wish.announce()
        {
            end_by(signal);
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(answer).map_err(failed)?;
    Ok(Arc::clone(watch.insert(stop)))
}

fn failed(error: std::io::Error) -> Error {
    Error::Failed(format!("cannot watch for signals: {error}"))
}

/// Ends the process as the signal ends one that does not listen, but without the files it had begun.
pub(super) fn end_by(signal: i32) -> ! {
    files::abandon();
    let _ = low_level::emulate_default_handler(signal);
    // Where the system would not have it.
    #[allow(clippy::exit)]
    std::process::exit(128 + signal)
}

/// Name of a signal for messages.
pub(super) fn name(signal: i32) -> String {
    low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}
