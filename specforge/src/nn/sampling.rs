//! From rows of logits to tokens.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::noise::{self, Place};
use super::processors::{Processors, argmax};

/// In place of a token, where a row holds NaN: a broken target is found where it breaks.
pub const NO_NUMBERS: i64 = -1;

/// How the next token is chosen: what is done to the logits, and the key of the noise where a token is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sampling {
    /// Penalty, temperature and what is ruled out. The default is greedy.
    pub processors: Processors,
    /// Key of the noise.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// A sample at a temperature, with nothing else.
    pub fn keyed(temperature: f64, seed: u64) -> Self {
        Self { processors: Processors::at_temperature(temperature), seed }
    }

    /// Chooses one token for each row of `logits [R, V]`, or [`NO_NUMBERS`]. One copy from the device. `keys` gives each row's own seed offset and its position,
    /// `context` the tokens before it; that is only asked for where a penalty needs it.
    pub fn choose<'a>(
        &self,
        logits: &Tensor,
        keys: &[(u64, u64)],
        context: impl Fn(usize) -> Vec<&'a [u32]> + Sync,
    ) -> Vec<i64> {
        let Self { processors, seed } = *self;
        if processors.leaves_the_greedy_choice() {
            let (best, tokens) = logits.max_dim(-1, false); // [R] each
            // NaN counts as the largest.
            let chosen = tokens.masked_fill(&best.isnan(), NO_NUMBERS);
            return Vec::try_from(chosen).expect("places are int64");
        }
        if logits.device() != Device::Cpu && processors.depend_on_rows_alone() {
            let places: Vec<Place> = keys.iter().map(|&(row, position)| (seed.wrapping_add(row), position)).collect();
            return Vec::try_from(keyed_choices(&processors, logits, &places)).expect("choices are int64");
        }
        let vocabulary = logits.size()[1] as usize;
        let logits = logits.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
        let mut values: Vec<f64> = Vec::try_from(logits).expect("logits are float64 now"); // R * V
        let rows = values.par_chunks_exact_mut(vocabulary).zip(keys).enumerate();
        rows.map(|(index, (row, &(row_seed, position)))| {
            let parts = if processors.repetition_penalty == 1.0 { Vec::new() } else { context(index) };
            if row.iter().any(|logit| logit.is_nan()) {
                return NO_NUMBERS;
            }
            processors.apply(row, parts.iter().flat_map(|part| part.iter().copied()));
            match processors.is_greedy() {
                true => argmax(row) as i64,
                false => noise::gumbel_argmax(seed.wrapping_add(row_seed), noise::TEXT, position, row, 1.0) as i64,
            }
        })
        .collect()
    }
}

/// Numbers of a piece of rows: what noise of many rows may take of a device's memory.
const PIECE: i64 = 1 << 24;

/// Rows of a vocabulary that are sampled from at once.
pub fn rows_of_a_piece(vocabulary: i64) -> usize {
    (PIECE / vocabulary).max(1) as usize
}

/// The tokens that keyed noise chooses from rows `[R, V]`, made where the rows are: `[R]` int64. A row with NaN gives
/// [`NO_NUMBERS`].
/// Processors must depend on rows alone.
pub fn keyed_choices(processors: &Processors, logits: &Tensor, places: &[Place]) -> Tensor {
    let vocabulary = logits.size()[1];
    let tokens = Tensor::arange(vocabulary, (Kind::Int64, logits.device()));
    let rows = rows_of_a_piece(vocabulary);
    let choose = |(index, places): (usize, &[Place])| {
        let piece = logits.narrow(0, (index * rows) as i64, places.len() as i64);
        let (best, token) =
            (processors.apply_rows(&piece) + noise::gumbel_rows(noise::TEXT, places, &tokens)).max_dim(-1, false);
        // NaN counts as the largest.
        token.masked_fill(&best.isnan(), NO_NUMBERS)
    };
    let pieces: Vec<Tensor> = places.chunks(rows).enumerate().map(choose).collect();
    match pieces.is_empty() {
        true => Tensor::zeros([0], (Kind::Int64, logits.device())),
        false => Tensor::cat(&pieces, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::drawn;

    #[test]
    fn keyed_samples_follow_the_softmax() {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, -1.0, 0.5]);
        let rows = 20_000;
        let keys: Vec<(u64, u64)> = (0..rows).map(|position| (0, position)).collect();
        let sampling = Sampling::keyed(0.7, 11);
        let chosen = sampling
            .choose(&logits.unsqueeze(0).expand([rows as i64, 5], false), &keys, |_| unreachable!("no penalty"));
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

    /// What a device chooses from many rows is what the host chooses from each.
    #[test]
    fn choices_made_where_the_rows_are_equal_those_of_the_host() {
        drawn::seed(9);
        let logits = drawn::randn([300, 211], (Kind::Float, Device::Cpu)) * 2.0;
        let places: Vec<Place> = (0..300).map(|row| (row % 3, 40 + row)).collect();
        for (temperature, top_k, top_p) in [(1.0, 0, 1.0), (0.6, 20, 0.95), (1.5, 0, 0.5)] {
            let sampling =
                Sampling { processors: Processors { temperature, top_k, top_p, ..Processors::default() }, seed: 17 };
            let want = sampling.choose(&logits, &places, |_| unreachable!("no penalty"));
            let shifted: Vec<Place> = places.iter().map(|&(seed, position)| (seed + 17, position)).collect();
            let got = keyed_choices(&sampling.processors, &logits, &shifted);
            assert_eq!(Vec::<i64>::try_from(got).unwrap(), want);
        }
        let _ = logits.narrow(0, 1, 1).narrow(1, 3, 1).fill_(f64::NAN);
        let got = keyed_choices(&Processors::at_temperature(1.0), &logits.narrow(0, 0, 3), &places[..3]);
        assert!(got.int64_value(&[0]) >= 0 && got.int64_value(&[1]) == -1);
    }

    #[test]
    fn a_penalty_looks_at_each_rows_own_tokens_and_what_is_ruled_out_is_never_chosen() {
        let logits = Tensor::from_slice(&[4.0f32, 3.0, -1.0, 2.0]).unsqueeze(0).expand([2, 4], false);
        let penalty = Processors { repetition_penalty: 2.0, ..Processors::default() };
        let (prompt, tokens): (&[u32], &[u32]) = (&[0], &[1]);
        let context = |row: usize| if row == 0 { vec![prompt, tokens] } else { vec![tokens] };
        let chosen = Sampling { processors: penalty, seed: 0 }.choose(&logits, &[(0, 0), (0, 0)], context);
        assert_eq!(chosen, [0, 0]);
        let context = |row: usize| if row == 0 { vec![prompt] } else { vec![prompt, tokens] };
        let chosen = Sampling { processors: penalty, seed: 0 }.choose(&logits, &[(0, 0), (0, 0)], context);
        // 2, 3, -1, 2 and 2, 1.5, -1, 2.
        assert_eq!(chosen, [1, 0]);
        let few = Processors { top_k: 2, ..Processors::at_temperature(5.0) };
        let keys: Vec<(u64, u64)> = (0..400).map(|position| (1, position)).collect();
        let many = logits.narrow(0, 0, 1).expand([400, 4], false);
        let chosen = Sampling { processors: few, seed: 3 }.choose(&many, &keys, |_| Vec::new());
        assert!(chosen.iter().all(|&token| token < 2) && chosen.contains(&1), "{chosen:?}");
    }
}
