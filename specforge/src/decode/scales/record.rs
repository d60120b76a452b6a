//! What a decode of images leaves behind.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::committed::Committed;

/// Who decided a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The target, without a draft.
    Target,
    /// The draft, and the target kept it.
    Accepted,
    /// The target, in the place of a drafted scale that was not kept.
    Correction,
    /// The target, behind drafted scales that were all kept.
    Bonus,
    /// The smaller model that an image was handed over to.
    Refiner,
}

/// One look of the target.
#[derive(Debug)]
pub struct Round {
    /// Scales that were committed before it.
    pub start: usize,
    /// Scales that were drafted.
    pub drafted: usize,
    /// Drafted ones that were kept.
    pub accepted: usize,
    /// Scales that it committed.
    pub committed: usize,
    /// Tokens of each image in the target's pass; guidance reads them twice.
    pub target_tokens: i64,
    /// What was drafted, `[B, p * p]` each.
    pub drafted_maps: Vec<Tensor>,
}

/// What is known of a committed scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRecord {
    /// Its number, from the image's first one.
    pub scale: usize,
    /// Its tokens.
    pub tokens: i64,
    /// Who decided it.
    pub source: Source,
    /// Number of the round that it was decided in, from 0; always 0 without a draft.
    pub round: usize,
    /// Tokens of an image whose keys and values the target held, this pass's among them.
    pub target_cache: i64,
    /// Weight of guidance.
    pub cfg_weight: f64,
    /// Positions of all images where the rule agreed with the draft; nothing where none was drafted.
    pub agreed: Option<i64>,
    /// Positions of all images.
    pub positions: i64,
}

/// Wall time by part, in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Seconds {
    /// Everything.
    pub total: f64,
    /// Passes of the target.
    pub target: f64,
    /// Passes of the draft.
    pub draft: f64,
    /// Choosing maps from logits, and comparing them.
    pub choosing: f64,
    /// Sums of maps, and what models read of them.
    pub quantizer: f64,
}

impl Seconds {
    /// Adds another decode's.
    pub fn add(&mut self, more: &Self) {
        self.total += more.total;
        self.target += more.target;
        self.draft += more.draft;
        self.choosing += more.choosing;
        self.quantizer += more.quantizer;
    }
}

/// Decoded images.
#[derive(Debug)]
pub struct Decoded {
    /// Maps, and what they add up to.
    pub committed: Committed,
    /// Looks of the target at drafted scales, in order; none where there is no draft.
    pub rounds: Vec<Round>,
    /// Every scale, in order.
    pub scales: Vec<ScaleRecord>,
    /// Passes of the target.
    pub target_calls: usize,
    /// Tokens of each image in them.
    pub target_tokens: i64,
    /// Passes of the draft.
    pub draft_calls: usize,
    /// Tokens of each image in them.
    pub draft_tokens: i64,
    /// Wall time.
    pub seconds: Seconds,
    /// Whether the images are the target's own, or follow its distribution.
    pub lossless: bool,
}
