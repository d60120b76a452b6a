//! Finds the records of a file, whatever its name ends in: JSON Lines, JSON lists, or JSON objects around a list, each of
//! them as it is or compressed with gzip or zstd; and Parquet, whose rows are records.
//!
//! Files that were joined hold several of these in a row. All of them are read; whatever else follows one is an error.
//!
//! Lists are cut at their commas without being parsed as a whole, so that a broken element is one broken record with a
//! line number, and a large file needs no memory of its own.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use super::content::Content;
use super::{compressed, parquet};
use crate::error::{Error, Result};

/// One record: where it lies and on which line it starts, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Bytes of [`SourceFile::bytes`].
    pub range: Range<usize>,
    /// First line, of what was compressed; the row of a Parquet file.
    pub line: usize,
}

/// An open input file, cut into records.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    bytes: Content,
    records: Vec<Record>,
}

impl SourceFile {
    /// Opens a file and finds its records. Records themselves are not looked into.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = compressed::unpack(path, Content::read(path)?)?;
        if parquet::is_parquet(&bytes) {
            let (bytes, lengths) = parquet::rows(path, bytes)?;
            return Ok(Self { path: path.to_path_buf(), bytes, records: rows(&lengths) });
        }
        refuse_other_formats(path, &bytes)?;
        let records = find_records(&bytes).map_err(|(line, problem)| Error::BadLine {
            path: path.to_path_buf(),
            line,
            problem: format!("{problem}; one broken line costs one record in JSON Lines, here it costs the file"),
        })?;
        Ok(Self { path: path.to_path_buf(), bytes, records })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole content, unpacked; rows of Parquet as lines of JSON.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All records in the order of the file.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The bytes of one record.
    pub fn record(&self, record: &Record) -> &[u8] {
        &self.bytes[record.range.clone()]
    }
}

/// Rows that stand one on a line.
fn rows(lengths: &[usize]) -> Vec<Record> {
    let mut at = 0;
    let row = |(line, &length): (usize, &usize)| {
        let range = at..at + length;
        at = range.end + 1;
        Record { range, line }
    };
    (1..).zip(lengths).map(row).collect()
}

fn refuse_other_formats(path: &Path, bytes: &[u8]) -> Result<()> {
    const SIGNATURES: &[(&[u8], &str, &str)] = &[
        (b"\x1f\x8b", "is compressed with gzip more than once", "unpack it with gunzip"),
        (b"\x28\xb5\x2f\xfd", "is compressed with zstd more than once", "unpack it with unzstd"),
        (b"BZh", "is compressed with bzip2", "unpack it with bunzip2"),
        (b"\xfd7zXZ\0", "is compressed with xz", "unpack it with unxz"),
        (b"\x04\x22\x4d\x18", "is compressed with lz4", "unpack it with unlz4"),
        (b"PK\x03\x04", "is a zip archive", "unpack it with unzip, and name its files"),
        (b"ARROW1", "is an Arrow file", "write it as Parquet or JSON Lines"),
        (b"\xff\xfe", "is UTF-16", "convert it to UTF-8"),
        (b"\xfe\xff", "is UTF-16", "convert it to UTF-8"),
    ];
    match SIGNATURES.iter().find(|(signature, _, _)| bytes.starts_with(signature)) {
        Some((_, problem, hint)) => Err(Error::bad_file(path, *problem).with_hint(*hint)),
        None => Ok(()),
    }
}

/// A problem and the line it was found on.
type Located = (usize, String);

