//! Arguments of a call, matched to parameters as Python does.

use std::sync::Arc;

use super::compare::undefined;
use super::limits::{Limits, Outcome, fail};
use super::print::text_of;
use super::value::Value;

/// What a call is given.
#[derive(Debug, Default, Clone)]
pub(super) struct Given {
    pub positional: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

impl Given {
    /// One slot for each parameter. The first `required` must be there.
    pub(super) fn bind(&self, function: &str, parameters: &[&str], required: usize) -> Outcome<Bound> {
        if self.positional.len() > parameters.len() {
            return fail(format!(
                "TypeError: {function}() takes {} arguments, got {}",
                parameters.len(),
                self.positional.len()
            ));
        }
        let mut slots: Vec<Option<Value>> = self.positional.iter().cloned().map(Some).collect();
        slots.resize(parameters.len(), None);
        for (name, value) in &self.named {
            match parameters.iter().position(|parameter| *parameter == &**name) {
                Some(at) if slots[at].is_none() => slots[at] = Some(value.clone()),
                Some(_) => return fail(format!("TypeError: {function}() got multiple values for argument '{name}'")),
                None => return fail(format!("TypeError: {function}() got an unexpected keyword argument '{name}'")),
            }
        }
        if let Some(at) = slots.iter().take(required).position(Option::is_none) {
            return fail(format!("TypeError: {function}() missing a required argument: '{}'", parameters[at]));
        }
        Ok(Bound { function: function.to_owned(), slots })
    }

    /// For methods that take arguments by position only.
    pub(super) fn bind_positional(&self, function: &str, parameters: &[&str], required: usize) -> Outcome<Bound> {
        if !self.named.is_empty() {
            return fail(format!("TypeError: {function}() takes no keyword arguments"));
        }
        self.bind(function, parameters, required)
    }

    /// Takes an argument by its name.
    pub(super) fn take_named(&mut self, name: &str) -> Option<Value> {
        let at = self.named.iter().position(|(own, _)| &**own == name)?;
        Some(self.named.remove(at).1)
    }
}

/// Arguments in the order of the parameters.
#[derive(Debug)]
pub(super) struct Bound {
    function: String,
    slots: Vec<Option<Value>>,
}

impl Bound {
    /// The argument, or None where it was left out.
    pub(super) fn get(&self, at: usize) -> Option<&Value> {
        self.slots.get(at).and_then(Option::as_ref)
    }

    /// The argument, or None where it was left out or is Python's `None`.
    pub(super) fn some(&self, at: usize) -> Option<&Value> {
        self.get(at).filter(|value| !matches!(value, Value::None))
    }

    pub(super) fn value(&self, at: usize) -> Value {
        self.get(at).cloned().unwrap_or(Value::None)
    }

    pub(super) fn is_true(&self, at: usize, default: bool) -> bool {
        self.get(at).map_or(default, super::compare::is_true)
    }

    /// A whole number.
    pub(super) fn int(&self, at: usize, default: i128) -> Outcome<i128> {
        match self.get(at) {
            None => Ok(default),
            Some(Value::Undefined(words)) => undefined(words),
            Some(value) => match value.as_int() {
                Some(number) => Ok(number),
                None => fail(format!(
                    "TypeError: {}: '{}' object cannot be interpreted as an integer",
                    self.function,
                    value.type_name()
                )),
            },
        }
    }

    /// A text, not something that prints as one.
    pub(super) fn text(&self, at: usize) -> Outcome<&str> {
        match self.get(at) {
            Some(value) => match value.as_text() {
                Some(text) => Ok(text),
                None => fail(format!("TypeError: {}: expected str, got '{}'", self.function, value.type_name())),
            },
            None => Ok(""),
        }
    }

    /// `str()` of an argument.
    pub(super) fn printed(&self, at: usize, default: &str, limits: &Limits) -> Outcome<String> {
        match self.get(at) {
            Some(value) => text_of(value, limits),
            None => Ok(default.to_owned()),
        }
    }
}
