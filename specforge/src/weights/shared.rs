//! Frozen weights that several processes of one machine hold once.
//!
//! Weights that are wanted as they are stored are mapped, and mapped pages belong to everybody. Weights that are wanted
//! in another element type would be converted by each process for itself; here one process converts them into a file, and
//! all map that. The file's name says what it was made of: where the weights lie, their names, types, shapes and both ends
//! of every tensor, and when their files were last changed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::WeightsFolder;
use super::writer::{dtype_of, host_bytes};
use crate::error::{Error, Result};
use crate::files::{self, Maker};

/// Bytes at either end of a tensor that tell it from another.
const SAMPLE_BYTES: usize = 4096;
/// Tensors begin where vector instructions like them to, if their sizes allow it.
const ALIGNMENT: usize = 64;
/// Bytes of the number before a safetensors header.
const LENGTH_BYTES: usize = 8;
/// Room that is left for others on the disk.
const SPARE_BYTES: u64 = 64 << 20;
/// How the names of copies end.
const EXTENSION: &str = ".weights.safetensors";

/// Where processes of one machine keep the converted weights they share.
#[derive(Clone, Copy)]
pub struct SharedCopies<'a> {
    /// Folder of the copies.
    pub folder: &'a Path,
    /// Is told how many bytes are converted, and of how many.
    pub progress: &'a dyn Fn(u64, u64),
    /// Receives a line for the user.
    pub note: &'a dyn Fn(&str),
}

impl std::fmt::Debug for SharedCopies<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SharedCopies").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl SharedCopies<'_> {
    /// Weights whose tensors of these names share their pages when they are loaded as `kind`: the given ones where they do
    /// already, else those of a copy, which one process makes and the others wait for. Where no copy can be made, a line
    /// says why, and the given ones come back.
    pub fn of(&self, weights: WeightsFolder, names: &[String], kind: Kind) -> WeightsFolder {
        if names.iter().all(|name| weights.shares_pages(name, kind)) {
            return weights;
        }
        match self.open_or_make(&weights, names, kind) {
            Ok(copy) => copy,
            Err(error) => {
                let folder = weights.path().display();
                (self.note)(&format!("every process converts {folder} for itself, in memory of its own: {error}"));
                weights
            }
        }
    }

    fn open_or_make(&self, weights: &WeightsFolder, names: &[String], kind: Kind) -> Result<WeightsFolder> {
        let CopyName { family, content } = CopyName::of(weights, names, kind)?;
        let path = self.folder.join(format!("{family}{content}{EXTENSION}"));
        // A damaged copy is as good as none.
        let open = || Ok(WeightsFolder::open(&path).ok());
        let make = |maker: &Maker<'_>| {
            self.clear_outdated(&family)?;
            let layout = Layout::new(weights, names, kind)?;
            let free = files::free_bytes(self.folder)?;
            if free < layout.bytes + SPARE_BYTES {
                let (need, free) = (layout.bytes >> 20, free >> 20);
                let folder = self.folder.display();
                return Err(Error::Failed(format!("{folder}: a converted copy takes {need} MiB, {free} MiB are free")));
            }
            maker.write(|temporary| layout.write(weights, kind, temporary, &path, maker))?;
            WeightsFolder::open(&path)
        };
        files::open_or_make(&path, "", self.progress, open, make)
    }

    /// Removes copies of what these files were before. Processes that have one mapped keep it until they end.
    fn clear_outdated(&self, family: &str) -> Result<()> {
        for entry in fs::read_dir(self.folder).map_err(Error::io("list", self.folder))? {
            let entry = entry.map_err(Error::io("list", self.folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(family) && name.ends_with(EXTENSION) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
            }
        }
        Ok(())
    }
}

/// What a copy is called.
struct CopyName {
    /// Where the weights lie, which of them, and the element type: the same when their content changes.
    family: String,
    content: String,
}

impl CopyName {
    fn of(weights: &WeightsFolder, names: &[String], kind: Kind) -> Result<Self> {
        let path: PathBuf = fs::canonicalize(weights.path()).map_err(Error::io("look at", weights.path()))?;
        let (mut family, mut content) = (Sha256::new(), Sha256::new());
        family.update(path.as_os_str().as_encoded_bytes());
        content.update(format!("{:?}", weights.stamps()));
        for name in names {
            family.update(format!("\n{name}"));
            content.update(format!("\n{name} {:?} {:?}\n", weights.kind(name), weights.shape(name)));
            let bytes = weights.bytes(name).unwrap_or_default();
            content.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            content.update(&bytes[bytes.len().saturating_sub(SAMPLE_BYTES)..]);
        }
        let digits = |digest: &[u8]| digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect::<String>();
        let dtype = format!("{:?}", dtype_of(kind)?).to_lowercase();
        Ok(Self { family: format!("{}-{dtype}-", digits(&family.finalize())), content: digits(&content.finalize()) })
    }
}

/// Header and size of a copy.
struct Layout<'a> {
    names: &'a [String],
    header: Vec<u8>,
    /// Of the whole file.
    bytes: u64,
}

impl<'a> Layout<'a> {
    fn new(weights: &WeightsFolder, names: &'a [String], kind: Kind) -> Result<Self> {
        let dtype = dtype_of(kind)?;
        let mut end = 0;
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let shape: Vec<usize> = weights.shape(name).unwrap_or_default().iter().map(|&size| size as usize).collect();
            let start = end;
            end += shape.iter().product::<usize>() * kind.elt_size_in_bytes();
            tensors.push((name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
        }
        let failed = |error: String| Error::Failed(format!("a header of converted weights: {error}"));
        let metadata = Metadata::new(None, tensors).map_err(|error| failed(error.to_string()))?;
        let mut text = serde_json::to_vec(&metadata).map_err(|error| failed(error.to_string()))?;
        let length = (text.len() + LENGTH_BYTES).next_multiple_of(ALIGNMENT) - LENGTH_BYTES;
        text.resize(length, b' ');
        let header = [&(length as u64).to_le_bytes(), text.as_slice()].concat();
        let bytes = (header.len() + end) as u64;
        Ok(Self { names, header, bytes })
    }

    /// Converts tensor by tensor, piece by piece; errors speak of `path`.
    fn write(
        &self,
        weights: &WeightsFolder,
        kind: Kind,
        temporary: &Path,
        path: &Path,
        maker: &Maker<'_>,
    ) -> Result<()> {
        let file = File::create(temporary).map_err(Error::io("create", path))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&self.header).map_err(Error::io("write", path))?;
        let mut done = self.header.len() as u64;
        for name in self.names {
            maker.report(done, self.bytes);
            let mut write = |piece: &Tensor| {
                let converted = piece.f_to_device_(Device::Cpu, kind, false, false)?;
                let bytes = host_bytes(&converted);
                done += bytes.len() as u64;
                out.write_all(bytes).map_err(Error::io("write", path))
            };
            match weights.scaled_numbers(name)? {
                Some(numbers) => write(&numbers)?,
                None => weights.read_pieces(name, write)?,
            }
        }
        maker.report(done, self.bytes);
        out.flush().map_err(Error::io("write", path))
    }
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