fn find_records(bytes: &[u8]) -> Result<Vec<Record>, Located> {
    let start = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let Some(first) = bytes[start..].iter().position(|byte| !byte.is_ascii_whitespace()).map(|at| start + at) else {
        return Ok(Vec::new());
    };
    if !matches!(bytes[first], b'[' | b'{') {
        return lines(bytes, start);
    }
    let line_end = bytes[first..].iter().position(|&byte| is_line_end(byte)).map_or(bytes.len(), |at| first + at);
    let more_follows = bytes[line_end..].iter().any(|byte| !byte.is_ascii_whitespace());
    let line = 1 + line_ends(&bytes[..first]);
    if more_follows && is_one_value(&bytes[first..line_end]) {
        let lines = lines(bytes, start)?;
        // A line of nothing but a bracket is part of a value over many lines, or broken.
        let bracket = |record: &Record| matches!(bytes[record.range.clone()].trim_ascii(), b"[" | b"{" | b"]" | b"}");
        return match lines.iter().any(bracket).then(|| values(bytes, first, line)) {
            Some(Ok(values)) => Ok(values),
            _ => Ok(lines),
        };
    }
    if bytes[first] == b'[' {
        return values(bytes, first, line);
    }
    // An object over many lines, or several on one, are values; otherwise the first line is merely a broken line.
    match Parts::split(bytes, first, line) {
        Ok(object) if is_one_value(&bytes[first..object.end]) => values(bytes, first, line),
        _ => lines(bytes, start),
    }
}

fn is_one_value(bytes: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(bytes).is_ok()
}

/// Lines end with a line feed, a carriage return, or both. Neither stands inside a value of JSON Lines.
fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// Number of line ends; a carriage return and a line feed together are one.
fn line_ends(bytes: &[u8]) -> usize {
    let ends = |(at, &byte): (usize, &u8)| byte == b'\n' || (byte == b'\r' && bytes.get(at + 1) != Some(&b'\n'));
    bytes.iter().enumerate().filter(|&one| ends(one)).count()
}

/// Values that follow each other with nothing but white space between them, up to the end of the file.
fn values(bytes: &[u8], first: usize, line: usize) -> Result<Vec<Record>, Located> {
    let mut records = Vec::new();
    let (mut at, mut line) = (first, line);
    loop {
        let end = match bytes[at] {
            b'[' => list_records(bytes, at, line, &mut records)?,
            b'{' => object_records(bytes, at, line, &mut records)?,
            _ => {
                let found: String = String::from_utf8_lossy(&bytes[at..bytes.len().min(at + 40)]).into_owned();
                let found = found.split(['\n', '\r']).next().unwrap_or_default();
                return Err((line, format!("expected another list or object, or the end of the file, got `{found}`")));
            }
        };
        let Some(next) = bytes[end..].iter().position(|byte| !byte.is_ascii_whitespace()) else {
            return Ok(records);
        };
        line += line_ends(&bytes[at..end + next]);
        at = end + next;
    }
}

fn lines(bytes: &[u8], start: usize) -> Result<Vec<Record>, Located> {
    let mut records = Vec::new();
    let (mut at, mut number) = (start, 1);
    while at < bytes.len() {
        let end = bytes[at..].iter().position(|&byte| is_line_end(byte)).map_or(bytes.len(), |length| at + length);
        if bytes[at..end].iter().any(|byte| !byte.is_ascii_whitespace()) {
            line_records(bytes, at..end, number, &mut records);
        }
        at = end + if bytes[end..].starts_with(b"\r\n") { 2 } else { 1 };
        number += 1;
    }
    Ok(records)
}

/// The records of one line: itself, or the values that stand on it.
fn line_records(bytes: &[u8], range: Range<usize>, line: usize, records: &mut Vec<Record>) {
    let text = &bytes[range.clone()];
    // Whoever joins files loses line ends. Text may hold the same signs, so this is only a reason to look.
    let glued = text.iter().enumerate().any(|(at, byte)| {
        let next = || text[at + 1..].iter().find(|byte| !byte.is_ascii_whitespace());
        matches!(byte, b'}' | b']') && matches!(next(), Some(b'{' | b'['))
    });
    let list = text.trim_ascii_start().starts_with(b"[");
    if glued || list {
        let first = range.start + text.len() - text.trim_ascii_start().len();
        let found = matches!(bytes[first], b'[' | b'{').then(|| values(&bytes[..range.end], first, line));
        if let Some(Ok(found)) = found
            && found.iter().all(|value| is_one_value(&bytes[value.range.clone()]))
        {
            records.extend(found);
            return;
        }
    }
    records.push(Record { range, line });
}

