//! A GGUF file where a Hugging Face folder could stand: its files are made in memory, and nothing is written to disk.
//!
//! The files are those that [`super::import`] writes, byte for byte, so that whoever looks at a model by its files sees
//! the same one either way. The weights take memory instead of disk, in float32, once for each process, for as long as
//! it runs; they are made when somebody asks for them, as a file without a name that is mapped like any other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use memmap2::Mmap;
use rustix::fs::{MemfdFlags, memfd_create};

use super::model::{FILES, Model};
use super::{ImportDtype, source, tensors};
use crate::error::{Error, Result};
use crate::progress::Progress;

const MAGIC: &[u8; 4] = b"GGUF";
/// The values of the file, not rounded.
const DTYPE: ImportDtype = ImportDtype::F32;

/// Whether a path names a GGUF file rather than a folder: by its first bytes, and one that is called so is taken at its
/// word, so that it is told what is wrong with it.
pub fn is_packed(path: &Path) -> bool {
    if !path.is_file() {
        return false;
    }
    let mut magic = [0; 4];
    let begins = File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok();
    (begins && &magic == MAGIC) || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A file of a model by its name, from its folder or made of its GGUF file; nothing where it is not there.
pub fn read_file(model: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    if is_packed(model) {
        return Ok(open(model)?.files.get(name).cloned());
    }
    let path = model.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    std::fs::read(&path).map(Some).map_err(Error::io("read", &path))
}

/// Whether a model has a file of this name, in its folder or made of its GGUF file, whose soundness nobody has looked at.
pub fn has_file(model: &Path, name: &str) -> bool {
    if is_packed(model) { FILES.contains(&name) } else { model.join(name).is_file() }
}

/// A model in a GGUF file.
#[derive(Debug)]
pub struct Packed {
    path: PathBuf,
    model: Model,
    files: BTreeMap<&'static str, Vec<u8>>,
    weights: Mutex<Option<Arc<Mmap>>>,
}

/// Length and time of the last change of a file, in bytes and nanoseconds.
type Stamp = (u64, i128);

/// Models that this process has open.
type Opened = BTreeMap<PathBuf, (Stamp, Arc<Packed>)>;

/// Opens a model, or gives the one that this process has open.
pub fn open(path: &Path) -> Result<Arc<Packed>> {
    static OPENED: OnceLock<Mutex<Opened>> = OnceLock::new();
    let file = source::open_plain(path)?;
    let metadata = file.metadata().map_err(Error::io("look at", path))?;
    let stamp = (metadata.len(), i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec()));
    // What a thread that panicked left behind is whole: entries are put in when they are.
    let mut opened = OPENED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, packed)) = opened.get(path)
        && *known == stamp
    {
        return Ok(Arc::clone(packed));
    }
    let model = Model::read(path, file, DTYPE)?;
    if model.parts.len() > 1 {
        let problem = format!("is the first of {} parts of a split GGUF file", model.parts.len());
        return Err(Error::bad_file(path, problem).with_hint("`specforge import` makes a folder of all its parts"));
    }
    let mut files = BTreeMap::new();
    for (name, content) in &model.files {
        let mut text = serde_json::to_vec_pretty(content).map_err(|error| Error::Failed(error.to_string()))?;
        text.push(b'\n');
        files.insert(*name, text);
    }
    let packed = Arc::new(Packed { path: path.to_path_buf(), model, files, weights: Mutex::default() });
    opened.insert(path.to_path_buf(), (stamp, Arc::clone(&packed)));
    Ok(packed)
}

impl Packed {
    /// The weights as a mapped safetensors file, under Hugging Face's names.
    pub fn weights(&self) -> Result<Arc<Mmap>> {
        let mut weights = self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = weights.as_ref() {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(self.convert()?);
        *weights = Some(Arc::clone(&map));
        Ok(map)
    }

    fn convert(&self) -> Result<Mmap> {
        let failed = |error: std::io::Error| Error::io("make memory for", &self.path)(error);
        let memory = File::from(memfd_create("gguf", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?);
        let bar = OnceLock::new();
        let report = |done: u64, total: u64| {
            let bar = bar.get_or_init(|| Progress::new("read GGUF", total >> 20, "MiB"));
            bar.set(done >> 20, "");
        };
        tensors::write_to_memory(&memory, &self.path, &self.model.parts, &self.model.plans, DTYPE, &report)?;
        if let Some(bar) = bar.get() {
            bar.finish("");
        }
        // SAFETY: nobody else has this file, and this process does not write to it again.
        unsafe { Mmap::map(&memory) }.map_err(failed)
    }
}
