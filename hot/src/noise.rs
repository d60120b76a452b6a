//! Keyed noise: a counter hash instead of a stateful generator. `nn::noise` says what it is for.

use rayon::prelude::*;

/// Step of the counter.
pub const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Mixes 64 bits so that each depends on all.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// 64 random bits for one (seed, domain, position, token).
pub fn keyed_bits(seed: u64, domain: u64, position: u64, token: u64) -> u64 {
    token_bits(position_key(seed, domain, position), token)
}

/// Key of all tokens at one position.
pub fn position_key(seed: u64, domain: u64, position: u64) -> u64 {
    let key = mix(seed.wrapping_add(GOLDEN.wrapping_mul(domain.wrapping_add(1))));
    mix(key.wrapping_add(GOLDEN.wrapping_mul(position.wrapping_add(1))))
}

fn token_bits(key: u64, token: u64) -> u64 {
    mix(key.wrapping_add(GOLDEN.wrapping_mul(token.wrapping_add(1))))
}

/// A number above 0 and below 1.
pub fn uniform_of(bits: u64) -> f64 {
    ((bits >> 11) as f64 + 0.5) * 2f64.powi(-53)
}

fn gumbel_of(bits: u64) -> f64 {
    -(-uniform_of(bits).ln()).ln()
}

/// Standard Gumbel noise for one (seed, domain, position, token).
pub fn keyed_gumbel(seed: u64, domain: u64, position: u64, token: u64) -> f64 {
    gumbel_of(keyed_bits(seed, domain, position, token))
}

/// Noise of tokens `0..count` at one position.
pub fn gumbel_of_all(seed: u64, domain: u64, position: u64, count: u64) -> Vec<f64> {
    let key = position_key(seed, domain, position);
    (0..count).map(|token| gumbel_of(token_bits(key, token))).collect()
}

/// Noise of some tokens at one position, in their order.
pub fn gumbel_of_some(seed: u64, domain: u64, position: u64, tokens: &[i64]) -> Vec<f64> {
    let key = position_key(seed, domain, position);
    tokens.iter().map(|&token| gumbel_of(token_bits(key, token as u64))).collect()
}

/// The token of the largest `logit / temperature + noise` at one position, the first of equals: what the noise of the whole
/// row and an argmax give, at a twentieth of the cost. Nearly every token is ruled out by its leading bits, before a
/// logarithm.
pub fn gumbel_argmax(seed: u64, domain: u64, position: u64, logits: &[f64], temperature: f64) -> usize {
    let key = position_key(seed, domain, position);
    let (mut best, mut best_score) = (0, f64::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        let scaled = logit / temperature;
        let bits = token_bits(key, token as u64);
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
/// others; fewer where fewer have a logit above minus infinity. In this order they are drawn without putting back. `tokens`
/// names the token of each logit; without names they are counted.
pub fn gumbel_top(
    (seed, domain, position): (u64, u64, u64),
    tokens: Option<&[i64]>,
    logits: &[f64],
    count: usize,
) -> Vec<u32> {
    let key = position_key(seed, domain, position);
    let mut best: Vec<(f64, u32)> = Vec::with_capacity(count.min(64) + 1);
    for (place, &logit) in logits.iter().enumerate() {
        let token = tokens.map_or(place as u64, |tokens| tokens[place] as u64);
        let least =
            if best.len() < count { f64::NEG_INFINITY } else { best.last().map_or(f64::INFINITY, |last| last.0) };
        let bits = token_bits(key, token);
        if logit + most_noise(bits) < least {
            continue;
        }
        let score = logit + gumbel_of(bits);
        if score > least {
            let place = best.partition_point(|(other, _)| *other >= score);
            best.insert(place, (score, token as u32));
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

/// A permutation of `0..count` that depends on the seed and the stream alone (Fisher-Yates).
pub fn permutation(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for (taken, last) in (1..count).rev().enumerate() {
        let bits = keyed_bits(seed, stream, taken as u64 + 1, 0);
        // The high word of the product maps 64 random bits to 0..=last without division.
        let pick = ((u128::from(bits) * (last as u128 + 1)) >> 64) as usize;
        order.swap(last, pick);
    }
    order
}

/// Numbers that a thread makes at least: fewer are not worth another thread.
pub const PIECE: usize = 1 << 14;

/// Normal noise from the keyed stream.
pub fn normal(count: usize, deviation: f64, seed: u64, stream: u64) -> Vec<f32> {
    let uniform = |position: u64| uniform_of(keyed_bits(seed, stream, position, 0));
    // Each number has its own two places in the stream, so that any thread may make any of them.
    let value = |index: usize| {
        let first = 2 * index as u64 + 1;
        let (radius, angle) = ((-2.0 * uniform(first).ln()).sqrt(), std::f64::consts::TAU * uniform(first + 1));
        (deviation * radius * angle.cos()) as f32
    };
    (0..count).into_par_iter().with_min_len(PIECE).map(value).collect()
}
