//! Reads the tensors of a Hugging Face folder: one `model.safetensors`, or shards with an index.
//!
//! Files are memory-mapped. On the CPU, tensors that are wanted as they are stored use the mapped pages themselves; every
//! other case converts piece by piece and gives the pages back to the system, so peak memory stays near the weights' size.
//!
//! Files come from strangers. A header is compared with the length of its file before anything is made of its numbers,
//! a name that stands twice is an error, and so is a tensor that holds something else than finite numbers.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::index::{SHARD_INDEX, ShardIndex, is_old_buffer};
use super::scaled::{self, Share};
use super::writer::kind_of;
use super::{finite, quantised};
use crate::error::{Error, Result, TensorMismatch};
use crate::gguf::packed;
use crate::memory;
use crate::strict;

const SINGLE_FILE: &str = "model.safetensors";

/// Tensors are converted in pieces of this many stored bytes, whose pages are given back piece by piece.
const PIECE_BYTES: usize = 8 << 20;

/// Where one tensor lies.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub file: usize,
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// Byte range within the file.
    pub start: usize,
    pub end: usize,
}

/// What the stored elements of a tensor of a few bits stand for.
#[derive(Debug, Clone)]
struct Scaled {
    /// Name of its scales.
    scales: String,
    /// Shape as stored.
    stored: Vec<i64>,
    share: Share,
    /// Whether the last two axes of what is stored change places.
    turned: bool,
}

/// An open, memory-mapped set of safetensors files.
#[derive(Debug)]
pub struct WeightsFolder {
    path: PathBuf,
    /// Each file's path and bytes.
    files: Vec<(PathBuf, Arc<Mmap>)>,
    /// Length and time of the last change of each file, in bytes and nanoseconds.
    stamps: Vec<(u64, i128)>,
    /// Of a tensor of a few bits the shape is that of the numbers it stands for.
    entries: BTreeMap<String, Entry>,
    /// Tensors of a few bits, by name.
    scaled: BTreeMap<String, Scaled>,
}

impl WeightsFolder {
    /// Opens a folder with `model.safetensors` or a shard index, a single safetensors file, or a GGUF file, whose weights
    /// then have the names and the values of the folder that an import makes of it.
    pub fn open(path: &Path) -> Result<Self> {
        if packed::is_packed(path) {
            return Self::open_packed(path);
        }
        if path.is_file() {
            return Self::open_files(path, &[path.to_path_buf()], None);
        }
        if !path.is_dir() {
            return Err(Error::bad_file(path, "no such folder")
                .with_hint("name a folder with config.json, tokenizer.json and model.safetensors"));
        }
        let (single, index_path) = (path.join(SINGLE_FILE), path.join(SHARD_INDEX));
        if !single.is_file() && !index_path.is_file() {
            return Err(Error::bad_file(path, format!("holds neither {SINGLE_FILE} nor {SHARD_INDEX}")).with_hint(
                "convert .bin weights first; a GGUF file is named itself, or made a folder by `specforge import`",
            ));
        }
        if !index_path.is_file() {
            return Self::open_files(path, &[single], None);
        }
        let index = ShardIndex::read(&index_path)?;
        // Readers disagree which of the two counts: one of them is stale.
        if single.is_file() && !index.files().contains(SINGLE_FILE) {
            return Err(Error::bad_file(
                path,
                format!("holds {SINGLE_FILE} and an index of other files, {SHARD_INDEX}"),
            )
            .with_hint("remove the weights that are not meant: some programs read one of them, some the other"));
        }
        let files: Vec<PathBuf> = index.files().into_iter().map(|name| path.join(name)).collect();
        if let Some(absent) = files.iter().find(|file| !file.is_file()) {
            return Err(Error::bad_file(absent, format!("is named in {SHARD_INDEX} but not there"))
                .with_hint("the download is incomplete: fetch the missing shard again"));
        }
        let folder = Self::open_files(path, &files, Some(&index))?;
        for (name, file) in index.entries() {
            let is_there = |entry: &Entry| folder.files[entry.file].0 == path.join(file);
            if !folder.entries.get(name).is_some_and(is_there) && !is_old_buffer(name) {
                return Err(Error::bad_file(&index_path, format!("lists `{name}` in {file}, which does not hold it")));
            }
        }
        Ok(folder)
    }

