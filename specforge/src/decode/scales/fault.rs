//! Mistakes that decoders of scales have really had (the seven of SDVAR's first version among them), each behind a switch that
//! only tests have: whether the tracer finds them is tested with the decoder that runs.

use std::cell::Cell;

/// A seeded mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScaleFault {
    /// A scale reads the embeddings of its own drafted tokens.
    OwnTokens,
    /// Logits of a pass are split as if it began with the cached scales.
    PrefixOffset,
    /// An accepted scale is added to what the draft has added it to already.
    AddedTwice,
    /// The target forgets what it has read before every pass.
    CacheReset,
    /// Scales of one pass see each other, and nothing of what is cached.
    MaskWithoutPrefix,
    /// Guidance counts scales from the beginning of the pass.
    RelativeWeight,
    /// Scales behind a rejected one are kept.
    RejectedKept,
}

thread_local! {
    static ACTIVE: Cell<Option<ScaleFault>> = const { Cell::new(None) };
    static FRESH: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread decodes with that mistake.
pub(crate) fn active(fault: ScaleFault) -> bool {
    ACTIVE.get() == Some(fault)
}

/// Runs `body` with a mistake.
pub(crate) fn with<T>(fault: Option<ScaleFault>, body: impl FnOnce() -> T) -> T {
    ACTIVE.set(fault);
    let result = body();
    ACTIVE.set(None);
    result
}

/// Whether nobody seeded a mistake.
pub(super) fn is_sound() -> bool {
    ACTIVE.get().is_none()
}

/// Notes that a cache was held against a fresh pass.
pub(super) fn count_fresh() {
    FRESH.set(FRESH.get() + 1);
}

/// How many caches this thread has held against a fresh pass.
pub(super) fn fresh_caches() -> usize {
    FRESH.get()
}
