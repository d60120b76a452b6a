//! TensorBoard event files with scalars.
//!
//! A file is a sequence of TFRecords, each a length, its checksum, an `Event` message and its checksum; the checksums
//! are masked CRC-32C. The few protocol buffer fields in use are encoded by hand (field numbers from TensorBoard's
//! `compat/proto/event.proto` and `summary.proto`):
//!
//! ```text
//! Event       1 wall_time double   2 step int64   3 file_version string   5 summary Summary   7 session_log SessionLog
//! Summary     1 value Value, repeated             Value  1 tag string   2 simple_value float
//! SessionLog  1 status enum, START = 1
//! ```

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;

const NAME_PREFIX: &str = "events.out.tfevents.";
const FILE_VERSION: &str = "brain.Event:2";
const SESSION_START: u64 = 1;

/// An event file, open for appending.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a new file in a folder. Readers drop what earlier files of the folder say about `first_step` and later.
    pub fn create(folder: &Path, first_step: u64, time: f64) -> Result<Self> {
        files::create_dir_all(folder)?;
        let (latest, others) = existing(folder)?;
        // Readers take the files in the order of their names, and two runs may start within a second.
        let seconds = latest.map_or(time as u64, |latest| latest.saturating_add(1).max(time as u64));
        let name = format!("{NAME_PREFIX}{seconds:010}.{}.{}.{others}", host_name(), std::process::id());
        let path = folder.join(name);
        let file = File::options().create_new(true).append(true).open(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, file };
        let mut version = Message::event(time, 0);
        version.bytes(3, FILE_VERSION.as_bytes());
        let mut records = record(&version.0);
        if others > 0 {
            let mut start = Message::default();
            start.integer(1, SESSION_START);
            let mut restart = Message::event(time, first_step);
            restart.bytes(7, &start.0);
            records.extend(record(&restart.0));
        }
        events.append(&records)?;
        Ok(events)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one event with all metrics of a step, in one write.
    pub fn log(&mut self, step: u64, time: f64, metrics: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (name, value) in metrics {
            let mut scalar = Message::default();
            scalar.bytes(1, name.as_bytes());
            scalar.float(2, *value as f32);
            summary.bytes(1, &scalar.0);
        }
        let mut event = Message::event(time, step);
        event.bytes(5, &summary.0);
        self.append(&record(&event.0))
    }

    /// Waits until the events are on disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

/// The latest time in the names of event files, and how many files there are.
fn existing(folder: &Path) -> Result<(Option<u64>, usize)> {
    let (mut latest, mut count) = (None, 0);
    for entry in std::fs::read_dir(folder).map_err(Error::io("read folder", folder))? {
        let name = entry.map_err(Error::io("read folder", folder))?.file_name();
        if let Some(rest) = name.to_string_lossy().strip_prefix(NAME_PREFIX) {
            let time = rest.split('.').next().and_then(|digits| digits.parse::<u64>().ok());
            latest = latest.max(time);
            count += 1;
        }
    }
    Ok((latest, count))
}

fn host_name() -> String {
    let name = match std::fs::read_to_string("/proc/sys/kernel/hostname") {
        Err(error) if error.kind() == ErrorKind::NotFound => std::env::var("HOSTNAME").unwrap_or_default(),
        read => read.unwrap_or_default(),
    };
    let safe = |letter: char| if letter.is_ascii_alphanumeric() || letter == '-' { letter } else { '_' };
    let name: String = name.trim().chars().map(safe).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

/// Length and content, each followed by its checksum.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend(length);
    record.extend(masked_checksum(&length).to_le_bytes());
    record.extend(message);
    record.extend(masked_checksum(message).to_le_bytes());
    record
}

/// Rotated and offset, so that a checksum of data that holds checksums is no fixed point.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protocol buffer message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

/// How the value of a field is stored.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

impl Message {
    fn event(time: f64, step: u64) -> Self {
        let mut event = Self::default();
        event.key(1, Wire::Fixed64);
        event.0.extend(time.to_le_bytes());
        event.integer(2, step);
        event
    }

    fn key(&mut self, field: u64, wire: Wire) {
        self.varint(field << 3 | wire as u64);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.key(field, Wire::Varint);
        self.varint(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, Wire::Fixed32);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, Wire::Bytes);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What a decoder written from the format's description, apart from the encoder above, finds in an event.
    #[derive(Debug, Default, PartialEq)]
    struct Decoded {
        time: f64,
        step: u64,
        version: String,
        restart: bool,
        scalars: Vec<(String, f32)>,
    }

    /// CRC-32C bit by bit.
    fn plain_checksum(bytes: &[u8]) -> u32 {
        let mut remainder = !0u32;
        for byte in bytes {
            remainder ^= u32::from(*byte);
            for _ in 0..8 {
                remainder = if remainder & 1 == 1 { remainder >> 1 ^ 0x82f6_3b78 } else { remainder >> 1 };
            }
        }
        !remainder
    }

    fn check(bytes: &[u8], stored: &[u8]) {
        let checksum = plain_checksum(bytes);
        let masked = checksum.rotate_left(17).wrapping_add(0xa282_ead8);
        assert_eq!(masked.to_le_bytes(), stored);
    }

    fn read_varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    /// Fields of a message: number and content; a varint comes as eight bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = read_varint(&mut bytes);
            let content = match key & 7 {
                0 => read_varint(&mut bytes).to_le_bytes().to_vec(),
                wire => {
                    let length = match wire {
                        1 => 8,
                        5 => 4,
                        2 => read_varint(&mut bytes) as usize,
                        other => panic!("wire type {other}"),
                    };
                    let (content, rest) = bytes.split_at(length);
                    bytes = rest;
                    content.to_vec()
                }
            };
            fields.push((key >> 3, content));
        }
        fields
    }

    fn decode(path: &Path) -> Vec<Decoded> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let file = std::fs::read(path).unwrap();
        let mut rest = file.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            check(&rest[..8], &rest[8..12]);
            let message = &rest[12..12 + length];
            check(message, &rest[12 + length..16 + length]);
            rest = &rest[16 + length..];
            let mut event = Decoded::default();
            for (field, content) in fields(message) {
                match field {
                    1 => event.time = f64::from_le_bytes(content.try_into().unwrap()),
                    2 => event.step = u64::from_le_bytes(content.try_into().unwrap()),
                    3 => event.version = text(content),
                    5 => {
                        for (_, value) in fields(&content) {
                            let mut parts = fields(&value).into_iter();
                            let (tag, number) = (parts.next().unwrap(), parts.next().unwrap());
                            assert_eq!((tag.0, number.0), (1, 2));
                            event.scalars.push((text(tag.1), f32::from_le_bytes(number.1.try_into().unwrap())));
                        }
                    }
                    7 => event.restart = fields(&content) == [(1, 1u64.to_le_bytes().to_vec())],
                    other => panic!("field {other}"),
                }
            }
            events.push(event);
        }
        events
    }

    fn metrics(loss: f64) -> Vec<(String, f64)> {
        vec![("train/loss".to_owned(), loss), ("train/learning_rate".to_owned(), 1e-4)]
    }

    /// Two files: steps 100 to 600, then a resume at 400 that logs 500 with another value.
    fn resumed_run(folder: &Path) -> [EventFile; 2] {
        let mut first = EventFile::create(folder, 0, 1_700_000_000.5).unwrap();
        for step in [100, 200, 300, 400, 500, 600] {
            first.log(step, 1_700_000_000.5 + step as f64, &metrics(step as f64)).unwrap();
        }
        let mut second = EventFile::create(folder, 401, 1_700_000_000.5).unwrap();
        second.log(500, 1_700_001_000.0, &metrics(-0.5)).unwrap();
        second.sync().unwrap();
        [first, second]
    }

    #[test]
    fn an_independent_decoder_reads_every_event() {
        assert_eq!(plain_checksum(b"123456789"), 0xe306_9283);
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = resumed_run(folder.path());
        let events = decode(first.path());
        assert_eq!(events.len(), 7);
        let time = 1_700_000_000.5;
        assert_eq!(events[0], Decoded { time, version: "brain.Event:2".to_owned(), ..Decoded::default() });
        let scalars = vec![("train/loss".to_owned(), 600.0), ("train/learning_rate".to_owned(), 1e-4)];
        assert_eq!(events[6], Decoded { time: time + 600.0, step: 600, scalars, ..Decoded::default() });
        let events = decode(second.path());
        assert_eq!(events.len(), 3);
        assert_eq!(events[1], Decoded { time, step: 401, restart: true, ..Decoded::default() });
        assert_eq!((events[2].step, events[2].scalars[0].1), (500, -0.5));
    }

    #[test]
    fn later_files_have_later_names() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<EventFile> = (0..12).map(|_| EventFile::create(folder.path(), 0, 1e9).unwrap()).collect();
        assert!(files.windows(2).all(|pair| pair[0].path() < pair[1].path()));
        let name = files[0].path().file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with("events.out.tfevents.1000000000."), "{name}");
    }

    #[test]
    fn tensorboard_itself_reads_the_files() {
        let available = Command::new("python3").args(["-c", "import tensorboard"]).output();
        if !available.is_ok_and(|output| output.status.success()) {
            // Not `eprintln!`, which the test harness would swallow.
            let told = "SKIPPED: python3 cannot import tensorboard, so TensorBoard's own reader was not asked";
            writeln!(std::io::stderr(), "{told}").unwrap();
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let [mut killed, _] = resumed_run(folder.path());
        killed.append(&record(b"an event that a kill cut off")[..20]).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/golden/read_tensorboard.py");
        let output = Command::new("python3").arg(script).arg(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let read: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let loss = serde_json::json!([[100, 100.0], [200, 200.0], [300, 300.0], [400, 400.0], [500, -0.5]]);
        assert_eq!(read["scalars"]["train/loss"], loss);
        assert_eq!(read["scalars"]["train/learning_rate"].as_array().unwrap().len(), 5);
        // Two versions, six steps, a restart, one step.
        assert_eq!(read["events"], 10);
    }
}
