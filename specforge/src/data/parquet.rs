//! Parquet files: every row becomes the JSON object that it would be as a line of JSON Lines.
//!
//! Structs are objects, lists are lists, maps with text as keys are objects, dates and times are text (`2024-05-01`,
//! `2024-05-01 10:00:00.000000 +00:00`). What JSON cannot say is refused by the name of its column, before anything is read.

use std::io::Write;
use std::path::Path;

use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::ColumnDescriptor;
use serde_json::{Map, Value};

use super::content::{Content, Unpacked};
use crate::error::{Error, Result, foreign};

/// How a file begins, and how one begins that nobody can read without its key.
const MAGIC: &[u8] = b"PAR1";
const ENCRYPTED: &[u8] = b"PARE";

/// Whether this is a Parquet file.
pub(super) fn is_parquet(content: &[u8]) -> bool {
    content.starts_with(MAGIC) || content.starts_with(ENCRYPTED)
}

/// The rows of a file as JSON Lines, and how long each line is.
pub(super) fn rows(path: &Path, content: Content) -> Result<(Content, Vec<usize>)> {
    let damaged = |problem: String| {
        let error = Error::bad_file(path, format!("is no whole Parquet file: {problem}"));
        error.with_hint("fetch or make the file again; encrypted files cannot be read")
    };
    let reader = foreign::answer(|| SerializedFileReader::new(Bytes::from_owner(content))).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let refused: Vec<String> = schema.columns().iter().filter_map(|column| refuse(column)).collect();
    if let Some(first) = refused.first() {
        let more = if refused.len() > 1 { format!("; {} more such columns", refused.len() - 1) } else { String::new() };
        return Err(Error::bad_file(path, format!("{first}{more}"))
            .with_hint("leave the column out when the file is written, or write it as another type"));
    }
    let mut unpacked = Unpacked::new();
    let mut lengths = Vec::new();
    let mut rows = foreign::answer(|| reader.get_row_iter(None)).map_err(damaged)?;
    loop {
        let number = lengths.len() + 1;
        let in_row = |problem: String| damaged(format!("row {number}: {problem}"));
        let Some(row) = foreign::answer(|| rows.next().transpose()).map_err(in_row)? else { break };
        let object = foreign::answer(|| object(row.get_column_iter())).map_err(|problem| Error::BadLine {
            path: path.to_path_buf(),
            line: number,
            problem,
        })?;
        let before = unpacked.length();
        let written = serde_json::to_writer(&mut unpacked, &Value::Object(object)).map_err(std::io::Error::from);
        written.map_err(Error::io("unpack", path))?;
        lengths.push(unpacked.length() - before);
        unpacked.write_all(b"\n").map_err(Error::io("unpack", path))?;
    }
    let expected = reader.metadata().file_metadata().num_rows();
    if lengths.len() as i64 != expected {
        return Err(damaged(format!("expected {expected} rows, got {}", lengths.len())));
    }
    Ok((unpacked.finish(path)?, lengths))
}

/// Why a column cannot be read, if it cannot.
fn refuse(column: &ColumnDescriptor) -> Option<String> {
    use ConvertedType as Converted;
    let what = match (column.physical_type(), column.converted_type(), column.logical_type_ref()) {
        (Type::INT64, Converted::NONE, Some(LogicalType::Timestamp(_))) => "timestamps in nanoseconds",
        (Type::INT64, Converted::NONE, Some(LogicalType::Time(_))) => "times in nanoseconds",
        (_, Converted::DECIMAL, _) => "decimal numbers",
        (_, Converted::INTERVAL, _) => "intervals",
        (Type::BYTE_ARRAY, Converted::UTF8 | Converted::ENUM | Converted::JSON, _) => return None,
        (Type::FIXED_LEN_BYTE_ARRAY, _, Some(LogicalType::Float16)) => return None,
        (Type::BYTE_ARRAY | Type::FIXED_LEN_BYTE_ARRAY, _, _) => "bytes that are not marked as text",
        _ => return None,
    };
    Some(format!("column `{}` holds {what}, which JSON has no value for", foreign::name(&column.path().string())))
}

