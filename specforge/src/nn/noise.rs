//! Keyed Gumbel noise: a counter hash instead of a stateful generator.
//!
//! The noise of a choice depends on the seed, the absolute position and the token alone, so sampled text is the same
//! for every batch, tree and draft. Argmax of `logits / T + noise` is a sample of `softmax(logits / T)`.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Noise domain of text positions.
pub const TEXT: u64 = 0;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// 64 random bits for one (seed, domain, position, token).
pub fn keyed_bits(seed: u64, domain: u64, position: u64, token: u64) -> u64 {
    mix(position_key(seed, domain, position).wrapping_add(GOLDEN.wrapping_mul(token + 1)))
}

fn position_key(seed: u64, domain: u64, position: u64) -> u64 {
    let key = mix(seed.wrapping_add(GOLDEN.wrapping_mul(domain.wrapping_add(1))));
    mix(key.wrapping_add(GOLDEN.wrapping_mul(position.wrapping_add(1))))
}

fn gumbel_of(bits: u64) -> f64 {
    let uniform = ((bits >> 11) as f64 + 0.5) * 2f64.powi(-53);
    -(-uniform.ln()).ln()
}

/// Standard Gumbel noise for one (seed, domain, position, token).
pub fn keyed_gumbel(seed: u64, domain: u64, position: u64, token: u64) -> f64 {
    gumbel_of(keyed_bits(seed, domain, position, token))
}

/// Noise of a whole vocabulary at one position: `[V]` float64 on the CPU.
pub fn gumbel_row(seed: u64, domain: u64, position: u64, vocabulary: i64) -> Tensor {
    gumbel_of_tokens(seed, domain, position, 0..vocabulary as u64)
}

/// Noise of some tokens at one position, in their order: `[n]` float64 on the CPU.
pub fn gumbel_of_tokens(seed: u64, domain: u64, position: u64, tokens: impl Iterator<Item = u64>) -> Tensor {
    let key = position_key(seed, domain, position);
    let row: Vec<f64> = tokens.map(|token| gumbel_of(mix(key.wrapping_add(GOLDEN.wrapping_mul(token + 1))))).collect();
    Tensor::from_slice(&row)
}

/// The token of the largest `logit / temperature + noise` at one position, the first of equals: what [`gumbel_row`] and
/// an argmax give, at a twentieth of the cost. Nearly every token is ruled out by its leading bits, before a logarithm.
pub fn gumbel_argmax(seed: u64, domain: u64, position: u64, logits: &[f64], temperature: f64) -> usize {
    let key = position_key(seed, domain, position);
    let (mut best, mut best_score) = (0, f64::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        let scaled = logit / temperature;
        let bits = mix(key.wrapping_add(GOLDEN.wrapping_mul(token as u64 + 1)));
        if scaled + most_noise(bits) < best_score {
            continue;
        }
        let score = scaled + gumbel_of(bits);
        if score > best_score {
            (best, best_score) = (token, score);
        }
    }
    best
}

/// The `count` tokens of the largest `logit + noise` at one position, largest first and the first of equals before the
/// others; fewer where fewer have a logit above minus infinity. In this order they are drawn without putting back.
pub fn gumbel_top(
    seed: u64,
    domain: u64,
    position: u64,
    logits: impl IntoIterator<Item = (u32, f64)>,
    count: usize,
) -> Vec<u32> {
    let key = position_key(seed, domain, position);
    let mut best: Vec<(f64, u32)> = Vec::with_capacity(count.min(64) + 1);
    for (token, logit) in logits {
        let least =
            if best.len() < count { f64::NEG_INFINITY } else { best.last().map_or(f64::INFINITY, |last| last.0) };
        let bits = mix(key.wrapping_add(GOLDEN.wrapping_mul(u64::from(token) + 1)));
        if logit + most_noise(bits) < least {
            continue;
        }
        let score = logit + gumbel_of(bits);
        if score > least {
            let place = best.partition_point(|(other, _)| *other >= score);
            best.insert(place, (score, token));
            best.truncate(count);
        }
    }
    best.into_iter().map(|(_, token)| token).collect()
}

/// At least the noise that some bits give, without a logarithm.
fn most_noise(bits: u64) -> f64 {
    // A uniform number u with n leading ones is at most 1 - 2^-(n + 1) (u is never 1 but by rounding, from 53 ones on),
    // and -ln(-ln(u)) <= -ln(1 - u). One more covers every rounding.
    let ones = bits.leading_ones();
    if ones < 52 { f64::from(ones + 2) * std::f64::consts::LN_2 } else { f64::INFINITY }
}

/// A deterministic stream of 64-bit numbers for shuffles, keyed by two counters.
pub fn keyed_stream(seed: u64, stream: u64) -> impl FnMut() -> u64 {
    let mut position = 0u64;
    move || {
        position += 1;
        keyed_bits(seed, stream, position, 0)
    }
}

/// A permutation of `0..count` that depends on the seed and the stream alone (Fisher-Yates).
pub fn permutation(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut next = keyed_stream(seed, stream);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        // The high word of the product maps 64 random bits to 0..=last without division.
        let pick = ((u128::from(next()) * (last as u128 + 1)) >> 64) as usize;
        order.swap(last, pick);
    }
    order
}

