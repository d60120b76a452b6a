//! Reads the tensors of a Hugging Face folder: one `model.safetensors`, or shards with an index.
//!
//! Files are memory-mapped. A float32 model on the CPU uses the mapped pages themselves; every other case converts one
//! tensor at a time and gives its pages back to the system, so peak memory stays near the weights' own size.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::SafeTensors;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::writer::kind_of;
use crate::error::{Error, Result, TensorMismatch};

const SINGLE_FILE: &str = "model.safetensors";
const SHARD_INDEX: &str = "model.safetensors.index.json";

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    kind: Kind,
    shape: Vec<i64>,
    /// Byte range within the file.
    start: usize,
    end: usize,
}

/// An open, memory-mapped set of safetensors files.
#[derive(Debug)]
pub struct WeightsFolder {
    path: PathBuf,
    files: Vec<Arc<Mmap>>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl WeightsFolder {
    /// Opens a folder with `model.safetensors` or a shard index, or a single safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Self::open_files(path, &[path.to_path_buf()]);
        }
        if !path.is_dir() {
            return Err(Error::bad_file(path, "no such folder")
                .with_hint("name a folder with config.json, tokenizer.json and model.safetensors"));
        }
        let single = path.join(SINGLE_FILE);
        if single.is_file() {
            return Self::open_files(path, &[single]);
        }
        let index_path = path.join(SHARD_INDEX);
        if !index_path.is_file() {
            return Err(Error::bad_file(path, format!("holds neither {SINGLE_FILE} nor {SHARD_INDEX}"))
                .with_hint("convert .bin or .gguf weights first (`specforge import` reads GGUF)"));
        }
        let text = std::fs::read_to_string(&index_path).map_err(Error::io("read", &index_path))?;
        let index: ShardIndex =
            serde_json::from_str(&text).map_err(|error| Error::bad_file(&index_path, error.to_string()))?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let files: Vec<PathBuf> = names.into_iter().map(|name| path.join(name)).collect();
        if let Some(absent) = files.iter().find(|file| !file.is_file()) {
            return Err(Error::bad_file(absent, format!("is named in {SHARD_INDEX} but not there"))
                .with_hint("the download is incomplete: fetch the missing shard again"));
        }
        let folder = Self::open_files(path, &files)?;
        if let Some(name) = index.weight_map.keys().find(|name| !folder.entries.contains_key(*name)) {
            return Err(Error::bad_file(&index_path, format!("lists `{name}`, which no shard holds")));
        }
        Ok(folder)
    }

    fn open_files(path: &Path, paths: &[PathBuf]) -> Result<Self> {
        let mut files = Vec::new();
        let mut entries = BTreeMap::new();
        for (index, file_path) in paths.iter().enumerate() {
            let file = File::open(file_path).map_err(Error::io("open", file_path))?;
            // SAFETY: weights are read-only inputs; replacing a file under a running program is not supported.
            let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", file_path))?;
            let broken = |problem: String| {
                Error::bad_file(file_path, format!("is not a whole safetensors file: {problem}"))
                    .with_hint("the file is truncated or damaged: fetch or write it again")
            };
            let (header_length, metadata) =
                SafeTensors::read_metadata(&map).map_err(|error| broken(error.to_string()))?;
            let data_start = header_length + 8;
            let expected = data_start + metadata.data_len();
            if map.len() != expected {
                return Err(broken(format!("expected {expected} bytes, got {}", map.len())));
            }
            for (name, info) in metadata.tensors() {
                let kind = kind_of(info.dtype).ok_or_else(|| {
                    Error::bad_file(file_path, format!("`{name}` has the unsupported element type {:?}", info.dtype))
                })?;
                let shape = info.shape.iter().map(|&size| size as i64).collect();
                let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
                let entry = Entry { file: index, kind, shape, start, end };
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(Error::bad_file(file_path, format!("`{name}` is also in another shard")));
                }
            }
            files.push(Arc::new(map));
        }
        Ok(Self { path: path.to_path_buf(), files, entries })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Element type of a tensor as stored.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.entries.get(name).map(|entry| entry.kind)
    }

    /// Compares names and shapes with what a model expects. `ignored` names may be there or not.
    pub fn check(&self, expected: &[(String, Vec<i64>)], ignored: impl Fn(&str) -> bool) -> Result<()> {
        let mut mismatch = TensorMismatch::default();
        for (name, want) in expected {
            match self.entries.get(name) {
                None => mismatch.missing.push(format!("{name} {want:?}")),
                Some(entry) if &entry.shape != want => {
                    mismatch.misshaped.push((name.clone(), want.clone(), entry.shape.clone()));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        for (name, entry) in &self.entries {
            if !known.contains(name.as_str()) && !ignored(name) {
                mismatch.surplus.push(format!("{name} {:?}", entry.shape));
            }
        }
        if mismatch.is_empty() { Ok(()) } else { Err(Error::Tensors { path: self.path.clone(), mismatch }) }
    }

    /// Loads one tensor. On the CPU and in the stored element type the result shares the mapped pages, which stay
    /// mapped for the life of the process.
    pub fn load(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.entries.get(name).ok_or_else(|| {
            let mismatch = TensorMismatch { missing: vec![name.to_owned()], ..TensorMismatch::default() };
            Error::Tensors { path: self.path.clone(), mismatch }
        })?;
        let map = &self.files[entry.file];
        let bytes = &map[entry.start..entry.end];
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(entry.kind.elt_size_in_bytes());
        if !aligned || bytes.is_empty() {
            let copied = Tensor::f_from_data_size(bytes, &entry.shape, entry.kind)?;
            return Ok(copied.f_to_device(device)?.f_to_kind(kind)?);
        }
        let strides = contiguous_strides(&entry.shape);
        // SAFETY: the bytes are a whole contiguous tensor of this shape and type (safetensors checked the size), and
        // `leak_map` keeps them mapped when the tensor itself is handed out.
        let mapped = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &entry.shape, &strides, entry.kind, Device::Cpu)? };
        if device == Device::Cpu && kind == entry.kind {
            leak_map(map);
            return Ok(mapped);
        }
        let loaded = mapped.f_to_device(device)?.f_to_kind(kind)?;
        drop(mapped);
        // The pages were only read: the system may drop them now and read them again if somebody asks.
        // SAFETY: the map is file-backed and read-only, so no content can be lost.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.start, bytes.len()) };
        Ok(loaded)
    }
}

/// Keeps a map for the life of the process: tensors made of its pages carry no owner.
fn leak_map(map: &Arc<Mmap>) {
    std::mem::forget(Arc::clone(map));
}

fn contiguous_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim] * shape[dim];
    }
    strides
}
