//! Mistakes that speculative decoders have really had, each behind a switch that only tests have: whether the tracer
//! finds them is tested with the decoder that runs, not with invented traces.

use std::cell::Cell;

use crate::tree::TokenTree;

/// A seeded mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The row of the j-th node is recorded for the j-th accepted token, not that of its own node.
    RowByDepth,
    /// The cache keeps the whole tree.
    NoRollback,
    /// The cache counts one token more than was kept.
    DoubleAdvance,
    /// The last prompt token is run again behind the prompt.
    PromptTokenTwice,
    /// A node does not see its parent.
    DroppedParent,
    /// A node sees its siblings.
    SeesSiblings,
    /// All nodes stand at the root's position.
    PositionsWithoutDepth,
    /// All nodes stand one position further.
    PositionsShifted,
    /// A correction is cached at once and fed again as the next root.
    CorrectionTwice,
    /// The root of the tree is not kept.
    PendingOmitted,
    /// The values of the accepted path are stored backwards, its keys are not.
    CompactionOrder,
    /// The first nodes of the tree are kept, not those of the path.
    CompactionByDepth,
    /// The accepted path is moved in place, last node first.
    CompactionOverlaps,
    /// An accepted run goes on behind a stop token.
    StopIgnored,
    /// A guess that the target did not choose is accepted behind a run.
    OneTooMany,
    /// Noise is keyed by the node.
    NoiseBySlot,
    /// The repetition penalty does not know of the path.
    ContextWithoutPath,
    /// Every row uses the longest row's cache length.
    RaggedLength,
    /// Token 0 counts as guessed by padding.
    PaddingMatches,
    /// The token behind a leaf is chosen from its parent's row.
    BonusFromParent,
    /// Rows are recorded in half precision.
    RecordedHalf,
    /// A correction is recorded as accepted.
    SourceLabel,
    /// The second token of a run is not told.
    Untold,
    /// The draft reads the features of the token before.
    DraftFeaturesShifted,
    /// The draft's cache keeps what it guessed.
    DraftNotRolledBack,
    /// The draft's cache keeps its guesses in the place of what was committed.
    DraftStale,
    /// The draft stands one position further.
    DraftPositionsShifted,
    /// The draft's rows change places when one leaves.
    DraftRowsMixed,
}

thread_local! {
    static ACTIVE: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Whether this thread decodes with that mistake.
pub(crate) fn active(fault: Fault) -> bool {
    ACTIVE.get() == Some(fault)
}

/// Runs `body` with a mistake.
pub(crate) fn with<T>(fault: Option<Fault>, body: impl FnOnce() -> T) -> T {
    ACTIVE.set(fault);
    let result = body();
    ACTIVE.set(None);
    result
}

/// What keys the noise of a choice.
pub(super) fn noise_position(position: usize, committed: usize, path: &[usize]) -> usize {
    if active(Fault::NoiseBySlot) { committed + path[path.len() - 1] } else { position }
}

/// Path to the row that a token is chosen from.
pub(super) fn chosen_from<'a>(tree: &TokenTree, path: &'a [usize]) -> &'a [usize] {
    let leaf = tree.topology().children(path[path.len() - 1]).next().is_none();
    let wrong = active(Fault::BonusFromParent) && leaf && path.len() > 1;
    if wrong { &path[..path.len() - 1] } else { path }
}

/// The node that guessed a token.
pub(super) fn child(tree: &TokenTree, node: usize, token: u32, child: Option<usize>) -> Option<usize> {
    let padding = tree.len() - 1;
    let wrong = active(Fault::PaddingMatches) && child.is_none() && token == 0 && padding != node;
    if wrong { Some(padding) } else { child }
}
