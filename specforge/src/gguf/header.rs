//! Reads a GGUF header: the metadata, and what tensors there are and where.
//!
//! A file from a stranger is refused before anything is made as large as it claims to be, a name that stands twice is an
//! error, and so is text that is not UTF-8. What is wrong is told with the key or tensor it is wrong in.
//!
//! Reference: `docs/gguf.md` of ggml, versions 2 and 3. Version 1 has not been written since 2023 and is refused.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use candle_core::quantized::gguf_file::Value;

use super::ggml_types::{self, ElementType};
use crate::error::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;

// Far above any real file (Llama 3.1 405B has 1,138 tensors and 560,000 array elements), far below what hurts.
const MOST_TENSORS: u64 = 1 << 16;
const MOST_KEYS: u64 = 1 << 16;
const MOST_ELEMENTS: u64 = 1 << 23;
const LONGEST_STRING: u64 = 1 << 24;
const MOST_STRING_BYTES: u64 = 1 << 28;
const MOST_DIMENSIONS: u32 = 4;
const DEEPEST_NESTING: usize = 4;

const TYPE_UINT32: u32 = 4;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// What stands before the tensor data.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    /// The last dimension is the innermost one.
    pub(super) shape: Vec<usize>,
    pub(super) kind: ElementType,
    /// Where its data starts in the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// Which of a model's files it lies in.
    pub(super) part: usize,
}

/// Reads everything up to the tensor data, and makes sure that the data of every tensor lies within the file.
pub(super) fn read(path: &Path, file: &mut File) -> Result<Content> {
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    file.rewind().map_err(Error::io("read", path))?;
    let mut walk = Walk {
        path,
        reader: BufReader::with_capacity(1 << 16, file),
        position: 0,
        length,
        place: "the header".to_owned(),
        elements: 0,
        string_bytes: 0,
    };
    walk.file()
}

struct Walk<'a> {
    path: &'a Path,
    reader: BufReader<&'a mut File>,
    position: u64,
    length: u64,
    /// What is being read, for messages.
    place: String,
    elements: u64,
    string_bytes: u64,
}

