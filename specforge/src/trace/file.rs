//! The format of a trace, and its reader.
//!
//! `FILE` has a JSON object a line: what was decoded how, then records in the order of events, and a last line that
//! says how much there is. `FILE.rows` has the whole row of every token, little-endian float32 or float64, one behind the
//! other; it is mapped, not read. A file whose last line is missing was not written to its end, and is refused.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lines::{Format, Opening};
use super::metrics::Real;
use crate::decode::Finish;
use crate::decode::event::Source;
use crate::decode::policy::Policy;
use crate::error::{Error, Result};
use crate::models::TargetIdentity;
use crate::nn::Processors;

/// What the first line says of the format.
pub(super) const FORMAT: Format = Format { kind: "specforge-trace", version: 1 };

/// A model folder and what tells it from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelName {
    /// The folder as it was named.
    pub path: PathBuf,
    /// Digest of its content; nothing where it lies in no folder.
    pub identity: Option<String>,
}

impl ModelName {
    /// A target's folder.
    pub fn target(path: &Path) -> Result<Self> {
        let TargetIdentity { config, tensors, samples, tables, .. } = TargetIdentity::read(path)?;
        let digest = Sha256::digest(format!("{config}\n{tensors}\n{samples}\n{tables}"));
        Ok(Self { path: path.to_path_buf(), identity: Some(hex(&digest)) })
    }

    /// A draft's folder: its tensors and JSON files, whole; or its one file.
    pub fn draft(path: &Path) -> Result<Self> {
        let mut files: Vec<PathBuf> = Vec::new();
        if path.is_file() {
            files.push(path.to_path_buf());
        } else {
            for entry in std::fs::read_dir(path).map_err(Error::io("read", path))? {
                let file = entry.map_err(Error::io("read", path))?.path();
                let counts = file.extension().is_some_and(|ext| ext == "json" || ext == "safetensors" || ext == "bin");
                if counts && file.is_file() {
                    files.push(file);
                }
            }
        }
        files.sort();
        let mut digest = Sha256::new();
        for file in &files {
            let map = map(file)?;
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let bytes = map.as_deref().unwrap_or_default();
            digest.update(format!("{name} {} {:08x}\n", bytes.len(), crc32c::crc32c(bytes)));
        }
        Ok(Self { path: path.to_path_buf(), identity: Some(hex(&digest.finalize())) })
    }
}

/// How was decoded, as the program understood it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the drafter.
    pub drafter: String,
    /// Its tree, in words.
    pub tree: String,
    /// What is done to the target's rows.
    pub processors: Processors,
    /// How guesses are accepted; the seed is in it.
    pub policy: Policy,
    /// Tokens that end a sequence.
    pub stop_tokens: Vec<u32>,
    /// Most new tokens of a request.
    pub max_new_tokens: usize,
    /// Requests that run together.
    pub max_rows: usize,
}

impl Settings {
    /// The settings in a few words.
    pub fn label(&self) -> String {
        let Processors { temperature, top_k, top_p, repetition_penalty } = self.processors;
        let mut label = format!("{}, {}, ", self.drafter, self.tree);
        label += &match self.policy {
            _ if temperature == 0.0 && self.policy.is_lossless() => "greedy".to_owned(),
            Policy::Keyed { seed } => format!("temperature {temperature}, keyed noise, seed {seed}"),
            Policy::Maximal { seed } => format!("temperature {temperature}, maximal coupling, seed {seed}"),
            Policy::Typical { epsilon, alpha } => {
                format!("temperature {temperature}, typical acceptance {epsilon}/{alpha} (lossy)")
            }
            Policy::Rank { k, .. } => format!("temperature {temperature}, rank at most {k} (lossy)"),
            Policy::Entropy { most, .. } => format!("temperature {temperature}, draft entropy at most {most} (lossy)"),
        };
        if top_k > 0 && temperature > 0.0 {
            label += &format!(", top-k {top_k}");
        }
        if top_p < 1.0 && temperature > 0.0 {
            label += &format!(", top-p {top_p}");
        }
        if repetition_penalty != 1.0 {
            label += &format!(", repetition penalty {repetition_penalty}");
        }
        format!("{label}, {} rows", self.max_rows)
    }
}

/// What was decoded how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The target.
    pub target: ModelName,
    /// The draft, where it is a model.
    pub draft: Option<ModelName>,
    /// Element type the target ran in: float32, bfloat16, float16 or float64.
    pub dtype: String,
    /// Where it ran.
    pub device: String,
    /// Number of logits in a row.
    pub vocabulary: usize,
    /// How was decoded.
    pub settings: Settings,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// Tag of the request.
    pub tag: u64,
    /// Its own part of every seed.
    pub key: u64,
    /// New tokens it may have.
    pub limit: usize,
    /// The prompt.
    pub tokens: Vec<u32>,
}

