//! A file that several processes want and one of them makes.
//!
//! Whoever comes first locks a file beside it and makes it; the others wait, however long that takes, and open what was
//! made. A lock belongs to its process: when that is killed, the system gives it to the next one, which starts anew. The
//! lock file says how far the work is, so that those who wait can show it, and what went wrong, so that they need not
//! find out one after the other.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::unfinished::{Unfinished, begun};
use super::{PARTIAL_PREFIX, create_dir_all, parent_of, write_through_as};
use crate::error::{Error, Result};

/// Time between two looks of those who wait.
const LOOK: Duration = Duration::from_millis(50);

/// Opens a file, or makes it while everybody else who wants it waits.
///
/// `open` gives nothing where the file is not there or cannot be used. `make` makes it through [`Maker::write`] and gives
/// what `open` would. `progress` is told how much is done and of how much, whichever process does it. A failure of `make`
/// is also the error of those who waited for it under the same `terms`: what decides, besides the path, whether it
/// succeeds.
pub fn open_or_make<T>(
    path: &Path,
    terms: &str,
    progress: &dyn Fn(u64, u64),
    mut open: impl FnMut() -> Result<Option<T>>,
    make: impl FnOnce(&Maker<'_>) -> Result<T>,
) -> Result<T> {
    let lock = loop {
        if let Some(found) = open()? {
            return Ok(found);
        }
        if let Some(lock) = Lock::wait(path, terms, progress)? {
            break lock;
        }
    };
    // Somebody may have been done between the look and the lock.
    if let Some(found) = open()? {
        return Ok(found);
    }
    let maker = Maker { path, progress, lock };
    maker.report(0, 0);
    maker.clear_leftovers()?;
    make(&maker).inspect_err(|error| maker.lock.say(&State::failed(terms, error)))
}

/// The right to make a file, until it is dropped.
pub struct Maker<'a> {
    path: &'a Path,
    progress: &'a dyn Fn(u64, u64),
    lock: Lock,
}

impl Maker<'_> {
    /// Tells everybody how much is done, and of how much.
    pub fn report(&self, done: u64, total: u64) {
        self.lock.say(&State::Making { process: std::process::id(), done, total });
        if total > 0 {
            (self.progress)(done, total);
        }
    }

    /// Writes the file through `body`, which is given the temporary path to write to.
    pub fn write(&self, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        write_through_as(self.path, &self.prefix(), body)
    }

    fn prefix(&self) -> String {
        format!("{PARTIAL_PREFIX}{}-", self.path.file_name().unwrap_or_default().to_string_lossy())
    }

    /// Removes what a killed maker left behind.
    fn clear_leftovers(&self) -> Result<()> {
        if !self.lock.is_held {
            return Ok(());
        }
        let (folder, prefix) = (parent_of(self.path), self.prefix());
        let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("list", folder))?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
            }
        }
        Ok(())
    }
}

/// What the lock file says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Making { process: u32, done: u64, total: u64 },
    Failed { terms: String, message: String, hint: Option<String>, is_bad_input: bool },
}

impl State {
    fn failed(terms: &str, error: &Error) -> Self {
        let (terms, message, hint) = (terms.to_owned(), error.to_string(), error.hint());
        State::Failed { terms, message, hint, is_bad_input: error.exit_code() == 2 }
    }

