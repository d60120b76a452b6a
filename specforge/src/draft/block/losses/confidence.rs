//! The loss of a head that says how sure it is of a slot.

use tch::{Reduction, Tensor};

/// `[C]` binary cross-entropy between the confidence of logits `[C]` and the acceptance `[C]`: the probability that a token
/// sampled from the draft is accepted, which is `1 - sum abs(p - q) / 2` in other words. Nothing flows into the latter.
pub fn confidence(logits: &Tensor, acceptance: &Tensor) -> Tensor {
    let acceptance = acceptance.detach().to_kind(logits.kind());
    logits.binary_cross_entropy_with_logits::<&Tensor>(&acceptance, None, None, Reduction::None)
}