/// Adds the records of a list, and says where it ends. A list of messages is itself one record.
fn list_records(bytes: &[u8], open: usize, line: usize, records: &mut Vec<Record>) -> Result<usize, Located> {
    let Parts { parts, end } = Parts::split(bytes, open, line)?;
    match parts.first() {
        Some(first) if is_message(&bytes[first.range.clone()]) => records.push(Record { range: open..end, line }),
        _ => records.extend(parts),
    }
    Ok(end)
}

/// Adds the records of an object, and says where it ends: itself, or the list of objects it is wrapped around.
fn object_records(bytes: &[u8], open: usize, line: usize, records: &mut Vec<Record>) -> Result<usize, Located> {
    let members = Parts::split(bytes, open, line)?;
    let mut lists = Vec::new();
    let mut is_record = false;
    for member in &members.parts {
        let text = &bytes[member.range.clone()];
        let mut keys = serde_json::Deserializer::from_slice(text).into_iter::<String>();
        let Some(Ok(key)) = keys.next() else {
            // Broken, which whoever reads the record will say.
            is_record = true;
            break;
        };
        let after_key = keys.byte_offset();
        let value = text[after_key..].iter().position(|&byte| byte != b':' && !byte.is_ascii_whitespace());
        let Some(value) = value.map(|at| after_key + at) else { continue };
        is_record |= matches!(key.as_str(), "text" | "prompt" | "turns") || holds_messages(&text[value..]);
        if text[value] != b'[' || key == "tools" {
            continue;
        }
        let value_line = member.line + line_ends(&text[..value]);
        let list = Parts::split(bytes, member.range.start + value, value_line)?;
        let behind = &bytes[list.end..member.range.end.max(list.end)];
        if behind.iter().any(|byte| !byte.is_ascii_whitespace()) {
            return Err((value_line, format!("something stands behind the list of `{key}`, expected a comma")));
        }
        let first = list.parts.first().map(|part| &bytes[part.range.clone()]);
        if first.is_some_and(|element| element.starts_with(b"{") && !is_message(element)) {
            lists.push((key, list.parts));
        }
    }
    match lists.len() {
        _ if is_record => records.push(Record { range: open..members.end, line }),
        0 => records.push(Record { range: open..members.end, line }),
        1 => records.extend(lists.remove(0).1),
        _ => {
            let names: Vec<String> = lists.into_iter().map(|(key, _)| format!("`{key}`")).collect();
            return Err((line, format!("the object holds several lists of records ({}); keep one", names.join(", "))));
        }
    }
    Ok(members.end)
}

/// Whether a value begins with a list whose first element is a message.
fn holds_messages(value: &[u8]) -> bool {
    if value.first() != Some(&b'[') {
        return false;
    }
    Parts::split(value, 0, 1)
        .is_ok_and(|list| list.parts.first().is_some_and(|part| is_message(&value[part.range.clone()])))
}

fn is_message(element: &[u8]) -> bool {
    let object: Result<serde_json::Map<String, serde_json::Value>, _> = serde_json::from_slice(element);
    object.is_ok_and(|object| object.contains_key("role") || object.contains_key("from"))
}

/// What stands between the brackets of a list or an object, cut at its commas.
struct Parts {
    parts: Vec<Record>,
    /// One past the closing bracket.
    end: usize,
}

