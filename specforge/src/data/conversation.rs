//! What one record of a file says.
//!
//! Conversations come as `messages` or `conversations`, with `role`/`content` or `from`/`value`, or as TRL's `prompt` and
//! `completion`. Whatever else a message carries (`reasoning_content`, `tool_calls`, `name`) is handed to the template as
//! it is, except that tool arguments written as a string of JSON become the object they spell, as serving engines do
//! before they render, and that what decides about training ([`super::marks`]) is no business of a template.
//! A template that takes arguments as strings only is given the strings.
//!
//! A record of `input_ids` and `loss_mask`, with nothing said beside, is a document as it is.
//!
//! Content in several parts of text is joined with a newline, as vLLM does for templates that take strings.

use serde_json::{Map, Value, json};

pub use super::fault::{Fault, FaultKind};
use super::marks::{self, Marks, PassedOver, Speech};
pub use super::sample::{Conversation, Message, Rejections, Sample, check_share, record_name};

/// A record, and what the file says about training it.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// What is said.
    pub sample: Sample,
    /// Whether the record is to be trained at all.
    pub train: bool,
    /// Keys that look as if they decided about training or rendering, and were not understood.
    pub passed_over: PassedOver,
}

/// Longest name kept, in characters: names are for messages.
const LONGEST_NAME: usize = 200;

/// Gives a record meaning, or says what is wrong with it.
pub fn parse_sample(bytes: &[u8], fallback_id: impl FnOnce() -> String) -> Result<Sample, String> {
    Ok(parse_record(bytes, fallback_id)?.sample)
}

/// Keys that hold a list of messages.
const MESSAGE_KEYS: [&str; 3] = ["messages", "conversations", "conversation"];

/// The same, with what the record says about training.
pub fn parse_record(bytes: &[u8], fallback_id: impl FnOnce() -> String) -> Result<Parsed, String> {
    let first = |faults: Vec<Fault>| faults.into_iter().next().map(|fault| fault.problem);
    parse_checked(bytes, fallback_id).map_err(|faults| first(faults).unwrap_or_default())
}

/// The same, or everything that is wrong with it: at least one fault.
pub fn parse_checked(bytes: &[u8], fallback_id: impl FnOnce() -> String) -> Result<Parsed, Vec<Fault>> {
    let training = Fault::of(FaultKind::Training);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let from = error.valid_up_to() + 1;
        Fault::new(FaultKind::Encoding, format!("is not UTF-8 from byte {from} of the record on"))
    })?;
    let value: Value =
        serde_json::from_str(text).map_err(|error| Fault::new(FaultKind::Json, format!("is not JSON: {error}")))?;
    let mut object = match value {
        Value::Object(object) => object,
        Value::Array(messages) => Map::from_iter([("messages".to_owned(), Value::Array(messages))]),
        other => {
            let problem = format!("expected an object, got {}", kind_of(&other));
            return Err(Fault::new(FaultKind::Format, problem).into());
        }
    };
    object.retain(|_, value| !value.is_null());
    let id = ["id", "conversation_id", "question_id"].iter().find_map(|key| match object.get(*key) {
        Some(Value::String(name)) if !name.is_empty() => Some(name.chars().take(LONGEST_NAME).collect()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    });
    let id = id.unwrap_or_else(fallback_id);
    let mut passed_over: PassedOver = marks::passed_over_in_record(&object).collect();
    if is_tokens(&object) {
        let sample = parse_tokens(id, &object).map_err(Fault::of(FaultKind::Tokens))?;
        // The mask is for the tokens; everything else that is said about training counts as ever.
        object.remove("loss_mask");
        passed_over.retain(|key| key != "`input_ids`");
        let mut answer = Marks::default();
        let speech = Speech { assistant: true, marks: &mut answer };
        let train = marks::of_record(&object, &mut [speech]).map_err(training)? && answer.train != Some(false);
        return Ok(Parsed { sample, train, passed_over });
    }
    let found = match find_messages(&object, &mut passed_over) {
        Ok(found) => found,
        Err(mut faults) => {
            faults.extend(tools_of(&object).err());
            faults.extend(arguments_of(&object).err());
            return Err(faults);
        }
    };
    if let Some(messages) = found {
        let mut conversation = parse_conversation(id, messages, &object)?;
        let messages = conversation.messages.iter_mut();
        let mut speeches: Vec<Speech<'_>> =
            messages.map(|message| Speech { assistant: message.is_assistant(), marks: &mut message.marks }).collect();
        let train = marks::of_record(&object, &mut speeches).map_err(training)?;
        return Ok(Parsed { sample: Sample::Conversation(conversation), train, passed_over });
    }
    let string = |key: &str| match object.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => {
            Err(Fault::new(FaultKind::Content, format!("`{key}`: expected a string, got {}", kind_of(other))))
        }
    };
    let mut answer = Marks::default();
    let speech = Speech { assistant: true, marks: &mut answer };
    let train = marks::of_record(&object, &mut [speech]).map_err(training)?;
    let train = train && answer.train != Some(false);
    if object.contains_key("chosen") {
        let problem = "holds answers to choose from (`chosen`, `rejected`), and one is trained here: write the wanted one \
                       as `completion`, or everything as `messages`";
        return Err(Fault::new(FaultKind::Format, problem).into());
    }
    if let Some(text) = string("text")? {
        return Ok(Parsed { sample: Sample::Text { id, text }, train, passed_over });
    }
    if let Some(prompt) = string("prompt")? {
        let missing = || Fault::new(FaultKind::Format, "`prompt` is there, `completion` is not");
        let completion = string("completion")?.ok_or_else(missing)?;
        refuse_unwanted(&object, &mut passed_over)?;
        let sample = Sample::Completion { id, prompt, completion, finish: answer.finish };
        return Ok(Parsed { sample, train, passed_over });
    }
    Err(Fault::new(FaultKind::Format, what_it_is_instead(&object)).into())
}

