//! A vocabulary map on disk: safetensors with `d2t` and `t2d`, and a record of what it was made of.
//!
//! The record is one JSON object under one key of the header, so that equal maps make equal bytes. A file without it (a
//! draft exported by another program, a `vocab_mapping.pt`) is read as well; there is less to check it by then.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};

use super::{VocabMap, torch_file};
use crate::error::{Error, Result};
use crate::files;
use crate::strict;

/// Layout of the record that this program writes.
const FORMAT_VERSION: u32 = 1;
/// Key of the record in the file's header.
const RECORD_KEY: &str = "specforge.vocab_map";

/// What a map was made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Layout of this record.
    pub format_version: u32,
    /// Which text each token id is: two tokenizers with this hash in common mean the same by an id.
    pub tokenizer_hash: String,
    /// Content of the token cache whose tokens were counted.
    pub corpus_hash: String,
    /// `V`
    pub target_vocab_size: i64,
    /// `DV`
    pub draft_vocab_size: i64,
    /// Share of the counted tokens that the map can name.
    pub coverage: f64,
}

impl Record {
    /// The record of a map.
    pub fn new(map: &VocabMap, tokenizer_hash: &str, corpus_hash: &str, coverage: f64) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            tokenizer_hash: tokenizer_hash.to_owned(),
            corpus_hash: corpus_hash.to_owned(),
            target_vocab_size: map.target_size(),
            draft_vocab_size: map.draft_size(),
            coverage,
        }
    }
}

/// A map with its record.
#[derive(Debug, Clone, PartialEq)]
pub struct VocabFile {
    /// The map.
    pub map: VocabMap,
    /// What it was made of; not every file says it.
    pub record: Option<Record>,
}

/// What a run needs of a map.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Hash of the run's tokenizer, as in [`Record::tokenizer_hash`].
    pub tokenizer_hash: &'a str,
    /// Content hash of the run's own data.
    pub corpus_hash: &'a str,
    /// `V` of the target.
    pub target_size: i64,
    /// `DV` that was asked for, if one was.
    pub draft_size: Option<i64>,
}