    /// Nothing while the lock file is just being written.
    fn read(mut file: &File) -> Option<Self> {
        let mut text = Vec::new();
        std::io::Seek::rewind(&mut file).ok()?;
        file.read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

struct Lock {
    file: File,
    path: PathBuf,
    is_held: bool,
    _unfinished: Option<Unfinished>,
}

impl Lock {
    /// Waits for the lock of `path`. Nothing where its last owner came to an end of the work, which is an error where
    /// that was one; a lock whose owner was killed is had.
    fn wait(path: &Path, terms: &str, progress: &dyn Fn(u64, u64)) -> Result<Option<Self>> {
        let folder = parent_of(path);
        create_dir_all(folder)?;
        let lock_path = folder.join(format!(".{}.lock", path.file_name().unwrap_or_default().to_string_lossy()));
        let options = File::options().create(true).read(true).write(true).truncate(false).open(&lock_path);
        let file = options.map_err(Error::io("create", &lock_path))?;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    if let Some(State::Making { done, total: total @ 1.., .. }) = State::read(&file) {
                        progress(done, total);
                    }
                    sleep(LOOK);
                }
                // Some network file systems know no locks: then everybody makes the file, and the last one stays.
                Err(TryLockError::Error(_)) => {
                    return Ok(Some(Self { file, path: lock_path, is_held: false, _unfinished: None }));
                }
            }
        }
        // Who comes to an end removes the lock file: this one may have been removed while we waited.
        let own = file.metadata().map_err(Error::io("look at", &lock_path))?;
        match fs::metadata(&lock_path) {
            Ok(current) if (current.dev(), current.ino()) == (own.dev(), own.ino()) => {
                let held = begun(|| Ok(lock_path.clone()), PathBuf::as_path).map_err(Error::io("lock", &lock_path))?;
                return Ok(Some(Self { file, path: lock_path, is_held: true, _unfinished: Some(held.1) }));
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("look at", &lock_path)(error)),
            _ => {}
        }
        match State::read(&file) {
            Some(State::Failed { terms: theirs, message, hint, is_bad_input }) if theirs == terms => {
                let problem = format!("another process could not make it: {message}");
                Err(match is_bad_input {
                    true => Error::BadFile { path: path.to_path_buf(), problem, hint },
                    false => Error::Failed(format!("{}: {problem}", path.display())),
                })
            }
            _ => Ok(None),
        }
    }

    /// Writes down what those who wait may want to know; they can do without.
    fn say(&self, state: &State) {
        if let Ok(text) = serde_json::to_vec(state) {
            let _ = self.file.write_all_at(&text, 0).and_then(|()| self.file.set_len(text.len() as u64));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock itself goes: whoever gets it next sees that this file is nobody's any more.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};
    use std::thread;

    use super::*;

    fn read(path: &Path) -> Result<Option<String>> {
        Ok(fs::read_to_string(path).ok())
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs `make` where eight threads want the file at once; returns what each got, and what each was told.
    fn at_once(path: &Path, make: impl Fn(&Maker<'_>) -> Result<String> + Sync) -> Vec<(Result<String>, Vec<u64>)> {
        let start = Barrier::new(8);
        let want = || {
            let (sender, told) = mpsc::channel();
            start.wait();
            let got = open_or_make(path, "", &|done, _| sender.send(done).unwrap(), || read(path), &make);
            drop(sender);
            (got, told.into_iter().collect())
        };
        thread::scope(|scope| {
            let wanting: Vec<_> = (0..8).map(|_| scope.spawn(want)).collect();
            wanting.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn one_makes_it_and_all_see_how_far_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/file");
        let made = AtomicUsize::new(0);
        let results = at_once(&path, |maker| {
            made.fetch_add(1, Ordering::SeqCst);
            maker.report(3, 7);
            sleep(LOOK * 8);
            maker.write(|temporary| fs::write(temporary, "whole").map_err(Error::io("write", temporary)))?;
            Ok("whole".to_owned())
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
        for (got, told) in results {
            assert_eq!(got.unwrap(), "whole");
            assert!(told.contains(&3) && told.iter().all(|&done| done == 3), "{told:?}");
        }
        assert_eq!(names(&folder.path().join("new")), ["file"]);
    }

    #[test]
    fn a_failure_is_everybodys_and_the_next_try_starts_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let tries = AtomicUsize::new(0);
        let bad = || Error::bad_file("input", "is no good").with_hint("take another");
        let results = at_once(&path, |_| {
            tries.fetch_add(1, Ordering::SeqCst);
            sleep(LOOK * 8);
            Err(bad())
        });
        let errors: Vec<Error> = results.into_iter().map(|(got, _)| got.unwrap_err()).collect();
        let echo = format!("{}: another process could not make it: input: is no good", path.display());
        assert_eq!(tries.load(Ordering::SeqCst), 1);
        assert_eq!(errors.iter().filter(|error| error.to_string() == echo).count(), 7);
        assert!(errors.iter().all(|error| error.exit_code() == 2 && error.hint() == bad().hint()));
        assert_eq!(names(folder.path()), Vec::<String>::new());
        let make = |_: &Maker<'_>| Ok("now".to_owned());
        assert_eq!(open_or_make(&path, "", &|_, _| (), || read(&path), make).unwrap(), "now");
    }

    #[test]
    fn a_failure_under_other_terms_is_not_ones_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (sender, started) = mpsc::channel();
        thread::scope(|scope| {
            let strict = scope.spawn(|| {
                let make = |_: &Maker<'_>| {
                    sender.send(()).unwrap();
                    sleep(LOOK * 8);
                    Err(Error::Failed("too strict".to_owned()))
                };
                open_or_make(&path, "strict", &|_, _| (), || read(&path), make)
            });
            started.recv().unwrap();
            let make = |_: &Maker<'_>| Ok("made".to_owned());
            assert_eq!(open_or_make(&path, "mild", &|_, _| (), || read(&path), make).unwrap(), "made");
            assert_eq!(strict.join().unwrap().unwrap_err().to_string(), "too strict");
        });
    }

    #[test]
    fn what_a_killed_maker_left_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (name, text) in [(".file.lock", r#"{"making":{"process":1,"done":1,"total":2}}"#), (".partial-file-x", "")]
        {
            fs::write(folder.path().join(name), text).unwrap();
        }
        fs::write(folder.path().join(".partial-other-x"), "somebody's").unwrap();
        let make = |maker: &Maker<'_>| {
            assert_eq!(names(folder.path()), [".file.lock", ".partial-other-x"]);
            maker.write(|temporary| fs::write(temporary, "whole").map_err(Error::io("write", temporary)))?;
            Ok("whole".to_owned())
        };
        assert_eq!(open_or_make(&path, "", &|_, _| (), || read(&path), make).unwrap(), "whole");
        assert_eq!(names(folder.path()), [".partial-other-x", "file"]);
    }
}
