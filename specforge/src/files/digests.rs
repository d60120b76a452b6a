//! Digests of large files, noted so that no start of a run reads them whole again.
//!
//! A note holds as long as the file is the one it speaks of: same path, inode and length, and not changed since by the
//! system's own clock (`ctime`), which no copying tool sets back as it does the time that `ls` shows. A file that was
//! changed a moment ago gets no note: the next change could bear the same time.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{open_or_make, write_json};
use crate::error::{Error, Result};

/// Folder of the notes below the folder of a run's caches.
const FOLDER: &str = "digests";
/// A file must have lain untouched for so long. Clocks of file servers are off by seconds; a minute costs nothing.
const SETTLED_SECONDS: i64 = 60;

/// Where digests are noted.
#[derive(Debug, Clone)]
pub struct Digests {
    folder: Option<PathBuf>,
    settled_seconds: i64,
}

/// What tells a file from what stood in its place before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    bytes: u64,
    changed_seconds: i64,
    changed_nanoseconds: i64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Note {
    file: Stamp,
    what: String,
    digest: String,
}

impl Stamp {
    /// Nothing for what is no plain file, such as a pipe.
    fn of(path: &Path) -> Option<Self> {
        let path = fs::canonicalize(path).ok()?;
        let metadata = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        Some(Self {
            path,
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed_seconds: metadata.ctime(),
            changed_nanoseconds: metadata.ctime_nsec(),
        })
    }

    fn is_settled(&self, seconds: i64) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64);
        self.changed_seconds + seconds <= now
    }
}

impl Digests {
    /// Notes in a folder of caches, which need not be there.
    pub fn in_cache(cache: &Path) -> Self {
        Self { folder: Some(cache.join(FOLDER)), settled_seconds: SETTLED_SECONDS }
    }

    /// No notes: every digest is made anew.
    pub fn unnoted() -> Self {
        Self { folder: None, settled_seconds: SETTLED_SECONDS }
    }

    /// The digest of a file as noted, or as `make` gives it. `what` says what is digested and how. Of several processes that
    /// want it at once, one makes it. A folder that takes no notes costs time, and nothing else.
    pub fn of(&self, path: &Path, what: &str, make: impl Fn() -> Result<String>) -> Result<String> {
        let stamp = Stamp::of(path).filter(|stamp| stamp.is_settled(self.settled_seconds));
        let (Some(folder), Some(stamp)) = (&self.folder, stamp) else {
            return make();
        };
        let place = folder.join(format!("{}.json", name_of(&stamp.path, what)));
        let open = || {
            let note: Option<Note> = fs::read(&place).ok().and_then(|text| serde_json::from_slice(&text).ok());
            Ok(note.filter(|note| note.file == stamp && note.what == what).map(|note| note.digest))
        };
        let (tried, made) = (Cell::new(false), OnceCell::new());
        let noted = open_or_make(&place, "", &|_, _| (), open, |_| {
            tried.set(true);
            let digest = made.get_or_init(&make).as_ref().map_err(|_| Error::Failed(String::new()))?.clone();
            // Changed while it was read: what was read is no particular content.
            if Stamp::of(path).as_ref() == Some(&stamp) {
                let note = Note { file: stamp.clone(), what: what.to_owned(), digest: digest.clone() };
                let _ = write_json(&place, &note);
            }
            Ok(digest)
        });
        match (made.into_inner(), noted) {
            (Some(own), _) => own,
            (None, Ok(digest)) => Ok(digest),
            // Somebody else failed, or nothing can be written there.
            (None, Err(_)) => make(),
        }
    }

    /// SHA-256 of a whole file in hexadecimal.
    pub fn sha256(&self, path: &Path) -> Result<String> {
        self.of(path, "sha256", || {
            let mut file = fs::File::open(path).map_err(Error::io("open", path))?;
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 1 << 20];
            loop {
                match file.read(&mut buffer).map_err(Error::io("read", path))? {
                    0 => return Ok(hexadecimal(&hasher.finalize())),
                    count => hasher.update(&buffer[..count]),
                }
            }
        })
    }
}

fn name_of(path: &Path, what: &str) -> String {
    let mut hasher = Sha256::new();
    hasher.update(path.as_os_str().as_encoded_bytes());
    hasher.update([0]);
    hasher.update(what);
    hexadecimal(&hasher.finalize()[..12])
}

/// Two digits a byte.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Notes that trust a file at once.
    fn eager(folder: &Path) -> Digests {
        Digests { folder: Some(folder.join(FOLDER)), settled_seconds: 0 }
    }

    /// The digest, and how often it was made.
    fn counted(digests: &Digests, path: &Path) -> (String, usize) {
        let times = Cell::new(0);
        let make = || {
            times.set(times.get() + 1);
            fs::read_to_string(path).map_err(Error::io("read", path))
        };
        (digests.of(path, "text", make).unwrap(), times.get())
    }

    #[test]
    fn a_file_is_read_once_until_it_changes_in_any_way() {
        let folder = tempfile::tempdir().unwrap();
        let (path, digests) = (folder.path().join("file"), eager(folder.path()));
        let pause = || thread::sleep(std::time::Duration::from_millis(20)); // longer than a tick of the system's clock
        fs::write(&path, "one").unwrap();
        assert_eq!(counted(&digests, &path), ("one".to_owned(), 1));
        assert_eq!(counted(&digests, &path), ("one".to_owned(), 0));
        // Another thing about the same file.
        assert_ne!(digests.sha256(&path).unwrap(), "one");
        // The same length and the same time as shown by `ls`.
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        pause();
        fs::write(&path, "two").unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_eq!(counted(&digests, &path), ("two".to_owned(), 1));
        // Another file in its place.
        pause();
        fs::write(folder.path().join("new"), "six").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(counted(&digests, &path), ("six".to_owned(), 1));
        assert_eq!(counted(&digests, &path), ("six".to_owned(), 0));
        // A damaged note is none.
        for entry in fs::read_dir(folder.path().join(FOLDER)).unwrap() {
            fs::write(entry.unwrap().path(), "{").unwrap();
        }
        assert_eq!(counted(&digests, &path), ("six".to_owned(), 1));
    }

    #[test]
    fn a_file_of_this_moment_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let (path, digests) = (folder.path().join("file"), Digests::in_cache(folder.path()));
        fs::write(&path, "one").unwrap();
        assert_eq!(counted(&digests, &path).1, 1);
        assert_eq!(counted(&digests, &path).1, 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn where_no_note_can_be_kept_the_digest_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "one").unwrap();
        // A file where the folder should be.
        let digests = Digests { folder: Some(path.join("below")), settled_seconds: 0 };
        assert_eq!(counted(&digests, &path), ("one".to_owned(), 1));
        assert_eq!(counted(&Digests::unnoted(), &path), ("one".to_owned(), 1));
        let absent = folder.path().join("absent");
        let error = eager(folder.path()).sha256(&absent).unwrap_err();
        assert!(error.to_string().contains("absent"), "{error}");
        // A failure is its own, and the next try is a new one.
        let failing = || Err(Error::bad_file(&path, "is no good"));
        for _ in 0..2 {
            assert!(eager(folder.path()).of(&path, "text", failing).unwrap_err().to_string().contains("is no good"));
        }
    }
}