impl Parts {
    fn split(bytes: &[u8], open: usize, first_line: usize) -> Result<Self, Located> {
        let mut parts = Vec::new();
        let (mut line, mut depth, mut in_string, mut escaped) = (first_line, 1usize, false, false);
        let mut current: Option<Record> = None;
        for (at, &byte) in bytes.iter().enumerate().skip(open + 1) {
            if byte == b'\n' || (byte == b'\r' && bytes.get(at + 1) != Some(&b'\n')) {
                line += 1;
            }
            if in_string {
                if escaped {
                    escaped = false;
                } else if byte == b'\\' {
                    escaped = true;
                } else if byte == b'"' {
                    in_string = false;
                }
            } else if byte.is_ascii_whitespace() {
                continue;
            } else if depth == 1 && byte == b',' {
                parts.extend(current.take());
                continue;
            } else {
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    parts.extend(current.take());
                    return Self::closed(bytes, open, parts, at + 1, line);
                }
            }
            current.get_or_insert(Record { range: at..at, line }).range.end = at + 1;
        }
        let opened = current.map_or(first_line, |part| part.line);
        Err((opened, "the file ends before what starts here is closed".to_owned()))
    }

    fn closed(bytes: &[u8], open: usize, parts: Vec<Record>, end: usize, line: usize) -> Result<Self, Located> {
        let expected = if bytes[open] == b'[' { b']' } else { b'}' };
        if bytes[end - 1] != expected {
            let (want, got) = (char::from(expected), char::from(bytes[end - 1]));
            return Err((line, format!("expected `{want}` to close what was opened, got `{got}`")));
        }
        Ok(Self { parts, end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(content: &str) -> Vec<(usize, &str)> {
        let records = find_records(content.as_bytes()).unwrap();
        records.into_iter().map(|record| (record.line, content[record.range].trim())).collect()
    }

    #[test]
    fn json_lines_with_mark_blank_lines_and_carriage_returns() {
        let content = "\u{feff}{\"a\":1}\r\n\r\n  \n{\"a\":2}\r\nnot json\n{\"a\":3}";
        assert_eq!(texts(content), [(1, "{\"a\":1}"), (4, "{\"a\":2}"), (5, "not json"), (6, "{\"a\":3}")]);
        assert!(texts("").is_empty());
        assert!(texts("\u{feff} \n\n").is_empty());
    }

    #[test]
    fn a_broken_first_line_is_one_broken_line() {
        assert_eq!(texts("{\"a\": \n{\"a\":2}\n"), [(1, "{\"a\":"), (2, "{\"a\":2}")]);
    }

    #[test]
    fn lists_are_cut_at_their_commas() {
        let content = "\n[ {\"a\": \"],[\\\"\"},\n  {\"b\": [1, {\"c\": 2}]} , oops\n]\n";
        let want = [(2, "{\"a\": \"],[\\\"\"}"), (3, "{\"b\": [1, {\"c\": 2}]}"), (3, "oops")];
        assert_eq!(texts(content), want);
        assert!(texts("[]").is_empty());
        assert_eq!(texts("[{\"a\":1},{\"a\":2}]").len(), 2);
    }

    #[test]
    fn an_object_is_itself_or_the_list_it_wraps() {
        let wrapped = "{\n \"version\": 1,\n \"data\": [\n  {\"messages\": []},\n  {\"messages\": []}\n ]\n}";
        assert_eq!(texts(wrapped), [(4, "{\"messages\": []}"), (5, "{\"messages\": []}")]);
        let single = "{\n \"conversations\": [\n {\"from\": \"human\", \"value\": \"x\"}]\n}\n";
        assert_eq!(texts(single), [(1, single.trim())]);
        assert_eq!(texts("{\"text\": \"x\"}"), [(1, "{\"text\": \"x\"}")]);
        let (_, problem) = find_records(b"{\"a\": [{}], \"b\": [{}]}").unwrap_err();
        assert!(problem.contains("`a`, `b`"), "{problem}");
    }

    #[test]
    fn everything_behind_the_first_value_is_read() {
        let records: Vec<String> =
            (0..6).map(|n| format!("{{\"id\": {n}, \"messages\": [{{\"role\": \"user\"}}]}}")).collect();
        let list = |part: &[String], glue: &str| format!("[{}]", part.join(glue));
        let (one, two) = (list(&records[..3], ",\n "), list(&records[3..], ",\n "));
        let wrapped = |part: &str| format!("{{\"version\": 1, \"data\": {part}}}");
        let pretty = |glue: &str| records.iter().map(|one| one.replace(", ", ",\n ")).collect::<Vec<_>>().join(glue);
        for joined in [
            format!("{one}\n{two}\n"),
            format!("{one}{two}"),
            format!("{}{}", list(&records[..3], ","), list(&records[3..], ",")),
            format!("{}\n{}\n", list(&records[..3], ","), list(&records[3..], ",")),
            records.concat(),
            records.join(" "),
            format!("{}\n{}\n", records[..3].concat(), records[3..].join("\n")),
            format!("{}\n{}\n", records[..3].join("\n"), records[3..].concat()),
            records.join("\r"),
            records.join("\r\n"),
            format!("{one}\n{}", records[3..].join("\n")),
            format!("{}\n{}\n", records[..3].join("\n"), list(&records[3..], ", ")),
            format!("{}\n[\n{}\n]", list(&records[..3], ","), records[3..].join(",\n")),
            format!("{}\n[\n{}\n]\n{}\n", records[0], records[1..5].join(",\n"), records[5]),
            format!("{}\n{{\n\"data\": {two}\n}}", records[..3].join("\n")),
            format!("{}{}", wrapped(&one), wrapped(&two)),
            format!("{}\n{}", wrapped(&one), wrapped(&two)),
            format!("{}{one}", list(&records[3..], ",")),
            pretty(""),
            pretty("\n"),
        ] {
            let found = texts(&joined);
            assert_eq!(found.len(), 6, "{joined}\n{found:?}");
            assert!(found.iter().all(|(_, text)| is_one_value(text.as_bytes())), "{joined}");
        }
        assert_eq!(texts(&records.join("\r")).iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(texts(&format!("{one}\r\n{two}")).iter().map(|(line, _)| *line).next_back(), Some(6));
    }

    #[test]
    fn what_follows_and_is_no_value_is_refused_with_its_line() {
        for (content, line, word) in [
            ("[{\"a\": 1},\n {\"a\": 2}]\n<html>504 Gateway</html>\n", 3, "got `<html>504 Gateway</html>`"),
            ("[{\"a\": 1}],\n[{\"a\": 2}]", 1, "got `,`"),
            ("{\n\"a\": 1}\n42", 3, "got `42`"),
            ("[]{\n\"data\": [{\"a\": 1}] oops\n}", 2, "behind the list of `data`"),
            ("[{\"a\": 1},\n{\"a\": 2}]\n[{\"a\":", 3, "the file ends"),
        ] {
            let (at, problem) = find_records(content.as_bytes()).unwrap_err();
            assert!(at == line && problem.contains(word), "{content}: {at} {problem}");
        }
        // In JSON Lines a bad line is one bad record, whatever stands on it.
        assert_eq!(texts("{\"a\":1}\n<html>\n{\"a\":2}{\"b\":\n")[1..], [(2, "<html>"), (3, "{\"a\":2}{\"b\":")]);
        assert_eq!(texts("{\"a\":1}\n{\n{\"a\":2}\n").len(), 3);
        // Brackets in text do not cut it.
        assert_eq!(texts("{\"text\":\"}{\"}\n{\"text\":\"] [\"}\n").len(), 2);
    }

    #[test]
    fn a_record_with_a_list_of_objects_beside_its_messages_is_one_record() {
        let content = "{\n \"notes\": [{\"by\": \"me\"}],\n \"messages\": [{\"role\": \"user\"}]}\n";
        assert_eq!(texts(content), [(1, content.trim())]);
    }

    #[test]
    fn a_list_of_messages_is_one_record() {
        assert_eq!(texts("[{\"role\":\"user\",\"content\":\"x\"}]").len(), 1);
        assert_eq!(texts("[{\"role\":\"user\"}]\n[{\"role\":\"user\"}]\n").len(), 2);
    }

    #[test]
    fn a_list_that_is_never_closed_is_refused_with_its_line() {
        assert_eq!(find_records(b"[{\"a\":1},\n{\"a\":").unwrap_err().0, 2);
        assert_eq!(find_records(b"[{\"a\":\"x},\n{\"a\":2}]").unwrap_err().0, 1);
        assert!(find_records(b"[1}").unwrap_err().1.contains("expected `]`"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.json");
        std::fs::write(&path, "[{\"a\":1},\n{\"a\":").unwrap();
        let message = SourceFile::open(&path).unwrap_err().to_string();
        assert!(message.contains("cut.json:2: the file ends"), "{message}");
    }

    #[test]
    fn other_formats_and_missing_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        assert!(SourceFile::open(&path).unwrap_err().to_string().contains("cannot open"));
        std::fs::write(&path, b"BZh91AY").unwrap();
        assert!(SourceFile::open(&path).unwrap_err().hint().unwrap().contains("bunzip2"));
        assert!(SourceFile::open(folder.path()).unwrap_err().to_string().contains("is a folder"));
    }
}