/// Whether a record is a document in tokens: ids beside a mask of the same length, and nothing that is said.
fn is_tokens(object: &Map<String, Value>) -> bool {
    let said = MESSAGE_KEYS.iter().chain(&["text", "prompt"]).any(|key| object.contains_key(*key));
    object.contains_key("input_ids") && object.get("loss_mask").is_some_and(Value::is_array) && !said
}

/// What SpecForge calls a tokenised record: `input_ids`, and a `loss_mask` of 0 and 1 for each.
fn parse_tokens(id: String, object: &Map<String, Value>) -> Result<Sample, String> {
    let list = |key: &str| {
        let values = object.get(key).and_then(Value::as_array);
        values.ok_or_else(|| format!("`{key}`: expected a list of numbers"))
    };
    let (ids, mask) = (list("input_ids")?, list("loss_mask")?);
    let token = |(place, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("`input_ids[{place}]`: expected a token id, got {value}"))
    };
    let mark = |(place, value): (usize, &Value)| match (value.as_u64(), value.as_bool()) {
        (Some(0), _) | (_, Some(false)) => Ok(0),
        (Some(1), _) | (_, Some(true)) => Ok(1),
        _ => Err(format!("`loss_mask[{place}]`: expected 0 or 1, got {value}")),
    };
    let tokens = ids.iter().enumerate().map(token).collect::<Result<Vec<u32>, String>>()?;
    let supervised = mask.iter().enumerate().map(mark).collect::<Result<Vec<u8>, String>>()?;
    if tokens.len() != supervised.len() {
        let (ids, marks) = (tokens.len(), supervised.len());
        return Err(format!("`loss_mask`: expected a mark for each of {ids} `input_ids`, got {marks}"));
    }
    let vocabulary_hash = match object.get("vocabulary_hash") {
        None => None,
        Some(Value::String(hash)) => Some(hash.clone()),
        Some(other) => return Err(format!("`vocabulary_hash`: expected a string, got {}", kind_of(other))),
    };
    Ok(Sample::Tokens { id, tokens, supervised, vocabulary_hash })
}

