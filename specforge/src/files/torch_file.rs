//! Reads what `torch.save` writes of tables of tensors: a zip archive with a pickle, and the tensors' bytes beside it.
//!
//! A pickle is a program. This reader knows the few instructions that build a table of plain tensors, and refuses a file
//! at the first other one: nothing of a file is ever run, imported or guessed. What it may take is bounded: length of
//! the program, depth of its tuples, elements of a tensor. (candle-core's reader knows no booleans, copies a value
//! whenever the program mentions it, and stops at no depth.)
//!
//! A list of tensors in the table stands for tensors called `NAME.0`, `NAME.1` and so on; a file of one tensor and no table
//! stands for a table that has it under the empty name. Numbers and truths of the table are kept. A file that was compressed as a
//! whole (`.gz`) is taken apart in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use crate::error::{Error, Result, foreign};

/// Every torch archive begins with this, being a zip archive.
pub const MAGIC: &[u8] = b"PK\x03\x04";
/// Every gzip file begins with this.
const GZIP_MAGIC: &[u8] = b"\x1f\x8b";

/// Longest program read. A tensor takes about 200 bytes, a model of some hundred tensors 100 kB.
const MOST_PROGRAM_BYTES: u64 = 1 << 20;
/// Deepest tuple in a tuple. Tensors take three.
const MOST_DEPTH: usize = 8;
/// Longest list in a table: a tensor for each layer of a model.
const MOST_IN_LIST: usize = 512;
/// By how much a compressed file may grow: numbers of a model do not even shrink to a half.
const MOST_GROWTH: u64 = 32;

/// Where an archive lies: in a file, or in memory.
trait Source: Read + Seek {}

impl<T: Read + Seek> Source for T {}

type Archive = ZipArchive<Box<dyn Source>>;

/// An open file with its table. Only the table has been read.
pub struct TorchFile {
    archive: Archive,
    /// The folder inside the archive.
    prefix: String,
    tensors: BTreeMap<String, TensorInfo>,
    numbers: BTreeMap<String, i64>,
    /// Whether the archive was taken apart in memory.
    in_memory: bool,
    /// Storages that were read whole for their checksums, by key, with their place in the file.
    whole: HashMap<String, Range<u64>>,
}

/// What a program builds: tensors and numbers by name.
type Table = (BTreeMap<String, TensorInfo>, BTreeMap<String, i64>);

/// What a tensor of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorHeader<'a> {
    /// PyTorch's name of its elements: `LongStorage`, `BFloat16Storage`.
    pub storage: &'a str,
    /// Its shape.
    pub shape: &'a [u64],
}

impl TorchFile {
    /// Opens a file and reads its table. A problem is given in words.
    pub fn open(path: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| Error::io("open", path)(error).to_string();
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut file = BufReader::new(file);
        let mut first = [0; 2];
        let is_gzip = file.read_exact(&mut first).is_ok() && first == *GZIP_MAGIC;
        file.rewind().map_err(failed)?;
        let source: Box<dyn Source> = match is_gzip {
            false => Box::new(file),
            true => {
                let most = length.saturating_mul(MOST_GROWTH);
                let mut whole = Vec::new();
                let unpacked = flate2::read::GzDecoder::new(file).take(most + 1).read_to_end(&mut whole);
                unpacked.map_err(|error| format!("is no whole gzip file: {error}"))?;
                if whole.len() as u64 > most {
                    return Err(format!("unpacks to more than {MOST_GROWTH} times its length"));
                }
                Box::new(Cursor::new(whole))
            }
        };
        let archive = foreign::answer(|| ZipArchive::new(source));
        let mut archive = archive.map_err(|error| format!("is no whole torch file: {error}"))?;
        let (prefix, (tensors, numbers)) = table(&mut archive)?;
        Ok(Self { archive, prefix, tensors, numbers, in_memory: is_gzip, whole: HashMap::new() })
    }

