//! Marks of trained tokens from a Hugging Face data set, as speculators keeps them beside its states: columns `input_ids` and
//! `loss_mask`, lists of whole numbers, in Arrow's streaming format (`data-00000-of-00001.arrow`; format: Apache Arrow,
//! `format/Message.fbs` and `format/Schema.fbs`).
//!
//! Of that format as much is read as these two columns need: schemas and record batches, not compressed, without
//! dictionaries. Columns of other types are stepped over. Every offset comes from a file and is compared with its length.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::Error;

/// Before each message; older writers leave it out.
const CONTINUATION: u32 = 0xFFFF_FFFF;
/// Deepest type in a type.
const MOST_DEPTH: usize = 16;

/// One row: token ids, and whether each is trained.
pub(super) type Row = (Vec<i64>, Vec<bool>);

/// Whether a file's name says that it is a part of a data set.
pub(super) fn is_named_so(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "arrow")
}

/// All rows of a file; nothing where it has no such columns. A problem is given in words.
pub(super) fn rows(path: &Path) -> Result<Vec<Row>, String> {
    let file = File::open(path).map_err(|error| Error::io("open", path)(error).to_string())?;
    // SAFETY: data sets are read-only inputs; replacing one under a running program is not supported.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io("map", path)(error).to_string())?;
    read(&map).ok_or_else(|| "is no whole file in Arrow's streaming format".to_owned())?
}

/// `None` where the file contradicts itself.
fn read(bytes: &[u8]) -> Option<Result<Vec<Row>, String>> {
    let mut columns: Option<[Column; 2]> = None;
    let mut rows = Vec::new();
    let mut rest = bytes;
    while let Some(mut length) = take_u32(&mut rest) {
        if length == CONTINUATION {
            length = take_u32(&mut rest)?;
        }
        if length == 0 {
            break;
        }
        let (head, behind) = rest.split_at_checked(length as usize)?;
        let message = Table::root(head)?;
        let body_length = usize::try_from(message.i64(3).unwrap_or(0)).ok()?;
        // Bodies begin at multiples of eight, and so do metadata, which are padded to that.
        let (body, behind) = behind.split_at_checked(body_length)?;
        rest = behind;
        let header = message.table(2);
        match (message.u8(1)?, header) {
            (1, Some(schema)) => match find_columns(&schema)? {
                Ok(found) => columns = found,
                Err(problem) => return Some(Err(problem)),
            },
            (3, Some(batch)) => {
                let Some(columns) = &columns else { return Some(Ok(Vec::new())) };
                if batch.table(3).is_some() {
                    return Some(Err("is compressed, which is not supported; save it without".to_owned()));
                }
                let [ids, marks] = columns;
                let (ids, marks) = (ids.lists(&batch, body)?, marks.lists(&batch, body)?);
                if ids.len() != marks.len() {
                    return None;
                }
                rows.extend(
                    ids.into_iter().zip(marks).map(|(ids, marks)| (ids, marks.iter().map(|&mark| mark != 0).collect())),
                );
            }
            _ => return Some(Err("holds dictionaries, which are not supported".to_owned())),
        }
    }
    Some(Ok(rows))
}

/// A list of whole numbers: where it stands among the buffers of a batch.
struct Column {
    /// Number of its first buffer: validity and offsets of the lists, then validity and values of the numbers.
    buffer: usize,
    wide_offsets: bool,
    values: Values,
}

#[derive(Clone, Copy)]
enum Values {
    Bits,
    Integers(usize),
}

/// `input_ids` and `loss_mask` of a schema, if it has both.
fn find_columns(schema: &Table<'_>) -> Option<Result<Option<[Column; 2]>, String>> {
    let mut buffer = 0;
    let (mut ids, mut marks) = (None, None);
    for field in schema.tables(1)? {
        let name = field.string(0).unwrap_or_default();
        match name {
            "input_ids" => ids = Column::read(&field, buffer),
            "loss_mask" => marks = Column::read(&field, buffer),
            _ => {}
        }
        match buffers_of(&field, 0)? {
            Ok(count) => buffer += count,
            Err(problem) => return Some(Err(format!("column `{}`: {problem}", crate::error::foreign::name(name)))),
        }
    }
    Some(Ok(ids.zip(marks).map(|(ids, marks)| [ids, marks])))
}

