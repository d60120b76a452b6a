//! What one record of a file is: a conversation, preformatted text, a prompt with its completion, or a document in
//! tokens; and the records that are none.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::marks::{Finish, Marks};
use crate::error::{Error, Result};

/// One message, as the chat template sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or `developer`.
    pub role: String,
    /// What is said; absent in a message that only calls tools.
    pub content: Option<String>,
    /// `reasoning_content`, `tool_calls`, `tool_call_id`, `name` and whatever else was written.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
    /// What decides about training; no template sees it.
    #[serde(skip)]
    pub marks: Marks,
    /// The arguments of each call of a tool as they were written, where that was a string of JSON.
    #[serde(skip)]
    pub written_arguments: Vec<Option<String>>,
}

impl Message {
    /// A message that only says something.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: Some(content.into()),
            extra: Map::new(),
            marks: Marks::default(),
            written_arguments: Vec::new(),
        }
    }

    /// Whether the assistant says it.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// The message as a file keeps it: with how its answer was generated.
    pub fn to_record(&self) -> Result<Value> {
        let failed = |error: serde_json::Error| Error::Failed(error.to_string());
        let mut record = serde_json::to_value(self).map_err(failed)?;
        let Marks { finish, token_ids, prompt_hash, vocabulary_hash, .. } = &self.marks;
        if let Some(finish) = finish {
            record["finish"] = serde_json::to_value(finish).map_err(failed)?;
        }
        if let Some(token_ids) = token_ids {
            record["token_ids"] = Value::from(token_ids.as_slice());
        }
        for (key, hash) in [("prompt_hash", prompt_hash), ("vocabulary_hash", vocabulary_hash)] {
            if let Some(hash) = hash {
                record[key] = Value::from(hash.as_str());
            }
        }
        Ok(record)
    }
}

/// A conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Its own name, or the file and line it stands on.
    pub id: String,
    /// What is said, in order.
    pub messages: Vec<Message>,
    /// Tools the assistant may call, a list in the format of the template.
    pub tools: Option<Value>,
    /// Values that its template is given besides (`chat_template_kwargs`); they replace those of the configuration.
    pub template_arguments: Map<String, Value>,
}

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    /// Rendered by the chat template.
    Conversation(Conversation),
    /// Taken as it is; every token is trained.
    Text {
        /// Its own name, or the file and line it stands on.
        id: String,
        /// Text with every special token written out.
        text: String,
    },
    /// Taken as it is; the completion is trained, with an end of sequence after it.
    Completion {
        /// Its own name, or the file and line it stands on.
        id: String,
        /// What the model is given.
        prompt: String,
        /// What it answers.
        completion: String,
        /// Why the answer ended, where the file says so.
        finish: Option<Finish>,
    },
    /// A document as it is, in tokens.
    Tokens {
        /// Its own name, or the file and line it stands on.
        id: String,
        /// Token ids.
        tokens: Vec<u32>,
        /// 1 for each token that is trained, 0 for the others.
        supervised: Vec<u8>,
        /// Hash of the vocabulary that the ids are of, where the file says it.
        vocabulary_hash: Option<String>,
    },
}

impl Sample {
    /// Its own name, or the file and line it stands on.
    pub fn id(&self) -> &str {
        match self {
            Sample::Conversation(conversation) => &conversation.id,
            Sample::Text { id, .. } | Sample::Completion { id, .. } | Sample::Tokens { id, .. } => id,
        }
    }

    /// A hash of what is said, whatever it is called and wherever it stands.
    pub fn content_key(&self) -> u64 {
        first_eight(&match self {
            Sample::Conversation(conversation) => conversation.said(conversation.messages.len()),
            Sample::Text { text, .. } => text.clone(),
            Sample::Completion { prompt, completion, .. } => format!("{prompt}\u{0}{completion}"),
            Sample::Tokens { tokens, .. } => format!("{tokens:?}"),
        })
    }

    /// By which its documents belong together, and with those of which others.
    pub fn origin(&self) -> Origin {
        let conversation = self.content_key();
        Origin { conversation, prompt: self.prompt().map_or(conversation, |prompt| first_eight(&prompt)) }
    }

