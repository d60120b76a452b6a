//! What a target's head says of all its tokens behind every stored state, noted when the states were captured.
//!
//! A draft with a vocabulary of its own learns from the target's logits of that part and from two numbers that take all of
//! them: the likeliest token, and the logarithm of the sum of exponentials. Noted once, no training that reads the store
//! passes over the whole vocabulary again. They are said of the states as they are stored, which are those that are trained
//! on, in float32.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::features::WholeVocabulary;
use crate::nn::Head;

/// Rows whose logits are there at once.
pub(super) const ROWS_PER_PASS: usize = 128;

impl WholeVocabulary {
    /// Adds what a head in float32 says of the next states, `[n, H]`.
    pub(super) fn ask(&mut self, states: &Tensor, head: &Head) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let states = states.f_to_device(head.device())?.f_to_kind(Kind::Float)?; // [n, H]
        let logits = head.logits(&states); // [n, V]
        self.likeliest.extend(Vec::<i64>::try_from(logits.f_argmax(1, false)?)?);
        let log_sum_exp = logits.f_logsumexp([1].as_slice(), false)?; // [n]
        self.log_sum_exp.extend(Vec::<f32>::try_from(log_sum_exp)?);
        Ok(())
    }
}
