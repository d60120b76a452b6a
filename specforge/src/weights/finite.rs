//! Whether stored numbers are numbers: one NaN or infinity makes every logit behind it worthless, and nothing says so.
//!
//! Every weight is looked at when it is loaded, as far as memory is concerned one read more. Only the exponents count: a
//! number is infinite or none where all bits of its exponent are set. Words of eight bytes are tested at once, each lane's
//! exponent moved into its sign bit by one addition.

use rayon::prelude::*;
use tch::Kind;

/// Bytes that one thread looks at before another may take over.
const PIECE_BYTES: usize = 1 << 18;

/// Layout of a floating-point type in a word of eight bytes.
#[derive(Clone, Copy)]
struct Lanes {
    /// Bytes of a number.
    width: usize,
    /// All exponents.
    exponents: u64,
    /// The lowest bit of each exponent: added to an exponent of ones, it carries into the sign.
    carry: u64,
    /// All signs.
    signs: u64,
}

impl Lanes {
    fn of(kind: Kind) -> Option<Self> {
        let (width, exponents, carry, signs) = match kind {
            Kind::Double => (8, 0x7FF0 << 48, 1 << 52, 1 << 63),
            Kind::Float => (4, 0x7F80_0000_7F80_0000, 0x0080_0000_0080_0000, 0x8000_0000_8000_0000),
            Kind::BFloat16 => (2, 0x7F80_7F80_7F80_7F80, 0x0080_0080_0080_0080, 0x8000_8000_8000_8000),
            Kind::Half => (2, 0x7C00_7C00_7C00_7C00, 0x0400_0400_0400_0400, 0x8000_8000_8000_8000),
            _ => return None,
        };
        Some(Self { width, exponents, carry, signs })
    }

    /// A bit of each lane that holds no finite number.
    fn test(self, word: u64) -> u64 {
        ((word & self.exponents) + self.carry) & self.signs
    }

    /// Whether a number, given as its bytes, is finite.
    fn is_finite(self, number: &[u8]) -> bool {
        let word = number.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        // Only the lowest lane holds something: zeros are finite.
        self.test(word) == 0
    }

    fn all_finite(self, bytes: &[u8]) -> bool {
        // SAFETY: every bit pattern is a number.
        let (before, words, after) = unsafe { bytes.align_to::<u64>() };
        if !before.len().is_multiple_of(self.width) {
            // Numbers lie across words.
            return bytes.chunks_exact(self.width).all(|number| self.is_finite(number));
        }
        let mut found = 0;
        for word in words {
            found |= self.test(*word);
        }
        let edges = before.chunks_exact(self.width).chain(after.chunks_exact(self.width));
        found == 0 && edges.into_iter().all(|number| self.is_finite(number))
    }
}

/// Place of the first element that is NaN or infinite, and what it is. Integers are always finite.
pub(super) fn first_non_finite(bytes: &[u8], kind: Kind) -> Option<(usize, &'static str)> {
    let lanes = Lanes::of(kind)?;
    let sound = bytes.par_chunks(PIECE_BYTES).position_first(|piece| !lanes.all_finite(piece));
    let start = sound? * PIECE_BYTES / lanes.width;
    let place = bytes[start * lanes.width..].chunks_exact(lanes.width).position(|number| !lanes.is_finite(number))?;
    let place = start + place;
    let number = &bytes[place * lanes.width..][..lanes.width];
    let word = number.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let lane = match lanes.width {
        8 => u64::MAX,
        width => (1 << (8 * width)) - 1,
    };
    let fraction = lane & !lanes.exponents & !lanes.signs;
    let what = match (word & fraction, word & lanes.signs & lane) {
        (0, 0) => "inf",
        (0, _) => "-inf",
        _ => "NaN",
    };
    Some((place, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` finite numbers of all sizes.
    fn numbers(kind: Kind, count: usize) -> Vec<u8> {
        let values = (0..count).map(|index| (index as f64 - 1000.0) * if index % 3 == 0 { 1e-7 } else { 65.0 });
        let values: Vec<f64> = values.map(|value| value.clamp(-65504.0, 65504.0)).collect();
        super::super::writer::host_bytes(&tch::Tensor::from_slice(&values).to_kind(kind)).to_vec()
    }

    #[test]
    fn what_is_no_number_is_found_wherever_it_lies() {
        let cases = [
            (Kind::Double, f64::to_le_bytes as fn(f64) -> [u8; 8]),
            (Kind::Float, |value| {
                let [a, b, c, d] = (value as f32).to_le_bytes();
                [a, b, c, d, 0, 0, 0, 0]
            }),
            (Kind::BFloat16, |value| {
                let [.., a, b] = (value as f32).to_le_bytes();
                [a, b, 0, 0, 0, 0, 0, 0]
            }),
            (Kind::Half, |value| {
                let [a, b] = half::f16::from_f64(value).to_le_bytes();
                [a, b, 0, 0, 0, 0, 0, 0]
            }),
        ];
        for (kind, bytes_of) in cases {
            let width = kind.elt_size_in_bytes();
            let sound = numbers(kind, 300_001);
            assert_eq!(first_non_finite(&sound, kind), None, "{kind:?}");
            for place in [0, 1, 7, 150_000, 300_000] {
                for (value, name) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
                    let mut bytes = sound.clone();
                    bytes[place * width..][..width].copy_from_slice(&bytes_of(value)[..width]);
                    assert_eq!(first_non_finite(&bytes, kind), Some((place, name)), "{kind:?} at {place}");
                    // Askew in memory, as old files may be.
                    let askew = [vec![0u8], bytes].concat();
                    assert_eq!(first_non_finite(&askew[1..], kind), Some((place, name)), "{kind:?} at {place}, askew");
                }
            }
        }
    }

    #[test]
    fn integers_and_nothing_are_finite() {
        assert_eq!(first_non_finite(&[0xff; 64], Kind::Int), None);
        assert_eq!(first_non_finite(&[], Kind::Float), None);
    }
}