    /// Opens files. Where an index names another file for a tensor than the one it lies in, the tensor is passed over: it
    /// was replaced. One that the index does not name counts wherever it lies.
    fn open_files(path: &Path, paths: &[PathBuf], index: Option<&ShardIndex>) -> Result<Self> {
        let (mut files, mut stamps) = (Vec::new(), Vec::new());
        let mut entries = BTreeMap::new();
        for (number, file_path) in paths.iter().enumerate() {
            let file = File::open(file_path).map_err(Error::io("open", file_path))?;
            let stamp = file.metadata().map_err(Error::io("look at", file_path))?;
            stamps.push((stamp.len(), changed(&stamp)));
            // SAFETY: weights are read-only inputs; replacing a file under a running program is not supported.
            let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", file_path))?;
            for (name, entry) in entries_of(file_path, &map, number)? {
                let listed = index.and_then(|index| index.file_of(&name));
                if listed.is_some_and(|listed| path.join(listed) != *file_path) {
                    continue;
                }
                if entries.contains_key(&name) {
                    return Err(Error::bad_file(file_path, format!("`{name}` is also in another shard")));
                }
                entries.insert(name, entry);
            }
            files.push((file_path.clone(), Arc::new(map)));
        }
        let scaled = scaled_among(&mut entries).map_err(|(name, problem)| {
            let file = entries.get(&name).map_or(path, |entry: &Entry| &paths[entry.file]);
            Error::bad_file(file, problem).with_hint(quantised::HINT)
        })?;
        Ok(Self { path: path.to_path_buf(), files, stamps, entries, scaled })
    }