/// The messages of a record, whatever their key is called.
fn find_messages(
    object: &Map<String, Value>,
    passed_over: &mut PassedOver,
) -> Result<Option<Vec<Message>>, Vec<Fault>> {
    let mut found: Option<(&str, Vec<Message>)> = None;
    for key in MESSAGE_KEYS {
        let Some(list) = object.get(key) else { continue };
        let messages = parse_messages(list, key, passed_over)?;
        match &found {
            Some((first, known)) if *known != messages => {
                let problem = format!("`{first}` and `{key}` say different things; keep one");
                return Err(Fault::new(FaultKind::Messages, problem).into());
            }
            Some(_) => {}
            None => found = Some((key, messages)),
        }
    }
    if let Some((_, messages)) = found {
        let beside = ["text", "completion"].into_iter().filter(|key| object.contains_key(*key));
        passed_over.extend(beside.map(|key| format!("`{key}` beside a conversation")));
        return Ok(Some(messages));
    }
    if let Some(Value::Array(turns)) = object.get("turns") {
        let messages = turns.iter().map(|turn| match turn {
            Value::String(text) => Ok(Message::new("user", text)),
            other => Err(Fault::new(FaultKind::Messages, format!("`turns`: expected strings, got {}", kind_of(other)))),
        });
        return Ok(Some(messages.collect::<Result<_, Fault>>()?));
    }
    let Some(prompt @ Value::Array(_)) = object.get("prompt") else {
        return Ok(None);
    };
    if object.contains_key("chosen") {
        return Ok(None);
    }
    // As TRL has it: what the assistant says in the prompt is context.
    let mut messages = parse_messages(prompt, "prompt", passed_over)?;
    messages.iter_mut().filter(|message| message.is_assistant()).for_each(|message| message.marks.train = Some(false));
    match object.get("completion") {
        None => {}
        Some(Value::String(text)) => messages.push(Message::new("assistant", text)),
        Some(list) => messages.extend(parse_messages(list, "completion", passed_over)?),
    }
    refuse_unwanted(object, passed_over)?;
    Ok(Some(messages))
}

/// TRL's unpaired preferences say of a completion whether it is wanted.
fn refuse_unwanted(object: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<(), Fault> {
    if object.get("label") == Some(&Value::Bool(false)) {
        let problem = "`label`: false marks an answer that is not wanted; leave such records out";
        return Err(Fault::new(FaultKind::Training, problem));
    }
    passed_over.retain(|key| key != "`label`");
    Ok(())
}

/// Names the formats that people bring and that mean something else.
fn what_it_is_instead(object: &Map<String, Value>) -> String {
    let has = |key: &str| object.contains_key(key);
    let keys: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    let known = if has("instruction") && (has("output") || has("response")) {
        " (Alpaca's: how instruction, input and output make a conversation is for you to say)"
    } else if has("query") && has("response") {
        " (ms-swift's: write history, query and response as messages)"
    } else if has("input_ids") {
        " (token ids are read beside a `loss_mask` of the same length)"
    } else {
        ""
    };
    format!(
        "expected `messages`, `conversations`, `text`, or `prompt` and `completion`; got the keys [{}]{known}",
        keys.join(", ")
    )
}

fn parse_conversation(
    id: String,
    mut messages: Vec<Message>,
    object: &Map<String, Value>,
) -> Result<Conversation, Vec<Fault>> {
    let system = put_system_first(&mut messages, object);
    match (tools_of(object), system, arguments_of(object)) {
        (Ok(tools), Ok(()), Ok(template_arguments)) => Ok(Conversation { id, messages, tools, template_arguments }),
        (tools, system, arguments) => Err([tools.err(), system.err(), arguments.err()].into_iter().flatten().collect()),
    }
}

fn tools_of(object: &Map<String, Value>) -> Result<Option<Value>, Fault> {
    let wrong = |found: &str| Fault::new(FaultKind::Tools, format!("`tools`: expected a list, got {found}"));
    let tools = match object.get("tools") {
        None => None,
        Some(Value::Array(tools)) => Some(Value::Array(tools.clone())),
        // Tables of strings carry the list as text.
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Array(tools)) => Some(Value::Array(tools)),
            _ => return Err(wrong("a string that spells none")),
        },
        Some(other) => return Err(wrong(kind_of(other))),
    };
    Ok(tools.filter(|tools| tools.as_array().is_some_and(|list| !list.is_empty())))
}