impl VocabFile {
    /// Reads a safetensors file, or a `vocab_mapping.pt` of SpecForge. The tables must agree with each other.
    pub fn read(path: &Path) -> Result<Self> {
        if !std::fs::metadata(path).map_err(Error::io("read", path))?.is_file() {
            return Err(Error::bad_file(path, "is no file")
                .with_hint("name a file that `specforge vocab` wrote, or a `vocab_mapping.pt`"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let wrong = |problem| Error::bad_file(path, problem).with_hint("make a new map with `specforge vocab`");
        // SAFETY: maps are read-only inputs; replacing a file under a running program is not supported.
        let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        if bytes.starts_with(torch_file::MAGIC) {
            let (d2t, t2d) = torch_file::read(path)?;
            let map = VocabMap::from_tables(&d2t, &t2d).map_err(wrong)?;
            return Ok(Self { map, record: None });
        }
        let damaged = |error: SafeTensorError| {
            Error::bad_file(
                path,
                format!("is no vocabulary map: neither a whole safetensors file ({error}) nor a zip archive"),
            )
            .with_hint("name a file that `specforge vocab` wrote, or a `vocab_mapping.pt` of PyTorch 1.6 or later")
        };
        if let Some(name) = strict::repeated_tensor(&bytes) {
            return Err(wrong(format!("its header names `{name}` twice")));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        let map = tables(&tensors).map_err(wrong)?;
        let text = header.metadata().as_ref().and_then(|metadata| metadata.get(RECORD_KEY));
        let record = text.map(|text| record(text, &map)).transpose().map_err(wrong)?;
        Ok(Self { map, record })
    }

    /// Writes a safetensors file whole or not at all. A map that is there is replaced, any other file is not.
    pub fn write(&self, path: &Path) -> Result<()> {
        if path.exists() && Self::read(path).is_err() {
            return Err(Error::bad_file(path, "is there and is no vocabulary map")
                .with_hint("choose a new file; nothing was changed"));
        }
        let failed = |problem: String| Error::bad_file(path, format!("cannot be written: {problem}"));
        let (d2t, t2d) = (self.map.d2t(), self.map.t2d());
        let d2t: Vec<u8> = d2t.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let t2d: Vec<u8> = t2d.iter().map(|named| u8::from(*named)).collect();
        let view = |dtype, size: i64, bytes| TensorView::new(dtype, vec![size as usize], bytes);
        let tensors = [
            ("d2t", view(Dtype::I64, self.map.draft_size(), &d2t).map_err(|error| failed(error.to_string()))?),
            ("t2d", view(Dtype::BOOL, self.map.target_size(), &t2d).map_err(|error| failed(error.to_string()))?),
        ];
        let metadata = match &self.record {
            Some(record) => {
                let text = serde_json::to_string(record).map_err(|error| failed(error.to_string()))?;
                Some(HashMap::from([(RECORD_KEY.to_owned(), text)]))
            }
            None => None,
        };
        let bytes = safetensors::serialize(tensors, metadata).map_err(|error| failed(error.to_string()))?;
        files::write_file(path, |writer| writer.write_all(&bytes))
    }

    /// Refuses a map that does not fit a run. Returns what the run should know about one that does.
    pub fn check(&self, path: &Path, wanted: &Wanted<'_>) -> Result<Vec<String>> {
        let (target, draft) = (self.map.target_size(), self.map.draft_size());
        if target != wanted.target_size {
            let problem = format!("maps a target of {target} tokens, this target has {}", wanted.target_size);
            return Err(Error::bad_file(path, problem).with_hint("make a map for this target with `specforge vocab`"));
        }
        if let Some(asked) = wanted.draft_size.filter(|&asked| asked != draft) {
            let problem = format!("holds {draft} tokens, draft.draft_vocab_size asks for {asked}");
            return Err(Error::bad_file(path, problem)
                .with_hint("leave draft.draft_vocab_size out, or make a map of that size with `specforge vocab`"));
        }
        let Some(record) = &self.record else {
            let warning = "does not say which tokenizer it was made with; it is taken to be this one";
            return Ok(vec![format!("{} {warning}", path.display())]);
        };
        if record.tokenizer_hash != wanted.tokenizer_hash {
            let short = |hash: &str| hash.chars().take(12).collect::<String>();
            let (then, now) = (short(&record.tokenizer_hash), short(wanted.tokenizer_hash));
            let problem = format!("was made with another tokenizer: its hash is {then}, this one's {now}");
            return Err(Error::bad_file(path, problem)
                .with_hint("the same ids are other words there: make a map with this tokenizer, `specforge vocab`"));
        }
        // One map may serve several corpora, and a draft keeps its map when it is trained further on new data.
        let elsewhere = (record.corpus_hash != wanted.corpus_hash).then(|| {
            format!("{} was counted on other data than this run's; its tokens are used as they are", path.display())
        });
        Ok(elsewhere.into_iter().collect())
    }
}

fn tables(tensors: &SafeTensors<'_>) -> Result<VocabMap, String> {
    let find = |name: &str, dtype: Dtype| {
        let names = || tensors.names().into_iter().take(6).collect::<Vec<_>>().join(", ");
        let tensor = tensors.tensor(name).map_err(|_| format!("holds no tensor `{name}`, only: {}", names()))?;
        if tensor.dtype() != dtype || tensor.shape().len() != 1 {
            let (got, shape) = (tensor.dtype(), tensor.shape());
            return Err(format!("`{name}`: expected {dtype:?} with one axis, got {got:?} of shape {shape:?}"));
        }
        Ok(tensor)
    };
    let (d2t, t2d) = (find("d2t", Dtype::I64)?, find("t2d", Dtype::BOOL)?);
    if let Some(place) = t2d.data().iter().position(|byte| *byte > 1) {
        return Err(format!("`t2d[{place}]` is neither true nor false"));
    }
    let offset = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | i64::from(*byte));
    let d2t: Vec<i64> = d2t.data().chunks_exact(8).map(offset).collect();
    let t2d: Vec<bool> = t2d.data().iter().map(|byte| *byte == 1).collect();
    VocabMap::from_tables(&d2t, &t2d)
}

fn record(text: &str, map: &VocabMap) -> Result<Record, String> {
    // The version is read first: a later layout may have fields that this program does not know.
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("{RECORD_KEY}: {error}"))?;
    if value["format_version"] != FORMAT_VERSION {
        let got = &value["format_version"];
        return Err(format!("{RECORD_KEY}: expected format_version {FORMAT_VERSION}, got {got}"));
    }
    let record: Record = serde_json::from_value(value).map_err(|error| format!("{RECORD_KEY}: {error}"))?;
    let sizes = [
        ("target_vocab_size", record.target_vocab_size, map.target_size()),
        ("draft_vocab_size", record.draft_vocab_size, map.draft_size()),
    ];
    match sizes.iter().find(|(_, says, is)| says != is) {
        Some((key, says, is)) => Err(format!("{RECORD_KEY}: `{key}` is {says}, but the tables say {is}")),
        None => Ok(record),
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