/// Number of buffers of a field with all that is in it.
fn buffers_of(field: &Table<'_>, depth: usize) -> Option<Result<usize, String>> {
    if depth > MOST_DEPTH {
        return None;
    }
    let own = match field.u8(2)? {
        1 => 0,
        // Numbers, truth values, decimals, dates, times, fixed bytes, durations.
        2 | 3 | 6..=11 | 15 | 18 => 2,
        // Bytes and text.
        4 | 5 | 19 | 20 => 3,
        // Lists and maps, structures, lists of one length.
        12 | 17 | 21 => 2,
        13 | 16 => 1,
        other => return Some(Err(format!("type {other} is not known"))),
    };
    let mut all = own;
    for child in field.tables(5).into_iter().flatten() {
        match buffers_of(&child, depth + 1)? {
            Ok(count) => all += count,
            problem => return Some(problem),
        }
    }
    Some(Ok(all))
}

impl Column {
    fn read(field: &Table<'_>, buffer: usize) -> Option<Self> {
        let wide_offsets = match field.u8(2)? {
            12 => false,
            21 => true,
            _ => return None,
        };
        let child = field.tables(5)?.next()?;
        let values = match child.u8(2)? {
            6 => Values::Bits,
            2 => Values::Integers(
                usize::try_from(child.table(3)?.i32(0)?).ok().filter(|bits| [8, 16, 32, 64].contains(bits))? / 8,
            ),
            _ => return None,
        };
        Some(Self { buffer, wide_offsets, values })
    }

    /// The lists of a batch.
    fn lists(&self, batch: &Table<'_>, body: &[u8]) -> Option<Vec<Vec<i64>>> {
        let buffers = batch.structs(2, 16)?;
        let buffer = |place: usize| {
            let bytes = buffers.get(16 * place..16 * place + 16)?;
            let (start, length) = (read_i64(&bytes[..8])?, read_i64(&bytes[8..])?);
            let start = usize::try_from(start).ok()?;
            body.get(start..start.checked_add(usize::try_from(length).ok()?)?)
        };
        let (offsets, values) = (buffer(self.buffer + 1)?, buffer(self.buffer + 3)?);
        let offsets: Vec<usize> = match self.wide_offsets {
            true => {
                offsets.chunks_exact(8).map(|bytes| usize::try_from(read_i64(bytes)?).ok()).collect::<Option<_>>()?
            }
            false => {
                offsets.chunks_exact(4).map(|bytes| usize::try_from(read_i32(bytes)?).ok()).collect::<Option<_>>()?
            }
        };
        let count = usize::try_from(batch.i64(0)?).ok()?;
        let offsets = offsets.get(..count.checked_add(1)?).unwrap_or_default();
        let list = |pair: &[usize]| match self.values {
            Values::Integers(width) => {
                let bytes = values.get(pair[0].checked_mul(width)?..pair[1].checked_mul(width)?)?;
                Some(bytes.chunks_exact(width).map(integer).collect())
            }
            Values::Bits => {
                let bit = |place: usize| Some(i64::from(values.get(place / 8)? >> (place % 8) & 1));
                // Bounds first: a length that cannot be must not be counted through.
                values.get(..pair[1].div_ceil(8))?;
                (pair[0]..pair[1]).map(bit).collect()
            }
        };
        offsets.windows(2).map(list).collect()
    }
}

/// A little-endian number with its sign.
fn integer(bytes: &[u8]) -> i64 {
    let start = if bytes.last().is_some_and(|byte| *byte >= 0x80) { -1 } else { 0 };
    bytes.iter().rev().fold(start, |sum: i64, byte| sum << 8 | i64::from(*byte))
}

fn read_i32(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_le_bytes(*bytes.first_chunk()?))
}