fn put_system_first(messages: &mut Vec<Message>, object: &Map<String, Value>) -> Result<(), Fault> {
    match (object.get("system"), messages.first().filter(|first| first.role == "system")) {
        (None, _) => {}
        (Some(Value::String(system)), None) if system.is_empty() => {}
        (Some(Value::String(system)), None) => messages.insert(0, Message::new("system", system)),
        (Some(Value::String(system)), Some(first)) if system.is_empty() || first.content.as_ref() == Some(system) => {}
        (Some(Value::String(_)), Some(_)) => {
            let problem = "`system` and the first message say different things; keep one";
            return Err(Fault::new(FaultKind::Messages, problem));
        }
        (Some(other), _) => {
            let problem = format!("`system`: expected a string, got {}", kind_of(other));
            return Err(Fault::new(FaultKind::Messages, problem));
        }
    }
    Ok(())
}

fn arguments_of(object: &Map<String, Value>) -> Result<Map<String, Value>, Fault> {
    template_arguments(object.get("chat_template_kwargs")).map_err(Fault::of(FaultKind::TemplateArguments))
}

/// What a record wants its template to know, in Hugging Face's and the serving engines' spelling.
pub(crate) fn template_arguments(value: Option<&Value>) -> Result<Map<String, Value>, String> {
    const OTHERS: [&str; 7] = [
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "return_dict",
    ];
    let mut arguments = match value {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments.clone(),
        Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|_| "`chat_template_kwargs`: expected an object, got a string that spells none".to_owned())?,
        Some(other) => return Err(format!("`chat_template_kwargs`: expected an object, got {}", kind_of(other))),
    };
    // Tables fill what a row does not say with null.
    arguments.retain(|_, value| !value.is_null());
    match OTHERS.iter().find(|key| arguments.contains_key(**key)) {
        Some(key) => Err(format!("`chat_template_kwargs` sets `{key}`, which is not the template's own business")),
        None => Ok(arguments),
    }
}

/// The messages of a list, or what is wrong with each that is none.
fn parse_messages(list: &Value, key: &str, passed_over: &mut PassedOver) -> Result<Vec<Message>, Vec<Fault>> {
    let wrong =
        |found: &str| Fault::new(FaultKind::Messages, format!("`{key}`: expected a list of messages, got {found}"));
    let spelled;
    let list = match list {
        Value::Array(list) => list,
        // Tables of strings carry the list as text.
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Array(list)) => {
                spelled = list;
                &spelled
            }
            _ => return Err(wrong("a string that spells none").into()),
        },
        other => return Err(wrong(kind_of(other)).into()),
    };
    let (mut messages, mut faults) = (Vec::with_capacity(list.len()), Vec::new());
    for (index, message) in list.iter().enumerate() {
        match parse_message(message, passed_over) {
            Ok(message) => messages.push(message),
            Err(fault) => faults.push(fault.at(&format!("message {}", index + 1))),
        }
    }
    if faults.is_empty() { Ok(messages) } else { Err(faults) }
}

