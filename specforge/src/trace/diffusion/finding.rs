//! What can be wrong with a trace of a masked diffusion model.

use serde::Serialize;

use crate::trace::finding::Side;

/// What is wrong. Of findings at one pass, the one that says most stands first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffusionKind {
    /// A text is in one of the traces alone, or has another prompt or other blocks there.
    OtherText,
    /// A pass was not told, or told twice.
    MissingStep,
    /// A block was left with masks in it.
    MasksLeft,
    /// A token that was known changed, or one became known that is not told.
    KnownChanged,
    /// The masked positions that the pass decided are not those of its block.
    Candidates,
    /// The pass read keys and values that others have written to.
    CacheIdentity,
    /// The pass ran on other positions than its cache leaves to it.
    View,
    /// States of other positions were compared.
    OtherOrigin,
    /// Heads were turned by other positions than their rows stand at.
    Positions,
    /// Cosines lost precision.
    SimilarityPrecision,
    /// Rows were skipped that the rule does not skip, or the other way round.
    SkipRule,
    /// What is told of rows of logits is not of whole rows.
    PartialRow,
    /// A row that was skipped did not keep its logits.
    SkippedChanged,
    /// Other tokens became known than the rule chooses.
    TransferRule,
    /// A pass over the whole text gave other logits than the model.
    WholePass,
    /// Other tokens became known than without a cache, though every pass was over the whole text.
    LeftExactPath,
    /// Something differs.
    Difference,
    /// Tokens differ.
    Token,
    /// Tokens differ where the model is undecided up to rounding.
    NearTie,
}

impl DiffusionKind {
    /// Its name, as in the JSON.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// Something wrong.
#[derive(Debug, Clone, Serialize)]
pub struct DiffusionFinding {
    /// What kind.
    pub kind: DiffusionKind,
    /// Whose; nobody's where that is not known.
    pub side: Option<Side>,
    /// Number of the text.
    pub text: usize,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over the block, from 0.
    pub step: usize,
    /// Absolute position, where it is one.
    pub position: Option<usize>,
    /// In words.
    pub words: String,
}
