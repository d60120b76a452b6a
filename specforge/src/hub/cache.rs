//! The cache that Python's client and many programs share, as they lay it out:
//!
//! ```text
//! models--org--name/   refs/main             the commit that a branch or tag meant when it was last asked for
//!                      blobs/ETAG            content, called as the server calls it; ETAG.incomplete while it comes
//!                      snapshots/COMMIT/...  files by their names: relative links to blobs
//! .locks/models--org--name/ETAG.lock         held (flock) by the process that downloads
//! ```

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::name::{Kind, Name, is_commit};
use crate::error::{Error, Result};
use crate::files::{create_dir_all, write_text};
use crate::progress;

/// Time between two looks at a lock of somebody else.
const LOOK: Duration = Duration::from_millis(100);

/// The part of a cache that belongs to one repository.
pub(super) struct RepoCache {
    layout: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    /// That of a repository below a cache's folder, which need not be there.
    pub(super) fn new(cache: &Path, name: &Name) -> Self {
        let kind = match name.kind {
            Kind::Model => RepoType::Model,
            Kind::Dataset => RepoType::Dataset,
        };
        let repo = Repo::new(name.repo.clone(), kind);
        let called = repo.folder_name();
        Self {
            layout: Cache::new(cache.to_path_buf()).repo(repo),
            folder: cache.join(&called),
            locks: cache.join(".locks").join(called),
        }
    }

    /// Where it is noted what a branch or tag means.
    pub(super) fn ref_path(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// The commit that a revision is, or meant when it was last asked for.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.ref_path(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes what a branch or tag means.
    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_text(&self.ref_path(revision), commit)
    }

    /// Folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// Where content of this name lies.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where it lies as long as it is not whole.
    pub(super) fn part(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Gives a file of a commit its content, which is there.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        if path.exists() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            create_dir_all(parent)?;
        }
        // From snapshots/COMMIT, and as many folders as the file's own name has.
        let target = format!("{}blobs/{etag}", "../".repeat(2 + file.matches('/').count()));
        match symlink(&target, &path) {
            // Another process was there first.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && path.exists() => Ok(()),
            // A link to content that is gone.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => fs::remove_file(&path)
                .and_then(|()| symlink(&target, &path))
                .or_else(|error| if path.exists() { Ok(()) } else { Err(error) })
                .map_err(Error::io("replace", &path)),
            // A file system without links: the file itself, as Python's client does it.
            Err(_) => fs::rename(self.blob(etag), &path).map_err(Error::io("make", &path)),
            Ok(()) => Ok(()),
        }
    }

    /// Waits until nobody else downloads this content, and keeps others waiting until it is dropped.
    pub(super) fn lock(&self, etag: &str) -> Result<File> {
        create_dir_all(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let options = File::options().create(true).read(true).write(true).truncate(false).open(&path);
        let file = options.map_err(Error::io("create", &path))?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    if !said {
                        progress::say("waiting for another process that downloads the same file");
                        said = true;
                    }
                    sleep(LOOK);
                }
                // Some network file systems know no locks. What comes is compared with its hash in any case.
                Err(TryLockError::Error(_)) => return Ok(file),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache(folder: &Path) -> RepoCache {
        RepoCache::new(folder, &Name::model("org/name").unwrap().unwrap())
    }

    #[test]
    fn what_is_written_lies_where_others_look_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        cache.note_commit("refs/pr/1", COMMIT).unwrap();
        cache.note_commit(COMMIT, COMMIT).unwrap();
        let repo = folder.path().join("models--org--name");
        assert_eq!(fs::read_to_string(repo.join("refs/refs/pr/1")).unwrap(), COMMIT);
        assert_eq!(fs::read_dir(repo.join("refs")).unwrap().count(), 1);
        assert_eq!((cache.commit("refs/pr/1").as_deref(), cache.commit("main")), (Some(COMMIT), None));
        create_dir_all(&repo.join("blobs")).unwrap();
        fs::write(cache.blob("abc"), "content").unwrap();
        for (file, target) in [("config.json", "../../blobs/abc"), ("sub/folder/x", "../../../../blobs/abc")] {
            for _ in 0..2 {
                cache.link(COMMIT, file, "abc").unwrap();
            }
            let path = repo.join("snapshots").join(COMMIT).join(file);
            assert_eq!(fs::read_link(&path).unwrap(), Path::new(target));
            assert_eq!(fs::read_to_string(&path).unwrap(), "content");
        }
        // A link whose content was removed is replaced.
        let broken = repo.join("snapshots").join(COMMIT).join("broken");
        symlink("../../blobs/gone", &broken).unwrap();
        cache.link(COMMIT, "broken", "abc").unwrap();
        assert_eq!(fs::read_to_string(&broken).unwrap(), "content");
        drop(cache.lock("abc").unwrap());
        assert!(folder.path().join(".locks/models--org--name/abc.lock").is_file());
        let data = Name::data("hf://datasets/org/name/x").unwrap().unwrap();
        let blob = RepoCache::new(folder.path(), &data).blob("abc");
        assert_eq!(blob, folder.path().join("datasets--org--name/blobs/abc"));
    }

    #[test]
    fn a_note_that_is_no_commit_means_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        write_text(&cache.ref_path("main"), "../../elsewhere").unwrap();
        assert_eq!(cache.commit("main"), None);
    }
}
