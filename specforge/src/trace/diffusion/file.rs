//! The format of a trace of a masked diffusion model, and its reader: see `trace::lines`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::placed::Placed;
use crate::decode::diffusion::{CacheSeen, Options};
use crate::error::Result;
use crate::trace::file::ModelName;
use crate::trace::lines::{self, Format};
use crate::trace::metrics::Real;

/// What the first line says of the format.
pub(super) const FORMAT: Format = Format { kind: "specforge-diffusion-trace", version: 1 };

/// Longest answer of a trace, so that a broken file takes no memory.
const LONGEST: usize = 1 << 24;

/// What was decoded how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffusionHeader {
    /// The model.
    pub target: ModelName,
    /// Element type that it ran in: float32, bfloat16, float16 or float64.
    pub dtype: String,
    /// Where it ran.
    pub device: String,
    /// Tokens of the vocabulary.
    pub vocabulary: i64,
    /// The mask token.
    pub mask: i64,
    /// How many positions before a token the row stands that says what it is: 0 or 1.
    pub shift: usize,
    /// Seed of the noise of all texts.
    pub seed: u64,
    /// How was decoded, as the program understood it.
    pub options: Options,
}

impl DiffusionHeader {
    /// Absolute positions of a block of an answer behind so long a prompt: the first, and how many.
    pub fn block(&self, prompt: usize, block: usize) -> (usize, usize) {
        (prompt + block * self.options.block, self.options.block)
    }
}

/// A text that begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextLine {
    /// Number of the text in the trace, from 0.
    pub text: usize,
    /// Key of its noise, added to the seed.
    pub key: u64,
    /// The prompt.
    pub prompt: Vec<u32>,
}

/// A masked position, and what the model has for it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// Absolute position.
    pub position: usize,
    /// The token.
    pub token: i64,
    /// By what the rule chose: its probability, or the draw of a random order.
    pub confidence: Real,
    /// Its logit.
    pub logit: Real,
    /// Logarithm of the sum of exponentials of the whole row.
    pub logsumexp: Real,
}

/// A pass over a block of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepLine {
    /// Number of the text.
    pub text: usize,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over the block, from 0.
    pub step: usize,
    /// The block's tokens before the pass.
    pub before: Placed<i64>,
    /// Shape of the block's logits, `[L, V]`.
    pub logits: (usize, usize),
    /// Absolute positions that the pass ran on: the first, and how many.
    pub view: (usize, usize),
    /// The keys and values that it left; nothing without a cache.
    pub cache: Option<CacheSeen>,
    /// Where rows may leave later layers out: absolute first positions of the states that were compared, before and now.
    pub compared: Option<(usize, usize)>,
    /// The same: cosines of each row by layer.
    pub similarity: Option<Placed<Vec<Real>>>,
    /// The same: whether each row ran all layers.
    pub active: Option<Placed<bool>>,
    /// The same: absolute positions by which the heads of the rows that did were turned.
    pub turned: Option<Vec<i64>>,
    /// Masked positions of the block, ascending.
    pub candidates: Vec<Candidate>,
    /// How many a quota asked for.
    pub quota: Option<usize>,
    /// Absolute positions that became known.
    pub transferred: Vec<usize>,
    /// The block's tokens after the pass.
    pub after: Placed<i64>,
    /// Masks in them.
    pub masks_left: usize,
    /// Line of the file.
    #[serde(skip)]
    pub line: usize,
}

impl StepLine {
    /// The candidate of a position.
    pub fn candidate(&self, position: usize) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.position == position)
    }
}

/// One line behind the first.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(super) enum Record {
    Text(TextLine),
    Step(Box<StepLine>),
}

/// What was recorded of one text.
#[derive(Debug)]
pub struct TextTrace {
    /// The text.
    pub text: TextLine,
    /// Its passes, in order.
    pub steps: Vec<StepLine>,
}

/// A trace that has been read.
#[derive(Debug)]
pub struct DiffusionTrace {
    /// The file.
    pub path: PathBuf,
    /// What was decoded how.
    pub header: DiffusionHeader,
    /// The texts, in the order they began.
    pub texts: Vec<TextTrace>,
}

impl DiffusionTrace {
    /// Whether a file's first line says that it is one.
    pub fn is_one(path: &Path) -> bool {
        FORMAT.is_of(path)
    }

    /// Reads a trace. One that does not say what it says it says is refused: passes of unknown texts, rows elsewhere than their
    /// block, unknown tokens.
    pub fn read(path: &Path) -> Result<Self> {
        let begin = |header: DiffusionHeader| {
            let Options { length, block, .. } = header.options;
            match block > 0 && length.is_multiple_of(block) && length <= LONGEST {
                true => Ok(Self { path: path.to_path_buf(), header, texts: Vec::new() }),
                false => {
                    Err(format!("expected an answer of up to {LONGEST} tokens in blocks, got {length} and {block}"))
                }
            }
        };
        lines::read(path, FORMAT, begin, Self::add)
    }

    fn add(&mut self, record: Record, line: usize) -> Result<(), String> {
        match record {
            Record::Text(text) if text.text != self.texts.len() => {
                Err(format!("expected text {}, got text {}", self.texts.len(), text.text))
            }
            Record::Text(text) => {
                self.texts.push(TextTrace { text, steps: Vec::new() });
                Ok(())
            }
            Record::Step(step) => {
                let number = step.text;
                let text =
                    self.texts.get_mut(number).ok_or_else(|| format!("a pass over text {number}: there is none"))?;
                fits(&step, &text.text, &self.header)?;
                text.steps.push(StepLine { line, ..*step });
                Ok(())
            }
        }
    }
}

/// Refuses a pass whose rows are not those of its block.
fn fits(step: &StepLine, text: &TextLine, header: &DiffusionHeader) -> Result<(), String> {
    let blocks = header.options.length / header.options.block.max(1);
    if step.block >= blocks {
        return Err(format!("block {}: there are {blocks}", step.block));
    }
    let (start, count) = header.block(text.prompt.len(), step.block);
    for rows in [&step.before, &step.after] {
        if rows.place() != (start, count) {
            let (origin, rows) = rows.place();
            return Err(format!("expected {count} tokens from position {start}, got {rows} from {origin}"));
        }
    }
    let inside = |position: &usize| (start..start + count).contains(position);
    let positions = step.candidates.iter().map(|candidate| candidate.position);
    if let Some(position) = positions.chain(step.transferred.iter().copied()).find(|position| !inside(position)) {
        return Err(format!("expected positions from {start} to {}, got {position}", start + count - 1));
    }
    if !step.candidates.windows(2).all(|pair| pair[0].position < pair[1].position) {
        return Err("expected candidates in the order of their positions".to_owned());
    }
    let unknown = |token: &i64| !(0..header.vocabulary).contains(token);
    let tokens = [&step.before, &step.after].into_iter().flat_map(|rows| rows.each().map(|(_, &token)| token));
    match tokens.chain(step.candidates.iter().map(|candidate| candidate.token)).find(unknown) {
        None => Ok(()),
        Some(token) => Err(format!("expected tokens from 0 to {}, got {token}", header.vocabulary - 1)),
    }
}
