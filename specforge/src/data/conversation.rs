//! What one record of a file says: a conversation, preformatted text, or a prompt with its completion.
//!
//! Conversations come as `messages` or `conversations`, with `role`/`content` or `from`/`value`. Whatever else a message
//! carries (`reasoning_content`, `tool_calls`, `name`) is handed to the template as it is, except that tool arguments
//! written as a string of JSON become the object they spell, as serving engines do before they render.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

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
}

impl Message {
    /// A message that only says something.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }

    /// Whether the assistant says it.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
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
    },
}

impl Sample {
    /// Its own name, or the file and line it stands on.
    pub fn id(&self) -> &str {
        match self {
            Sample::Conversation(conversation) => &conversation.id,
            Sample::Text { id, .. } | Sample::Completion { id, .. } => id,
        }
    }

    /// A hash of what is said, whatever it is called and wherever it stands.
    pub fn content_key(&self) -> u64 {
        let content = match self {
            Sample::Conversation(conversation) => {
                serde_json::to_string(&(&conversation.messages, &conversation.tools)).unwrap_or_default()
            }
            Sample::Text { text, .. } => text.clone(),
            Sample::Completion { prompt, completion, .. } => format!("{prompt}\u{0}{completion}"),
        };
        let digest = Sha256::digest(content.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_le_bytes(first)
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
pub(super) fn check_share(
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

/// Longest name kept, in characters: names are for messages.
const LONGEST_NAME: usize = 200;

/// Gives a record meaning, or says what is wrong with it.
pub fn parse_sample(bytes: &[u8], fallback_id: impl FnOnce() -> String) -> Result<Sample, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| format!("is not UTF-8 from byte {} of the record on", error.valid_up_to() + 1))?;
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    let mut object = match value {
        Value::Object(object) => object,
        Value::Array(messages) => Map::from_iter([("messages".to_owned(), Value::Array(messages))]),
        other => return Err(format!("expected an object, got {}", kind_of(&other))),
    };
    object.retain(|_, value| !value.is_null());
    let id = ["id", "conversation_id", "question_id"].iter().find_map(|key| match object.get(*key) {
        Some(Value::String(name)) if !name.is_empty() => Some(name.chars().take(LONGEST_NAME).collect()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    });
    let id = id.unwrap_or_else(fallback_id);
    for key in ["messages", "conversations", "conversation"] {
        if let Some(list) = object.get(key) {
            let messages = parse_messages(list, key)?;
            return parse_conversation(id, messages, &object).map(Sample::Conversation);
        }
    }
    let string = |key: &str| match object.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("`{key}`: expected a string, got {}", kind_of(other))),
    };
    if let Some(text) = string("text")? {
        return Ok(Sample::Text { id, text });
    }
    if let Some(prompt) = string("prompt")? {
        let completion = string("completion")?.ok_or("`prompt` is there, `completion` is not")?;
        return Ok(Sample::Completion { id, prompt, completion });
    }
    if let Some(Value::Array(turns)) = object.get("turns") {
        let messages = turns.iter().map(|turn| match turn {
            Value::String(text) => Ok(Message::new("user", text)),
            other => Err(format!("`turns`: expected strings, got {}", kind_of(other))),
        });
        let messages = messages.collect::<Result<_, String>>()?;
        return parse_conversation(id, messages, &object).map(Sample::Conversation);
    }
    let keys: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    Err(format!(
        "expected `messages`, `conversations`, `text`, or `prompt` and `completion`; got the keys [{}]",
        keys.join(", ")
    ))
}

fn parse_conversation(
    id: String,
    mut messages: Vec<Message>,
    object: &Map<String, Value>,
) -> Result<Conversation, String> {
    let tools = match object.get("tools") {
        None => None,
        Some(Value::Array(tools)) => Some(Value::Array(tools.clone())),
        // Tables of strings carry the list as text.
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Array(tools)) => Some(Value::Array(tools)),
            _ => return Err("`tools`: expected a list, got a string that spells none".to_owned()),
        },
        Some(other) => return Err(format!("`tools`: expected a list, got {}", kind_of(other))),
    };
    let tools = tools.filter(|tools| tools.as_array().is_some_and(|list| !list.is_empty()));
    if let Some(Value::String(system)) = object.get("system")
        && !system.is_empty()
        && messages.first().is_none_or(|first| first.role != "system")
    {
        messages.insert(0, Message::new("system", system));
    }
    Ok(Conversation { id, messages, tools })
}

