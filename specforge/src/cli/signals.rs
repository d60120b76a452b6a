//! SIGINT and SIGTERM ask a run to save and stop; a second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level;

use crate::error::{Error, Result};

/// What arrived so far.
pub(super) struct Watch {
    /// Whether a signal arrived.
    pub(super) arrived: Arc<AtomicBool>,
    /// Its number; 0 while none did.
    pub(super) number: Arc<AtomicI32>,
}

/// Starts watching. Until the first signal arrives nothing changes; the second one ends the process.
pub(super) fn watch() -> Result<Watch> {
    let watch = Watch { arrived: Arc::new(AtomicBool::new(false)), number: Arc::new(AtomicI32::new(0)) };
    for signal in [SIGINT, SIGTERM] {
        let failed = |error| Error::Failed(format!("cannot watch signal {signal}: {error}"));
        // Registered first, so that it acts on the second signal only.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&watch.arrived)).map_err(failed)?;
        let (number, arrived) = (Arc::clone(&watch.number), Arc::clone(&watch.arrived));
        let action = move || {
            number.store(signal, Ordering::Relaxed);
            arrived.store(true, Ordering::Relaxed);
        };
        // SAFETY: the action only stores to atomics, which a signal handler may do.
        unsafe { low_level::register(signal, action) }.map_err(failed)?;
    }
    Ok(watch)
}

/// Name of a signal for messages.
pub(super) fn name(signal: i32) -> String {
    low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}