fn read_i64(bytes: &[u8]) -> Option<i64> {
    Some(i64::from_le_bytes(*bytes.first_chunk()?))
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (first, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(u32::from_le_bytes(*first))
}

/// A table of a flat buffer: fields are found by their number, and may be absent.
#[derive(Clone, Copy)]
struct Table<'a> {
    bytes: &'a [u8],
    start: usize,
}

impl<'a> Table<'a> {
    fn root(bytes: &'a [u8]) -> Option<Self> {
        Some(Self { bytes, start: usize::try_from(read_i32(bytes)?).ok()? })
    }

    /// Where a field lies.
    fn field(&self, number: usize) -> Option<usize> {
        let back = read_i32(self.bytes.get(self.start..)?)?;
        let table = usize::try_from(i64::try_from(self.start).ok()? - i64::from(back)).ok()?;
        let size = |place: usize| Some(usize::from(u16::from_le_bytes(*self.bytes.get(place..)?.first_chunk()?)));
        let entry = 4 + 2 * number;
        if entry + 2 > size(table)? {
            return None;
        }
        let offset = size(table + entry)?;
        (offset != 0).then(|| self.start + offset)
    }

    fn at(&self, number: usize) -> Option<&'a [u8]> {
        self.bytes.get(self.field(number)?..)
    }

    fn u8(&self, number: usize) -> Option<u8> {
        // Left out where it is nothing.
        match self.field(number) {
            Some(place) => self.bytes.get(place).copied(),
            None => Some(0),
        }
    }

    fn i32(&self, number: usize) -> Option<i32> {
        read_i32(self.at(number)?)
    }

    fn i64(&self, number: usize) -> Option<i64> {
        read_i64(self.at(number)?)
    }

    /// Where something lies that a field points to.
    fn pointed(&self, place: usize) -> Option<usize> {
        place.checked_add(usize::try_from(read_i32(self.bytes.get(place..)?)?).ok()?)
    }

    fn table(&self, number: usize) -> Option<Self> {
        Some(Self { bytes: self.bytes, start: self.pointed(self.field(number)?)? })
    }

    /// Length and place of the elements of a list.
    fn list(&self, number: usize) -> Option<(usize, usize)> {
        let place = self.pointed(self.field(number)?)?;
        let length = usize::try_from(read_i32(self.bytes.get(place..)?)?).ok()?;
        Some((length, place + 4))
    }

    fn string(&self, number: usize) -> Option<&'a str> {
        let (length, start) = self.list(number)?;
        std::str::from_utf8(self.bytes.get(start..start.checked_add(length)?)?).ok()
    }

    /// Elements of so many bytes each, one after the other.
    fn structs(&self, number: usize, width: usize) -> Option<&'a [u8]> {
        let (length, start) = self.list(number)?;
        self.bytes.get(start..start.checked_add(length.checked_mul(width)?)?)
    }

    /// Tables of a list.
    fn tables(&self, number: usize) -> Option<impl Iterator<Item = Table<'a>> + use<'a>> {
        let (length, start) = self.list(number)?;
        let places = self.bytes.get(start..start.checked_add(length.checked_mul(4)?)?)?;
        let whole = *self;
        let table = move |index: usize| {
            let start = whole.pointed(start + 4 * index)?;
            Some(Table { bytes: whole.bytes, start })
        };
        Some((0..places.len() / 4).map_while(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written as Hugging Face datasets does: see tests/data/states/README.md.
    fn fixture() -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/states/marks.arrow");
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_data_set_gives_its_marks_and_a_damaged_one_never_panics() {
        let whole = fixture();
        let rows = read(&whole).unwrap().unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0], (vec![1, 5, 6, 7, 2], vec![false, false, true, true, true]));
        assert_eq!(rows[1].0, [1, 49_000, 2]);
        assert_eq!(rows[2], (vec![9], vec![false]));
        for length in 0..whole.len() {
            let _ = read(&whole[..length]);
        }
        for place in 0..whole.len() {
            for bit in [0, 3, 7] {
                let mut damaged = whole.clone();
                damaged[place] ^= 1 << bit;
                let _ = read(&damaged);
            }
        }
    }
}