    /// An integer of the table, or a truth as 0 or 1.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.numbers.get(name).copied()
    }

    /// Names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What a tensor is.
    pub fn header(&self, name: &str) -> Option<TensorHeader<'_>> {
        self.tensors.get(name).map(|info| TensorHeader { storage: &info.storage, shape: &info.shape })
    }

    /// The elements of a tensor as they are stored: `width` little-endian bytes each, row-major. Neither the tensor nor the
    /// storage that it looks into may have more than `most` elements.
    pub fn elements(&mut self, name: &str, width: u64, most: u64) -> Result<Vec<u8>, String> {
        let info = self.tensors.get(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
        let length = info.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let end = length.and_then(|length| info.offset.checked_add(length)).filter(|&end| end <= most);
        let end =
            end.ok_or_else(|| format!("`{name}`: expected at most {most} elements, got shape {:?}", info.shape))?;
        if !info.is_row_major() {
            return Err(format!("`{name}`: its elements do not lie side by side"));
        }
        // A storage may be larger than the tensor that looks into it.
        let (key, offset) = (info.key.clone(), info.offset);
        let bytes = entry(&mut self.archive, &format!("{}data/{key}", self.prefix), most.saturating_mul(width))?;
        let range = offset.checked_mul(width).zip(end.checked_mul(width));
        let range = range.and_then(|(start, end)| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
        let found = range.and_then(|range| bytes.get(range)).map(<[u8]>::to_vec);
        let got = bytes.len();
        found.ok_or_else(|| format!("`{name}`: expected {} bytes, got {got}", end.saturating_mul(width)))
    }
}

impl TorchFile {
    /// Where in the file the elements of a tensor lie, `width` little-endian bytes each, row-major, so that a mapped file can
    /// be used as it is. What the tensor looks into is read whole once, for its checksum.
    pub fn place(&mut self, name: &str, width: u64) -> Result<Range<u64>, String> {
        if self.in_memory {
            return Err("is compressed as a whole: unpack it first".to_owned());
        }
        let info = self.tensors.get(name).ok_or_else(|| format!("holds no tensor `{name}`"))?;
        if !info.is_row_major() {
            return Err(format!("`{name}`: its elements do not lie side by side"));
        }
        let storage = match self.whole.get(&info.key) {
            Some(range) => range.clone(),
            None => {
                let range = stored_range(&mut self.archive, &format!("{}data/{}", self.prefix, info.key))?;
                self.whole.insert(info.key.clone(), range.clone());
                range
            }
        };
        let length = info.shape.iter().try_fold(width, |product, &size| product.checked_mul(size));
        let start = info.offset.checked_mul(width).and_then(|offset| storage.start.checked_add(offset));
        let end = start.zip(length).and_then(|(start, length)| start.checked_add(length));
        match start.zip(end) {
            Some((start, end)) if end <= storage.end => Ok(start..end),
            _ => {
                let got = storage.end - storage.start;
                Err(format!("`{name}`: expected elements of shape {:?}, its storage has {got} bytes", info.shape))
            }
        }
    }
}

/// Where an entry that is not compressed lies in the file, once it was read whole and fits its checksum.
fn stored_range(archive: &mut Archive, name: &str) -> Result<Range<u64>, String> {
    let mut entry = archive.by_name(name).map_err(|error| format!("`{name}`: {}", broken(&error)))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!("`{name}`: is compressed, which torch.save does not do"));
    }
    let start = entry.data_start().ok_or_else(|| format!("`{name}`: has no place in the file"))?;
    let length = std::io::copy(&mut entry, &mut std::io::sink());
    let length = length.map_err(|error| format!("`{name}`: {}", broken(&ZipError::Io(error))))?;
    Ok(start..start.saturating_add(length))
}

fn broken(error: &ZipError) -> String {
    format!("is no whole torch file: {error}")
}

