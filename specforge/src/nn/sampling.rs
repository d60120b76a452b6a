//! From a row of logits to a token.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::noise;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The most likely token.
    Greedy,
    /// A sample at a temperature, with noise keyed by seed and position.
    Keyed {
        /// Divides the logits; above zero.
        temperature: f64,
        /// Key of the noise.
        seed: u64,
    },
}

impl Sampling {
    /// Chooses one token for each row of `logits [R, V]`; `keys` gives each row's own seed offset and its position.
    pub fn choose(&self, logits: &Tensor, keys: &[(u64, u64)]) -> Vec<i64> {
        match *self {
            Sampling::Greedy => {
                let chosen = logits.argmax(-1, false); // [R]
                Vec::try_from(chosen).expect("argmax gives int64")
            }
            Sampling::Keyed { temperature, seed } => {
                let vocabulary = logits.size()[1] as usize;
                let logits = logits.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
                let values: Vec<f64> = Vec::try_from(logits).expect("logits are float64 now"); // R * V
                let rows = values.par_chunks_exact(vocabulary).zip(keys);
                rows.map(|(row, &(row_seed, position))| {
                    noise::gumbel_argmax(seed.wrapping_add(row_seed), noise::TEXT, position, row, temperature) as i64
                })
                .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_samples_follow_the_softmax() {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, -1.0, 0.5]);
        let rows = 20_000;
        let keys: Vec<(u64, u64)> = (0..rows).map(|position| (0, position)).collect();
        let sampling = Sampling::Keyed { temperature: 0.7, seed: 11 };
        let chosen = sampling.choose(&logits.unsqueeze(0).expand([rows as i64, 5], false), &keys);
        let want = (logits.to_kind(Kind::Double) / 0.7).softmax(-1, Kind::Double).to_device(Device::Cpu);
        let mut chi_square = 0.0;
        for token in 0..5 {
            let seen = chosen.iter().filter(|&&choice| choice == token).count() as f64;
            let expected = want.double_value(&[token]) * rows as f64;
            chi_square += (seen - expected).powi(2) / expected;
        }
        // 99.9 % quantile of four degrees of freedom.
        assert!(chi_square < 18.5, "chi square {chi_square}");
    }
}
