//! Reads the tensors of a Hugging Face folder: one `model.safetensors`, or shards with an index.
//!
//! Files are memory-mapped. On the CPU, tensors that are wanted as they are stored use the mapped pages themselves; every
//! other case converts piece by piece and gives the pages back to the system, so peak memory stays near the weights' size.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::writer::kind_of;
use crate::error::{Error, Result, TensorMismatch};

const SINGLE_FILE: &str = "model.safetensors";
const SHARD_INDEX: &str = "model.safetensors.index.json";

/// Tensors are converted in pieces of this many stored bytes, whose pages are given back piece by piece.
const PIECE_BYTES: usize = 8 << 20;

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
    /// Where each file lies.
    paths: Vec<PathBuf>,
    /// Length and time of the last change of each file, in bytes and nanoseconds.
    stamps: Vec<(u64, i128)>,
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
        let (mut files, mut stamps) = (Vec::new(), Vec::new());
        let mut entries = BTreeMap::new();
        for (index, file_path) in paths.iter().enumerate() {
            let file = File::open(file_path).map_err(Error::io("open", file_path))?;
            let stamp = file.metadata().map_err(Error::io("look at", file_path))?;
            stamps.push((stamp.len(), i128::from(stamp.ctime()) * 1_000_000_000 + i128::from(stamp.ctime_nsec())));
            // SAFETY: weights are read-only inputs; replacing a file under a running program is not supported.
            let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", file_path))?;
            let (header_length, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
                let problem = match error {
                    SafeTensorError::MetadataIncompleteBuffer => {
                        format!("its header describes another length than its {} bytes", map.len())
                    }
                    other => other.to_string(),
                };
                Error::bad_file(file_path, format!("is not a whole safetensors file: {problem}"))
                    .with_hint("the file is truncated or damaged: fetch or write it again")
            })?;
            let data_start = header_length + 8;
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
        Ok(Self { path: path.to_path_buf(), files, paths: paths.to_vec(), stamps, entries })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length and time of the last change of each file, in bytes and nanoseconds.
    pub fn stamps(&self) -> &[(u64, i128)] {
        &self.stamps
    }

    /// Each file with the names of its tensors, sorted.
    pub(super) fn by_file(&self) -> Vec<(&Path, Vec<&str>)> {
        let mut files: Vec<(&Path, Vec<&str>)> = self.paths.iter().map(|path| (path.as_path(), Vec::new())).collect();
        self.entries.iter().for_each(|(name, entry)| files[entry.file].1.push(name));
        files
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

    /// The elements of a tensor as stored: little-endian, row-major.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entries.get(name).map(|entry| &self.files[entry.file][entry.start..entry.end])
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

    /// Whether a tensor on the CPU shares the mapped pages: those of this type that do not lie askew.
    pub fn shares_pages(&self, name: &str, kind: Kind) -> bool {
        self.entries.get(name).is_some_and(|entry| self.is_usable(entry, kind))
    }

    fn is_usable(&self, entry: &Entry, kind: Kind) -> bool {
        entry.start < entry.end && kind == entry.kind && self.is_aligned(entry)
    }

    fn is_aligned(&self, entry: &Entry) -> bool {
        let address = self.files[entry.file].as_ptr() as usize + entry.start;
        address.is_multiple_of(entry.kind.elt_size_in_bytes())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            let mismatch = TensorMismatch { missing: vec![name.to_owned()], ..TensorMismatch::default() };
            Error::Tensors { path: self.path.clone(), mismatch }
        })
    }

    /// Loads one tensor. On the CPU and in the stored element type the result shares the mapped pages, which stay
    /// mapped for the life of the process and must not be written to.
    pub fn load(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        if device == Device::Cpu && self.is_usable(entry, kind) {
            let map = &self.files[entry.file];
            leak_map(map);
            // SAFETY: safetensors checked the size, the address is aligned, and `leak_map` keeps the bytes mapped.
            return unsafe { tensor_over(&map[entry.start..entry.end], &entry.shape, kind) };
        }
        let loaded = Tensor::f_empty(&entry.shape, (kind, device))?;
        let flat = loaded.f_view([-1])?;
        let mut first = 0;
        self.read_pieces(name, |piece| {
            let length = piece.numel() as i64;
            flat.f_narrow(0, first, length)?.f_copy_(piece)?;
            first += length;
            Ok(())
        })?;
        Ok(loaded)
    }

    /// Gives the elements of one tensor as stored, piece by piece, and gives the pages back to the system.
    pub(super) fn read_pieces(&self, name: &str, mut body: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let entry = self.entry(name)?;
        let map = &self.files[entry.file];
        let is_aligned = self.is_aligned(entry);
        for (index, piece) in map[entry.start..entry.end].chunks(PIECE_BYTES).enumerate() {
            let length = (piece.len() / entry.kind.elt_size_in_bytes()) as i64;
            let source = if is_aligned {
                // SAFETY: the address is aligned; this tensor does not outlive the loop, which the map does.
                unsafe { tensor_over(piece, &[length], entry.kind)? }
            } else {
                Tensor::f_from_data_size(piece, &[length], entry.kind)?
            };
            body(&source)?;
            // The pages were only read: the system may drop them now and read them again if somebody asks.
            let start = entry.start + index * PIECE_BYTES;
            // SAFETY: the map is file-backed and read-only, so no content can be lost.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, piece.len()) };
        }
        Ok(())
    }
}

