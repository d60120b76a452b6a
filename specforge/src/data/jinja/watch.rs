//! What is watched while a template runs, to know the renderings of a conversation's beginnings.

use std::rc::Rc;

use super::value::{Items, Value};

/// The rendering of some first messages: how much of the whole text, and what follows instead of the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data) struct Beginning {
    pub shared: usize,
    pub behind: String,
}

/// What is watched while a template runs.
#[derive(Debug)]
pub(super) struct Watch {
    /// How many messages, and whether with a generation prompt; ascending.
    pub wanted: Vec<(usize, bool)>,
    /// The conversation, and lists that are it without its first messages.
    pub lists: Vec<(Rc<Items>, usize)>,
    pub found: Vec<Beginning>,
    /// Something was seen that a beginning would see differently.
    pub differs: bool,
    /// The loop is passed.
    pub passed: bool,
}

impl Watch {
    pub(super) fn new(messages: &Value, wanted: Vec<(usize, bool)>) -> Self {
        let lists = match messages {
            Value::List(items) => vec![(items.clone(), 0)],
            _ => Vec::new(),
        };
        Self { wanted, lists, found: Vec::new(), differs: false, passed: false }
    }

    pub(super) fn offset(&self, value: &Value) -> Option<usize> {
        let Value::List(items) = value else { return None };
        self.lists.iter().find(|(own, _)| Rc::ptr_eq(own, items)).map(|(_, offset)| *offset)
    }

    pub(super) fn fewest(&self) -> usize {
        self.wanted.first().map_or(0, |(count, _)| *count)
    }
}
