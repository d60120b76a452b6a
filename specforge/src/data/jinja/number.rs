//! Python's numbers: how they are read and written, divided and rounded.

use super::lexer::is_space;
use super::limits::{Outcome, fail};

/// `repr(float)`.
pub(super) fn float_text(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    // Rust changes to exponents at the same sizes, but writes them without sign and padding.
    let text = format!("{value:?}");
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
            format!("{}e{sign}{digits:0>2}", mantissa.strip_suffix(".0").unwrap_or(mantissa))
        }
    }
}

/// Digits with single underscores between them, without these.
fn plain_digits(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let fits = |at: usize| {
        bytes[at] != b'_'
            || (at > 0
                && bytes[at - 1].is_ascii_alphanumeric()
                && bytes.get(at + 1).is_some_and(u8::is_ascii_alphanumeric))
    };
    (0..bytes.len()).all(fits).then(|| text.replace('_', ""))
}

/// `int(text, base)`; None where Python raises `ValueError`.
pub(super) fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_lowercase();
    let prefix = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .find(|(prefix, radix)| lower.starts_with(prefix) && (base == *radix || base == 0));
    let (digits, radix) = match prefix {
        Some((_, radix)) => (lower[2..].strip_prefix('_').unwrap_or(&lower[2..]).to_owned(), radix),
        None if base == 0 => {
            if lower.starts_with('0') && lower.chars().any(|digit| !matches!(digit, '0' | '_')) {
                return None;
            }
            (lower, 10)
        }
        None => (lower, base),
    };
    if !(2..=36).contains(&radix) || digits.starts_with(['+', '-']) {
        return None;
    }
    let digits: String = digits.chars().map(|digit| ascii_digit(digit).unwrap_or(digit)).collect();
    let number = i128::from_str_radix(&plain_digits(&digits)?, radix).ok()?;
    Some(if negative { -number } else { number })
}

/// Digits of other scripts that come in tens from a zero on, as far as they are common.
fn ascii_digit(digit: char) -> Option<char> {
    const ZEROS: [u32; 6] = [0x660, 0x6f0, 0x966, 0x9e6, 0xe50, 0xff10];
    let code = u32::from(digit);
    let value = ZEROS.iter().find_map(|zero| code.checked_sub(*zero).filter(|value| *value < 10))?;
    char::from_digit(value, 10)
}

/// `float(text)`; None where Python raises `ValueError`.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let text = plain_digits(text.trim_matches(is_space))?;
    let lower = text.to_lowercase();
    let bare = lower.trim_start_matches(['+', '-']);
    let is_word = matches!(bare, "inf" | "infinity" | "nan");
    if !is_word && !bare.starts_with(|first: char| first.is_ascii_digit() || first == '.') {
        return None;
    }
    lower.parse().ok()
}

/// `int(float)`.
pub(super) fn truncate(value: f64) -> Outcome<i128> {
    if !value.is_finite() {
        return fail(format!("cannot convert float {} to integer", float_text(value)));
    }
    if value.abs() >= 1.7e38 {
        return fail("a whole number is too large");
    }
    Ok(value as i128)
}

/// `a // b` and `a % b` of whole numbers.
pub(super) fn divide_ints(one: i128, two: i128) -> Outcome<(i128, i128)> {
    if two == 0 {
        return fail("ZeroDivisionError: integer division or modulo by zero");
    }
    let (Some(quotient), Some(rest)) = (one.checked_div(two), one.checked_rem(two)) else {
        return fail("a whole number is too large");
    };
    if rest != 0 && (rest < 0) != (two < 0) { Ok((quotient - 1, rest + two)) } else { Ok((quotient, rest)) }
}

/// `a // b` and `a % b` of floats.
pub(super) fn divide_floats(one: f64, two: f64) -> Outcome<(f64, f64)> {
    if two == 0.0 {
        return fail("ZeroDivisionError: float floor division or modulo by zero");
    }
    let mut rest = one % two;
    let mut quotient = (one - rest) / two;
    if rest == 0.0 {
        rest = 0.0_f64.copysign(two);
    } else if (rest < 0.0) != (two < 0.0) {
        rest += two;
        quotient -= 1.0;
    }
    let mut floor = quotient.floor();
    if quotient - floor > 0.5 {
        floor += 1.0;
    }
    if quotient == 0.0 {
        floor = 0.0_f64.copysign(one / two);
    }
    Ok((floor, rest))
}

/// `round(float, digits)`.
pub(super) fn round_float(value: f64, digits: i128) -> f64 {
    if !value.is_finite() || digits > 330 {
        return value;
    }
    if digits >= 0 {
        // Rust writes the exact value and rounds halves to even, as Python does.
        return format!("{value:.*}", digits as usize).parse().unwrap_or(value);
    }
    if digits < -309 {
        return 0.0_f64.copysign(value);
    }
    let unit = 10_f64.powi(-digits as i32);
    (value / unit).round_ties_even() * unit
}

/// `round(int, digits)`.
pub(super) fn round_int(value: i128, digits: i128) -> Outcome<i128> {
    if digits >= 0 {
        return Ok(value);
    }
    let Some(unit) = u32::try_from(-digits).ok().and_then(|digits| 10_i128.checked_pow(digits)) else {
        return Ok(0);
    };
    let (low, rest) = (value.div_euclid(unit), value.rem_euclid(unit));
    let up = rest * 2 > unit || (rest * 2 == unit && low % 2 != 0);
    Ok((low + i128::from(up)) * unit)
}

/// A float with so many significant digits, as `%g` writes it. `keep_zeros` is the sign `#`.
pub(super) fn general(value: f64, precision: usize, keep_zeros: bool) -> String {
    if !value.is_finite() {
        return float_text(value);
    }
    let precision = precision.max(1);
    let scientific = format!("{value:.*e}", precision - 1);
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let strip = |text: &str| match text.contains('.') && !keep_zeros {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        return format!("{}{}", strip(mantissa), exponent_text(exponent));
    }
    strip(&format!("{value:.*}", (precision as i32 - 1 - exponent).max(0) as usize))
}

/// A float in scientific notation, as `%e` writes it.
pub(super) fn scientific(value: f64, precision: usize) -> String {
    if !value.is_finite() {
        return float_text(value);
    }
    let text = format!("{value:.precision$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{mantissa}{}", exponent_text(exponent.parse().unwrap_or(0)))
}

fn exponent_text(exponent: i32) -> String {
    format!("e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}
