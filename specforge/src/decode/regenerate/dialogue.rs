//! A row whose turns are being answered.

use std::collections::VecDeque;

use super::prompts::Prompt;
use crate::data::conversation::Message;

/// What is said in a row, and what is still to be asked.
pub(super) struct Dialogue {
    /// Said so far.
    pub(super) messages: Vec<Message>,
    /// Not yet asked.
    pub(super) rest: VecDeque<Message>,
    /// Hash of the prompt that is being answered, where it is known before the answer.
    pub(super) prompt_hash: String,
    /// Answers so far.
    pub(super) turns: usize,
}

impl Dialogue {
    /// A row of which nothing was asked.
    pub(super) fn new(prompt: &Prompt) -> Self {
        let rest = prompt.messages.iter().cloned().collect();
        Self { messages: Vec::new(), rest, prompt_hash: String::new(), turns: 0 }
    }

    /// Says everything up to the next user message, it included. False where no user message is left.
    pub(super) fn ask(&mut self) -> bool {
        while let Some(message) = self.rest.pop_front() {
            let question = message.role == "user";
            self.messages.push(message);
            if question {
                return true;
            }
        }
        false
    }
}