/// Reads at most `most` bytes of an entry.
fn entry(archive: &mut Archive, name: &str, most: u64) -> Result<Vec<u8>, String> {
    let mut entry = archive.by_name(name).map_err(|error| format!("`{name}`: {}", broken(&error)))?;
    let mut bytes = Vec::new();
    let length = entry.by_ref().take(most.saturating_add(1)).read_to_end(&mut bytes);
    length.map_err(|error| format!("`{name}`: {}", broken(&ZipError::Io(error))))?;
    if bytes.len() as u64 > most {
        return Err(format!("`{name}`: expected at most {most} bytes, got more"));
    }
    Ok(bytes)
}

/// The folder inside the archive, and the table that its program describes.
fn table(archive: &mut Archive) -> Result<(String, Table), String> {
    let names = archive.file_names().map(|name| name.map(|name| name.into_owned()));
    let names = names.collect::<Result<Vec<String>, ZipError>>().map_err(|error| broken(&error))?;
    let programs: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix("data.pkl")).collect();
    let [prefix] = programs.as_slice() else {
        return Err(format!("is no torch file: expected one `data.pkl` inside, found {}", programs.len()));
    };
    let order = format!("{prefix}byteorder");
    if names.contains(&order) && entry(archive, &order, 16)? != b"little" {
        return Err("was written on a big-endian machine, which is not supported".to_owned());
    }
    let program = entry(archive, &format!("{prefix}data.pkl"), MOST_PROGRAM_BYTES)?;
    let table = Machine::new(&program).run().map_err(|problem| format!("`{prefix}data.pkl`: {problem}"))?;
    Ok(((*prefix).to_owned(), table))
}

/// Where a tensor's elements lie, in elements.
#[derive(Debug, Clone, PartialEq)]
struct TensorInfo {
    storage: String,
    key: String,
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

impl TensorInfo {
    /// Whether its elements lie side by side, in order. An axis of one element may have any stride.
    fn is_row_major(&self) -> bool {
        let mut next = Some(1u64);
        self.shape.len() == self.strides.len()
            && self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
                let fits = size <= 1 || next == Some(stride);
                next = next.and_then(|next| next.checked_mul(size));
                fits
            })
    }
}

/// A value of the program. Copies share what they hold.
#[derive(Debug, Clone)]
enum Value {
    None,
    Bool(bool),
    Integer(i64),
    Text(Rc<str>),
    /// The name of a Python object, never looked up.
    Global(Rc<str>),
    Tuple(Rc<[Value]>, usize),
    /// A place in [`Machine::tables`].
    Table(usize),
    /// A place in [`Machine::lists`].
    List(usize),
    Storage {
        kind: Rc<str>,
        key: Rc<str>,
    },
    Tensor(Rc<TensorInfo>),
    Mark,
}

impl Value {
    fn depth(&self) -> usize {
        if let Value::Tuple(_, depth) = self { *depth } else { 0 }
    }
}

/// Runs a program of the few instructions that tables of tensors need.
struct Machine<'a> {
    program: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    tables: Vec<Vec<(Value, Value)>>,
    lists: Vec<Vec<Value>>,
}

impl<'a> Machine<'a> {
    fn new(program: &'a [u8]) -> Self {
        Self { program, stack: Vec::new(), memo: HashMap::new(), tables: Vec::new(), lists: Vec::new() }
    }

    /// What is in the table that the program builds, by name.
    fn run(mut self) -> Result<Table, String> {
        while self.step()? {}
        let table = match self.pop()? {
            Value::Table(table) => table,
            Value::Tensor(info) => {
                return Ok((BTreeMap::from([(String::new(), info.as_ref().clone())]), BTreeMap::new()));
            }
            _ => return Err("expected a table of tensors by name, got another value".to_owned()),
        };
        let (mut tensors, mut numbers) = (BTreeMap::new(), BTreeMap::new());
        for (key, value) in &self.tables[table] {
            match (key, value) {
                (Value::Text(name), Value::Tensor(info)) => {
                    tensors.insert(name.to_string(), info.as_ref().clone());
                }
                (Value::Text(name), Value::Integer(number)) => {
                    numbers.insert(name.to_string(), *number);
                }
                (Value::Text(name), Value::Bool(truth)) => {
                    numbers.insert(name.to_string(), i64::from(*truth));
                }
                (Value::Text(name), Value::List(list)) => {
                    for (place, value) in self.lists[*list].iter().enumerate() {
                        if let Value::Tensor(info) = value {
                            tensors.insert(format!("{name}.{place}"), info.as_ref().clone());
                        }
                    }
                }
                _ => {}
            }
        }
        Ok((tensors, numbers))
    }