    /// What a user should know of weights of a few bits, where there are some.
    pub fn scaled_words(&self) -> Option<String> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for scaled in self.scaled.values() {
            *counts.entry(scaled.share.words()).or_default() += 1;
        }
        let parts: Vec<String> = counts.iter().map(|(words, count)| format!("{count} tensors of {words}")).collect();
        (!parts.is_empty()).then(|| {
            format!(
                "the weights are quantised ({}): they are read as the numbers they stand for, and activations are not \
                 quantised",
                parts.join(", ")
            )
        })
    }

    /// Whether a tensor belongs to weights of a few bits: their scales, and those of activations, which nothing here reads.
    fn is_scale(&self, name: &str) -> bool {
        const ACTIVATIONS: [&str; 5] = [".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale"];
        let of_activations = !self.scaled.is_empty() && ACTIVATIONS.iter().any(|end| name.ends_with(end));
        of_activations || self.scaled.values().any(|scaled| scaled.scales == name)
    }

    /// The numbers that a tensor of a few bits stands for, in float32 on the CPU; nothing for other tensors.
    pub(super) fn scaled_numbers(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(scaled) = self.scaled.get(name) else { return Ok(None) };
        let entry = self.entry(name)?;
        let stored = Tensor::f_from_data_size(self.bytes_of(entry), &scaled.stored, entry.kind)?;
        let kind = self.kind(&scaled.scales).unwrap_or(Kind::Float);
        let scales = self.load(&scaled.scales, kind, Device::Cpu)?;
        let numbers = match scaled.share {
            Share::Group if scaled.turned => {
                let shape = scaled::turned(&entry.shape);
                scaled::of_float4(&stored, &scales, &shape)?.f_transpose(-2, -1)?.f_contiguous()?
            }
            Share::Group => scaled::of_float4(&stored, &scales, &entry.shape)?,
            share => scaled::of_float8(&stored, &scales, share)?,
        };
        if !bool::try_from(numbers.f_isfinite()?.f_all()?)? {
            let problem = format!("`{name}`: expected finite numbers, some are none with their scales");
            return Err(Error::bad_file(self.file_of(name), problem)
                .with_hint("the weights are damaged: fetch or write them again"));
        }
        Ok(Some(numbers))
    }

    fn open_packed(path: &Path) -> Result<Self> {
        let map = packed::open(path)?.weights()?;
        let entries = entries_of(path, &map, 0)?.into_iter().collect();
        Self::of_one(path, map, entries)
    }

    /// The tensors of one mapped file, each of whose bytes lie within it.
    pub(super) fn of_one(path: &Path, map: Arc<Mmap>, entries: BTreeMap<String, Entry>) -> Result<Self> {
        let stamp = std::fs::metadata(path).map_err(Error::io("look at", path))?;
        let stamps = vec![(stamp.len(), changed(&stamp))];
        Ok(Self {
            path: path.to_path_buf(),
            files: vec![(path.to_path_buf(), map)],
            stamps,
            entries,
            scaled: BTreeMap::new(),
        })
    }

    /// The same tensors under other names; those that get none are not there any more.
    pub fn renamed(self, name_of: impl Fn(&str) -> Option<String>) -> Self {
        let renamed = |(name, entry): (String, Entry)| Some((name_of(&name)?, entry));
        let of_few_bits = |(name, scaled): (String, Scaled)| {
            Some((name_of(&name)?, Scaled { scales: name_of(&scaled.scales)?, ..scaled }))
        };
        Self {
            entries: self.entries.into_iter().filter_map(renamed).collect(),
            scaled: self.scaled.into_iter().filter_map(of_few_bits).collect(),
            ..self
        }
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
        let mut files: Vec<(&Path, Vec<&str>)> =
            self.files.iter().map(|(path, _)| (path.as_path(), Vec::new())).collect();
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
        self.entries.get(name).map(|entry| self.bytes_of(entry))
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].1[entry.start..entry.end]
    }

    /// The file that holds a tensor; the folder for one that is not there.
    pub fn file_of(&self, name: &str) -> &Path {
        self.entries.get(name).map_or(&self.path, |entry| &self.files[entry.file].0)
    }

    /// Refuses weights that are quantised: by the names of any tensors, and by the element types of those of a model.
    /// Integers are not taken for the numbers they stand for.
    pub fn check_numbers(&self, expected: &[(String, Vec<i64>)]) -> Result<()> {
        let refuse =
            |name: &str, problem: String| Err(Error::bad_file(self.file_of(name), problem).with_hint(quantised::HINT));
        for name in self.names().filter(|name| !self.is_scale(name)) {
            if let Some(method) = quantised::method_of(name) {
                return refuse(name, format!("holds quantised weights ({method}), such as `{name}`"));
            }
        }
        for (name, _) in expected.iter().filter(|(name, _)| !self.scaled.contains_key(name)) {
            match self.kind(name) {
                None | Some(Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) => {}
                Some(kind) => {
                    return refuse(
                        name,
                        format!("`{name}`: expected floating-point numbers, got {kind:?}: quantised weights?"),
                    );
                }
            }
        }
        Ok(())
    }

    /// Whether two tensors hold the same numbers, whatever their element types.
    pub fn same_content(&self, left: &str, right: &str) -> Result<bool> {
        let (one, other) = (self.entry(left)?, self.entry(right)?);
        if one.shape != other.shape {
            return Ok(false);
        }
        if [left, right].iter().any(|name| self.scaled.contains_key(*name)) {
            let [left, right] = [left, right].map(|name| self.load(name, Kind::Float, Device::Cpu));
            return Ok(left?.f_equal(&right?)?);
        }
        if one.kind == other.kind && self.bytes_of(one) == self.bytes_of(other) {
            return Ok(true);
        }
        // Piece by piece, and in most cases the first one decides.
        let count = one.shape.iter().product::<i64>();
        let elements = PIECE_BYTES as i64 / 8;
        for start in (0..count).step_by(elements as usize) {
            let piece = |entry: &Entry| {
                let width = entry.kind.elt_size_in_bytes();
                let length = elements.min(count - start);
                let bytes = &self.bytes_of(entry)[start as usize * width..][..length as usize * width];
                Ok::<_, Error>(Tensor::f_from_data_size(bytes, &[length], entry.kind)?.f_to_kind(Kind::Double)?)
            };
            if !piece(one)?.f_equal(&piece(other)?)? {
                return Ok(false);
            }
        }
        Ok(true)
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
            if !known.contains(name.as_str()) && !ignored(name) && !self.is_scale(name) {
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
        let address = self.bytes_of(entry).as_ptr() as usize;
        address.is_multiple_of(entry.kind.elt_size_in_bytes())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            let mismatch = TensorMismatch { missing: vec![name.to_owned()], ..TensorMismatch::default() };
            Error::Tensors { path: self.path.clone(), mismatch }
        })
    }

    /// Loads one tensor. On the CPU and in the stored element type the result shares the mapped pages, which stay
    /// mapped for the life of the process and must not be written to. What is not a finite number is refused, also where
    /// it becomes infinite in the wanted type.
    pub fn load(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        if device == Device::Cpu && self.is_usable(entry, kind) {
            self.refuse_non_finite(name, entry, self.bytes_of(entry), 0)?;
            leak_map(&self.files[entry.file].1);
            // SAFETY: safetensors checked the size, the address is aligned, and `leak_map` keeps the bytes mapped.
            return unsafe { tensor_over(self.bytes_of(entry), &entry.shape, kind) };
        }
        if let Some(numbers) = self.scaled_numbers(name)? {
            let loaded = numbers.f_to_device(device)?.f_to_kind(kind)?;
            if may_overflow(Kind::Float, kind) && !bool::try_from(loaded.f_isfinite()?.f_all()?)? {
                return Err(self.too_large(name, kind));
            }
            return Ok(loaded);
        }
        let loaded = Tensor::f_empty(&entry.shape, (kind, device))?;
        if device == Device::Cpu {
            memory::prefer_large_pages(loaded.data_ptr().cast(), loaded.numel() * kind.elt_size_in_bytes());
        }
        let flat = loaded.f_view([-1])?;
        let may_overflow = may_overflow(entry.kind, kind);
        let mut first = 0;
        self.read_pieces(name, |piece| {
            let length = piece.numel() as i64;
            let mut place = flat.f_narrow(0, first, length)?;
            place.f_copy_(piece)?;
            first += length;
            if may_overflow && !bool::try_from(place.f_isfinite()?.f_all()?)? {
                return Err(self.too_large(name, kind));
            }
            Ok(())
        })?;
        Ok(loaded)
    }

    fn too_large(&self, name: &str, kind: Kind) -> Error {
        let problem = format!("`{name}` holds numbers that are too large for {kind:?}");
        Error::bad_file(self.file_of(name), problem).with_hint("load the weights as bfloat16 or float32")
    }

    /// Tells the system that some tensors are read soon.
    pub fn will_need(&self, names: &[String]) {
        for entry in names.iter().filter_map(|name| self.entries.get(name)) {
            // Advice that is not taken costs nothing but time.
            let _ = self.files[entry.file].1.advise_range(Advice::WillNeed, entry.start, entry.end - entry.start);
        }
    }

    /// Tells the system that some tensors are not read soon. Those that share the mapped pages stay usable: their pages are
    /// read again.
    pub fn release(&self, names: &[String]) {
        for entry in names.iter().filter_map(|name| self.entries.get(name)) {
            let map = &self.files[entry.file].1;
            // SAFETY: the map is file-backed and read-only, so no content can be lost.
            let _ =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.start, entry.end - entry.start) };
        }
    }

    /// Gives the elements of one tensor as stored, piece by piece, and gives the pages back to the system.
    pub(super) fn read_pieces(&self, name: &str, mut body: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let entry = self.entry(name)?;
        let map = &self.files[entry.file].1;
        let is_aligned = self.is_aligned(entry);
        let width = entry.kind.elt_size_in_bytes();
        for (index, piece) in self.bytes_of(entry).chunks(PIECE_BYTES).enumerate() {
            self.refuse_non_finite(name, entry, piece, index * PIECE_BYTES / width)?;
            let length = (piece.len() / width) as i64;
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

    /// `bytes` are a part of the tensor that begins with element `first`.
    fn refuse_non_finite(&self, name: &str, entry: &Entry, bytes: &[u8], first: usize) -> Result<()> {
        let hint = "the weights are damaged: fetch or write them again";
        if entry.kind == Kind::Bool {
            return match bytes.iter().position(|byte| *byte > 1) {
                None => Ok(()),
                Some(place) => {
                    let problem = format!("`{name}`: element {} is neither true nor false", first + place);
                    Err(Error::bad_file(self.file_of(name), problem).with_hint(hint))
                }
            };
        }
        match finite::first_non_finite(bytes, entry.kind) {
            None => Ok(()),
            Some((place, what)) => {
                let problem = format!("`{name}`: expected finite numbers, element {} is {what}", first + place);
                Err(Error::bad_file(self.file_of(name), problem).with_hint(hint))
            }
        }
    }
}

/// When a file was last changed, in nanoseconds.
fn changed(file: &std::fs::Metadata) -> i128 {
    i128::from(file.ctime()) * 1_000_000_000 + i128::from(file.ctime_nsec())
}

/// Whether a finite number of one type may be infinite in the other.
fn may_overflow(from: Kind, to: Kind) -> bool {
    matches!(
        (from, to),
        (Kind::Double, Kind::Float | Kind::BFloat16 | Kind::Half)
            | (Kind::Float, Kind::BFloat16 | Kind::Half)
            | (Kind::BFloat16, Kind::Half)
    )
}

/// The tensors that a file's header names.
fn entries_of(path: &Path, map: &Mmap, file: usize) -> Result<Vec<(String, Entry)>> {
    let broken = |problem: String| {
        Error::bad_file(path, format!("is not a whole safetensors file: {problem}"))
            .with_hint("the file is truncated or damaged: fetch or write it again")
    };
    // The reader keeps the last of two tensors of one name.
    if let Some(name) = strict::repeated_tensor(map) {
        return Err(broken(format!("its header names `{name}` twice")));
    }
    let (header_length, metadata) = SafeTensors::read_metadata(map).map_err(|error| match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            broken(format!("its header describes another length than its {} bytes", map.len()))
        }
        other => broken(other.to_string()),
    })?;
    let data_start = header_length + 8;
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let kind = kind_of(info.dtype).ok_or_else(|| unsupported(path, &name, info.dtype))?;
        let shape: Option<Vec<i64>> = info.shape.iter().map(|&size| i64::try_from(size).ok()).collect();
        // An empty tensor may claim any size along its other axes.
        let elements =
            |shape: &Vec<i64>| shape.iter().try_fold(8i64, |product, &size| product.checked_mul(size.max(1)));
        let Some(shape) = shape.filter(|shape| elements(shape).is_some()) else {
            return Err(broken(format!("`{name}` has the impossible shape {:?}", info.shape)));
        };
        let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
        entries.push((name, Entry { file, kind, shape, start, end }));
    }
    Ok(entries)
}

