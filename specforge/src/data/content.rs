//! The bytes of an input file, as they lie or as they were unpacked.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;
use tempfile::{SpooledData, SpooledTempFile, spooled_tempfile};

use crate::error::{Error, Result};

/// What is unpacked is kept in memory up to this size, and above it in a file without a name in the system's folder for
/// those (`TMPDIR`).
const IN_MEMORY: usize = 64 << 20;

/// Bytes, mapped or owned.
#[derive(Debug)]
pub(super) enum Content {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Content {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Content::Mapped(map) => map,
            Content::Owned(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for Content {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Content {
    /// The bytes of a file or a pipe.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        if metadata.is_dir() {
            return Err(Error::bad_file(path, "is a folder, expected a file").with_hint("name its files one by one"));
        }
        if metadata.is_file() && metadata.len() > 0 {
            // SAFETY: inputs are read-only; changing a file under a running program is not supported.
            return Ok(Self::Mapped(unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?));
        }
        // Pipes and the like have no size and cannot be mapped.
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        Ok(Self::Owned(bytes))
    }
}

/// Bytes that are just being unpacked.
pub(super) struct Unpacked {
    file: SpooledTempFile,
    length: usize,
}

impl Unpacked {
    /// None yet.
    pub(super) fn new() -> Self {
        Self { file: spooled_tempfile(IN_MEMORY), length: 0 }
    }

    /// How many there are.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// All of them. `path` is the file they came from, for messages.
    pub(super) fn finish(mut self, path: &Path) -> Result<Content> {
        self.file.flush().map_err(Error::io("unpack", path))?;
        match self.file.into_inner() {
            SpooledData::InMemory(bytes) => Ok(Content::Owned(bytes.into_inner())),
            // SAFETY: nobody else knows this file.
            SpooledData::OnDisk(file) => {
                let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map what was unpacked of", path))?;
                Ok(Content::Mapped(map))
            }
        }
    }
}

impl Write for Unpacked {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.length += count;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Above how many bytes what is unpacked leaves memory.
#[cfg(test)]
pub(super) fn tests_limit() -> usize {
    IN_MEMORY
}
