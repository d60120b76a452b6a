//! Hidden states in eight bits: float8 e4m3fn values, and one float32 scale for each token.
//!
//! The format is that of Micikevicius et al. 2022 (<https://arxiv.org/abs/2209.05433>) without infinities: one sign bit,
//! four exponent bits of bias 7, three bits of fraction; the largest number is 448. A token's scale is its largest
//! absolute value divided by 448, so that every token uses the whole range. Rounding is to the nearest, ties to even.
//!
//! Shape legend: `T` tokens, `H` hidden size; values are row-major `[T, H]`.

use rayon::prelude::*;

/// The largest number.
pub const LARGEST: f32 = 448.0;
/// Code of the largest number.
pub const LARGEST_CODE: u32 = 0x7E;
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
pub fn code(value: f32) -> u8 {
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
