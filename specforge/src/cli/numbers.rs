//! Numbers on the command line: what a flag takes is said in words, and a minus sign is part of a number.

use std::fmt::Display;
use std::str::FromStr;

/// Reads whole numbers of at least `least`. Flags that use it allow hyphens, so that this can refuse them.
pub(super) fn at_least<T>(least: T) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Copy + Send + Sync + 'static,
{
    move |text| {
        let too_large = !text.is_empty() && text.bytes().all(|letter| letter.is_ascii_digit());
        match text.parse() {
            Ok(number) if number >= least => Ok(number),
            Err(_) if too_large => Err("the number is too large".to_owned()),
            _ => Err(format!("expected a whole number of at least {least}")),
        }
    }
}

/// Reads any number, infinity and NaN included: whoever uses it checks the range.
pub(super) fn any(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_| "expected a number".to_owned())
}

/// Reads a number of bytes: a whole number, with KiB, MiB or GiB behind it or nothing.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let unit = units.iter().find_map(|&(name, power)| Some((text.strip_suffix(name)?, power)));
    let (number, power) = unit.unwrap_or((text, 0));
    let number: u64 = number.trim_end().parse().map_err(|_| {
        "expected a whole number of bytes, or one with KiB, MiB or GiB behind it such as 4GiB".to_owned()
    })?;
    number.checked_mul(1 << power).ok_or_else(|| "the number is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_or_none() {
        assert_eq!(["4GiB", "1 MiB", "3KiB", "17"].map(bytes), [4 << 30, 1 << 20, 3 << 10, 17].map(Ok));
        for wrong in ["", "GiB", "1GB", "-1", "1.5GiB", "many"] {
            assert!(bytes(wrong).unwrap_err().contains("expected a whole number of bytes"), "{wrong}");
        }
        assert_eq!(bytes("99999999999GiB").unwrap_err(), "the number is too large");
    }

    #[test]
    fn what_is_no_whole_number_is_refused_in_words() {
        let read = at_least(1u32);
        assert_eq!(read("7"), Ok(7));
        for wrong in ["0", "-1", "-1e3", "1.5", "", "many", "١"] {
            assert_eq!(read(wrong).unwrap_err(), "expected a whole number of at least 1", "{wrong}");
        }
        assert_eq!(read("99999999999").unwrap_err(), "the number is too large");
        assert_eq!(any("-.5"), Ok(-0.5));
        assert_eq!(any("warm").unwrap_err(), "expected a number");
    }
}