/// A tree that was verified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundRecord {
    /// Tag of the request.
    pub tag: u64,
    /// Number of the verification, from 1.
    pub round: u64,
    /// Committed tokens before it.
    pub committed: usize,
    /// Tokens in the target's cache before it.
    pub target_cache: i64,
    /// Tokens in the draft's cache while it drafted.
    pub draft_cache: i64,
    /// Token of each node.
    pub tokens: Vec<u32>,
    /// Parent of each node.
    pub parents: Vec<usize>,
    /// The draft's score of each node.
    pub scores: Vec<Real>,
    /// Line of the file.
    #[serde(skip)]
    pub line: usize,
}

impl RoundRecord {
    /// Depth of each node; nothing where parents do not stand before their children.
    pub fn depths(&self) -> Option<Vec<usize>> {
        let mut depths = vec![0usize; self.parents.len()];
        for node in 1..depths.len() {
            let parent = self.parents[node];
            if parent >= node {
                return None;
            }
            depths[node] = depths[parent] + 1;
        }
        Some(depths)
    }

    /// Nodes behind a node.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (1..self.parents.len()).filter(move |&child| child != node && self.parents[child] == node)
    }
}

/// A committed token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// Tag of the request.
    pub tag: u64,
    /// Absolute position.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// Where it comes from.
    pub source: Source,
    /// Verification it belongs to; 0 is the prefill.
    pub round: u64,
    /// Node whose row it was chosen from, or the last token of the prompt.
    pub slot: usize,
    /// Its parent.
    pub parent_slot: usize,
    /// Its depth.
    pub depth: usize,
    /// Tokens in the target's cache before the pass.
    pub cache_length: i64,
    /// The largest logits.
    pub top: Vec<(u32, Real)>,
    /// Logarithm of the sum of exponentials of the row.
    pub logsumexp: Real,
    /// Euclidean length of the row.
    pub l2: Real,
    /// CRC-32C of the row's bytes.
    pub hash: String,
    /// Where the row begins in `FILE.rows`.
    pub row: u64,
    /// Line of the file.
    #[serde(skip)]
    pub line: usize,
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndRecord {
    /// Tag of the request.
    pub tag: u64,
    /// Why it ended; nothing where it failed.
    pub finish: Option<Finish>,
}

/// One line behind the first.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(super) enum Record {
    Prompt(Prompt),
    Round(RoundRecord),
    Token(TokenRecord),
    End(EndRecord),
    Close { records: u64, row_bytes: u64 },
}

/// What was recorded of one request, in order.
#[derive(Debug)]
pub struct RequestTrace {
    /// The request.
    pub prompt: Prompt,
    /// Its verifications.
    pub rounds: Vec<RoundRecord>,
    /// Its tokens.
    pub tokens: Vec<TokenRecord>,
    /// Its end.
    pub end: Option<EndRecord>,
}

impl RequestTrace {
    /// The verification of a number.
    pub fn round(&self, number: u64) -> Option<&RoundRecord> {
        self.rounds.iter().find(|round| round.round == number)
    }

    /// Prompt and new tokens before an absolute position, as far as they follow each other without a gap.
    pub fn before(&self, position: usize) -> Vec<u32> {
        let mut tokens = self.prompt.tokens.clone();
        for record in &self.tokens {
            if record.position == tokens.len() && tokens.len() < position {
                tokens.push(record.token);
            }
        }
        tokens.truncate(position);
        tokens
    }
}

/// A trace that has been read.
#[derive(Debug)]
pub struct Trace {
    /// The file.
    pub path: PathBuf,
    /// The program that wrote it.
    pub program: String,
    /// What was decoded how.
    pub header: Header,
    /// The requests, in the order they began.
    pub requests: Vec<RequestTrace>,
    rows: Option<Mmap>,
}

