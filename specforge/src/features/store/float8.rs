//! Hidden states in eight bits: float8 e4m3fn values, and one float32 scale for each token.
//!
//! The format is that of Micikevicius et al. 2022 (<https://arxiv.org/abs/2209.05433>) without infinities: one sign bit,
//! four exponent bits of bias 7, three bits of fraction; the largest number is 448. A token's scale is its largest
//! absolute value divided by 448, so that every token uses the whole range. Rounding is to the nearest, ties to even.
//!
//! Shape legend: `T` tokens, `H` hidden size; values are row-major `[T, H]`.

use rayon::prelude::*;

/// The largest number.
const LARGEST: f32 = 448.0;
/// Code of the largest number.
const LARGEST_CODE: u32 = 0x7E;
/// The smallest number whose fraction has an implicit leading one: 2^-6.
const SMALLEST_NORMAL: f32 = 0.015_625;
/// Numbers below are multiples of 2^-9.
const SUBNORMALS_PER_ONE: f32 = 512.0;

/// The number behind each code.
pub static NUMBERS: [f32; 256] = numbers();

const fn numbers() -> [f32; 256] {
    let mut numbers = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        numbers[code] = number(code as u32);
        code += 1;
    }
    numbers
}

const fn number(code: u32) -> f32 {
    let (sign, exponent, fraction) = (code >> 7, code >> 3 & 15, code & 7);
    let magnitude = match (exponent, fraction) {
        (15, 7) => f32::NAN,
        (0, fraction) => fraction as f32 / SUBNORMALS_PER_ONE,
        // The same exponent with float32's bias.
        (exponent, fraction) => f32::from_bits((exponent + 120) << 23 | fraction << 20),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// Code of the nearest number; beyond the largest it is the largest.
fn code(value: f32) -> u8 {
    let magnitude = value.abs();
    let code = if magnitude < SMALLEST_NORMAL {
        (magnitude * SUBNORMALS_PER_ONE).round_ties_even() as u32
    } else {
        // Adding almost half of the last kept bit carries where the rest is above half, or half and the kept bit is odd.
        let bits = magnitude.to_bits();
        let rounded = bits.saturating_add(0x7_FFFF + (bits >> 20 & 1));
        ((rounded >> 20) - (120 << 3)).min(LARGEST_CODE)
    };
    (code | u32::from(value.is_sign_negative()) << 7) as u8
}

/// Appends codes and scales of finite `values [T, H]`.
pub fn encode(values: &[f32], width: usize, codes: &mut Vec<u8>, scales: &mut Vec<f32>) {
    let first = codes.len();
    codes.resize(first + values.len(), 0);
    let rows = values.par_chunks(width).zip(codes[first..].par_chunks_mut(width));
    let encode_row = |(row, codes): (&[f32], &mut [u8])| {
        let largest = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        // A token of zeros, or nearly so, must not divide by zero.
        let scale = (largest / LARGEST).max(f32::MIN_POSITIVE);
        codes.iter_mut().zip(row).for_each(|(place, value)| *place = code(value / scale));
        scale
    };
    scales.par_extend(rows.map(encode_row));
}

/// The numbers `[T, H]` behind codes and scales, into `values`.
pub fn decode(codes: &[u8], scales: &[f32], width: usize, values: &mut [f32]) {
    let rows = codes.par_chunks(width).zip(scales).zip(values.par_chunks_mut(width));
    rows.for_each(|((codes, scale), values)| {
        values.iter_mut().zip(codes).for_each(|(value, &code)| *value = NUMBERS[usize::from(code)] * scale);
    });
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn every_code_is_libtorchs_number_and_its_own_code() {
        let codes: Vec<u8> = (0..=255).collect();
        let theirs = Tensor::from_data_size(&codes, &[256], Kind::Float8e4m3fn).to_kind(Kind::Float);
        let theirs = Vec::<f32>::try_from(theirs).unwrap();
        for (byte, &want) in codes.into_iter().zip(&theirs) {
            let got = NUMBERS[usize::from(byte)];
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{byte:#x}: {got} {want}");
            assert!(got.is_nan() || code(got) == byte, "{byte:#x}");
        }
    }

    /// All midpoints between neighbours, a hair to both sides of them, and many others.
    #[test]
    fn rounding_is_libtorchs() {
        let mut values: Vec<f32> = Vec::new();
        for pair in NUMBERS[..usize::try_from(LARGEST_CODE).unwrap() + 1].windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            values.extend([middle, middle.next_up(), middle.next_down()]);
        }
        values.extend((0..100_000).map(|step| (step as f32 * 0.37).sin() * (step as f32 * 1.3e-4).exp2()));
        values.retain(|value| value.abs() <= LARGEST);
        values.extend(values.clone().iter().map(|value| -value));
        assert!(values.len() > 100_000);
        let theirs = Tensor::from_slice(&values).to_kind(Kind::Float8e4m3fn).to_kind(Kind::Float);
        let theirs = Vec::<f32>::try_from(theirs).unwrap();
        for (&value, want) in values.iter().zip(theirs) {
            let got = NUMBERS[usize::from(code(value))];
            assert_eq!(got.to_bits(), want.to_bits(), "{value:e}: {got:e} {want:e}");
        }
        for beyond in [449.0, 463.9, 464.0, 1e9, f32::MAX] {
            assert_eq!((code(beyond), code(-beyond)), (0x7E, 0xFE));
        }
    }

    #[test]
    fn tokens_keep_a_relative_precision_of_their_own() {
        let width = 64;
        let sizes = [1.0, 1e-20, 3e30, 0.0, f32::MIN_POSITIVE];
        let values = Tensor::randn([5, width as i64], (Kind::Float, Device::Cpu));
        let mut values = Vec::<f32>::try_from(values.flatten(0, -1)).unwrap();
        values.chunks_mut(width).zip(sizes).for_each(|(row, size)| row.iter_mut().for_each(|value| *value *= size));
        let (mut codes, mut scales, mut decoded) = (Vec::new(), Vec::new(), vec![f32::NAN; values.len()]);
        encode(&values[..2 * width], width, &mut codes, &mut scales);
        encode(&values[2 * width..], width, &mut codes, &mut scales);
        decode(&codes, &scales, width, &mut decoded);
        for (row, (want, got)) in values.chunks(width).zip(decoded.chunks(width)).enumerate() {
            let largest = want.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (want, got) in want.iter().zip(got) {
                // Half of the last of four digits, or half of the smallest step.
                let bound = (want.abs() / 16.0).max(largest / LARGEST / 1024.0).max(f32::MIN_POSITIVE);
                assert!((want - got).abs() <= bound, "row {row}: {want:e} {got:e}");
            }
        }
    }
}