    /// One instruction; false at the end of the program.
    fn step(&mut self) -> Result<bool, String> {
        let code = self.take(1)?[0];
        match code {
            // PROTO
            0x80 => drop(self.take(1)?),
            // STOP
            b'.' => return Ok(false),
            b'N' => self.stack.push(Value::None),
            // NEWTRUE, NEWFALSE
            0x88 | 0x89 => self.stack.push(Value::Bool(code == 0x88)),
            // BININT1, BININT2, BININT, LONG1
            b'K' => self.integer(1, false)?,
            b'M' => self.integer(2, false)?,
            b'J' => self.integer(4, true)?,
            0x8a => {
                let length = self.take(1)?[0] as usize;
                self.integer(length, true)?;
            }
            // BINUNICODE
            b'X' => {
                let length = self.number(4)? as usize;
                let text = text(self.take(length)?)?;
                self.stack.push(Value::Text(text));
            }
            // GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(format!("{module}.{name}").into()));
            }
            // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            // MARK, and what gathers the values down to it: TUPLE, SETITEMS
            b'(' => self.stack.push(Value::Mark),
            b't' => {
                let values = self.pop_to_mark()?;
                self.tuple(values)?;
            }
            b'u' => {
                let values = self.pop_to_mark()?;
                self.set(&values)?;
            }
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3
            b')' => self.tuple(Vec::new())?,
            0x85..=0x87 => {
                let values = self.pop_many(usize::from(code - 0x84))?;
                self.tuple(values)?;
            }
            // EMPTY_DICT, SETITEM
            b'}' => self.table(),
            b's' => {
                let values = self.pop_many(2)?;
                self.set(&values)?;
            }
            // EMPTY_LIST, APPEND, APPENDS
            b']' => {
                self.stack.push(Value::List(self.lists.len()));
                self.lists.push(Vec::new());
            }
            b'a' => {
                let values = self.pop_many(1)?;
                self.append(values)?;
            }
            b'e' => {
                let values = self.pop_to_mark()?;
                self.append(values)?;
            }
            // BINPERSID, REDUCE
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            // BUILD: what a module's table of tensors notes beside them, versions of layers
            b'b' => {
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Table(_))) {
                    return Err("gives attributes to something that is no table".to_owned());
                }
            }
            other => return Err(format!("has the instruction {other:#04x}, which a table of tensors does not need")),
        }
        Ok(true)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.program.split_at_checked(length).ok_or("ends in the middle")?;
        self.program = rest;
        Ok(taken)
    }

    fn number(&mut self, length: usize) -> Result<u32, String> {
        Ok(self.take(length)?.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
    }

    fn integer(&mut self, length: usize, signed: bool) -> Result<(), String> {
        if length > 8 {
            return Err(format!("has an integer of {length} bytes"));
        }
        let bytes = self.take(length)?;
        let negative = signed && bytes.last().is_some_and(|byte| *byte >= 0x80);
        let start = if negative { -1 } else { 0 };
        self.stack.push(Value::Integer(bytes.iter().rev().fold(start, |sum: i64, byte| sum << 8 | i64::from(*byte))));
        Ok(())
    }

    fn line(&mut self) -> Result<Rc<str>, String> {
        let length = self.program.iter().position(|byte| *byte == b'\n').ok_or("ends in the middle")?;
        let line = self.take(length + 1)?;
        text(&line[..length])
    }

    fn put(&mut self, width: usize) -> Result<(), String> {
        let place = self.number(width)?;
        let value = self.stack.last().ok_or("remembers a value where there is none")?;
        self.memo.insert(place, value.clone());
        Ok(())
    }

    fn get(&mut self, width: usize) -> Result<(), String> {
        let place = self.number(width)?;
        let value = self.memo.get(&place).ok_or_else(|| format!("asks for value {place}, which it never kept"))?;
        self.stack.push(value.clone());
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| "takes a value where there is none".to_owned())
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Value>, String> {
        let start = self.stack.len().checked_sub(count).ok_or("takes a value where there is none")?;
        Ok(self.stack.split_off(start))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or("misses a mark")?;
        let values = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(values)
    }

    fn tuple(&mut self, values: Vec<Value>) -> Result<(), String> {
        let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
        if depth > MOST_DEPTH {
            return Err(format!("nests tuples more than {MOST_DEPTH} deep"));
        }
        self.stack.push(Value::Tuple(values.into(), depth));
        Ok(())
    }

    fn table(&mut self) {
        self.stack.push(Value::Table(self.tables.len()));
        self.tables.push(Vec::new());
    }

    fn set(&mut self, values: &[Value]) -> Result<(), String> {
        let Some(Value::Table(table)) = self.stack.last() else {
            return Err("puts values into something that is no table".to_owned());
        };
        let pairs = values.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return Err("puts a key without a value into a table".to_owned());
        }
        self.tables[*table].extend(pairs.map(|pair| (pair[0].clone(), pair[1].clone())));
        Ok(())
    }

    fn append(&mut self, values: Vec<Value>) -> Result<(), String> {
        let Some(Value::List(list)) = self.stack.last() else {
            return Err("appends a value to something that is no list".to_owned());
        };
        let list = &mut self.lists[*list];
        if list.len() + values.len() > MOST_IN_LIST {
            return Err(format!("has a list of more than {MOST_IN_LIST} values"));
        }
        list.extend(values);
        Ok(())
    }

    /// `("storage", element type, key, device, elements)`
    fn storage(&mut self) -> Result<(), String> {
        let Value::Tuple(values, _) = self.pop()? else {
            return Err("names a storage by something else than a tuple".to_owned());
        };
        let [Value::Text(_), Value::Global(kind), Value::Text(key), Value::Text(_), Value::Integer(_)] = &*values
        else {
            return Err("describes a storage in an unknown way".to_owned());
        };
        let kind = kind.strip_prefix("torch.").unwrap_or(kind).into();
        self.stack.push(Value::Storage { kind, key: Rc::clone(key) });
        Ok(())
    }

    /// A function with its arguments: the two that a table of tensors needs.
    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Global(name), Value::Tuple(arguments, _)) = (&function, &arguments) else {
            return Err("calls something that has no name".to_owned());
        };
        match (&**name, &**arguments) {
            ("collections.OrderedDict", []) => self.table(),
            ("torch._utils._rebuild_tensor_v2", arguments) => {
                let tensor = tensor(arguments).ok_or("describes a tensor in an unknown way")?;
                self.stack.push(Value::Tensor(Rc::new(tensor)));
            }
            (name, _) => {
                return Err(format!("calls `{name}`, which a table of tensors does not need; nothing of it was run"));
            }
        }
        Ok(())
    }
}

/// Storage, offset, shape, strides; what follows is about gradients.
fn tensor(arguments: &[Value]) -> Option<TensorInfo> {
    let [Value::Storage { kind, key }, Value::Integer(offset), shape, strides, ..] = arguments else {
        return None;
    };
    Some(TensorInfo {
        storage: kind.to_string(),
        key: key.to_string(),
        offset: u64::try_from(*offset).ok()?,
        shape: sizes(shape)?,
        strides: sizes(strides)?,
    })
}

fn sizes(value: &Value) -> Option<Vec<u64>> {
    let Value::Tuple(values, _) = value else { return None };
    let size = |value: &Value| if let Value::Integer(size) = value { u64::try_from(*size).ok() } else { None };
    values.iter().map(size).collect()
}

fn text(bytes: &[u8]) -> Result<Rc<str>, String> {
    std::str::from_utf8(bytes).map(Rc::from).map_err(|_| "has a text that is no UTF-8".to_owned())
}
