//! The rows to answer: which messages they hold, and what they are called.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::data::conversation::{Conversation, Message, Parsed, Sample, parse_record};
use crate::data::marks::{PassedOver, PassedOverCounts};
use crate::data::reader::SourceFile;
use crate::data::tokenizer::hex;
use crate::error::{Error, Result};

/// Keys that hold the messages of a row under one of their names, or say how old answers ended. The messages come back as
/// `messages`, each answer with how it ended.
const REPLACED_KEYS: &[&str] =
    &["messages", "conversations", "conversation", "turns", "prompt", "completion", "finish", "finish_reason"];

/// One row to answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its own id, or a hash of its line.
    pub id: String,
    /// Where it stands in its file, from 1.
    pub line: usize,
    /// Messages in order, without the assistant's.
    pub messages: Vec<Message>,
    /// Tools the assistant may call.
    pub tools: Option<Value>,
    /// Values that the row gives its template.
    pub template_arguments: Map<String, Value>,
    /// Everything else the row carries, and the id.
    kept: Map<String, Value>,
}

/// All rows of a file.
#[derive(Debug)]
pub struct Prompts {
    path: PathBuf,
    /// In the order of the file.
    pub rows: Vec<Prompt>,
    /// Lines that cannot be used, as [`Error::BadLine`].
    pub bad_lines: Vec<Error>,
    /// Keys that look as if they decided something, and were not understood.
    pub passed_over: PassedOverCounts,
    index: HashMap<String, usize>,
}

impl Prompts {
    /// Reads a file. Two rows of one id are an error; unusable lines are one only above `max_bad_share`.
    pub fn read(path: &Path, max_bad_share: f64) -> Result<Self> {
        let source = SourceFile::open(path)?;
        let total = source.records().len();
        if total == 0 {
            return Err(Error::bad_file(path, "holds no prompts")
                .with_hint(r#"write one {"id": ..., "messages": [...]} a line"#));
        }
        let mut prompts = Self {
            path: path.to_path_buf(),
            rows: Vec::with_capacity(total),
            bad_lines: Vec::new(),
            passed_over: PassedOverCounts::default(),
            index: HashMap::with_capacity(total),
        };
        let mut unnamed: HashMap<String, usize> = HashMap::new();
        for record in source.records() {
            match Prompt::parse(source.record(record), record.line, &mut unnamed) {
                Ok((prompt, passed_over)) => {
                    prompts.passed_over.add(path, passed_over);
                    prompts.add(prompt)?;
                }
                Err(problem) => prompts.bad_lines.push(bad_line(path, record.line, problem)),
            }
        }
        prompts.check_share(max_bad_share)?;
        Ok(prompts)
    }

    /// Place of a row by its id.
    pub fn find(&self, id: &str) -> Option<usize> {
        self.index.get(id).copied()
    }

    /// Tells sets of rows apart: processes that share them must mean the same.
    pub(super) fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for Prompt { id, messages, .. } in &self.rows {
            digest.update(format!("{id}\n{}\n", messages.len()));
            for message in messages {
                digest.update(message.role.as_bytes());
                digest.update(message.content.as_deref().unwrap_or_default().as_bytes());
            }
        }
        hex(&digest.finalize())
    }

    fn add(&mut self, prompt: Prompt) -> Result<()> {
        if let Some(first) = self.index.insert(prompt.id.clone(), self.rows.len()) {
            let problem = format!("id `{}` was used before, on line {}", prompt.id, self.rows[first].line);
            return Err(bad_line(&self.path, prompt.line, problem));
        }
        self.rows.push(prompt);
        Ok(())
    }

    fn check_share(&self, max_bad_share: f64) -> Result<()> {
        let (bad, total) = (self.bad_lines.len(), self.bad_lines.len() + self.rows.len());
        let Some(first) = self.bad_lines.first() else {
            return Ok(());
        };
        if bad as f64 <= max_bad_share * total as f64 && bad < total {
            return Ok(());
        }
        let problem =
            format!("{bad} of {total} rows cannot be used, more than a share of {max_bad_share}; the first: {first}");
        Err(Error::bad_file(&self.path, problem).with_hint("correct the rows, or raise --max-bad-share"))
    }
}

impl Prompt {
    fn parse(bytes: &[u8], line: usize, unnamed: &mut HashMap<String, usize>) -> Result<(Self, PassedOver), String> {
        let mut named = true;
        let fallback = || {
            named = false;
            content_id(bytes, unnamed)
        };
        let Parsed { sample, passed_over, .. } = parse_record(bytes, fallback)?;
        let Sample::Conversation(conversation) = sample else {
            return Err("expected a conversation, got text".to_owned());
        };
        let Conversation { id, mut messages, tools, template_arguments } = conversation;
        messages.retain(|message| !message.is_assistant());
        if !messages.iter().any(|message| message.role == "user") {
            return Err("holds no message of the user to answer".to_owned());
        }
        if messages.iter().any(|message| message.role == "tool") {
            return Err("holds results of tools; they belong to answers that are dropped here".to_owned());
        }
        let mut kept = if named { Map::new() } else { Map::from_iter([("id".to_owned(), Value::from(id.as_str()))]) };
        if let Ok(Value::Object(object)) = serde_json::from_slice(bytes) {
            kept.extend(object.into_iter().filter(|(_, value)| !value.is_null()));
        }
        if !named {
            kept.insert("id".to_owned(), Value::from(id.as_str()));
        }
        kept.retain(|key, _| !REPLACED_KEYS.contains(&key.as_str()));
        Ok((Self { id, line, messages, tools, template_arguments, kept }, passed_over))
    }