/// A tensor on the CPU that uses these bytes.
///
/// # Safety
/// The bytes must be aligned for the element type, as many as the shape has, and outlive the tensor.
unsafe fn tensor_over(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor> {
    let strides = contiguous_strides(shape);
    // SAFETY: promised by the caller.
    Ok(unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &strides, kind, Device::Cpu)? })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::write_tensors;

    fn numbers(shape: &[i64], kind: Kind) -> Tensor {
        let count: i64 = shape.iter().product();
        (Tensor::arange(count, (Kind::Float, Device::Cpu)) / 8 - 3).to_kind(kind).view(shape)
    }

    fn write(path: &Path, tensors: &[(&str, Tensor)]) {
        let tensors: Vec<_> = tensors.iter().map(|(name, value)| ((*name).to_owned(), value.shallow_clone())).collect();
        write_tensors(path, &tensors, &[]).unwrap();
    }

    /// Two shards and their index.
    fn sharded() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let shard = |number: u32| folder.path().join(format!("model-0000{number}-of-00002.safetensors"));
        write(&shard(1), &[("a", numbers(&[2, 3], Kind::Float)), ("b", numbers(&[4], Kind::BFloat16))]);
        write(&shard(2), &[("c", numbers(&[3, 1, 2], Kind::Half))]);
        let index = r#"{"metadata": {"total_size": 44}, "weight_map": {"a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}"#;
        std::fs::write(folder.path().join(SHARD_INDEX), index).unwrap();
        folder
    }

    #[track_caller]
    fn assert_refused(path: &Path, words: &[&str]) {
        let error = WeightsFolder::open(path).unwrap_err();
        let text = format!("{error} (hint: {})", error.hint().unwrap_or_default());
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn every_tensor_of_every_shard_is_found_and_converted() {
        let folder = sharded();
        let weights = WeightsFolder::open(folder.path()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(weights.shape("c"), Some([3, 1, 2].as_slice()));
        assert_eq!(weights.kind("b"), Some(Kind::BFloat16));
        for (name, shape) in [("a", [2i64, 3].as_slice()), ("b", &[4]), ("c", &[3, 1, 2])] {
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
                let got = weights.load(name, kind, Device::Cpu).unwrap();
                assert_eq!(got.kind(), kind);
                assert!(got.equal(&numbers(shape, kind)), "{name} as {kind:?}"); // these numbers are exact in every type
            }
        }
    }

    #[test]
    fn tensors_outlive_the_folder() {
        let folder = sharded();
        let tensor = WeightsFolder::open(folder.path()).unwrap().load("a", Kind::Float, Device::Cpu).unwrap();
        drop(folder);
        assert!(tensor.equal(&numbers(&[2, 3], Kind::Float)));
    }

    /// More than one piece, the last one short.
    #[test]
    fn a_large_tensor_is_converted_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE_FILE);
        let count = (2 * PIECE_BYTES / 2 + 77) as i64;
        let want = Tensor::arange(count, (Kind::Int64, Device::Cpu)).remainder(251).to_kind(Kind::BFloat16);
        write(&path, &[("w", want.shallow_clone())]);
        let got = WeightsFolder::open(&path).unwrap().load("w", Kind::Float, Device::Cpu).unwrap();
        assert!(got.equal(&want.to_kind(Kind::Float)));
    }

    /// Old writers did not pad the header, so elements may lie across their alignment.
    #[test]
    fn elements_that_lie_askew_and_empty_tensors_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE_FILE);
        let mut header = r#"{"e":{"dtype":"F32","shape":[0,2],"data_offsets":[0,0]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
            .to_owned();
        while header.len() % 4 != 1 {
            header.push(' ');
        }
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()));
        std::fs::write(&path, bytes).unwrap();
        let weights = WeightsFolder::open(folder.path()).unwrap();
        for kind in [Kind::Float, Kind::Half] {
            let got = weights.load("w", kind, Device::Cpu).unwrap();
            assert!(got.equal(&Tensor::from_slice(&[1.5f32, -2.0]).to_kind(kind)));
            assert_eq!(weights.load("e", kind, Device::Cpu).unwrap().size(), [0, 2]);
        }
    }

    #[test]
    fn folders_without_weights_say_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        assert_refused(&folder.path().join("absent"), &["absent", "no such folder", "name a folder"]);
        assert_refused(folder.path(), &["neither model.safetensors nor model.safetensors.index.json", "import"]);
    }

    #[test]
    fn broken_shard_sets_are_named() {
        let folder = sharded();
        let (index, second) = (folder.path().join(SHARD_INDEX), folder.path().join("model-00002-of-00002.safetensors"));
        let whole = std::fs::read_to_string(&index).unwrap();
        std::fs::write(&index, whole.replace(r#""c":"#, r#""absent": "model-00002-of-00002.safetensors", "c":"#))
            .unwrap();
        assert_refused(folder.path(), &["index.json", "`absent`", "no shard holds"]);
        write(&second, &[("a", numbers(&[1], Kind::Float)), ("c", numbers(&[1], Kind::Float))]);
        assert_refused(folder.path(), &["model-00002", "`a` is also in another shard"]);
        std::fs::remove_file(&second).unwrap();
        assert_refused(folder.path(), &["model-00002-of-00002.safetensors", "not there", "fetch the missing shard"]);
        std::fs::write(&index, &whole[..whole.len() - 9]).unwrap();
        assert_refused(folder.path(), &["index.json", "line"]);
        std::fs::write(&index, "{}").unwrap();
        assert_refused(folder.path(), &["index.json", "weight_map"]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE_FILE);
        write(&path, &[("w", numbers(&[64], Kind::Float))]);
        let whole = std::fs::read(&path).unwrap();
        let longer = [whole.clone(), vec![0; 3]].concat();
        let huge_header = [&u64::MAX.to_le_bytes(), &whole[8..]].concat();
        let not_json = [&whole[..8], b"[", &whole[9..]].concat();
        let pieces = [&whole[..0], &whole[..5], &whole[..20], &whole[..whole.len() - 1]];
        for bytes in pieces.into_iter().chain([longer.as_slice(), &huge_header, &not_json]) {
            std::fs::write(&path, bytes).unwrap();
            assert_refused(
                folder.path(),
                &["model.safetensors", "not a whole safetensors file", "truncated or damaged"],
            );
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_refused(folder.path(), &[&format!("another length than its {} bytes", whole.len() - 1)]);
    }

    #[test]
    fn tensors_that_do_not_fit_are_listed_with_expected_and_got() {
        let folder = sharded();
        let weights = WeightsFolder::open(folder.path()).unwrap();
        let expected = [("a", vec![2, 3]), ("b", vec![5]), ("d", vec![7])];
        let expected = expected.map(|(name, shape)| (name.to_owned(), shape));
        let text = weights.check(&expected, |_| false).unwrap_err().to_string();
        for line in ["missing (1):\n    d [7]", "surplus (1):\n    c [3, 1, 2]", "b: expected [5], got [4]"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(!weights.check(&expected, |name| name == "c").unwrap_err().to_string().contains("surplus"));
        assert!(weights.load("d", Kind::Float, Device::Cpu).unwrap_err().to_string().contains("missing (1):\n    d"));
        let fitting = [("a", vec![2, 3]), ("b", vec![4]), ("c", vec![3, 1, 2])];
        weights.check(&fitting.map(|(name, shape)| (name.to_owned(), shape)), |_| false).unwrap();
    }
}