fn parse_message(message: &Value, passed_over: &mut PassedOver) -> Result<Message, Fault> {
    let Value::Object(object) = message else {
        return Err(Fault::new(FaultKind::Messages, format!("expected an object, got {}", kind_of(message))));
    };
    let role_fault = Fault::of(FaultKind::Role);
    let content_fault = Fault::of(FaultKind::Content);
    let mut extra = object.clone();
    // Tables fill absent columns with null; templates ask whether a key is there.
    extra.retain(|_, value| !value.is_null());
    let named = one_of(&mut extra, "role", "from", |name| name.as_str().and_then(|name| role_of(name).ok()));
    let (role, calls) = match named.map_err(&role_fault)? {
        // LLaMA-Factory's name of an assistant that calls a tool.
        Some(Value::String(name)) if name.trim().eq_ignore_ascii_case("function_call") => ("assistant", true),
        Some(Value::String(name)) => (role_of(&name).map_err(role_fault)?, false),
        Some(other) => return Err(role_fault(format!("`role`: expected a string, got {}", kind_of(&other)))),
        None => return Err(role_fault("neither `role` nor `from` is there".to_owned())),
    };
    let said = one_of(&mut extra, "content", "value", |said| Some(said.clone()));
    let mut content = match said.map_err(&content_fault)? {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => Some(join_parts(&parts).map_err(content_fault)?),
        Some(other) => return Err(content_fault(format!("`content`: expected a string, got {}", kind_of(&other)))),
        None if extra.contains_key("tool_calls") || extra.contains_key("reasoning_content") => None,
        None => return Err(content_fault("neither `content` nor `value` is there".to_owned())),
    };
    if calls {
        let spelled = spelled_calls(&content.take().unwrap_or_default());
        extra.insert("tool_calls".to_owned(), spelled.map_err(Fault::of(FaultKind::Tools))?);
    }
    let written_arguments = match extra.get_mut("tool_calls") {
        Some(calls) => spell_out_tool_calls(calls).map_err(Fault::of(FaultKind::Tools))?,
        None => Vec::new(),
    };
    let marks = marks::of_message(role, &mut extra, passed_over).map_err(Fault::of(FaultKind::Training))?;
    Ok(Message { role: role.to_owned(), content, extra, marks, written_arguments })
}

/// Takes a value that has two names. Both at once must mean the same.
fn one_of<T: PartialEq>(
    extra: &mut Map<String, Value>,
    name: &str,
    other: &str,
    meaning: impl Fn(&Value) -> Option<T>,
) -> Result<Option<Value>, String> {
    match (extra.shift_remove(name), extra.shift_remove(other)) {
        (Some(one), Some(two)) if meaning(&one) != meaning(&two) => {
            Err(format!("`{name}` and `{other}` say different things; keep one"))
        }
        (Some(one), _) => Ok(Some(one)),
        (None, two) => Ok(two),
    }
}

