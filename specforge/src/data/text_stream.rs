//! Text of tokens as they arrive. A character may be spread over several tokens, and what a token spells may depend on
//! the one before it: text is held back until it is whole, and is cut from the decoding of a few tokens at once.

use super::ChatTokenizer;
use crate::error::Result;

/// Turns tokens into text, piece by piece. The pieces together are the decoding of all tokens.
pub struct TextStream<'a> {
    tokenizer: &'a ChatTokenizer,
    /// Tokens from the last place where text was whole on.
    tokens: Vec<u32>,
    /// How many of them are in what was given out.
    given: usize,
}

/// What a decoder writes for bytes that are no character yet.
const UNFINISHED: char = '\u{FFFD}';

impl<'a> TextStream<'a> {
    /// A stream without tokens.
    pub fn new(tokenizer: &'a ChatTokenizer) -> Self {
        Self { tokenizer, tokens: Vec::new(), given: 0 }
    }

    /// Takes a token and returns the text that it completes. Special tokens spell nothing.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let before = self.tokenizer.decode(&self.tokens[..self.given], true)?;
        let now = self.tokenizer.decode(&self.tokens, true)?;
        if now.ends_with(UNFINISHED) || now.len() <= before.len() || !now.starts_with(&before) {
            return Ok(String::new());
        }
        let text = now[before.len()..].to_owned();
        // The tokens just given stay as the context of the next.
        self.tokens.drain(..self.given);
        self.given = self.tokens.len();
        Ok(text)
    }

    /// What is left, finished or not.
    pub fn finish(&mut self) -> Result<String> {
        let before = self.tokenizer.decode(&self.tokens[..self.given], true)?;
        let now = self.tokenizer.decode(&self.tokens, true)?;
        self.given = self.tokens.len();
        Ok(now.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }
}
