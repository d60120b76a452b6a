//! The objective of masked diffusion: tokens of a text are masked, each with one probability that is drawn for the text, and
//! the model is asked for them. LLaDA (<https://arxiv.org/abs/2502.09992>), as `GUIDELINES.md` of ML-GSAI/LLaDA, commit
//! b7e6c3565f194352da44b38dd12b6970597309f3, writes it down.
//!
//! A masked token's cross-entropy is divided by the probability with which it was masked, which makes the sum a bound of the
//! text's likelihood. Pretraining masks anything and divides by all tokens of the batch. Fine-tuning masks answers alone and
//! divides by the length of each answer.
//!
//! Shape legend: `B` texts, `T` tokens of the longest, `V` vocabulary.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::noise;

/// Noise domain of what is masked in training.
const DOMAIN: u64 = 66;

/// The least probability of a mask: a text of which nothing is masked teaches nothing, and its share would be divided by 0.
const LEAST: f64 = 1e-3;

/// A text of which some tokens are masked.
#[derive(Debug, Clone, PartialEq)]
pub struct Corrupted {
    /// Its tokens, masks among them.
    pub ids: Vec<i64>,
    /// Which are masked.
    pub masked: Vec<bool>,
    /// The probability with which each of those that may be was masked: `(1 - 0.001) t + 0.001`, `t` uniform from 0 to 1.
    pub probability: f64,
}

impl Corrupted {
    /// Masks tokens of a text that may be masked. What is masked depends on the seed and the text's key alone.
    pub fn of(ids: &[i64], may: &[bool], mask: i64, (seed, key): (u64, u64)) -> Result<Self> {
        if ids.len() != may.len() {
            let (tokens, marks) = (ids.len(), may.len());
            return Err(Error::Failed(format!("masking: the text has {tokens} tokens and {marks} marks")));
        }
        let uniform = |counter: u64| noise::uniform_of(noise::keyed_bits(seed, DOMAIN, key, counter));
        let probability = (1.0 - LEAST) * uniform(0) + LEAST;
        let masked: Vec<bool> =
            may.iter().zip(1..).map(|(&may, counter)| may && uniform(counter) < probability).collect();
        let ids = ids.iter().zip(&masked).map(|(&id, &masked)| if masked { mask } else { id }).collect();
        Ok(Self { ids, masked, probability })
    }
}

/// What sums are divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divisor {
    /// All tokens of the batch.
    #[serde(rename = "pretraining")]
    Tokens,
    /// Tokens of each text that may be masked, and then the texts.
    #[serde(rename = "fine_tuning")]
    #[default]
    Answers,
}

impl Divisor {
    /// Weight of a masked token of a text before the whole batch divides it; `may` tokens of the text may be masked.
    pub fn within(self, text: &Corrupted, may: usize) -> f64 {
        match self {
            Self::Tokens => 1.0 / text.probability,
            Self::Answers => 1.0 / (text.probability * may as f64),
        }
    }

    /// What a text adds to the batch's divisor.
    pub fn of(self, text: &Corrupted, may: usize) -> f64 {
        match self {
            Self::Tokens => text.masked.len() as f64,
            Self::Answers => f64::from(u8::from(may > 0)),
        }
    }
}

/// Weight of each token in the objective, `[B, T]` float64; texts that are shorter than the longest are padded with zeros.
/// `may` says how many tokens of each text may be masked.
pub fn weights(texts: &[Corrupted], may: &[usize], divisor: Divisor) -> Result<Tensor> {
    if texts.len() != may.len() {
        return Err(Error::Failed(format!("weights: {} texts and {} lengths", texts.len(), may.len())));
    }
    let longest = texts.iter().map(|text| text.masked.len()).max().unwrap_or(0);
    let by: f64 = texts.iter().zip(may).map(|(text, &may)| divisor.of(text, may)).sum();
    let mut weights = vec![0.0; texts.len() * longest];
    for (index, (text, &may)) in texts.iter().zip(may).enumerate() {
        for (place, _) in text.masked.iter().enumerate().filter(|(_, masked)| **masked) {
            weights[index * longest + place] = divisor.within(text, may) / by;
        }
    }
    Ok(Tensor::from_slice(&weights).view([texts.len() as i64, longest as i64]))
}

