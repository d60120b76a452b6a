//! Keyed Gumbel noise: a counter hash instead of a stateful generator.
//!
//! The noise of a choice depends on the seed, the absolute position and the token alone, so sampled text is the same
//! for every batch, tree and draft. Argmax of `logits / T + noise` is a sample of `softmax(logits / T)`.
//!
//! The hash is 64-bit integer arithmetic that wraps around, which a device does as well as the host: where logits are on a
//! GPU, so is their noise ([`gumbel_rows`]), bit for bit, and no row of a vocabulary travels.

use specforge_hot::noise::{GOLDEN, position_key};
pub use specforge_hot::noise::{gumbel_argmax, gumbel_top, keyed_bits, keyed_gumbel, permutation, uniform_of};
use tch::{Device, Kind, Tensor};

use crate::device;

/// Noise domain of text positions.
pub const TEXT: u64 = 0;

/// Noise of a whole vocabulary at one position: `[V]` float64 on the CPU.
pub fn gumbel_row(seed: u64, domain: u64, position: u64, vocabulary: i64) -> Tensor {
    Tensor::from_slice(&specforge_hot::noise::gumbel_of_all(seed, domain, position, vocabulary as u64))
}

/// Noise of some tokens at one position, in their order: `[n]` float64 on the CPU.
pub fn gumbel_of_tokens(seed: u64, domain: u64, position: u64, tokens: &[i64]) -> Tensor {
    Tensor::from_slice(&specforge_hot::noise::gumbel_of_some(seed, domain, position, tokens))
}

/// Where noise is drawn: a seed and an absolute position.
pub type Place = (u64, u64);

/// Noise of `tokens [n]` (int64) at several places, on the device of the tokens: `[R, n]` float64, from the same bits as
/// [`gumbel_row`]'s.
pub fn gumbel_rows(domain: u64, places: &[Place], tokens: &Tensor) -> Tensor {
    let keys = position_keys(domain, places, tokens.device()).unsqueeze(1); // [R, 1]
    gumbels_of(&bits_of(&keys, tokens)) // [R, n]
}

/// The key of each place, `[R]` int64 on a device.
pub fn position_keys(domain: u64, places: &[Place], device: Device) -> Tensor {
    let keys: Vec<i64> = places.iter().map(|&(seed, position)| position_key(seed, domain, position) as i64).collect();
    device::send(&Tensor::from_slice(&keys), device)
}

/// [`uniform_of`] the bits of a counter under each of some keys, `[R]` each.
pub fn uniforms(keys: &Tensor, counters: &Tensor) -> Tensor {
    uniforms_of(&bits_of(keys, counters))
}

/// [`keyed_bits`] of tokens, or counters, under keys of places.
fn bits_of(keys: &Tensor, tokens: &Tensor) -> Tensor {
    let steps = (tokens + 1i64).g_mul_scalar_(GOLDEN as i64);
    mixed(keys + steps)
}

/// The hash's mixing of every number.
fn mixed(mut z: Tensor) -> Tensor {
    // int64 shifts its sign in from the left: what came in is masked out.
    let folded = |z: &Tensor, shift: i64| {
        let shifted = z.bitwise_right_shift_tensor_scalar(shift).bitwise_and_(i64::MAX >> (shift - 1));
        z.bitwise_xor_tensor(&shifted)
    };
    for (shift, factor) in [(30, 0xBF58_476D_1CE4_E5B9u64), (27, 0x94D0_49BB_1331_11EB)] {
        z = folded(&z, shift).g_mul_scalar_(factor as i64);
    }
    folded(&z, 31)
}

/// [`uniform_of`] every number.
fn uniforms_of(bits: &Tensor) -> Tensor {
    let whole = bits.bitwise_right_shift_tensor_scalar(11i64).bitwise_and_(i64::MAX >> 10);
    whole.to_kind(Kind::Double).g_add_scalar_(0.5).g_mul_scalar_(2f64.powi(-53))
}

/// Gumbel noise of every number's bits.
fn gumbels_of(bits: &Tensor) -> Tensor {
    uniforms_of(bits).log_().neg_().log_().neg_()
}

/// A deterministic stream of 64-bit numbers for shuffles, keyed by two counters.
pub fn keyed_stream(seed: u64, stream: u64) -> impl FnMut() -> u64 {
    let mut position = 0u64;
    move || {
        position += 1;
        keyed_bits(seed, stream, position, 0)
    }
}

/// Normal noise from the keyed stream, for initialising parameters alike on every device. float32 on the CPU.
pub fn normal(shape: &[i64], deviation: f64, seed: u64, stream: u64) -> Tensor {
    let count = shape.iter().product::<i64>().max(0) as usize;
    let values = specforge_hot::noise::normal(count, deviation, seed, stream);
    Tensor::from_slice(&values).to_kind(Kind::Float).to_device(Device::Cpu).view(shape)
}

#[cfg(test)]
mod tests {
    use specforge_hot::noise::PIECE;

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

    /// Every bit of the hash, sign bits among them, and the noise up to the last digit of a logarithm.
    #[test]
    fn noise_made_on_a_device_is_that_of_the_host() {
        let places = [(0, 0), (7, 12), ((1 << 63) + 5, 1000), (u64::MAX, u64::MAX)];
        let tokens = [0i64, 1, 2, 5, 77, 126_335, 4_000_000_000];
        let of = |place: &Place, token: i64| (place.0, 3, place.1, token as u64);
        let table = Tensor::from_slice(&tokens);
        let keys = position_keys(3, &places, Device::Cpu);
        let bits = bits_of(&keys.unsqueeze(1), &table);
        let chances = uniforms(&keys, &Tensor::from_slice(&[1i64, 2, 3, 4]));
        let noise = gumbel_rows(3, &places, &table);
        assert_eq!((noise.size(), noise.kind()), (vec![4, 7], Kind::Double));
        for (row, place) in places.iter().enumerate() {
            let want = uniform_of(keyed_bits(place.0, 3, place.1, row as u64 + 1));
            assert_eq!(chances.double_value(&[row as i64]), want, "{place:?}");
            for (column, &token) in tokens.iter().enumerate() {
                let (seed, domain, position, token) = of(place, token);
                let at = [row as i64, column as i64];
                assert_eq!(
                    bits.int64_value(&at) as u64,
                    keyed_bits(seed, domain, position, token),
                    "{place:?} {token}"
                );
                let want = keyed_gumbel(seed, domain, position, token);
                assert!((noise.double_value(&at) - want).abs() <= 1e-13 * (1.0 + want.abs()), "{place:?} {token}");
            }
        }
        assert!(bits.lt(0).any().int64_value(&[]) == 1 && bits.gt(0).any().int64_value(&[]) == 1);
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
            let names: Vec<i64> = (0..400).map(|id| 3 * id).collect();
            let logits: Vec<f64> =
                logits.iter().enumerate().map(|(id, &logit)| if id == 5 { f64::NEG_INFINITY } else { logit }).collect();
            let mut want: Vec<(u32, f64)> =
                names.iter().map(|&token| token as u32).zip(logits.iter().copied()).collect();
            want.iter_mut().for_each(|(token, score)| *score += noise[*token as usize]);
            want.sort_by(|a, b| b.1.total_cmp(&a.1));
            for count in [0, 1, 10, 399, 500] {
                let got = gumbel_top((seed, 33, 7), Some(&names), &logits, count);
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
