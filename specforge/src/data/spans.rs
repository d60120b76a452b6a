//! Trained parts of a text, in bytes.

use std::ops::Range;

/// A trained part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the text.
    pub range: Range<usize>,
    /// Where it may end earlier.
    pub end: SpanEnd,
}

/// Where the trained part of a span ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanEnd {
    /// Where the span ends.
    Exact,
    /// At the first token behind this byte that ends a sequence: there the model stops, whatever the template writes
    /// after it. Without one at the last special token behind this byte, without that where the span ends.
    EndOfTurn {
        /// One past the last byte of the message's content.
        after: usize,
    },
    /// At the first token that ends a sequence and that only special tokens and white space follow, else at the last
    /// special token that only white space follows, else where the span ends.
    BeforeWhiteSpace,
    /// Where the span ends, without a token that reaches beyond: the answer was cut off, and what follows was not said.
    Cut,
}

/// A text with its trained parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What is encoded.
    pub text: String,
    /// Trained parts, in order, without overlap.
    pub spans: Vec<Span>,
    /// Which of several documents of one conversation this is: the assistant's turn, counted from 1.
    pub turn: Option<usize>,
}