    /// What stands before the first answer, if anything does.
    fn prompt(&self) -> Option<String> {
        match self {
            Sample::Conversation(conversation) => {
                let asked = conversation.messages.iter().position(super::Message::is_assistant)?;
                (asked > 0).then(|| conversation.said(asked))
            }
            Sample::Text { .. } => None,
            Sample::Completion { prompt, .. } => (!prompt.is_empty()).then(|| prompt.clone()),
            Sample::Tokens { tokens, supervised, .. } => {
                let asked = supervised.iter().position(|&mark| mark == 1)?;
                (asked > 0).then(|| format!("{:?}", &tokens[..asked]))
            }
        }
    }
}

impl Conversation {
    /// Its first messages with everything else that a template is given, as one text.
    fn said(&self, messages: usize) -> String {
        let mut said = serde_json::to_string(&(&self.messages[..messages], &self.tools)).unwrap_or_default();
        if !self.template_arguments.is_empty() {
            said.push_str(&Value::Object(self.template_arguments.clone()).to_string());
        }
        said
    }
}

/// The first eight bytes of its SHA-256.
fn first_eight(content: &str) -> u64 {
    let digest = Sha256::digest(content.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

/// Hashes by which documents belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// Of what is asked before the first answer: the same for all answers to it.
    pub prompt: u64,
    /// Of all that is said: the same for all documents of one conversation.
    pub conversation: u64,
}

/// Of something that answers nothing.
impl From<u64> for Origin {
    fn from(conversation: u64) -> Self {
        Self { prompt: conversation, conversation }
    }
}

/// Records that could not be used, each with file, line and reason.
#[derive(Debug, Default)]
pub struct Rejections {
    /// Every one, as [`Error::BadLine`].
    pub errors: Vec<Error>,
    /// Number of records they were found among.
    pub total: usize,
}

/// More rejections than these are counted, not listed.
const REJECTIONS_SHOWN: usize = 5;

impl Rejections {
    /// Notes one.
    pub fn push(&mut self, path: &Path, line: usize, problem: String) {
        self.errors.push(Error::BadLine { path: path.to_path_buf(), line, problem });
    }

    /// An error that shows the first few, when there are more than the configured share.
    pub fn check(&self, max_bad_share: f64) -> Result<()> {
        let Some(Error::BadLine { path, .. }) = self.errors.first() else {
            return Ok(());
        };
        let reasons = self.errors.iter().map(Error::to_string);
        check_share(path, (self.errors.len(), self.total), reasons, max_bad_share)
    }
}

/// Refuses more unusable records than the configured share. `counts` are theirs and that of all records; `reasons` are
/// those of the first.
pub fn check_share(
    path: &Path,
    (count, total): (usize, usize),
    reasons: impl Iterator<Item = String>,
    max_bad_share: f64,
) -> Result<()> {
    let share = count as f64 / total.max(1) as f64;
    if share <= max_bad_share {
        return Ok(());
    }
    let mut problem = format!(
        "{count} of {total} records ({:.1} %) cannot be used, more than data.max_bad_share = {max_bad_share} allows:",
        share * 100.0,
    );
    reasons.take(REJECTIONS_SHOWN).for_each(|reason| problem.push_str(&format!("\n  {reason}")));
    if count > REJECTIONS_SHOWN {
        problem.push_str(&format!("\n  and {} more", count - REJECTIONS_SHOWN));
    }
    Err(Error::bad_file(path, problem).with_hint("correct these records, or raise data.max_bad_share"))
}

/// Name of a record that has none of its own.
pub fn record_name(path: &Path, line: usize) -> String {
    let file = path.file_name().unwrap_or(path.as_os_str());
    format!("{}:{line}", file.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejections_name_file_line_and_share() {
        let mut rejections = Rejections { total: 14, ..Rejections::default() };
        for line in 3..10 {
            rejections.push(Path::new("data/prompts.jsonl"), line, "is not JSON".to_owned());
        }
        rejections.check(0.5).unwrap();
        let error = rejections.check(0.4).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("7 of 14 records (50.0 %)"), "{message}");
        assert!(message.contains("prompts.jsonl:3: is not JSON"), "{message}");
        assert!(message.contains("prompts.jsonl:7:") && message.ends_with("and 2 more"), "{message}");
        assert_eq!(error.exit_code(), 2);
    }
}
