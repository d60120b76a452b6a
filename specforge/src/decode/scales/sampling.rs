//! From logits of a scale to its map: guidance, what is ruled out, and the choice of every position.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::noise::{self, Place};
use crate::nn::sampling::rows_of_a_piece;

/// Places of keyed noise for each image: more than a scale has positions.
const PLACES: u64 = 1024;

/// Noise domain of a scale's choice.
pub fn domain(scale: usize) -> u64 {
    1 + scale as u64
}

/// How maps are chosen. The default is greedy and unguided.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleSampling {
    /// Strength of guidance at the last scale; it grows from 0 at the first one. 0 is none, and costs half.
    pub cfg: f64,
    /// Only so many of the largest logits stay, and those that equal the least of them; 0 is all of them.
    pub top_k: usize,
    /// Only the largest probabilities that reach this together stay; 0 is all of them.
    pub top_p: f64,
    /// Divides the logits behind the filters; 0 is greedy.
    pub temperature: f64,
    /// Key of the noise.
    pub seed: u64,
}

impl Default for ScaleSampling {
    fn default() -> Self {
        Self { cfg: 0.0, top_k: 0, top_p: 0.0, temperature: 0.0, seed: 0 }
    }
}

impl ScaleSampling {
    /// Refuses values that mean nothing.
    pub fn check(&self) -> Result<(), String> {
        let Self { cfg, top_p, temperature, .. } = *self;
        if !(cfg.is_finite() && cfg >= 0.0) {
            return Err(format!("cfg: expected 0 or more, got {cfg}"));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(format!("top_p: expected from 0 to 1, got {top_p}"));
        }
        match temperature.is_finite() && temperature >= 0.0 {
            true => Ok(()),
            false => Err(format!("temperature: expected 0 or more, got {temperature}")),
        }
    }

    /// Whether there is guidance: then every image has a second row, with the null label.
    pub fn is_guided(&self) -> bool {
        self.cfg != 0.0
    }

    /// Weight `t` of guidance at a scale, counted from the image's first one (FoundationVision/VAR @78b9539,
    /// `models/var.py:161-171`).
    pub fn weight(&self, scale: usize, scales: usize) -> f64 {
        match scales {
            0 | 1 => 0.0,
            _ => self.cfg * scale as f64 / (scales - 1) as f64,
        }
    }

    /// Logits of images from those of their rows: `[2 B, T, V]`, labels first and then the null label, to
    /// `(1 + t) label - t null`, `[B, T, V]`, with the weight `t` of their scale. Without guidance the rows are the images.
    pub fn mixed(&self, logits: &Tensor, weight: f64) -> Tensor {
        if !self.is_guided() {
            return logits.shallow_clone();
        }
        let halves = logits.chunk(2, 0);
        match halves.as_slice() {
            [label, null] => label * (1.0 + weight) - null * weight,
            _ => logits.shallow_clone(),
        }
    }

    /// Rules tokens out: top-k, then top-p of what is left, `[.., V]` both ways. What is ruled out becomes minus infinity.
    /// At least one token stays (FoundationVision/VAR @78b9539, `models/helpers.py:6-19`).
    pub fn filtered(&self, logits: &Tensor) -> Tensor {
        let mut kept = logits.shallow_clone();
        let vocabulary = logits.size().last().copied().unwrap_or(0);
        if self.top_k > 0 && (self.top_k as i64) < vocabulary {
            let (best, _) = kept.topk(self.top_k as i64, -1, true, true); // [.., k]
            let least = best.amin([-1i64].as_slice(), true); // [.., 1]
            kept = kept.masked_fill(&kept.lt_tensor(&least), f64::NEG_INFINITY);
        }
        if self.top_p > 0.0 {
            // Equal logits keep their order, so that what is ruled out depends on the row alone.
            let (sorted, order) = kept.sort_stable(true, -1, false); // [.., V], ascending
            let sums = sorted.softmax(-1, kept.kind()).cumsum(-1, kept.kind());
            let out = sums.le(1.0 - self.top_p);
            let _ = out.narrow(-1, vocabulary - 1, 1).fill_(0); // the most likely one stays
            let out = out.zeros_like().scatter(-1, &order, &out);
            kept = kept.masked_fill(&out, f64::NEG_INFINITY);
        }
        kept
    }

    /// The map of a scale from filtered logits `[B, T, V]`: `[B, T]` int64. `images` are the numbers of the rows' images,
    /// which key their noise.
    pub fn choice(&self, filtered: &Tensor, scale: usize, images: &[u64]) -> Result<Tensor> {
        if self.temperature == 0.0 {
            return Ok(filtered.f_argmax(-1, false)?);
        }
        let (rows, tokens, vocabulary) = filtered.size3()?;
        let flat = filtered.reshape([rows * tokens, vocabulary]);
        let ids = Tensor::arange(vocabulary, (Kind::Int64, filtered.device()));
        let places = self.places(images, tokens);
        if places.len() as i64 != rows * tokens {
            return Err(Error::Failed(format!("expected numbers of {rows} images, got {}", images.len())));
        }
        let size = rows_of_a_piece(vocabulary);
        let pieces = places.chunks(size).enumerate().map(|(number, places)| {
            let piece = flat.narrow(0, (number * size) as i64, places.len() as i64).to_kind(Kind::Double);
            let scores = piece / self.temperature + noise::gumbel_rows(domain(scale), places, &ids); // [R, V]
            scores.argmax(-1, false)
        });
        Ok(Tensor::cat(&pieces.collect::<Vec<_>>(), 0).view([rows, tokens]))
    }