/// The calls that a message of LLaMA-Factory's `function_call` spells: one object with name and arguments, or a list.
fn spelled_calls(text: &str) -> Result<Value, String> {
    let calls = match serde_json::from_str(text) {
        Ok(Value::Array(calls)) => calls,
        Ok(call @ Value::Object(_)) => vec![call],
        _ => return Err("`function_call`: expected the JSON of a call with `name` and `arguments`".to_owned()),
    };
    match calls.iter().all(|call| call.get("name").is_some()) {
        true => Ok(calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect()),
        false => Err("`function_call`: a call has no `name`".to_owned()),
    }
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

/// Content in parts, as far as it is text: joined as vLLM joins it for templates that take strings.
fn join_parts(parts: &[Value]) -> Result<String, String> {
    let mut texts: Vec<&str> = Vec::with_capacity(parts.len());
    for part in parts {
        match (part, part.get("text"), part.get("type").and_then(Value::as_str)) {
            (Value::String(part), _, _) | (_, Some(Value::String(part)), Some("text") | None) => texts.push(part),
            (_, _, Some(kind)) => {
                return Err(format!("`content` holds a part of type `{kind}`; only text is supported"));
            }
            _ => return Err("`content` holds a part that is no text".to_owned()),
        }
    }
    Ok(texts.join("\n"))
}

/// Turns arguments that are strings of JSON into the objects they spell, and gives the strings.
fn spell_out_tool_calls(calls: &mut Value) -> Result<Vec<Option<String>>, String> {
    if let Value::String(text) = calls {
        *calls = serde_json::from_str(text).map_err(|error| format!("`tool_calls` is a string, not JSON: {error}"))?;
    }
    let Value::Array(list) = calls else {
        return Err(format!("`tool_calls`: expected a list, got {}", kind_of(calls)));
    };
    let mut written = Vec::with_capacity(list.len());
    for call in list {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        let mut text = None;
        if let Some(arguments) = call.get_mut("arguments")
            && let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str)
        {
            text = arguments.as_str().map(str::to_owned);
            *arguments = object;
        }
        written.push(text);
    }
    Ok(written)
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
    fn formats_of_other_trainers_mean_the_same() {
        let want = conversation(
            r#"{"id": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        );
        for text in [
            r#"{"id": 1, "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}]}"#,
            r#"{"id": 1, "prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#,
            r#"{"id": 1, "messages": "[{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]"}"#,
            r#"{"id": 1, "messages": null, "conversations": [{"from": "human", "value": "a", "weight": null},
                {"role": "assistant", "from": "gpt", "content": "b", "value": "b"}], "text": "a b"}"#,
        ] {
            assert_eq!(conversation(text), want, "{text}");
        }
        let call = conversation(
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "1"},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}]}"#,
        );
        assert_eq!((call.messages[2].role.as_str(), &call.messages[2].content), ("assistant", &None));
        assert_eq!(call.messages[2].extra["tool_calls"][0]["function"]["arguments"]["x"], 1);
    }

    #[test]
    fn parts_of_text_are_joined_with_a_newline() {
        let parts = |list: &str| {
            conversation(&format!(r#"{{"messages": [{{"role": "user", "content": {list}}}]}}"#))
                .messages
                .remove(0)
                .content
        };
        let two = parts(r#"[{"type": "text", "text": "First."}, {"type": "text", "text": "Second."}]"#);
        assert_eq!(two.as_deref(), Some("First.\nSecond."));
        assert_eq!(parts(r#"["a", {"type": "text", "text": "b", "image_url": null}]"#).as_deref(), Some("a\nb"));
        assert_eq!((parts("[]").as_deref(), parts(r#"["a"]"#).as_deref()), (Some(""), Some("a")));
    }

    #[test]
    fn every_malformed_record_says_why() {
        for (text, reason) in [
            ("{\"messages\": [", "is not JSON: EOF"),
            ("3", "expected an object, got a number"),
            ("{\"foo\": 1, \"bar\": 2}", "got the keys [foo, bar]"),
            (r#"{"messages": "x"}"#, "`messages`: expected a list of messages, got a string that spells none"),
            (r#"{"messages": [[{"role": "user", "content": "x"}]]}"#, "message 1: expected an object, got a list"),
            (r#"{"messages": [{"role": "user", "from": "gpt", "content": "x"}]}"#, "`role` and `from` say different"),
            (
                r#"{"messages": [{"role": "user", "content": "x", "value": "y"}]}"#,
                "`content` and `value` say different",
            ),
            (r#"{"messages": [], "conversations": [{"from": "gpt", "value": "x"}]}"#, "`messages` and `conversations`"),
            (r#"{"system": "s", "messages": [{"role": "system", "content": "t"}]}"#, "`system` and the first message"),
            (r#"{"system": ["s"], "messages": []}"#, "`system`: expected a string, got a list"),
            (r#"{"prompt": [], "chosen": [], "rejected": []}"#, "answers to choose from (`chosen`, `rejected`)"),
            (r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#, "answers to choose from (`chosen`, `rejected`)"),
            (r#"{"prompt": "p", "completion": "c", "label": false}"#, "an answer that is not wanted"),
            (r#"{"instruction": "i", "input": "", "output": "o"}"#, "Alpaca's"),
            (r#"{"query": "q", "response": "r", "history": []}"#, "ms-swift's"),
            (r#"{"input_ids": [1], "labels": [1]}"#, "token ids are read beside a `loss_mask`"),
            (r#"{"messages": [], "chat_template_kwargs": {"tools": []}}"#, "`chat_template_kwargs` sets `tools`"),
            (r#"{"messages": [], "chat_template_kwargs": 3}"#, "`chat_template_kwargs`: expected an object"),
            (r#"{"messages": [{"role": "function_call", "content": "x"}]}"#, "expected the JSON of a call"),
            (r#"{"text": "x", "weight": 0.5}"#, "`weight`: expected 0 or 1, got 0.5"),
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
}
