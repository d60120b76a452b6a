//! What can be wrong with a trace, and whose fault it is.

use serde::Serialize;

/// One of the two traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

/// What is wrong. Of findings at one position, the one that says most stands first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A parent that does not stand before its child.
    Orphan,
    /// Two siblings guess one token.
    DuplicateSibling,
    /// A position was not told.
    MissingPosition,
    /// A position was told twice.
    DuplicatePosition,
    /// A token behind a stop token or the limit.
    AfterEnd,
    /// The recorded end is not the text's.
    WrongEnd,
    /// The target's cache does not hold all committed tokens but the last.
    CacheLength,
    /// A tree that does not begin with the last committed token.
    WrongRoot,
    /// Slot, parent or depth are not the tree's.
    WrongPlace,
    /// The accepted tokens are no path of the tree.
    WrongPath,
    /// Accepted, correction or bonus: another one.
    WrongSource,
    /// The row recorded is another node's.
    WrongSlot,
    /// The token is the choice of another node's row.
    WrongRow,
    /// The noise is another position's.
    NoisePosition,
    /// The processors did not know of the tokens on the path.
    ProcessorContext,
    /// A guess was accepted that the target did not choose.
    UnchosenAccepted,
    /// The token is not its row's choice.
    WrongChoice,
    /// Rows lost precision when they were recorded.
    StoragePrecision,
    /// Nodes stood at wrong positions.
    Positions,
    /// Nodes saw too little or too much of the tree.
    Mask,
    /// What the pass saw of the cache is not the committed text.
    CacheContents,
    /// A row of a tree is wrong, for no reason that was tried.
    TreePass,
    /// The row behind the prompt is wrong.
    Prefill,
    /// Rows differ.
    Logits,
    /// Tokens differ.
    Token,
    /// Tokens differ where the target is undecided up to rounding.
    NearTie,
    /// Two requests of one tag have other prompts, or one of them is not there.
    OtherRequest,
    /// The draft's cache does not hold what it should.
    DraftCacheLength,
    /// The draft guesses otherwise behind the same text.
    DraftTree,
    /// The draft scores its guesses otherwise.
    DraftScores,
}

impl Kind {
    /// Its name, as in the JSON.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// Something wrong.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What kind.
    pub kind: Kind,
    /// Whose; nobody's where both are right or that is not known.
    pub side: Option<Side>,
    /// Tag of the request.
    pub tag: u64,
    /// Absolute position.
    pub position: usize,
    /// Line of the trace, where one record shows it.
    pub line: Option<usize>,
    /// In words.
    pub text: String,
}