fn parse_messages(list: &Value, key: &str) -> Result<Vec<Message>, String> {
    let Value::Array(list) = list else {
        return Err(format!("`{key}`: expected a list of messages, got {}", kind_of(list)));
    };
    let messages = list.iter().enumerate();
    messages
        .map(|(index, message)| parse_message(message).map_err(|problem| format!("message {}: {problem}", index + 1)))
        .collect()
}

fn parse_message(message: &Value) -> Result<Message, String> {
    let Value::Object(object) = message else {
        return Err(format!("expected an object, got {}", kind_of(message)));
    };
    let mut extra = object.clone();
    // Tables fill absent columns with null; templates ask whether a key is there.
    extra.retain(|_, value| !value.is_null());
    let role = match extra.shift_remove("role").or_else(|| extra.shift_remove("from")) {
        Some(Value::String(role)) => role_of(&role)?,
        Some(other) => return Err(format!("`role`: expected a string, got {}", kind_of(&other))),
        None => return Err("neither `role` nor `from` is there".to_owned()),
    };
    let content = match extra.shift_remove("content").or_else(|| extra.shift_remove("value")) {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => Some(join_parts(&parts)?),
        Some(other) => return Err(format!("`content`: expected a string, got {}", kind_of(&other))),
        None if extra.contains_key("tool_calls") || extra.contains_key("reasoning_content") => None,
        None => return Err("neither `content` nor `value` is there".to_owned()),
    };
    if let Some(calls) = extra.get_mut("tool_calls") {
        spell_out_tool_calls(calls)?;
    }
    Ok(Message { role: role.to_owned(), content, extra })
}

fn role_of(name: &str) -> Result<&'static str, String> {
    const ROLES: &[(&str, &str)] = &[
        ("user", "user"),
        ("human", "user"),
        ("assistant", "assistant"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("developer", "developer"),
        ("tool", "tool"),
        ("function", "tool"),
        ("function_response", "tool"),
        ("observation", "tool"),
        ("ipython", "tool"),
    ];
    let lower = name.trim().to_lowercase();
    ROLES.iter().find(|(known, _)| *known == lower).map(|(_, role)| *role).ok_or_else(|| {
        let known: Vec<&str> = ROLES.iter().map(|(known, _)| *known).collect();
        format!("unknown role `{name}`; known: {}", known.join(", "))
    })
}

/// Content in parts, as far as it is text.
fn join_parts(parts: &[Value]) -> Result<String, String> {
    let mut text = String::new();
    for part in parts {
        match (part, part.get("text"), part.get("type").and_then(Value::as_str)) {
            (Value::String(part), _, _) | (_, Some(Value::String(part)), Some("text") | None) => text.push_str(part),
            (_, _, Some(kind)) => {
                return Err(format!("`content` holds a part of type `{kind}`; only text is supported"));
            }
            _ => return Err("`content` holds a part that is no text".to_owned()),
        }
    }
    Ok(text)
}