fn object<'a>(columns: impl Iterator<Item = (&'a String, &'a Field)>) -> Result<Map<String, Value>, String> {
    columns
        .map(|(name, field)| Ok((name.clone(), value(field).map_err(|problem| format!("`{name}`: {problem}"))?)))
        .collect()
}

fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => Value::from(value.to_f32()),
        Field::Float(value) => Value::from(*value),
        Field::Double(value) => Value::from(*value),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => Value::from(field.to_string()),
        Field::Group(row) => Value::Object(object(row.get_column_iter())?),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?),
        Field::MapInternal(map) => {
            let entry = |(key, held): &(Field, Field)| match key {
                Field::Str(key) => Ok((key.clone(), value(held)?)),
                other => Err(format!("the keys of a map are text, got {other}")),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_, _>>()?)
        }
        // Refused by their columns.
        Field::Decimal(_) | Field::Bytes(_) => return Err("has no value in JSON".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::reader::SourceFile;
    use super::*;

    /// What `make.py` there wrote with pyarrow.
    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/rows").join(name)
    }

    fn values(path: &Path) -> Vec<Value> {
        let source = SourceFile::open(path).unwrap();
        source.records().iter().map(|record| serde_json::from_slice(source.record(record)).unwrap()).collect()
    }

    /// Every compression, both kinds of pages, dictionaries and deltas, several row groups and pages.
    #[test]
    fn rows_are_what_python_reads() {
        let want = values(&fixture("rows.jsonl"));
        assert_eq!(want.len(), 10);
        for name in ["none", "snappy", "gzip", "zstd", "brotli", "lz4"] {
            let path = fixture(&format!("{name}.parquet"));
            let got = values(&path);
            assert_eq!(got.len(), want.len(), "{name}");
            for (row, (got, want)) in (1..).zip(got.iter().zip(&want)) {
                assert_eq!(got, want, "{name}, row {row}");
            }
            let lines: Vec<usize> = SourceFile::open(&path).unwrap().records().iter().map(|row| row.line).collect();
            assert_eq!(lines, (1..=10).collect::<Vec<_>>());
        }
        assert!(values(&fixture("empty.parquet")).is_empty());
    }

    #[test]
    fn what_json_cannot_say_is_refused_by_its_column() {
        for (name, words) in [
            ("bytes", "holds bytes that are not marked as text"),
            ("decimal", "holds decimal numbers"),
            ("nanoseconds", "holds timestamps in nanoseconds"),
        ] {
            let error = SourceFile::open(&fixture(&format!("{name}.parquet"))).unwrap_err();
            assert!(error.to_string().contains(&format!("column `extra.inner` {words}")), "{error}");
            assert!(error.hint().unwrap().contains("leave the column out"));
        }
    }

    /// Whatever was done to a file, it is read as it was or refused in words.
    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let whole = std::fs::read(fixture("snappy.parquet")).unwrap();
        for length in [4, 8, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = SourceFile::open(&path).unwrap_err().to_string();
            assert!(error.contains("is no whole Parquet file"), "{length}: {error}");
        }
        for at in (0..whole.len()).step_by(97) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, bytes).unwrap();
            if let Err(error) = SourceFile::open(&path) {
                assert!(error.exit_code() == 2, "{at}: {error}");
            }
        }
    }

    #[test]
    fn compression_and_names_do_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.txt");
        let rows = std::fs::read(fixture("rows.jsonl")).unwrap();
        std::fs::write(&path, zstd::encode_all(&*rows, 1).unwrap()).unwrap();
        assert_eq!(values(&path), values(&fixture("rows.jsonl")));
        let list = format!("[{}]", String::from_utf8(rows).unwrap().trim().replace('\n', ",\n"));
        std::fs::write(&path, zstd::encode_all(list.as_bytes(), 1).unwrap()).unwrap();
        let source = SourceFile::open(&path).unwrap();
        assert_eq!(source.records().last().unwrap().line, 10);
        assert_eq!(values(&path), values(&fixture("rows.jsonl")));
        std::fs::write(&path, zstd::encode_all(&*std::fs::read(fixture("none.parquet")).unwrap(), 1).unwrap()).unwrap();
        assert_eq!(values(&path), values(&fixture("rows.jsonl")));
    }
}