/// The objective: the weighted sum of cross-entropies of the true tokens `ids [B, T]` under `logits [B, T, V]`, in float32 at
/// least. Scalar, with a graph where the logits have one.
pub fn objective(logits: &Tensor, ids: &Tensor, weights: &Tensor) -> Tensor {
    let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let chosen = logits.log_softmax(-1, wide).gather(-1, &ids.unsqueeze(-1), false).squeeze_dim(-1); // [B, T]
    (chosen * weights.to_kind(wide).to_device(logits.device())).sum(wide).neg()
}

#[cfg(test)]
mod tests {

    use super::*;

    /// Two texts of different lengths, the first with a prompt of two tokens.
    fn texts() -> (Vec<Vec<i64>>, Vec<Vec<bool>>, Vec<Corrupted>) {
        let ids = vec![vec![1, 2, 3, 4, 5, 1], vec![3, 2, 1, 0]];
        let may = vec![vec![false, false, true, true, true, true], vec![true; 4]];
        let corrupted = ids.iter().zip(&may).zip(0..);
        let corrupted = corrupted.map(|((ids, may), key)| Corrupted::of(ids, may, 6, (10, key)).unwrap()).collect();
        (ids, may, corrupted)
    }

    #[test]
    fn the_objective_is_its_formula() {
        let (ids, may, corrupted) = texts();
        let logits = noise::normal(&[2, 6, 7], 1.0, 4, 1).to_kind(Kind::Double).set_requires_grad(true);
        let padded: Vec<i64> = ids.iter().flat_map(|ids| ids.iter().copied().chain([0; 6]).take(6)).collect();
        let padded = Tensor::from_slice(&padded).view([2, 6]);
        let counts: Vec<usize> = may.iter().map(|may| may.iter().filter(|may| **may).count()).collect();
        assert!(corrupted.iter().all(|text| text.masked.iter().any(|masked| *masked)), "a seed that masks something");
        for divisor in [Divisor::Tokens, Divisor::Answers] {
            let weights = weights(&corrupted, &counts, divisor).unwrap();
            let got = objective(&logits, &padded, &weights);
            let mut want = 0.0;
            for (row, (ids, text)) in ids.iter().zip(&corrupted).enumerate() {
                let mut sum = 0.0;
                for (place, &id) in ids.iter().enumerate().filter(|(place, _)| text.masked[*place]) {
                    let at = |token: i64| logits.double_value(&[row as i64, place as i64, token]);
                    let total: f64 = (0..7).map(|token| at(token).exp()).sum();
                    sum += (total.ln() - at(id)) / text.probability;
                }
                want += match divisor {
                    Divisor::Tokens => sum / 10.0,
                    Divisor::Answers => sum / counts[row] as f64 / 2.0,
                };
            }
            assert!((got.double_value(&[]) - want).abs() < 1e-12, "{divisor:?}");
            // Nothing is learned of what was not masked.
            let gradient = Tensor::run_backward(&[&got], &[&logits], false, false).remove(0);
            let moved = gradient.abs().sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).gt(0.0);
            assert!(moved.equal(&weights.gt(0.0)));
        }
    }

    #[test]
    fn masks_are_where_they_may_be_as_often_as_their_text_says() {
        let may: Vec<bool> = (0..4000).map(|place| place >= 1000).collect();
        let ids = vec![5; 4000];
        let mut rates = Vec::new();
        for key in 0..40 {
            let text = Corrupted::of(&ids, &may, 9, (3, key)).unwrap();
            assert!(!text.masked[..1000].contains(&true));
            assert!(text.ids.iter().zip(&text.masked).all(|(&id, &masked)| id == if masked { 9 } else { 5 }));
            let rate = text.masked.iter().filter(|masked| **masked).count() as f64 / 3000.0;
            assert!((rate - text.probability).abs() < 0.04, "{rate} and {}", text.probability);
            rates.push(text.probability);
        }
        let mean = rates.iter().sum::<f64>() / 40.0;
        assert!((mean - 0.5).abs() < 0.15 && rates.iter().all(|rate| (1e-3..1.0).contains(rate)), "{mean}");
        let of = |key| Corrupted::of(&ids, &may, 9, (3, key)).unwrap();
        assert!(of(1) == of(1) && of(1) != of(2));
        assert!(Corrupted::of(&ids, &may[1..], 9, (3, 0)).is_err());
    }
}