fn spell_out_tool_calls(calls: &mut Value) -> Result<(), String> {
    if let Value::String(text) = calls {
        *calls = serde_json::from_str(text).map_err(|error| format!("`tool_calls` is a string, not JSON: {error}"))?;
    }
    let Value::Array(list) = calls else {
        return Err(format!("`tool_calls`: expected a list, got {}", kind_of(calls)));
    };
    for call in list {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(arguments) = call.get_mut("arguments")
            && let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str)
        {
            *arguments = object;
        }
    }
    Ok(())
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Sample, String> {
        parse_sample(text.as_bytes(), || "file:7".to_owned())
    }

    fn conversation(text: &str) -> Conversation {
        match parse(text).unwrap() {
            Sample::Conversation(conversation) => conversation,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let one = conversation(
            r#"{"id": 3, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
        );
        let two = conversation(
            r#"{"id": "3", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        );
        assert_eq!(one, two);
        assert_eq!(one.id, "3");
        let three = conversation(r#"[{"role": "User", "content": [{"type": "text", "text": "a"}]}]"#);
        assert_eq!((three.id.as_str(), three.messages[0].content.as_deref()), ("file:7", Some("a")));
        let key = |conversation: Conversation| Sample::Conversation(conversation).content_key();
        assert_eq!(key(one), key(Conversation { id: "other".to_owned(), ..two }));
    }

    #[test]
    fn system_tools_and_reasoning_are_kept() {
        let text = r#"{"system": "S", "tools": "[{\"name\": \"f\"}]", "messages": [{"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "name": null, "reasoning_content": "r", "tool_calls":
             [{"function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}}]}]}"#;
        let conversation = conversation(text);
        assert_eq!(conversation.messages[0], Message::new("system", "S"));
        assert_eq!(conversation.tools.unwrap()[0]["name"], "f");
        let call = &conversation.messages[2];
        assert_eq!((call.content.as_deref(), call.extra["reasoning_content"].as_str()), (None, Some("r")));
        assert!(!call.extra.contains_key("name"));
        let arguments = &call.extra["tool_calls"][0]["function"]["arguments"];
        assert_eq!(serde_json::to_string(arguments).unwrap(), r#"{"z":1,"a":2}"#);
    }

    #[test]
    fn text_prompts_and_turns() {
        assert!(matches!(parse(r#"{"text": "x"}"#), Ok(Sample::Text { text, .. }) if text == "x"));
        let completion = parse(r#"{"prompt": "p", "completion": "c"}"#).unwrap();
        assert!(matches!(completion, Sample::Completion { completion, .. } if completion == "c"));
        let turns = conversation(r#"{"question_id": 81, "category": "x", "turns": ["a", "b"]}"#);
        assert_eq!((turns.id.as_str(), turns.messages.len()), ("81", 2));
    }

    #[test]
    fn every_malformed_record_says_why() {
        for (text, reason) in [
            ("{\"messages\": [", "is not JSON: EOF"),
            ("3", "expected an object, got a number"),
            ("{\"foo\": 1, \"bar\": 2}", "got the keys [foo, bar]"),
            ("{\"messages\": {}}", "`messages`: expected a list of messages, got an object"),
            ("{\"messages\": [1]}", "message 1: expected an object, got a number"),
            ("{\"messages\": [{\"content\": \"x\"}]}", "message 1: neither `role` nor `from`"),
            ("{\"messages\": [{\"role\": \"user\"}]}", "message 1: neither `content` nor `value`"),
            ("{\"messages\": [{\"role\": \"martian\", \"content\": \"x\"}]}", "unknown role `martian`"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": 3}]}", "expected a string, got a number"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "part of type `image_url`"),
            (r#"{"messages": [], "tools": 3}"#, "`tools`: expected a list"),
            (r#"{"prompt": "p"}"#, "`completion` is not"),
            (r#"{"text": 1}"#, "`text`: expected a string"),
            (r#"{"text": "\ud800"}"#, "is not JSON"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(reason), "{text}: {problem}");
        }
        let problem = parse_sample(b"{\"text\": \"\xff\"}", String::new).unwrap_err();
        assert!(problem.contains("not UTF-8 from byte 11"), "{problem}");
        let deep = "[".repeat(100_000);
        assert!(parse(&deep).unwrap_err().contains("recursion limit"));
    }

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
