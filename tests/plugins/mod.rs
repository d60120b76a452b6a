//! What only tests have, and the program knows as it knows its own: each is one file here and a line of [`register`].
//!
//! Tests call [`register`] for themselves and run `specforge-plugins` (`fixture::plugins`) for whole runs.

use std::sync::Once;

pub mod anchors;
pub mod windowed;

/// Adds everything to the program's tables.
pub fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        anchors::register();
        windowed::register();
    });
}