impl Trace {
    /// Reads a trace.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut lines = BufReader::new(file).lines().zip(1..);
        let bad = |line: usize, problem: String| Error::BadLine { path: path.to_path_buf(), line, problem };
        let foreign =
            || Error::bad_file(path, "is not a trace").with_hint("make one with `specforge generate --trace`");
        let first = match lines.next() {
            Some((Ok(line), _)) => line,
            Some((Err(error), _)) if error.kind() != std::io::ErrorKind::InvalidData => {
                return Err(Error::io("read", path)(error));
            }
            _ => return Err(foreign()),
        };
        let outline: serde_json::Value = serde_json::from_str(&first).map_err(|_| foreign())?;
        let Format { kind, version } = FORMAT;
        if outline["kind"] != kind {
            return Err(foreign());
        }
        if outline["format"] != version {
            let problem = format!("is a trace of format {}; this program reads format {version}", outline["format"]);
            return Err(Error::bad_file(path, problem));
        }
        let Opening::<Header> { program, header, .. } =
            serde_json::from_str(&first).map_err(|error| bad(1, error.to_string()))?;
        row_bytes(&header).map_err(|problem| bad(1, problem))?;
        let mut trace = Self { path: path.to_path_buf(), program, header, requests: Vec::new(), rows: None };
        let mut closed = None;
        let mut last_line = 1;
        for (line, number) in lines {
            let line = line.map_err(Error::io("read", path))?;
            last_line = number;
            if closed.is_some() {
                return Err(bad(number, "stands behind the end of the trace".to_owned()));
            }
            match serde_json::from_str(&line).map_err(|error| bad(number, error.to_string()))? {
                Record::Close { records, row_bytes } => closed = Some((records, row_bytes, number)),
                record => trace.add(record, number).map_err(|problem| bad(number, problem))?,
            }
        }
        let Some((records, bytes, line)) = closed else {
            let problem = "is the last line of a trace that was cut off: its closing record is missing".to_owned();
            return Err(bad(last_line, problem));
        };
        if records != line as u64 - 2 {
            return Err(bad(line, format!("the trace should have {records} records; it has {}", line - 2)));
        }
        let rows = rows_path(path);
        trace.rows = map(&rows)?;
        let got = trace.rows.as_ref().map_or(0, |map| map.len() as u64);
        if got != bytes {
            return Err(Error::bad_file(&rows, format!("expected {bytes} bytes, as its trace says, got {got}")));
        }
        Ok(trace)
    }

    fn add(&mut self, record: Record, line: usize) -> Result<(), String> {
        let tag = match &record {
            Record::Prompt(prompt) => {
                if self.request(prompt.tag).is_some() {
                    return Err(format!("request {} begins a second time", prompt.tag));
                }
                if prompt.tokens.is_empty() {
                    return Err(format!("request {} has no prompt", prompt.tag));
                }
                self.requests.push(RequestTrace {
                    prompt: prompt.clone(),
                    rounds: Vec::new(),
                    tokens: Vec::new(),
                    end: None,
                });
                return Ok(());
            }
            Record::Round(round) => round.tag,
            Record::Token(token) => token.tag,
            Record::End(end) => end.tag,
            Record::Close { .. } => return Ok(()),
        };
        let request = self.requests.iter_mut().find(|request| request.prompt.tag == tag);
        let request = request.ok_or_else(|| format!("request {tag} has not begun"))?;
        match record {
            Record::Round(mut round) => {
                let nodes = round.tokens.len();
                let counts = [nodes, round.parents.len(), round.scores.len()];
                if nodes == 0 || counts.iter().any(|&count| count != nodes) {
                    return Err(format!("a tree of {} tokens, {} parents and {} scores", nodes, counts[1], counts[2]));
                }
                round.line = line;
                request.rounds.push(round);
            }
            Record::Token(mut token) => {
                token.line = line;
                request.tokens.push(token);
            }
            Record::End(end) => request.end = Some(end),
            Record::Prompt(_) | Record::Close { .. } => {}
        }
        Ok(())
    }

    /// The request of a tag.
    pub fn request(&self, tag: u64) -> Option<&RequestTrace> {
        self.requests.iter().find(|request| request.prompt.tag == tag)
    }

    /// The row a token was chosen from, `[V]`.
    pub fn row(&self, token: &TokenRecord) -> Result<Vec<f64>> {
        let path = rows_path(&self.path);
        let size = row_bytes(&self.header).map_err(Error::Failed)?;
        let start = usize::try_from(token.row).unwrap_or(usize::MAX);
        let bytes = self.rows.as_ref().and_then(|map| map.get(start..start.checked_add(size)?));
        let bytes = bytes.ok_or_else(|| {
            let problem =
                format!("{}:{} names a row at byte {start} that is not there", self.path.display(), token.line);
            Error::bad_file(&path, problem)
        })?;
        let hash = row_hash(bytes);
        if hash != token.hash {
            let (line, want) = (token.line, &token.hash);
            let problem = format!("the row at byte {start} is not the one that was recorded: {hash}, expected {want}");
            return Err(Error::bad_file(&path, format!("{problem} ({}:{line})", self.path.display())));
        }
        Ok(match size / self.header.vocabulary.max(1) {
            4 => bytes.as_chunks().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect(),
            _ => bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect(),
        })
    }
}

/// Bytes of a row.
pub(super) fn row_bytes(header: &Header) -> Result<usize, String> {
    let element = match header.dtype.as_str() {
        "float32" | "bfloat16" | "float16" => 4,
        "float64" => 8,
        other => return Err(format!("dtype: expected float32, bfloat16, float16 or float64, got `{other}`")),
    };
    header.vocabulary.checked_mul(element).ok_or_else(|| "vocabulary: too large".to_owned())
}

/// Where the rows of a trace lie.
pub(super) fn rows_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".rows");
    PathBuf::from(name)
}

pub(super) fn row_hash(bytes: &[u8]) -> String {
    format!("{:08x}", crc32c::crc32c(bytes))
}

/// Maps a file; an empty one cannot be mapped.
fn map(path: &Path) -> Result<Option<Mmap>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    if file.metadata().map_err(Error::io("read", path))?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the map is read-only; a file that another program changes meanwhile shows in its checksums.
    unsafe { Mmap::map(&file) }.map(Some).map_err(Error::io("map", path))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
