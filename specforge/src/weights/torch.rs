//! Weights as `torch.save` writes them: one zip archive with a flat table of tensors (`.pth`, `.pt`, `.bin`).
//!
//! The archive's entries are not compressed, so the file is mapped and used like a safetensors file; its table is read by
//! [`TorchFile`], which runs nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use tch::Kind;

use super::WeightsFolder;
use super::folder::Entry;
use crate::error::{Error, Result};
use crate::files::torch_file::{MAGIC, TorchFile};

/// How names of such files end.
const EXTENSIONS: [&str; 3] = ["pth", "pt", "bin"];
/// Hint where a file is not what it should be.
const HINT: &str = "expected what torch.save writes of a model's state_dict(): a table of tensors by name";

/// Opens weights in either format: a folder with `model.safetensors` (or its shards), else with one file of `torch.save`; or
/// such a file itself.
pub fn open_either(path: &Path) -> Result<WeightsFolder> {
    if path.is_file() {
        return if is_torch(path)? { open(path) } else { WeightsFolder::open(path) };
    }
    if !path.is_dir() || path.join("model.safetensors").exists() || path.join("model.safetensors.index.json").exists() {
        return WeightsFolder::open(path);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io("list", path))? {
        let file = entry.map_err(Error::io("list", path))?.path();
        if has_extension(&file) {
            files.push(file);
        }
    }
    files.sort();
    match files.as_slice() {
        [] => Err(Error::bad_file(path, "holds neither model.safetensors nor a file of torch.save (.pth)")
            .with_hint("name a folder with config.json and the weights, or the file with the weights")),
        [file] => open(file),
        [first, second, ..] => {
            let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let problem = format!("holds several files of weights: {}, {}", name(first), name(second));
            Err(Error::bad_file(path, problem).with_hint("name the file that is meant"))
        }
    }
}

fn has_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    path.is_file() && extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}

/// Whether a file is an archive of torch by its first bytes; one that is called so is taken at its word, so that it is told
/// what is wrong with it.
fn is_torch(path: &Path) -> Result<bool> {
    use std::io::Read;

    let mut first = Vec::new();
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.take(MAGIC.len() as u64).read_to_end(&mut first).map_err(Error::io("read", path))?;
    Ok(first == MAGIC || has_extension(path))
}

/// Opens one file of `torch.save`. Every byte is read once, for the archive's checksums.
pub fn open(path: &Path) -> Result<WeightsFolder> {
    let refuse = |problem: String| Error::bad_file(path, problem).with_hint(HINT);
    let mut torch = TorchFile::open(path).map_err(refuse)?;
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: weights are read-only inputs; replacing a file under a running program is not supported.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    let names: Vec<String> = torch.names().map(str::to_owned).collect();
    if names.is_empty() {
        return Err(refuse("holds no tensors by name; perhaps they are in a table within a table".to_owned()));
    }
    let mut entries = BTreeMap::new();
    for name in names {
        let entry = entry_of(&mut torch, &name, map.len()).map_err(refuse)?;
        entries.insert(name, entry);
    }
    WeightsFolder::of_one(path, Arc::new(map), entries)
}

fn entry_of(torch: &mut TorchFile, name: &str, length: usize) -> Result<Entry, String> {
    let header = torch.header(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
    let kind = kind_of(header.storage)
        .ok_or_else(|| format!("`{name}` has the unsupported element type {}", header.storage))?;
    let shape: Option<Vec<i64>> = header.shape.iter().map(|&size| i64::try_from(size).ok()).collect();
    // An empty tensor may claim any size along its other axes.
    let product = |shape: &Vec<i64>| shape.iter().try_fold(8i64, |product, &size| product.checked_mul(size.max(1)));
    let shape = shape.filter(|shape| product(shape).is_some());
    let shape = shape.ok_or_else(|| format!("`{name}` has the impossible shape {:?}", header.shape))?;
    let place = torch.place(name, kind.elt_size_in_bytes() as u64)?;
    let range = usize::try_from(place.start).ok().zip(usize::try_from(place.end).ok());
    let (start, end) = range
        .filter(|&(start, end)| start <= end && end <= length)
        .ok_or_else(|| format!("`{name}`: its elements lie behind the end of the file"))?;
    Ok(Entry { file: 0, kind, shape, start, end })
}

/// The element type that PyTorch calls a storage by.
fn kind_of(storage: &str) -> Option<Kind> {
    Some(match storage {
        "FloatStorage" => Kind::Float,
        "DoubleStorage" => Kind::Double,
        "HalfStorage" => Kind::Half,
        "BFloat16Storage" => Kind::BFloat16,
        "LongStorage" => Kind::Int64,
        "IntStorage" => Kind::Int,
        "ShortStorage" => Kind::Int16,
        "CharStorage" => Kind::Int8,
        "ByteStorage" => Kind::Uint8,
        "BoolStorage" => Kind::Bool,
        _ => return None,
    })
}
