//! What stands at a masked position, and how sure the model is of it.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::noise;

/// Noise domain of masked diffusion: its positions are those of the text.
pub const DOMAIN: u64 = 64;
/// Noise domain of the order in which random remasking makes tokens known.
const ORDER: u64 = 65;

/// A pass that something is drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Key of the text: texts of one batch have different noise.
    pub key: u64,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over the block, from 0.
    pub step: usize,
}

/// Where random numbers come from.
pub trait Draws {
    /// Gumbel noise of all tokens of a vocabulary at absolute positions, `[n, V]` float64.
    fn gumbel(&mut self, draw: Draw, positions: &[i64], vocabulary: i64, device: Device) -> Result<Tensor>;
    /// How early each position becomes known where the order is random, larger first.
    fn order(&mut self, draw: Draw, positions: &[i64]) -> Result<Vec<f64>>;
}

/// Keyed noise: a position has the same noise in every pass, so that a text depends on its seed alone, whatever is cached,
/// batched or guessed.
#[derive(Debug, Clone, Copy)]
pub struct Keyed {
    /// Seed of all texts.
    pub seed: u64,
}

impl Draws for Keyed {
    fn gumbel(&mut self, draw: Draw, positions: &[i64], vocabulary: i64, device: Device) -> Result<Tensor> {
        let seed = self.seed.wrapping_add(draw.key);
        let places: Vec<noise::Place> = positions.iter().map(|&position| (seed, position as u64)).collect();
        Ok(noise::gumbel_rows(DOMAIN, &places, &Tensor::arange(vocabulary, (Kind::Int64, device))))
    }

    fn order(&mut self, draw: Draw, positions: &[i64]) -> Result<Vec<f64>> {
        let seed = self.seed.wrapping_add(draw.key);
        let of = |&position: &i64| noise::uniform_of(noise::keyed_bits(seed, ORDER, position as u64, draw.step as u64));
        Ok(positions.iter().map(of).collect())
    }
}

/// Tokens with the probability that the model gives each of them, without noise.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choice {
    /// The token of each position.
    pub tokens: Vec<i64>,
    /// Its probability.
    pub confidence: Vec<f64>,
}

impl Choice {
    /// The likeliest tokens of `logits [n, V]`, or with noise `[n, V]` the likeliest of `logits + temperature noise`. The mask
    /// token is never chosen: a position that took it would be masked for ever. Probabilities are float64's, over all
    /// tokens.
    pub fn of(logits: &Tensor, mask: i64, noise: Option<(f64, &Tensor)>) -> Result<Self> {
        let wide = logits.to_kind(Kind::Double); // [n, V]
        let scores = match noise {
            Some((temperature, noise)) => &wide + noise * temperature,
            None => wide.copy(),
        };
        let _ = scores.select(-1, mask).fill_(f64::NEG_INFINITY);
        let tokens = scores.argmax(-1, false); // [n]
        let confidence = wide.softmax(-1, Kind::Double).gather(1, &tokens.unsqueeze(1), false).squeeze_dim(1); // [n]
        let confidence = Vec::<f64>::try_from(confidence.to_device(Device::Cpu))?;
        if confidence.iter().any(|sure| sure.is_nan()) {
            return Err(Error::Failed("the model gives logits that are no numbers (NaN or infinity)".to_owned()));
        }
        Ok(Self { tokens: Vec::<i64>::try_from(tokens.to_device(Device::Cpu))?, confidence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[[f64; 4]]) -> Tensor {
        Tensor::from_slice2(rows)
    }

    #[test]
    fn the_mask_is_never_chosen_and_counts_among_the_probabilities() {
        let choice = Choice::of(&logits(&[[1.0, 2.0, 9.0, 0.0], [0.0, 0.0, 0.0, 0.5]]), 2, None).unwrap();
        assert_eq!(choice.tokens, [1, 3]);
        let sum = 1f64.exp() + 2f64.exp() + 9f64.exp() + 1.0;
        assert!((choice.confidence[0] - 2f64.exp() / sum).abs() < 1e-15);
        let broken = Choice::of(&logits(&[[f64::NAN, 2.0, 9.0, 0.0]]), 2, None);
        assert!(broken.unwrap_err().to_string().contains("no numbers"));
    }

    /// Keyed noise samples the softmax at the temperature, and confidence is that without noise.
    #[test]
    fn noise_samples_and_confidence_has_none() {
        let row = [0.0, 1.0, -9e9, 0.5];
        let rows = logits(&vec![row; 4000]);
        let positions: Vec<i64> = (0..4000).collect();
        let draw = Draw { key: 3, block: 0, step: 0 };
        let noise = Keyed { seed: 7 }.gumbel(draw, &positions, 4, Device::Cpu).unwrap();
        let choice = Choice::of(&rows, 2, Some((0.5, &noise))).unwrap();
        let at = |token: usize| (row[token] / 0.5).exp();
        let count = choice.tokens.iter().filter(|&&token| token == 1).count() as f64 / 4000.0;
        assert!((count - at(1) / (at(0) + at(1) + at(3))).abs() < 0.03, "{count}");
        let plain: f64 = [0, 1, 3].map(|token: usize| row[token].exp()).iter().sum();
        for (token, sure) in choice.tokens.iter().zip(&choice.confidence) {
            assert!((sure - row[*token as usize].exp() / plain).abs() < 1e-12);
        }
        // The noise is that of domain 64, at absolute positions, whatever the pass.
        assert_eq!(noise.double_value(&[12, 3]), noise::keyed_gumbel(10, DOMAIN, 12, 3));
        let later = Keyed { seed: 7 }.gumbel(Draw { block: 4, step: 9, ..draw }, &positions, 4, Device::Cpu).unwrap();
        assert!(later.equal(&noise));
    }
}
