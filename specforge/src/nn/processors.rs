//! What is done to a row of logits before a token is chosen from it: repetition penalty, temperature, top-k, top-p, in
//! the order of Hugging Face's `generate` (transformers 5.8.1, `generation/logits_process.py`).
//!
//! A row is float64. On the CPU, processing happens only for rows that a token is really chosen from; on a GPU, for all rows
//! of a pass where they are, because a row that travels costs more. What a row becomes depends on the row and on the tokens
//! before it alone, so plain and speculative decoding process it alike.

use serde::{Deserialize, Serialize};
use specforge_hot::rows;
pub use specforge_hot::rows::{argmax, softmax};
use tch::{Kind, Tensor};

/// How a row of logits is changed. The default changes nothing and chooses greedily.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Processors {
    /// Divides the logits; 0 is greedy.
    pub temperature: f64,
    /// Only this many of the largest logits stay; 0 is all of them.
    pub top_k: usize,
    /// Only the largest probabilities that together reach this stay; 1 is all of them.
    pub top_p: f64,
    /// Makes tokens that are already there less likely, above 1, or likelier, below: positive logits are divided by it,
    /// negative ones multiplied.
    pub repetition_penalty: f64,
}

impl Default for Processors {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 }
    }
}

impl Processors {
    /// Sampling at a temperature, with nothing else.
    pub fn at_temperature(temperature: f64) -> Self {
        Self { temperature, ..Self::default() }
    }

