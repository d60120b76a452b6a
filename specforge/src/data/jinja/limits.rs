//! What a template may take, and what it says when it fails.
//!
//! A template comes with a model, from anywhere. It may loop, double a text until memory is gone, or call itself for ever;
//! each of that ends here. The limits grow with the conversation, so that no honest template meets them.

use std::cell::Cell;

/// Why a template could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::data) enum Fault {
    /// The template's own words: `raise_exception`.
    Raised(String),
    /// It takes more time, memory or stack than any template needs.
    Limit(String),
    /// Everything else that Jinja2 would fail with.
    Failed(String),
}

impl Fault {
    /// What it says, without its kind.
    pub(in crate::data) fn text(&self) -> &str {
        match self {
            Self::Raised(text) | Self::Limit(text) | Self::Failed(text) => text,
        }
    }
}

/// A result, with the failure in a box: most results are small and most succeed.
pub(in crate::data) type Outcome<T> = Result<T, Box<Fault>>;

/// Fails with a reason.
pub(super) fn fail<T>(text: impl Into<String>) -> Outcome<T> {
    Err(Box::new(Fault::Failed(text.into())))
}

fn limit<T>(text: String) -> Outcome<T> {
    Err(Box::new(Fault::Limit(text)))
}

/// Steps of a template that is given nothing. A template for tools takes some thousands.
const STEPS: u64 = 1_000_000;
/// Steps for every byte of input on top: what a template needs that walks through the whole conversation for every message.
const STEPS_PER_BYTE: u64 = 2_000;
/// Bytes of texts and lists that may be made, let go or kept.
const BYTES: u64 = 256 << 20;
const BYTES_PER_BYTE: u64 = 8_192;
/// The longest text.
const LONGEST: usize = 32 << 20;
const LONGEST_PER_BYTE: usize = 64;
/// Stack that one rendering may take. Threads have 2 MiB, and rendering is not all they do.
const STACK: usize = 1 << 20;

/// What is left to one rendering.
#[derive(Debug)]
pub(in crate::data) struct Limits {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    longest: usize,
    base: usize,
}

impl Limits {
    /// For a rendering that is given so many bytes, and starts at this depth of the stack.
    pub(in crate::data) fn new(input_bytes: usize) -> Self {
        let here = 0_u8;
        let input = input_bytes as u64;
        Self {
            steps: Cell::new(STEPS.saturating_add(input.saturating_mul(STEPS_PER_BYTE))),
            bytes: Cell::new(BYTES.saturating_add(input.saturating_mul(BYTES_PER_BYTE))),
            longest: LONGEST.saturating_add(input_bytes.saturating_mul(LONGEST_PER_BYTE)),
            base: std::ptr::from_ref(&here) as usize,
        }
    }

    /// Takes steps: one for a small thing, more for what goes through a list or a text.
    pub(super) fn step(&self, count: usize) -> Outcome<()> {
        match self.steps.get().checked_sub(count as u64) {
            Some(left) => self.steps.set(left),
            None => return limit("it does not come to an end: it takes more steps than any template needs".to_owned()),
        }
        Ok(())
    }

    /// Asks for room before a text or list of so many bytes is made.
    pub(super) fn room(&self, bytes: usize) -> Outcome<()> {
        if bytes > self.longest {
            return limit(format!("it makes a text of {bytes} bytes; expected {} at most", self.longest));
        }
        match self.bytes.get().checked_sub(bytes as u64) {
            Some(left) => self.bytes.set(left),
            None => return limit("it takes more memory than any template needs".to_owned()),
        }
        self.step(bytes / 64)
    }

    /// Refuses to go deeper than the stack is.
    pub(super) fn stack(&self) -> Outcome<()> {
        let here = 0_u8;
        if self.base.abs_diff(std::ptr::from_ref(&here) as usize) > STACK {
            return limit("it is nested too deeply, or calls itself without end".to_owned());
        }
        Ok(())
    }
}
