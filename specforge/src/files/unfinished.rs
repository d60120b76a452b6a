//! What this process has begun to write and not finished. Dropping removes it; where a signal ends the process nothing is
//! dropped, and [`abandon`] removes it instead.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static ABANDONED: AtomicBool = AtomicBool::new(false);

/// Stands for a file or folder that is begun, until it has its name or is removed.
#[derive(Debug)]
pub(super) struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Begins a file or folder through `make`. The two are one step: nothing is begun that [`abandon`] does not see.
pub(super) fn begun<T>(
    make: impl FnOnce() -> std::io::Result<T>,
    path: impl Fn(&T) -> &Path,
) -> std::io::Result<(T, Unfinished)> {
    let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    let made = make()?;
    let unfinished = Unfinished(path(&made).to_path_buf());
    all.insert(unfinished.0.clone());
    Ok((made, unfinished))
}

/// Removes everything unfinished, for a process that is about to end by a signal. From then on whoever begins or
/// finishes something waits for that end.
pub fn abandon() {
    ABANDONED.store(true, Ordering::Relaxed);
    let all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    for path in all.iter() {
        // What was renamed a moment ago is not there any more.
        let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
    std::mem::forget(all);
}

/// Whether the process is about to end: what fails from now on may fail because its files are gone.
pub fn is_abandoned() -> bool {
    ABANDONED.load(Ordering::Relaxed)
}