    /// Refuses values that mean nothing.
    pub fn check(&self) -> Result<(), String> {
        let Self { temperature, top_p, repetition_penalty, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(format!("temperature: expected 0 or more, got {temperature}"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(format!("top_p: expected above 0 and at most 1, got {top_p}"));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(format!("repetition_penalty: expected above 0, got {repetition_penalty}"));
        }
        Ok(())
    }

    /// Whether the most likely token is chosen.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether a greedy choice is that of the row as it is.
    pub fn leaves_the_greedy_choice(&self) -> bool {
        self.is_greedy() && self.repetition_penalty == 1.0
    }

    /// Changes a row `[V]` that follows the tokens of `context`. What is ruled out becomes minus infinity.
    pub fn apply(&self, row: &mut [f64], context: impl IntoIterator<Item = u32>) {
        if self.repetition_penalty != 1.0 {
            let mut seen = std::collections::HashSet::new();
            for token in context {
                let Some(logit) = row.get_mut(token as usize).filter(|_| seen.insert(token)) else { continue };
                *logit = if *logit < 0.0 { *logit * self.repetition_penalty } else { *logit / self.repetition_penalty };
            }
        }
        if self.is_greedy() {
            return;
        }
        if self.temperature != 1.0 {
            rows::divide(row, self.temperature);
        }
        rows::keep_largest(row, self.top_k);
        if self.top_p < 1.0 {
            rows::keep_nucleus(row, self.top_p);
        }
    }

    /// Whether [`Self::apply_rows`] knows all of it: everything but a penalty, which depends on each row's tokens.
    pub fn depend_on_rows_alone(&self) -> bool {
        self.repetition_penalty == 1.0
    }

    /// What [`Self::apply`] does, without a penalty, to many rows where they are: `[R, V]` to float64 `[R, V]`.
    pub fn apply_rows(&self, logits: &Tensor) -> Tensor {
        let mut all = logits.to_kind(Kind::Double);
        if self.is_greedy() {
            return all;
        }
        if self.temperature != 1.0 {
            // Not in place: a row that is float64 already is the caller's own.
            all = all.divide_scalar(self.temperature);
        }
        let size = all.size()[1];
        if self.top_k > 0 && (self.top_k as i64) < size {
            let (best, _) = all.topk(self.top_k as i64, -1, true, false); // [R, k]
            let least = best.amin([-1i64].as_slice(), true); // [R, 1]
            all = all.masked_fill(&all.lt_tensor(&least), f64::NEG_INFINITY);
        }
        if self.top_p < 1.0 {
            // Equal probabilities keep their order: the result depends on the row alone.
            let (sorted, order) = all.softmax(-1, Kind::Double).sort_stable(true, -1, true); // [R, V]
            let before = sorted.cumsum(-1, Kind::Double) - &sorted;
            let beyond = before.ge(self.top_p);
            let _ = beyond.narrow(1, 0, 1).fill_(0); // the most likely token stays
            let beyond = beyond.zeros_like().scatter(1, &order, &beyond);
            all = all.masked_fill(&beyond, f64::NEG_INFINITY);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    fn applied(processors: Processors, row: &[f64], context: &[u32]) -> Vec<f64> {
        processors.check().unwrap();
        let mut row = row.to_vec();
        processors.apply(&mut row, context.iter().copied());
        row
    }

    const OUT: f64 = f64::NEG_INFINITY;

    #[test]
    fn top_k_keeps_ties_with_the_least() {
        let processors = Processors { top_k: 2, ..Processors::at_temperature(1.0) };
        assert_eq!(applied(processors, &[1.0, 3.0, 2.0, 2.0, 0.0], &[]), [OUT, 3.0, 2.0, 2.0, OUT]);
    }

    #[test]
    fn top_p_keeps_the_fewest_tokens_that_reach_it() {
        let row: Vec<f64> = [0.5f64, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |top_p| {
            let row = applied(Processors { top_p, ..Processors::at_temperature(1.0) }, &row, &[]);
            row.iter().filter(|logit| logit.is_finite()).count()
        };
        assert_eq!([0.1, 0.5, 0.51, 0.79, 0.81, 0.96, 1.0].map(kept), [1, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn temperature_comes_before_top_p() {
        let processors = Processors { temperature: 0.5, top_p: 0.7, ..Processors::default() };
        // Squared and normed, 0.6 and 0.4 are 0.69 and 0.31: one is not enough.
        assert_eq!(applied(processors, &[0.6f64.ln(), 0.4f64.ln()], &[]).iter().filter(|l| l.is_finite()).count(), 2);
        let processors = Processors { top_p: 0.68, ..processors };
        assert_eq!(applied(processors, &[0.6f64.ln(), 0.4f64.ln()], &[]).iter().filter(|l| l.is_finite()).count(), 1);
    }

    #[test]
    fn the_penalty_counts_a_token_once_and_lowers_negative_logits() {
        let processors = Processors { repetition_penalty: 2.0, ..Processors::default() };
        assert_eq!(applied(processors, &[4.0, -1.0, 3.0], &[0, 0, 1, 77]), [2.0, -2.0, 3.0]);
        assert!(!processors.leaves_the_greedy_choice() && processors.is_greedy());
    }

    #[test]
    fn many_rows_become_what_each_becomes_alone() {
        drawn::seed(4);
        let logits = drawn::randn([6, 40], (Kind::Double, tch::Device::Cpu)) * 3.0;
        let _ = logits.narrow(0, 2, 1).fill_(1.0); // all alike
        let _ = logits.narrow(1, 7, 1).fill_(f64::NEG_INFINITY);
        for (temperature, top_k, top_p) in
            [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 40, 0.3), (2.0, 0, 0.9), (0.5, 7, 0.8), (1.0, 1, 0.5)]
        {
            let processors = Processors { temperature, top_k, top_p, ..Processors::default() };
            let got = processors.apply_rows(&logits);
            for row in 0..6 {
                let values: Vec<f64> = Vec::try_from(logits.get(row)).unwrap();
                let want = applied(processors, &values, &[]);
                assert_eq!(Vec::<f64>::try_from(got.get(row)).unwrap(), want, "{processors:?}, row {row}");
            }
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for (processors, name) in [
            (Processors::at_temperature(-1.0), "temperature"),
            (Processors::at_temperature(f64::NAN), "temperature"),
            (Processors { top_p: 0.0, ..Processors::default() }, "top_p"),
            (Processors { top_p: 1.1, ..Processors::default() }, "top_p"),
            (Processors { repetition_penalty: 0.0, ..Processors::default() }, "repetition_penalty"),
        ] {
            assert!(processors.check().unwrap_err().starts_with(name));
        }
    }

    #[test]
    fn rows_without_a_finite_logit_are_uniform() {
        assert_eq!(softmax(&[OUT, OUT]), [0.5, 0.5]);
        assert_eq!(argmax(&[OUT, OUT]), 0);
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), 1);
    }
}