/// Numbers that a thread makes at least: fewer are not worth another thread.
const PIECE: usize = 1 << 14;

/// Normal noise from the keyed stream, for initialising parameters alike on every device. float32 on the CPU.
pub fn normal(shape: &[i64], deviation: f64, seed: u64, stream: u64) -> Tensor {
    let uniform = |position: u64| ((keyed_bits(seed, stream, position, 0) >> 11) as f64 + 0.5) * 2f64.powi(-53);
    // Each number has its own two places in the stream, so that any thread may make any of them.
    let value = |index: usize| {
        let first = 2 * index as u64 + 1;
        let (radius, angle) = ((-2.0 * uniform(first).ln()).sqrt(), std::f64::consts::TAU * uniform(first + 1));
        (deviation * radius * angle.cos()) as f32
    };
    let count = shape.iter().product::<i64>().max(0) as usize;
    let values: Vec<f32> = (0..count).into_par_iter().with_min_len(PIECE).map(value).collect();
    Tensor::from_slice(&values).to_kind(Kind::Float).to_device(Device::Cpu).view(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_vectors() {
        for (seed, domain, position, token, bits, gumbel) in [
            (0, 0, 0, 0, 0x2382_75bc_38fc_be91, -0.680_757_802_513_778_4),
            (7, 0, 12, 5, 0xf5cb_4485_91f8_6ddf, 3.201_930_227_955_11),
            ((1 << 63) + 5, 3, 1000, 126_335, 0x11eb_c290_00f3_774a, -0.978_028_228_920_869_8),
        ] {
            assert_eq!(keyed_bits(seed, domain, position, token), bits);
            assert!((keyed_gumbel(seed, domain, position, token) - gumbel).abs() < 1e-13);
            assert_eq!(
                gumbel_row(seed, domain, position, 8).double_value(&[3]),
                keyed_gumbel(seed, domain, position, 3)
            );
        }
    }

    #[test]
    fn the_quick_argmax_is_the_argmax_of_the_row() {
        for (position, scale, temperature) in
            [(0, 0.0, 1.0), (1, 1.0, 1.0), (2, 5.0, 0.3), (3, 3.0, 2.0), (4, 9.0, 0.7)]
        {
            for seed in 0..40 {
                let logits = normal(&[5000], scale, seed, 9);
                let logits = logits.to_kind(Kind::Double);
                let values: Vec<f64> = Vec::try_from(&logits).unwrap();
                let row = logits / temperature + gumbel_row(seed, TEXT, position, 5000);
                let quick = gumbel_argmax(seed, TEXT, position, &values, temperature);
                assert_eq!(quick as i64, row.argmax(-1, false).int64_value(&[]), "seed {seed}, scale {scale}");
            }
        }
    }

    #[test]
    fn the_quick_best_are_the_best_of_the_row() {
        for seed in 0..20 {
            let logits: Vec<f64> = Vec::try_from(normal(&[400], 3.0, seed, 9).to_kind(Kind::Double)).unwrap();
            let noise: Vec<f64> = Vec::try_from(gumbel_row(seed, 33, 7, 1200)).unwrap();
            // Every third token, as a draft with a smaller vocabulary names them; one of them is ruled out.
            let named = |id: usize| (3 * id as u32, if id == 5 { f64::NEG_INFINITY } else { logits[id] });
            let mut want: Vec<(u32, f64)> = (0..400).map(named).collect();
            want.iter_mut().for_each(|(token, score)| *score += noise[*token as usize]);
            want.sort_by(|a, b| b.1.total_cmp(&a.1));
            for count in [0, 1, 10, 399, 500] {
                let got = gumbel_top(seed, 33, 7, (0..400).map(named), count);
                let want: Vec<u32> = want.iter().take(count.min(399)).map(|(token, _)| *token).collect();
                assert_eq!(got, want, "seed {seed}, {count} tokens");
            }
        }
    }

    /// Box and Muller's formula, one number after the other.
    #[test]
    fn normal_noise_is_that_of_the_stream_in_order() {
        let count = 3 * PIECE as i64 + 5;
        let mut next = keyed_stream(11, 4);
        let mut uniform = || ((next() >> 11) as f64 + 0.5) * 2f64.powi(-53);
        let want: Vec<f32> = (0..count)
            .map(|_| {
                let radius = (-2.0 * uniform().ln()).sqrt();
                (0.02 * radius * (std::f64::consts::TAU * uniform()).cos()) as f32
            })
            .collect();
        let got = normal(&[count], 0.02, 11, 4);
        assert!(Vec::<f32>::try_from(&got).unwrap() == want);
        let deviation = got.std(true).double_value(&[]);
        assert!((deviation / 0.02 - 1.0).abs() < 0.02, "{deviation}");
        assert_eq!(normal(&[2, 0], 1.0, 1, 1).size(), [2, 0]);
        assert!(normal(&[], 1.0, 1, 1).size().is_empty());
    }

    #[test]
    fn a_permutation_holds_every_index_once_and_depends_on_its_key() {
        let first = permutation(1000, 1, 2);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        assert_eq!(first, permutation(1000, 1, 2));
        assert_ne!(first, permutation(1000, 1, 3));
        assert_ne!(first, permutation(1000, 2, 2));
    }
}