    /// What decides the map of a scale, `[B, T, V]` float64: filtered logits with their noise, or without any where the largest
    /// logit decides.
    pub fn scores(&self, filtered: &Tensor, scale: usize, images: &[u64]) -> Result<Tensor> {
        let wide = filtered.to_kind(Kind::Double);
        if self.temperature == 0.0 {
            return Ok(wide);
        }
        let (_, tokens, vocabulary) = filtered.size3()?;
        let ids = Tensor::arange(vocabulary, (Kind::Int64, filtered.device()));
        let noise = noise::gumbel_rows(domain(scale), &self.places(images, tokens), &ids); // [B * T, V]
        Ok((wide / self.temperature).f_add(&noise.f_view_as(filtered)?)?)
    }

    /// Where the noise of some images' positions is drawn.
    pub(super) fn places(&self, images: &[u64], tokens: i64) -> Vec<Place> {
        let of = |image: u64| move |index| (self.seed, image.wrapping_mul(PLACES).wrapping_add(index));
        images.iter().flat_map(|&image| (0..tokens as u64).map(of(image))).collect()
    }

    /// Probabilities that [`Self::choice`] follows, `[.., V]` float64.
    pub(super) fn probabilities(&self, filtered: &Tensor) -> Tensor {
        let wide = filtered.to_kind(Kind::Double);
        match self.temperature == 0.0 {
            true => wide.argmax(-1, false).one_hot(wide.size().last().copied().unwrap_or(1)).to_kind(Kind::Double),
            false => (wide / self.temperature).softmax(-1, Kind::Double),
        }
    }
}

/// The map of a scale from noise that is given: Gumbel noise `[B, T, V]` beside filtered logits at temperature 1.
pub fn choice_from(filtered: &Tensor, gumbel: &Tensor) -> Tensor {
    (filtered.to_kind(Kind::Double) + gumbel.to_kind(Kind::Double)).argmax(-1, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sampling: ScaleSampling, row: &[f32]) -> Vec<bool> {
        Vec::try_from(sampling.filtered(&Tensor::from_slice(row)).isfinite()).unwrap()
    }

    #[test]
    fn top_k_keeps_ties_and_top_p_the_fewest_that_reach_it() {
        let top_k = ScaleSampling { top_k: 2, ..ScaleSampling::default() };
        assert_eq!(kept(top_k, &[1.0, 3.0, 2.0, 2.0]), [false, true, true, true]);
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let count = |top_p| {
            let sampling = ScaleSampling { top_p, ..ScaleSampling::default() };
            kept(sampling, &row).into_iter().filter(|&kept| kept).count()
        };
        assert_eq!([1e-6, 0.49, 0.51, 0.79, 0.81, 0.96, 0.0].map(count), [1, 1, 2, 2, 3, 4, 4]);
        // Top-p counts what top-k leaves: of 0.5 and 0.3, the first is 0.625.
        let both = ScaleSampling { top_k: 2, top_p: 0.6, ..ScaleSampling::default() };
        assert_eq!(kept(both, &row), [true, false, false, false]);
    }

    #[test]
    fn guidance_grows_with_the_scale() {
        let sampling = ScaleSampling { cfg: 1.5, ..ScaleSampling::default() };
        assert_eq!([0, 1, 2, 3].map(|scale| sampling.weight(scale, 4)), [0.0, 0.5, 1.0, 1.5]);
        assert_eq!(sampling.weight(0, 1), 0.0);
        let rows = Tensor::from_slice(&[1.0f64, 2.0, 10.0, 20.0]).view([2, 1, 2]);
        let mixed = Vec::<f64>::try_from(sampling.mixed(&rows, sampling.weight(2, 4)).flatten(0, -1)).unwrap();
        assert_eq!(mixed, [2.0 - 10.0, 4.0 - 20.0]);
    }

    #[test]
    fn a_row_is_chosen_alike_whoever_is_beside_it() {
        let sampling = ScaleSampling { temperature: 0.8, seed: 5, ..ScaleSampling::default() };
        let logits = noise::normal(&[3, 4, 9], 1.0, 1, 1);
        let all = sampling.choice(&logits, 2, &[7, 8, 9]).unwrap();
        for (row, image) in [7u64, 8, 9].into_iter().enumerate() {
            let one = sampling.choice(&logits.narrow(0, row as i64, 1), 2, &[image]).unwrap();
            assert!(one.get(0).equal(&all.get(row as i64)));
        }
        let row: Vec<f64> = Vec::try_from(logits.get(1).get(3).to_kind(Kind::Double)).unwrap();
        let want = noise::gumbel_argmax(5, 3, 8 * 1024 + 3, &row, 0.8);
        assert_eq!(all.int64_value(&[1, 3]), want as i64);
        assert!(sampling.choice(&logits, 2, &[7]).is_err());
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        let default = ScaleSampling::default();
        for (sampling, name) in [
            (ScaleSampling { cfg: -1.0, ..default }, "cfg"),
            (ScaleSampling { cfg: f64::NAN, ..default }, "cfg"),
            (ScaleSampling { top_p: 1.1, ..default }, "top_p"),
            (ScaleSampling { temperature: f64::INFINITY, ..default }, "temperature"),
        ] {
            assert!(sampling.check().unwrap_err().starts_with(name));
        }
        assert!(default.check().is_ok());
    }
}
