//! The format of a trace of scales, and its reader: a JSON object a line. The first says what was decoded how, the last how many
//! records there are; a file without its last line was not written to its end, and is refused.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::decode::scales::{ScaleRecord, ScaleSampling};
use crate::error::Result;
use crate::trace::file::ModelName;
use crate::trace::lines::{self, Format};
use crate::trace::metrics::Real;

/// What the first line says of the format.
pub(super) const FORMAT: Format = Format { kind: "specforge-scale-trace", version: 1 };

/// What was decoded how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleHeader {
    /// The target.
    pub target: ModelName,
    /// The image tokenizer.
    pub vae: ModelName,
    /// The draft, where there is one.
    pub draft: Option<ModelName>,
    /// Element type that the target ran in: float32 or float64.
    pub dtype: String,
    /// Where it ran.
    pub device: String,
    /// How maps are chosen.
    pub sampling: ScaleSampling,
    /// How the draft is used, in words.
    pub plan: String,
    /// Whether every token is the target's choice with its own noise.
    pub is_exact: bool,
    /// Side of each scale.
    pub patch_nums: Vec<i64>,
    /// Tokens of the vocabulary.
    pub vocabulary: i64,
}

/// Images that were decoded together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagesRecord {
    /// Label of each.
    pub labels: Vec<i64>,
    /// Number of each, which keys its noise.
    pub images: Vec<u64>,
}

/// A committed scale of these images. Lists have an entry for each image, and in it one for each position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleLine {
    /// What the decoder knew of it.
    pub scale: ScaleRecord,
    /// The map.
    pub map: Vec<Vec<i64>>,
    /// What was drafted, where something was.
    pub drafted: Option<Vec<Vec<i64>>>,
    /// The token with the largest score: logit and noise.
    pub best: Vec<Vec<i64>>,
    /// Distance of the two largest scores.
    pub margin: Vec<Vec<Real>>,
    /// Largest logit.
    pub largest: Vec<Vec<Real>>,
    /// Logarithm of the sum of exponentials of the logits.
    pub logsumexp: Vec<Vec<Real>>,
    /// Euclidean length of what the maps add up to, for each image.
    pub sum: Vec<Real>,
    /// Line of the file.
    #[serde(skip)]
    pub line: usize,
}

/// One line behind the first.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(super) enum Record {
    Images(ImagesRecord),
    Scale(Box<ScaleLine>),
}

/// What was recorded of images that were decoded together.
#[derive(Debug)]
pub struct ImagesTrace {
    /// The images.
    pub images: ImagesRecord,
    /// Their scales, in order.
    pub scales: Vec<ScaleLine>,
}

/// A trace that has been read.
#[derive(Debug)]
pub struct ScaleTrace {
    /// The file.
    pub path: PathBuf,
    /// What was decoded how.
    pub header: ScaleHeader,
    /// Everything that was decoded together.
    pub batches: Vec<ImagesTrace>,
}

impl ScaleTrace {
    /// Whether a file's first line says that it is one.
    pub fn is_one(path: &Path) -> bool {
        FORMAT.is_of(path)
    }

    /// Reads a trace. One that does not say what it says it says is refused: lists of other lengths, unknown tokens.
    pub fn read(path: &Path) -> Result<Self> {
        let begin = |header| Ok(Self { path: path.to_path_buf(), header, batches: Vec::new() });
        lines::read(path, FORMAT, begin, Self::add)
    }

    fn add(&mut self, record: Record, line: usize) -> Result<(), String> {
        match record {
            Record::Images(images) => {
                if images.labels.len() != images.images.len() || images.images.is_empty() {
                    return Err("expected a label and a number for each image".to_owned());
                }
                self.batches.push(ImagesTrace { images, scales: Vec::new() });
            }
            Record::Scale(scale) => {
                let batch = self.batches.last_mut().ok_or("a scale of no images")?;
                fits(&scale, batch.images.images.len(), &self.header)?;
                batch.scales.push(ScaleLine { line, ..*scale });
            }
        }
        Ok(())
    }
}

/// Refuses a scale whose lists are not those of its images.
fn fits(line: &ScaleLine, images: usize, header: &ScaleHeader) -> Result<(), String> {
    let scale = line.scale.scale;
    let side = header.patch_nums.get(scale).copied();
    let side = side.ok_or_else(|| format!("scale {scale}: there are {} scales", header.patch_nums.len()))?;
    let tokens = usize::try_from(side.saturating_mul(side)).unwrap_or(0);
    fn even<T>(rows: &[Vec<T>], images: usize, tokens: usize) -> bool {
        rows.len() == images && rows.iter().all(|row| row.len() == tokens)
    }
    let numbers = [&line.margin, &line.largest, &line.logsumexp];
    let lists = [Some(&line.map), line.drafted.as_ref(), Some(&line.best)];
    let fits = numbers.iter().all(|rows| even(rows, images, tokens))
        && lists.iter().flatten().all(|rows| even(rows, images, tokens))
        && line.sum.len() == images;
    if !fits {
        return Err(format!("scale {scale}: expected lists of {images} images with {tokens} positions each"));
    }
    let unknown = |token: &&i64| !(0..header.vocabulary).contains(*token);
    match lists.iter().flatten().flat_map(|rows| rows.iter().flatten()).find(unknown) {
        None => Ok(()),
        Some(token) => Err(format!("scale {scale}: expected tokens from 0 to {}, got {token}", header.vocabulary - 1)),
    }
}
