//! Which messages of a conversation are trained, and which of their parts.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Who says a message.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What the conversation is about.
    System,
    /// The same, as OpenAI calls it.
    Developer,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
    /// What a tool gave back.
    Tool,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [Role::System, Role::Developer, Role::User, Role::Assistant, Role::Tool];

    /// As messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// Who is trained, and which parts of what the assistant says.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Mask {
    /// Whose messages are trained. Of the assistant's the whole turn with its end, of others what they say alone.
    pub roles: Vec<Role>,
    /// Whether thoughts are trained, with the signs around them.
    pub reasoning: bool,
    /// Whether calls of tools are trained, with the signs around them.
    pub tool_calls: bool,
}

impl Default for Mask {
    fn default() -> Self {
        Self { roles: vec![Role::Assistant], reasoning: true, tool_calls: true }
    }
}

impl Mask {
    /// Refuses lists of roles that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if self.roles.is_empty() {
            let problem = "names no role: nothing would be trained";
            return Err(Error::config("data.mask.roles", problem).with_hint("the default is [\"assistant\"]"));
        }
        let twice = (1..self.roles.len()).find(|&at| self.roles[..at].contains(&self.roles[at]));
        if let Some(at) = twice {
            return Err(Error::config("data.mask.roles", format!("names {} twice", self.roles[at].name())));
        }
        let left_out = [("reasoning", self.reasoning), ("tool_calls", self.tool_calls)].into_iter().find(|one| !one.1);
        if let (false, Some((part, _))) = (self.trains_assistant(), left_out) {
            let problem = "leaves out a part of what the assistant says, but data.mask.roles does not train it at all";
            return Err(Error::config(format!("data.mask.{part}"), problem));
        }
        Ok(())
    }

    /// Whether messages of this role are trained.
    pub fn trains(&self, role: &str) -> bool {
        self.roles.iter().any(|one| one.name() == role)
    }

    /// Whether what the assistant says is trained.
    pub fn trains_assistant(&self) -> bool {
        self.roles.contains(&Role::Assistant)
    }

    /// Whether the whole of a trained turn is.
    pub fn takes_whole_turns(&self) -> bool {
        self.reasoning && self.tool_calls
    }

    /// Whether it is what is taken without a choice: the whole of what the assistant says.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// In words, for a report.
    pub fn words(&self) -> String {
        let mut words = self.roles.iter().map(|role| role.name()).collect::<Vec<_>>().join(", ");
        for (part, kept) in [("reasoning", self.reasoning), ("tool calls", self.tool_calls)] {
            if !kept {
                words.push_str(&format!(", without {part}"));
            }
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_that_cannot_be_meant_are_refused() {
        let mask = |text: &str| serde_json::from_str::<Mask>(text).unwrap();
        for (text, problem) in [
            (r#"{"roles": []}"#, "names no role"),
            (r#"{"roles": ["tool", "assistant", "tool"]}"#, "names tool twice"),
            (r#"{"roles": ["tool"], "tool_calls": false}"#, "does not train it at all"),
        ] {
            let error = mask(text).check().unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("data.mask."), "{error}");
        }
        let both = mask(r#"{"roles": ["assistant", "tool"], "reasoning": false}"#);
        both.check().unwrap();
        assert_eq!(both.words(), "assistant, tool, without reasoning");
        assert!(both.trains("tool") && !both.trains("user") && !both.takes_whole_turns() && !both.is_default());
        assert!(mask("{}").is_default());
        for wrong in [r#"{"roles": ["gpt"]}"#, r#"{"thoughts": false}"#, r#"{"reasoning": 0}"#] {
            assert!(serde_json::from_str::<Mask>(wrong).is_err(), "{wrong}");
        }
    }
}
