//! Writes a trace while a decode goes on. Nothing appears under the trace's name before [`Recorder::finish`].

use std::path::Path;

use tch::{Device, Kind};

use super::file::{self, EndRecord, FORMAT, Header, Prompt, Record, RoundRecord, TokenRecord};
use super::lines::LineWriter;
use super::metrics::{self, Real};
use crate::decode::Finish;
use crate::decode::event::{Committed, Listener, Round, Started};
use crate::error::{Error, Result};
use crate::files::StagedFile;

/// Logits named in a record; the whole row lies beside it.
const TOP: usize = 8;

/// Records everything an engine tells.
#[derive(Debug)]
pub struct Recorder {
    lines: LineWriter,
    rows: StagedFile,
    vocabulary: usize,
    /// Bytes of a row.
    size: usize,
    written: u64,
}

impl Recorder {
    /// Starts a trace at `path`, with its rows beside it.
    pub fn create(path: &Path, header: Header) -> Result<Self> {
        let size = file::row_bytes(&header).map_err(Error::Usage)?;
        let vocabulary = header.vocabulary;
        let (lines, rows) = (LineWriter::create(path, FORMAT, header)?, StagedFile::new(&file::rows_path(path))?);
        Ok(Self { lines, rows, vocabulary, size, written: 0 })
    }

    /// Gives the trace its name.
    pub fn finish(self) -> Result<()> {
        let row_bytes = self.written;
        self.rows.commit()?;
        self.lines.close(|records| Record::Close { records, row_bytes })
    }
}

impl Listener for Recorder {
    fn wants_rows(&self) -> bool {
        true
    }

    fn started(&mut self, event: &Started<'_>) -> Result<()> {
        let &Started { tag, key, prompt, known: _, limit } = event;
        self.lines.record(&Record::Prompt(Prompt { tag, key, limit, tokens: prompt.to_vec() }))
    }

    fn round(&mut self, event: &Round<'_>) -> Result<()> {
        self.lines.record(&Record::Round(RoundRecord {
            tag: event.tag,
            round: event.round,
            committed: event.committed,
            target_cache: event.target_cache,
            draft_cache: event.draft_cache,
            tokens: event.tree.tokens().to_vec(),
            parents: event.tree.topology().parents().to_vec(),
            scores: event.scores.iter().copied().map(Real).collect(),
            line: 0,
        }))
    }

    fn committed(&mut self, event: &Committed<'_>) -> Result<()> {
        let row = event.row.ok_or_else(|| Error::Failed("a trace needs the rows of a decode".to_owned()))?;
        let row: Vec<f64> = Vec::try_from(row.to_device(Device::Cpu).to_kind(Kind::Double))?;
        if row.len() != self.vocabulary {
            let (got, want) = (row.len(), self.vocabulary);
            return Err(Error::Failed(format!("a row of {got} logits; the trace is of a vocabulary of {want}")));
        }
        // Every value is a float32 already, where the target does not give float64.
        let bytes: Vec<u8> = match self.size / self.vocabulary.max(1) {
            4 => row.iter().flat_map(|&logit| (logit as f32).to_le_bytes()).collect(),
            _ => row.iter().flat_map(|logit| logit.to_le_bytes()).collect(),
        };
        let record = TokenRecord {
            tag: event.tag,
            position: event.position,
            token: event.token,
            source: event.source,
            round: event.round,
            slot: event.slot,
            parent_slot: event.parent_slot,
            depth: event.depth,
            cache_length: event.cache_length,
            top: metrics::top(&row, TOP),
            logsumexp: Real(metrics::logsumexp(&row)),
            l2: Real(metrics::length(&row)),
            hash: file::row_hash(&bytes),
            row: self.written,
            line: 0,
        };
        self.rows.write(&bytes)?;
        self.written += bytes.len() as u64;
        self.lines.record(&Record::Token(record))
    }

    fn ended(&mut self, tag: u64, finish: Option<Finish>) -> Result<()> {
        self.lines.record(&Record::End(EndRecord { tag, finish }))
    }
}