impl Walk<'_> {
    fn file(&mut self) -> Result<Content> {
        let (tensors, keys) = self.preamble()?;
        let (metadata, alignment) = self.metadata(keys)?;
        let mut tensors = self.tensors(tensors, alignment)?;
        let start = self.position.next_multiple_of(alignment);
        self.check_extents(&tensors, start)?;
        tensors.values_mut().for_each(|tensor| tensor.start += start);
        Ok(Content { metadata, tensors })
    }

    /// Magic, version and the two counts.
    fn preamble(&mut self) -> Result<(u64, u64)> {
        let magic = self.bytes::<4>().map_err(|_| self.bad("expected a GGUF file, got fewer than four bytes"))?;
        if &magic != MAGIC {
            let shown = magic.escape_ascii();
            return Err(self.bad(format!("expected a GGUF file (first bytes `GGUF`), got `{shown}`")));
        }
        match self.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(self.bad("expected a little-endian GGUF file, got a big-endian one"));
            }
            version => return Err(self.bad(format!("expected GGUF version 2 or 3, got {version}"))),
        }
        let (tensors, keys) = (self.u64()?, self.u64()?);
        for (what, count, most) in [("tensors", tensors, MOST_TENSORS), ("metadata keys", keys, MOST_KEYS)] {
            if count > most {
                return Err(self.bad(format!("the header claims {count} {what}; expected at most {most}")));
            }
        }
        Ok((tensors, keys))
    }

    /// The metadata, and the alignment of the tensor data.
    fn metadata(&mut self, count: u64) -> Result<(HashMap<String, Value>, u64)> {
        let mut metadata = HashMap::new();
        let mut alignment = DEFAULT_ALIGNMENT;
        for index in 0..count {
            self.place = format!("metadata key {} of {count}", index + 1);
            let key = self.name()?;
            self.place = format!("metadata key `{key}`");
            let kind = self.u32()?;
            if key == "general.alignment" && kind != TYPE_UINT32 {
                return Err(self.bad("`general.alignment`: expected a 32-bit unsigned number"));
            }
            let value = self.value(kind, 0)?;
            if let ("general.alignment", Value::U32(number)) = (key.as_str(), &value) {
                alignment = u64::from(*number);
                if !alignment.is_power_of_two() {
                    let problem = format!("`general.alignment`: expected a power of two, got {alignment}");
                    return Err(self.bad(problem));
                }
            }
            if metadata.insert(key, value).is_some() {
                return Err(self.bad(format!("{} stands twice in the file", self.place)));
            }
        }
        Ok((metadata, alignment))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            TYPE_UINT32 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes::<1>()? {
                [flag @ (0 | 1)] => Value::Bool(flag == 1),
                [other] => return Err(self.bad(format!("{}: expected true or false, got {other}", self.place))),
            },
            TYPE_STRING => {
                let text = self.string()?;
                if depth > 0 && text.ends_with('\0') {
                    return Err(self.bad(format!("{}: an element ends with a zero byte", self.place)));
                }
                // Some writers leave zero bytes at the end.
                Value::String(text.trim_end_matches('\0').to_owned())
            }
            TYPE_ARRAY => Value::Array(self.array(depth)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.bad(format!("{}: unknown value type {kind}", self.place))),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Vec<Value>> {
        if depth >= DEEPEST_NESTING {
            return Err(self.bad(format!("{}: arrays nested deeper than {DEEPEST_NESTING}", self.place)));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        // An element takes at least a byte, so a count beyond the file's end is caught before anything is read.
        if count > self.length - self.position {
            return Err(self.bad(format!("{}: claims {count} elements; the file ends before that", self.place)));
        }
        self.elements = self.elements.saturating_add(count);
        if self.elements > MOST_ELEMENTS {
            return Err(self.bad(format!("{}: the metadata holds more than {MOST_ELEMENTS} elements", self.place)));
        }
        (0..count).map(|_| self.value(kind, depth + 1)).collect()
    }

    /// The tensors; where their data starts is relative to the start of all data.
    fn tensors(&mut self, count: u64, alignment: u64) -> Result<BTreeMap<String, TensorInfo>> {
        let mut tensors = BTreeMap::new();
        for index in 0..count {
            self.place = format!("tensor {} of {count}", index + 1);
            let name = self.name()?;
            self.place = format!("tensor `{name}`");
            let tensor = self.tensor(alignment)?;
            if tensors.insert(name, tensor).is_some() {
                return Err(self.bad(format!("{} stands twice in the file", self.place)));
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo> {
        let rank = self.u32()?;
        if !(1..=MOST_DIMENSIONS).contains(&rank) {
            return Err(self.bad(format!("{}: expected 1 to {MOST_DIMENSIONS} dimensions, got {rank}", self.place)));
        }
        // The first dimension is the innermost one.
        let sizes = (0..rank).map(|_| self.u64()).collect::<Result<Vec<u64>>>()?;
        let (id, offset) = (self.u32()?, self.u64()?);
        let Some(kind) = ggml_types::by_id(id) else {
            let problem = format!("{}: {}", self.place, ggml_types::unreadable(&ggml_types::name_of(id)));
            return Err(self.bad(problem).with_hint(ggml_types::HINT));
        };
        let block = kind.block_size() as u64;
        if !sizes[0].is_multiple_of(block) {
            let name = ggml_types::name_of(id);
            let (place, row) = (&self.place, sizes[0]);
            return Err(
                self.bad(format!("{place}: rows of {row} elements do not divide into {name} blocks of {block}"))
            );
        }
        let elements = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bytes = elements.and_then(|elements| (elements / block).checked_mul(kind.type_size() as u64));
        let Some(bytes) = bytes else {
            return Err(self.bad(format!("{}: the shape {sizes:?} is absurdly large", self.place)));
        };
        if !offset.is_multiple_of(alignment) {
            return Err(self.bad(format!("{}: offset {offset} is no multiple of {alignment}", self.place)));
        }
        let shape = sizes.iter().rev().map(|&size| size as usize).collect();
        Ok(TensorInfo { shape, kind, start: offset, bytes, part: 0 })
    }

    /// The data of no tensor reaches beyond the file or into another tensor's.
    fn check_extents(&self, tensors: &BTreeMap<String, TensorInfo>, start: u64) -> Result<()> {
        let mut in_order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
        in_order.sort_by_key(|(_, tensor)| tensor.start);
        let mut free = 0;
        for (name, TensorInfo { start: offset, bytes, .. }) in in_order {
            let end = offset.checked_add(*bytes).and_then(|end| end.checked_add(start));
            if end.is_none_or(|end| end > self.length) {
                let (length, from) = (self.length, start.saturating_add(*offset));
                let problem =
                    format!("tensor `{name}`: needs {bytes} bytes from {from}, but the file ends at {length}");
                return Err(self.bad(problem).with_hint("the file looks cut off; download it again"));
            }
            if *offset < free {
                return Err(self.bad(format!("tensor `{name}`: its data overlaps another tensor's")));
            }
            free = *offset + *bytes;
        }
        Ok(())
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        if length > self.length - self.position {
            return Err(self.truncated());
        }
        self.string_bytes = self.string_bytes.saturating_add(length);
        if length > LONGEST_STRING || self.string_bytes > MOST_STRING_BYTES {
            return Err(self.bad(format!("{}: a string of {length} bytes is too long", self.place)));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.bad(format!("{}: a string is not valid UTF-8", self.place)))
    }

    /// A name, without the zero bytes that some writers leave at the end.
    fn name(&mut self) -> Result<String> {
        Ok(self.string()?.trim_end_matches('\0').to_owned())
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 > self.length - self.position {
            return Err(self.truncated());
        }
        self.reader.read_exact(bytes).map_err(Error::io("read", self.path))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn truncated(&self) -> Error {
        let problem = format!("the file ends within {} (at byte {} of {})", self.place, self.position, self.length);
        self.bad(problem).with_hint("the file looks cut off; download it again")
    }

    fn bad(&self, problem: impl Into<String>) -> Error {
        Error::bad_file(self.path, problem)
    }
}
