//! Writes that either happen completely or not at all: a sibling with a temporary name, flushed to disk, then renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

mod digests;
mod once;
pub mod png;
mod shrunk;
pub mod torch_file;
mod unfinished;

pub use digests::{Digests, hexadecimal};
pub use once::{Maker, open_or_make};
pub use shrunk::on_shrunk;
use unfinished::{Unfinished, begun};
pub use unfinished::{abandon, is_abandoned};

/// How the names of unfinished files begin.
const PARTIAL_PREFIX: &str = ".partial-";

/// Writes a file through `body`. On any error the old file, if there was one, stays as it was.
pub fn write_file(path: &Path, body: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    write_through(path, |temporary| {
        let file = File::create(temporary).map_err(Error::io("create", path))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        body(&mut writer).and_then(|()| writer.flush()).map_err(Error::io("write", path))
    })
}

/// Writes a file through `body`, which is given the temporary path to write to.
pub fn write_through(path: &Path, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    write_through_as(path, PARTIAL_PREFIX, body)
}

/// The same with a temporary name that begins with `prefix`.
fn write_through_as(path: &Path, prefix: &str, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = parent_of(path);
    create_dir_all(parent)?;
    let begin = || tempfile::Builder::new().prefix(prefix).tempfile_in(parent);
    let (file, _unfinished) =
        begun(begin, tempfile::NamedTempFile::path).map_err(Error::io("create a file in", parent))?;
    let temporary = file.into_temp_path();
    body(&temporary)?;
    let mode = PermissionsExt::from_mode(0o644);
    File::open(&temporary)
        .and_then(|file| file.sync_all().and_then(|()| file.set_permissions(mode)))
        .map_err(Error::io("write", path))?;
    temporary.persist(path).map_err(|error| Error::io("rename to", path)(error.error))?;
    sync_dir(parent)
}

/// A file that is written piece by piece and appears under its name only when [`StagedFile::commit`] is called.
/// Dropped before that, it vanishes.
#[derive(Debug)]
pub struct StagedFile {
    writer: BufWriter<tempfile::NamedTempFile>,
    target: PathBuf,
    _unfinished: Unfinished,
}

impl StagedFile {
    /// Starts a file that will become `target`.
    pub fn new(target: &Path) -> Result<Self> {
        let parent = parent_of(target);
        create_dir_all(parent)?;
        let begin = || tempfile::Builder::new().prefix(PARTIAL_PREFIX).tempfile_in(parent);
        let (file, _unfinished) =
            begun(begin, tempfile::NamedTempFile::path).map_err(Error::io("create a file in", parent))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, file), target: target.to_path_buf(), _unfinished })
    }

    /// Writes behind what is there.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.target))
    }

    /// Gives the file its name, in the place of an older one.
    pub fn commit(self) -> Result<()> {
        let target = self.target;
        let file = self.writer.into_inner().map_err(|error| Error::io("write", &target)(error.into_error()))?;
        let mode = PermissionsExt::from_mode(0o644);
        let settled = file.as_file().sync_all().and_then(|()| file.as_file().set_permissions(mode));
        settled.map_err(Error::io("write", &target))?;
        file.persist(&target).map_err(|error| Error::io("rename to", &target)(error.error))?;
        sync_dir(parent_of(&target))
    }
}

/// Writes text.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_file(path, |writer| writer.write_all(text.as_bytes()))
}

/// Writes a value as indented JSON with a newline at the end.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::Failed(error.to_string()))?;
    text.push('\n');
    write_text(path, &text)
}

/// A folder that appears under its name only when [`StagedDir::commit`] is called, with everything in it.
/// Dropped before that, it vanishes.
#[derive(Debug)]
pub struct StagedDir {
    staging: tempfile::TempDir,
    target: PathBuf,
    _unfinished: Unfinished,
}

impl StagedDir {
    /// Starts a folder that will become `target`.
    pub fn new(target: &Path) -> Result<Self> {
        let parent = parent_of(target);
        create_dir_all(parent)?;
        let begin = || tempfile::Builder::new().prefix(PARTIAL_PREFIX).tempdir_in(parent);
        let (staging, _unfinished) =
            begun(begin, tempfile::TempDir::path).map_err(Error::io("create a folder in", parent))?;
        Ok(Self { staging, target: target.to_path_buf(), _unfinished })
    }

    /// Where to write meanwhile.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Gives the folder its name. An older folder of that name is moved aside first and removed after.
    pub fn commit(self) -> Result<()> {
        let parent = parent_of(&self.target).to_path_buf();
        sync_dir(self.staging.path())?;
        let open = PermissionsExt::from_mode(0o755);
        fs::set_permissions(self.staging.path(), open).map_err(Error::io("set permissions of", &self.target))?;
        let old = if self.target.exists() {
            let aside = tempfile::Builder::new()
                .prefix(".replaced-")
                .tempdir_in(&parent)
                .map_err(Error::io("create a folder in", &parent))?;
            let moved = aside.path().join("old");
            fs::rename(&self.target, moved).map_err(Error::io("move aside", &self.target))?;
            Some(aside)
        } else {
            None
        };
        let staging = self.staging.keep();
        if let Err(error) = fs::rename(&staging, &self.target) {
            // Put back what was there; what was staged is kept too, under its temporary name.
            if let Some(aside) = &old {
                let _ = fs::rename(aside.path().join("old"), &self.target);
            }
            return Err(Error::io("rename to", &self.target)(error));
        }
        sync_dir(&parent)?;
        drop(old);
        Ok(())
    }
}

/// Bytes that may still be written where a file or folder is, or is going to be.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let mut place = path;
    while !place.exists() {
        let above = parent_of(place);
        if above == place {
            break;
        }
        place = above;
    }
    let usage =
        rustix::fs::statvfs(place).map_err(|error| Error::io("ask for the free space of", place)(error.into()))?;
    Ok(usage.f_bavail.saturating_mul(usage.f_frsize))
}

/// Creates a folder and its parents.
pub fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create folder", path))
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a rename durable.
fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("flush folder", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("value.txt");
        write_text(&path, "old").unwrap();
        let failed = write_file(&path, |writer| {
            writer.write_all(b"half of the new")?;
            Err(std::io::Error::other("disk pulled"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_staged_file_appears_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        write_text(&path, "old").unwrap();
        let mut staged = StagedFile::new(&path).unwrap();
        staged.write(b"one ").unwrap();
        drop(staged);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut staged = StagedFile::new(&path).unwrap();
        ["one ", "two"].iter().for_each(|text| staged.write(text.as_bytes()).unwrap());
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn free_space_is_that_of_the_nearest_folder_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        assert!(free_bytes(&folder.path().join("not/yet/there")).unwrap() > 0);
        assert!(free_bytes(Path::new("neither")).unwrap() > 0);
        assert_eq!(free_bytes(Path::new("/proc/nothing/fits/here")).unwrap(), 0);
    }

    #[test]
    fn a_staged_folder_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let staged = StagedDir::new(&target).unwrap();
        write_text(&staged.path().join("a"), "1").unwrap();
        drop(staged);
        assert!(!target.exists());
        for content in ["1", "2"] {
            let staged = StagedDir::new(&target).unwrap();
            write_text(&staged.path().join("a"), content).unwrap();
            staged.commit().unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), content);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
