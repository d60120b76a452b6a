//! Mistakes of the published notebook and its program (`llada/debug_tokenskip_trace.ipynb` of HanHoupu/fastllmskip), each behind a
//! switch that only tests have: whether the tracer finds them is tested with the decoder that runs.

use std::cell::Cell;

use tch::{Kind, Tensor};

use super::network::Text;

/// A seeded mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiffusionFault {
    /// Row `j` of a block is compared with position `j` of the whole text.
    OtherOrigin,
    /// Heads of the rows that run on are turned by positions within the block.
    LocalPositions,
    /// A row that is skipped gets the logits of what the first layers made of it.
    EarlyLogits,
    /// Cosines are computed in bfloat16.
    NarrowCosines,
    /// Rows are skipped by another threshold than the one that was asked for.
    OtherThreshold,
    /// Only the first logits of a row are looked at.
    FirstLogitsOnly,
    /// Another decode of the same text, which is further on, writes to the same cache.
    SharedCache,
    /// A block ends after a fixed number of passes.
    StepBudget,
}

thread_local! {
    static ACTIVE: Cell<Option<DiffusionFault>> = const { Cell::new(None) };
}

/// Whether this thread decodes with that mistake.
pub(crate) fn active(fault: DiffusionFault) -> bool {
    ACTIVE.get() == Some(fault)
}

/// Runs `body` with a mistake.
pub(crate) fn with<T>(fault: Option<DiffusionFault>, body: impl FnOnce() -> T) -> T {
    ACTIVE.set(fault);
    let result = body();
    ACTIVE.set(None);
    result
}

/// A value, or what the mistake makes of it.
pub(super) fn seen<T>(fault: DiffusionFault, value: T, wrong: impl FnOnce(T) -> T) -> T {
    if active(fault) { wrong(value) } else { value }
}

/// Cosines of states `[R, W, H]` in bfloat16, `[R, W]`.
pub(super) fn narrow_cosine(before: &Tensor, now: &Tensor) -> Tensor {
    let [before, now] = [before, now].map(|state| state.to_kind(Kind::BFloat16));
    let sum = |product: Tensor| product.sum_dim_intlist([-1i64].as_slice(), false, Kind::BFloat16);
    let norms = sum(before.square()).sqrt() * sum(now.square()).sqrt();
    (sum(before * now) / norms).to_kind(Kind::Double)
}

/// Texts some steps later: masks of which every other is known.
pub(super) fn further_on(texts: &[&Text], mask: i64) -> Vec<Text> {
    let known = |(at, &id): (usize, &i64)| if id == mask && at % 2 == 0 { 1 } else { id };
    let later = |text: &&Text| Text { ids: text.ids.iter().enumerate().map(known).collect(), prompt: text.prompt };
    texts.iter().map(later).collect()
}
