//! How long a server asks to be left alone: `Retry-After` of RFC 9110, in seconds or as a date.
//!
//! A date counts from the server's own clock where an answer has one (`Date`), so that clocks that differ do no harm.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// The pause that `Retry-After` asks for, none where it cannot be read; a date that is over asks for no time at all. `date` is
/// what the same answer says in `Date`.
pub fn pause(retry_after: &str, date: Option<&str>) -> Option<Duration> {
    let text = retry_after.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let now = date.and_then(|date| seconds_of(date, None)).unwrap_or_else(clock);
    let until = seconds_of(text, Some(now))?;
    Some(Duration::from_secs(until.saturating_sub(now).max(0) as u64))
}

/// Seconds since 1970 of a date in one of the three forms that RFC 9110 (5.6.7) lets senders use. `now` tells the century of
/// the form whose years have two digits.
fn seconds_of(text: &str, now: Option<i64>) -> Option<i64> {
    let words: Vec<&str> = text.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    let (day, month, year, time) = match words[..] {
        // Sun, 06 Nov 1994 08:49:37 GMT
        [_, day, month, year, time, "GMT"] => (day, month, number(year)?, time),
        // Sunday, 06-Nov-94 08:49:37 GMT
        [_, date, time, "GMT"] => {
            let mut parts = date.splitn(3, '-');
            let (day, month, year) = (parts.next()?, parts.next()?, number(parts.next()?)?);
            (day, month, whole_year(year, now), time)
        }
        // Sun Nov  6 08:49:37 1994
        [_, month, day, time, year] => (day, month, number(year)?, time),
        _ => return None,
    };
    let month = MONTHS.iter().position(|name| *name == month)? as i64 + 1;
    let day = number(day)?;
    let mut clock = time.splitn(3, ':');
    let (hour, minute, second) = (number(clock.next()?)?, number(clock.next()?)?, number(clock.next()?)?);
    let sound = (1..=31).contains(&day) && hour < 24 && minute < 60 && second <= 60 && (1970..=9999).contains(&year);
    sound.then(|| days(year, month, day) * 86400 + hour * 3600 + minute * 60 + second)
}

/// Digits alone.
fn number(text: &str) -> Option<i64> {
    let sound = (1..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    sound.then(|| text.parse().ok()).flatten()
}

/// A year of two digits: what looks more than 50 years away is meant of the century before (RFC 9110).
fn whole_year(year: i64, now: Option<i64>) -> i64 {
    const YEAR: i64 = 31_556_952; // seconds, of the mean Gregorian year
    if year >= 100 {
        return year;
    }
    let this = 1970 + now.unwrap_or(0) / YEAR;
    let whole = this - this % 100 + year;
    if whole > this + 50 { whole - 100 } else { whole }
}

/// Days since 1970 of a date of the Gregorian calendar; the year begins in March, so that the leap day is its last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_year = (153 * month + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_every_form_are_one_second() {
        for text in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(seconds_of(text, Some(784_111_777)), Some(784_111_777), "{text}");
        }
        assert_eq!(seconds_of("Tue, 29 Feb 2028 00:00:00 GMT", None), Some(1_835_395_200));
        assert_eq!(seconds_of("Thu, 01 Jan 1970 00:00:00 GMT", None), Some(0));
        for text in [
            "",
            "soon",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 6 Foo 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
        ] {
            assert_eq!(seconds_of(text, None), None, "{text}");
        }
    }

    #[test]
    fn a_pause_is_seconds_or_the_way_to_a_date() {
        let date = Some("Sun, 29 Nov 2026 12:00:00 GMT");
        let of = |text: &str| pause(text, date).map(|pause| pause.as_secs());
        assert_eq!((of("7"), of(" 0 "), of("-1"), of("soon")), (Some(7), Some(0), None, None));
        assert_eq!(of("Sun, 29 Nov 2026 12:01:30 GMT"), Some(90));
        assert_eq!(of("Sunday, 29-Nov-26 12:01:30 GMT"), Some(90));
        assert_eq!(of("Sun Nov 29 12:01:30 2026"), Some(90));
        // Over already.
        assert_eq!(of("Sun, 29 Nov 2026 11:00:00 GMT"), Some(0));
        // Without the server's clock, by this one.
        assert_eq!(pause("Sun, 06 Nov 1994 08:49:37 GMT", None), Some(Duration::ZERO));
        assert!(pause("Fri, 31 Dec 9999 23:59:59 GMT", None).is_some_and(|pause| pause > Duration::from_secs(86400)));
    }
}