    /// The row with its answers, as one line of JSON.
    pub fn answered(&self, messages: &[Message]) -> Result<String> {
        let mut row = self.kept.clone();
        row.insert("messages".to_owned(), messages.iter().map(Message::to_record).collect::<Result<_>>()?);
        Ok(Value::Object(row).to_string())
    }
}

/// Id of a row that has none: a hash of its line, and a number where the same line was there before.
fn content_id(bytes: &[u8], unnamed: &mut HashMap<String, usize>) -> String {
    let id = hex(&Sha256::digest(bytes.trim_ascii())[..8]);
    let count = unnamed.entry(id.clone()).or_insert(0);
    *count += 1;
    if *count == 1 { id } else { format!("{id}-{count}") }
}

pub(super) fn bad_line(path: &Path, line: usize, problem: String) -> Error {
    Error::BadLine { path: path.to_path_buf(), line, problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Finish, Marks};

    fn read(text: &str, share: f64) -> Result<Prompts> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).unwrap();
        Prompts::read(&path, share)
    }

    #[test]
    fn answers_go_where_the_row_had_its_messages_and_other_keys_stay() {
        let prompts = read(
            concat!(
                r#"{"topic":"birds","id":7,"conversations":[{"from":"human","value":"a"},"#,
                r#"{"from":"gpt","value":"old"}],"tools":[{"name":"t"}],"finish":["stop"],"empty":null}"#,
                "\n",
                r#"{"system":"be brief","messages":[{"role":"user","content":"b","name":"Ann"}]}"#,
                "\n",
            ),
            0.0,
        )
        .unwrap();
        let [first, second] = prompts.rows.as_slice() else { panic!("two rows") };
        assert_eq!((first.id.as_str(), first.messages.len(), first.tools.is_some()), ("7", 1, true));
        let mut messages = first.messages.clone();
        let marks = Marks { finish: Some(Finish::Length), token_ids: Some(vec![3, 1]), ..Marks::default() };
        messages.push(Message { marks, ..Message::new("assistant", "new") });
        assert_eq!(
            first.answered(&messages).unwrap(),
            concat!(
                r#"{"topic":"birds","id":7,"tools":[{"name":"t"}],"#,
                r#""messages":[{"role":"user","content":"a"},{"role":"assistant","content":"new","#,
                r#""finish":"length","token_ids":[3,1]}]}"#
            )
        );
        assert_eq!(second.messages[0], Message::new("system", "be brief"));
        let line = second.answered(&second.messages).unwrap();
        assert!(line.starts_with(&format!(r#"{{"id":"{}","system":"be brief","messages":"#, second.id)), "{line}");
        assert!(line.contains(r#""name":"Ann""#), "{line}");
        assert_eq!(prompts.find(&second.id), Some(1));
    }

    #[test]
    fn an_answered_row_is_read_back_as_the_same_prompt() {
        let text = concat!(
            r#"{"system":"s","turns":["a","b"]}"#,
            "\n",
            r#"{"id":null,"messages":[{"role":"user","content":"b"}]}"#,
            "\n",
            r#"{"prompt":[{"role":"user","content":"c"}],"completion":[{"role":"assistant","content":"d"}],"#,
            r#""chat_template_kwargs":{"think":false}}"#,
            "\n",
        );
        for prompt in read(text, 0.0).unwrap().rows {
            let line = prompt.answered(&prompt.messages).unwrap();
            let again = &read(&line, 0.0).unwrap().rows[0];
            assert_eq!((&again.id, &again.messages), (&prompt.id, &prompt.messages));
            assert_eq!(again.template_arguments, prompt.template_arguments);
        }
    }

    #[test]
    fn rows_without_id_are_named_by_content() {
        let row = r#"{"turns":["a"]}"#;
        let ids =
            |text: &str| -> Vec<String> { read(text, 0.0).unwrap().rows.into_iter().map(|prompt| prompt.id).collect() };
        let alone = ids(row);
        assert_eq!(alone[0].len(), 16);
        let other = r#"{"turns":["b"]}"#;
        let many = ids(&format!("{other}\n{row}\n  {row}\r\n"));
        assert_eq!(many[1..], [alone[0].clone(), format!("{}-2", alone[0])]);
    }

    #[test]
    fn two_rows_of_one_id_are_refused_with_both_lines() {
        let row = r#"{"id":"a","turns":["x"]}"#;
        let message = read(&format!("{row}\n\n{row}\n"), 1.0).unwrap_err().to_string();
        assert!(message.ends_with("prompts.jsonl:3: id `a` was used before, on line 1"), "{message}");
    }

    #[test]
    fn unusable_lines_are_named_and_bounded() {
        let good = r#"{"id":"a","turns":["x"]}"#;
        for (bad, reason) in [
            ("{", "is not JSON"),
            (r#"{"messages":[{"role":"assistant","content":"x"}]}"#, "no message of the user"),
            (r#"{"messages":[{"role":"user","content":"x"},{"role":"tool","content":"x"}]}"#, "results of tools"),
            (r#"{"text":"x"}"#, "expected a conversation"),
        ] {
            let text = format!("{good}\n{bad}\n");
            let prompts = read(&text, 0.5).unwrap();
            let message = prompts.bad_lines[0].to_string();
            assert!(message.contains("prompts.jsonl:2: ") && message.contains(reason), "{message}");
            let error = read(&text, 0.4).unwrap_err();
            assert!(error.to_string().contains("1 of 2 rows") && error.to_string().contains(reason), "{error}");
            assert_eq!(error.exit_code(), 2);
            assert!(read(bad, 1.0).is_err(), "nothing is left to answer");
        }
        assert!(read("\n\n", 1.0).unwrap_err().to_string().contains("holds no prompts"));
    }
}
