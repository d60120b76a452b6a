//! Tables of what the program knows by name: algorithms, drafters, formats. A table has the rows that the program was built
//! with, and those that a program around this library adds before it starts.

use std::sync::{PoisonError, RwLock};

use crate::error::{Error, Result};

/// Rows of one kind, each with a name of its own.
#[derive(Debug)]
pub struct Table<T: 'static> {
    /// What a row is, for messages.
    what: &'static str,
    name: fn(&T) -> &'static str,
    built_in: &'static [T],
    added: RwLock<Vec<&'static T>>,
}

impl<T> Table<T> {
    /// A table of these rows. `what` says what a row is, and `name` what one is called.
    pub const fn new(what: &'static str, name: fn(&T) -> &'static str, built_in: &'static [T]) -> Self {
        Self { what, name, built_in, added: RwLock::new(Vec::new()) }
    }

    /// Every row: those that were built in, then those that were added, in order.
    pub fn rows(&self) -> Vec<&'static T> {
        let added = self.added.read().unwrap_or_else(PoisonError::into_inner);
        self.built_in.iter().chain(added.iter().copied()).collect()
    }

    /// The row of a name.
    pub fn find(&self, name: &str) -> Option<&'static T> {
        self.rows().into_iter().find(|row| (self.name)(row) == name)
    }

    /// The names of all rows, for messages.
    pub fn names(&self) -> String {
        self.rows().into_iter().map(self.name).collect::<Vec<_>>().join(", ")
    }

    /// Adds a row. Refuses a name that is taken.
    pub fn add(&self, row: &'static T) -> Result<()> {
        let name = (self.name)(row);
        if self.find(name).is_some() {
            return Err(Error::Failed(format!("there are two rows for {} `{name}`", self.what)));
        }
        self.added.write().unwrap_or_else(PoisonError::into_inner).push(row);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_added_behind_those_of_the_program_and_names_are_taken_once() {
        static TABLE: Table<&str> = Table::new("a word", |word| word, &["one", "two"]);
        TABLE.add(&"three").unwrap();
        assert_eq!(TABLE.names(), "one, two, three");
        assert_eq!(TABLE.find("three"), Some(&"three"));
        for taken in [&"two", &"three"] {
            let error = TABLE.add(taken).unwrap_err().to_string();
            assert!(error.contains(&format!("a word `{taken}`")), "{error}");
        }
        assert_eq!(TABLE.rows().len(), 3);
    }
}
