//! SIGINT and SIGTERM ask a run to save and stop; a second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level;

use crate::error::{Error, Result};

/// Number of the signal that arrived; 0 while none did.
pub(super) fn watch() -> Result<Arc<AtomicI32>> {
    let arrived = Arc::new(AtomicI32::new(0));
    let armed = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let failed = |error| Error::Failed(format!("cannot watch signal {signal}: {error}"));
        // Registered first, so that it acts on the second signal only.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&armed)).map_err(failed)?;
        let (arrived, armed) = (Arc::clone(&arrived), Arc::clone(&armed));
        let action = move || {
            arrived.store(signal, Ordering::Relaxed);
            armed.store(true, Ordering::Relaxed);
        };
        // SAFETY: the action only stores to atomics, which a signal handler may do.
        unsafe { low_level::register(signal, action) }.map_err(failed)?;
    }
    Ok(arrived)
}

/// Name of a signal for messages.
pub(super) fn name(signal: i32) -> String {
    low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}
