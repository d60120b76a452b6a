//! The date that templates print.

use super::limits::{Outcome, fail};

/// A day, for templates that print the date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) struct Day {
    pub year: i64,
    pub month: usize,
    pub day: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Day {
    /// From `2024-07-26`; nothing where that is no day.
    pub(in crate::data) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-').zip([4, 2, 2]).map(|(part, digits)| {
            let sound = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
            sound.then(|| part.parse::<i64>().ok()).flatten()
        });
        let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
        let leaps = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = match month {
            2 => 28 + i64::from(leaps),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let sound = text.len() == 10 && (1..=12).contains(&month) && (1..=last).contains(&day);
        sound.then_some(Self { year, month: month as usize, day })
    }

    /// Days since Sunday.
    fn weekday(self) -> usize {
        // Sakamoto's method.
        const SHIFT: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        let sum = year + year / 4 - year / 100 + year / 400 + SHIFT[self.month - 1] + self.day;
        sum.rem_euclid(7) as usize
    }

    /// Counted from 1.
    fn day_of_year(self) -> i64 {
        const BEFORE: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leaps = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0) && self.month > 2;
        BEFORE[self.month - 1] + self.day + i64::from(leaps)
    }

    /// `strftime` at midnight.
    pub(super) fn format(self, pattern: &str) -> Outcome<String> {
        let mut out = String::new();
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                out.push(character);
                continue;
            }
            let (month, weekday) = (MONTHS[self.month - 1], WEEKDAYS[self.weekday()]);
            let mut code = characters.next();
            let unpadded = code == Some('-');
            if unpadded {
                code = characters.next();
            }
            let number = |value: i64| if unpadded { value.to_string() } else { format!("{value:02}") };
            match code {
                Some('Y') => out.push_str(&self.year.to_string()),
                Some('y') => out.push_str(&number(self.year % 100)),
                Some('m') => out.push_str(&number(self.month as i64)),
                Some('d') => out.push_str(&number(self.day)),
                Some('e') => out.push_str(&format!("{:2}", self.day)),
                Some('B') => out.push_str(month),
                Some('b' | 'h') => out.push_str(&month[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('H' | 'M' | 'S') => out.push_str(&number(0)),
                Some('I') => out.push_str("12"),
                Some('p') => out.push_str("AM"),
                Some('F') => out.push_str(&self.format("%Y-%m-%d")?),
                Some('T') => out.push_str("00:00:00"),
                Some('R') => out.push_str("00:00"),
                Some('X') => out.push_str("00:00:00"),
                Some('D' | 'x') => out.push_str(&self.format("%m/%d/%y")?),
                Some('c') => out.push_str(&self.format("%a %b %e %H:%M:%S %Y")?),
                Some('r') => out.push_str("12:00:00 AM"),
                Some('k') => out.push_str(" 0"),
                Some('l') => out.push_str("12"),
                Some('f') => out.push_str("000000"),
                Some('C') => out.push_str(&number(self.year / 100)),
                Some('j') if unpadded => out.push_str(&self.day_of_year().to_string()),
                Some('j') => out.push_str(&format!("{:03}", self.day_of_year())),
                Some('w') => out.push_str(&self.weekday().to_string()),
                Some('u') => out.push_str(&((self.weekday() + 6) % 7 + 1).to_string()),
                Some('U') => out.push_str(&number((self.day_of_year() + 6 - self.weekday() as i64) / 7)),
                Some('W') => {
                    out.push_str(&number((self.day_of_year() + 6 - (self.weekday() as i64 + 6) % 7) / 7));
                }
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                // The time is in no zone.
                Some('Z' | 'z') => {}
                Some('%') => out.push('%'),
                other => {
                    let code = other.map_or_else(String::new, String::from);
                    let text = format!("strftime_now: `%{code}` in `{pattern}` is not supported");
                    return fail(text);
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let day = Day { year: 2024, month: 7, day: 26 };
        assert_eq!(day.format("%d %b %Y").unwrap(), "26 Jul 2024");
        assert_eq!(day.format("%A, %B %-d, %y %%").unwrap(), "Friday, July 26, 24 %");
        assert_eq!(Day { year: 2000, month: 2, day: 29 }.format("%a %F").unwrap(), "Tue 2000-02-29");
        assert!(day.format("%Q").is_err());
    }

    #[test]
    fn days_are_read() {
        assert_eq!(Day::parse("2024-02-29"), Some(Day { year: 2024, month: 2, day: 29 }));
        for none in
            ["2023-02-29", "2024-13-01", "2024-00-01", "2024-1-1", "2024-01-01T00:00", "2024-01", "today", "+024-01-01"]
        {
            assert_eq!(Day::parse(none), None, "{none}");
        }
    }
}