/// Tensors of a few bits whose scales are there: they get the name and the shape of what they stand for. Others are
/// refused, with the name and the problem.
fn scaled_among(entries: &mut BTreeMap<String, Entry>) -> Result<BTreeMap<String, Scaled>, (String, String)> {
    let mut found = BTreeMap::new();
    let narrow = |entry: &Entry| matches!(entry.kind, Kind::Float8e4m3fn | Kind::Uint8);
    let names: Vec<String> = entries.iter().filter(|(_, entry)| narrow(entry)).map(|(name, _)| name.clone()).collect();
    for stored in names {
        let is_float8 = entries[&stored].kind == Kind::Float8e4m3fn;
        let Some((name, scales)) = scaled::partner(&stored, |name| entries.contains_key(name)) else {
            match is_float8 {
                true => {
                    return Err((
                        stored.clone(),
                        format!("holds quantised weights: `{stored}` is of type F8_E4M3, and no scale lies beside it"),
                    ));
                }
                false => continue,
            }
        };
        let (entry, scale) = (&entries[&stored], &entries[&scales]);
        let shape = entry.shape.clone();
        let (numbers, share) = match is_float8 {
            true => (Some(shape.clone()), scaled::share(&shape, &scale.shape)),
            false if scale.kind == Kind::Uint8 => (scaled::unpacked_shape(&shape, &scale.shape), Some(Share::Group)),
            // Bytes with other scales are integers of somebody else's method.
            false => continue,
        };
        let (Some(numbers), Some(share)) = (numbers, share) else {
            let problem =
                format!("`{scales}` {:?} fits no weights of shape {shape:?}, which `{stored}` has", scale.shape);
            return Err((stored, problem));
        };
        if name != stored && entries.contains_key(&name) {
            return Err((stored.clone(), format!("holds `{name}` as it is and quantised")));
        }
        // Experts in blocks lie row by row, where their plain numbers lie column by column.
        let turned = stored.ends_with("_blocks") && numbers.len() == 3;
        let numbers = if turned { scaled::turned(&numbers) } else { numbers };
        if let Some(entry) = entries.remove(&stored) {
            entries.insert(name.clone(), Entry { shape: numbers, ..entry });
        }
        found.insert(name, Scaled { scales, stored: shape, share, turned });
    }
    Ok(found)
}

fn unsupported(path: &Path, name: &str, dtype: Dtype) -> Error {
    if quantised::is_narrow_float(dtype) {
        return Error::bad_file(path, format!("holds quantised weights: `{name}` is of type {dtype:?}"))
            .with_hint(quantised::HINT);
    }
    Error::bad_file(path, format!("`{name}` has the unsupported element type {dtype:?}"))
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
#[path = "folder_tests.rs"]
mod tests;
