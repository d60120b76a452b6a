//! What can be wrong with a trace of scales.

use serde::Serialize;

use crate::trace::finding::Side;

/// What is wrong. Of findings at one scale, the one that says most stands first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleKind {
    /// An image is in one of the traces alone, or has another label or other settings there.
    OtherImages,
    /// A scale was not told.
    MissingScale,
    /// A scale was told twice, or out of order.
    DuplicateScale,
    /// A scale was kept behind one of its round that was not.
    BehindRejected,
    /// The target's keys and values are not those of whole scales up to this one.
    CacheLength,
    /// Guidance has the weight of another scale.
    GuidanceWeight,
    /// What is committed is not the sum of the committed maps.
    Sum,
    /// A scale was read from its own tokens.
    OwnTokens,
    /// Logits are those of positions further on: the split of a pass counts scales that are not in it.
    PrefixOffset,
    /// A scale did not see the scales before its pass.
    Prefix,
    /// Logits are wrong, for no reason that was tried.
    Logits,
    /// A token is not what its logits and its noise choose.
    WrongChoice,
    /// Tokens differ.
    Token,
    /// Tokens differ where the target is undecided up to rounding.
    NearTie,
}

impl ScaleKind {
    /// Its name, as in the JSON.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// Something wrong.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleFinding {
    /// What kind.
    pub kind: ScaleKind,
    /// Whose; nobody's where that is not known.
    pub side: Option<Side>,
    /// Number of the first image that it concerns.
    pub image: u64,
    /// Scale, from 0.
    pub scale: usize,
    /// Position in the scale, row by row, where it is one.
    pub position: Option<usize>,
    /// In words.
    pub text: String,
}
