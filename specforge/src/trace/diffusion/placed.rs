//! Something of rows that stand side by side in a text. It owns the absolute position of the first: two of them meet in
//! [`Placed::beside`] alone, which refuses those of other positions, so that nobody takes a row of one by a number that counts from
//! where the other begins.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Something of each row from a position on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placed<T> {
    /// Absolute position of the first row.
    origin: usize,
    rows: Vec<T>,
}

/// Rows of other positions were to be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherPlaces {
    /// First position and number of rows of the one.
    pub one: (usize, usize),
    /// Those of the other.
    pub other: (usize, usize),
}

impl fmt::Display for OtherPlaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = |(origin, rows): (usize, usize)| format!("{rows} rows from position {origin}");
        write!(f, "rows of different positions cannot be compared: {}, {}", words(self.one), words(self.other))
    }
}

impl<T> Placed<T> {
    /// Rows that begin at an absolute position.
    pub fn new(origin: usize, rows: Vec<T>) -> Self {
        Self { origin, rows }
    }

    /// First position, and number of rows.
    pub fn place(&self) -> (usize, usize) {
        (self.origin, self.rows.len())
    }

    /// What is at an absolute position, where that is one of these rows.
    pub fn at(&self, position: usize) -> Option<&T> {
        self.rows.get(position.checked_sub(self.origin)?)
    }

    /// Absolute positions and what is there.
    pub fn each(&self) -> impl Iterator<Item = (usize, &T)> {
        (self.origin..).zip(&self.rows)
    }

    /// Both, position by position.
    pub fn beside<'a, U>(
        &'a self,
        other: &'a Placed<U>,
    ) -> Result<impl Iterator<Item = (usize, &'a T, &'a U)>, OtherPlaces> {
        match self.place() == other.place() {
            true => Ok(self.each().zip(&other.rows).map(|((position, one), other)| (position, one, other))),
            false => Err(OtherPlaces { one: self.place(), other: other.place() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_by_position_or_not_at_all() {
        let (one, other) = (Placed::new(5, vec![1, 2, 3]), Placed::new(5, vec!['a', 'b', 'c']));
        let pairs: Vec<_> = one.beside(&other).unwrap().collect();
        assert_eq!(pairs, [(5, &1, &'a'), (6, &2, &'b'), (7, &3, &'c')]);
        assert_eq!((one.at(4), one.at(7), one.at(8)), (None, Some(&3), None));
        for other in [Placed::new(0, vec!['a', 'b', 'c']), Placed::new(5, vec!['a', 'b'])] {
            let problem = one.beside(&other).err().unwrap().to_string();
            assert!(problem.contains("different positions") && problem.contains("3 rows from position 5"), "{problem}");
        }
    }
}
