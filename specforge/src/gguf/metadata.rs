//! The metadata of a GGUF file, with errors that name the key.

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value;

use super::header::Content;
use crate::error::{Error, Result};

/// The header of a GGUF file, and what to call the file in messages.
#[derive(Debug)]
pub struct Metadata {
    pub(super) path: PathBuf,
    pub(super) content: Content,
    /// What the keys of the network begin with.
    architecture: String,
}

impl Metadata {
    pub(super) fn new(path: PathBuf, content: Content) -> Self {
        let architecture = content.metadata.get("general.architecture").and_then(text).unwrap_or("llama").to_owned();
        Self { path, content, architecture }
    }

    /// What kind of network the file says it holds, such as `llama`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The key of this name that belongs to the network.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// Text, where the key is there.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "text", text)
    }

    /// A whole number, not negative, where the key is there.
    pub fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number", whole)
    }

    /// A finite number, where the key is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", number)
    }

    /// A truth value, where the key is there.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| value.to_bool().ok())
    }

    /// A list of texts, where the key is there.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of texts", |value| list(value)?.iter().map(text).collect())
    }

    /// A list of whole numbers, not negative, where the key is there.
    pub fn wholes(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.typed(key, "a list of whole numbers", |value| list(value)?.iter().map(whole).collect())
    }

    /// A list of finite numbers, where the key is there.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of finite numbers", |value| list(value)?.iter().map(number).collect())
    }

    /// What `read` finds, or an error that names the missing key: `need("llama.block_count", Metadata::whole)`.
    pub fn need<'a, T>(&'a self, key: &str, read: impl FnOnce(&'a Self, &str) -> Result<Option<T>>) -> Result<T> {
        read(self, key)?.ok_or_else(|| self.bad(format!("the metadata key `{key}` is missing")))
    }

    /// An error about this file.
    pub fn bad(&self, problem: impl Into<String>) -> Error {
        Error::bad_file(&self.path, problem)
    }

    fn typed<'a, T>(&'a self, key: &str, want: &str, take: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(self.bad(format!("metadata key `{key}`: expected {want}, got {}", shown(value)))),
        }
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn list(value: &Value) -> Option<&Vec<Value>> {
    value.to_vec().ok()
}

fn whole(value: &Value) -> Option<u64> {
    match *value {
        Value::U8(number) => Some(number.into()),
        Value::U16(number) => Some(number.into()),
        Value::U32(number) => Some(number.into()),
        Value::U64(number) => Some(number),
        Value::I8(number) => number.try_into().ok(),
        Value::I16(number) => number.try_into().ok(),
        Value::I32(number) => number.try_into().ok(),
        Value::I64(number) => number.try_into().ok(),
        _ => None,
    }
}

fn number(value: &Value) -> Option<f64> {
    let number = match *value {
        Value::F32(number) => f64::from(number),
        Value::F64(number) => number,
        Value::I8(number) => number.into(),
        Value::I16(number) => number.into(),
        Value::I32(number) => number.into(),
        Value::I64(number) => number as f64,
        _ => whole(value)? as f64,
    };
    number.is_finite().then_some(number)
}

/// A value as a message shows it: long ones only by their kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(elements) => format!("a list of {}", elements.len()),
        Value::String(text) if text.chars().count() > 40 => format!("a text of {} bytes", text.len()),
        Value::String(text) => format!("`{text}`"),
        Value::Bool(flag) => flag.to_string(),
        other => match number(other) {
            Some(number) => number.to_string(),
            None => format!("{other:?}"),
        },
    }
}

/// A float32 as the decimal its author meant: 1e-5, not 9.999999747378752e-6.
pub(super) fn six_digits(number: f64) -> f64 {
    format!("{number:.5e}").parse().unwrap_or(number)
}
