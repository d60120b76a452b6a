//! What a record says about being trained, beside what is said in it: whether a message counts, why an answer ended,
//! which tokens it was generated as.
//!
//! Each of these keys is honoured, or the record is refused. Keys that merely look as if they decided something are
//! counted, and named once a file. None of them reaches a template.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token was generated.
    Stop,
    /// The token limit or the end of the context was reached.
    Length,
}

/// What stands beside the words of a message.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Marks {
    /// Whether the file wants it trained; `None` where it does not say.
    pub train: Option<bool>,
    /// Why the answer ended.
    pub finish: Option<Finish>,
    /// The answer as it was generated, with the stop token that ended it.
    pub token_ids: Option<Vec<u32>>,
    /// Hash of the prompt's tokens that the answer was generated from.
    pub prompt_hash: Option<String>,
    /// Hash of the vocabulary that the ids are of.
    pub vocabulary_hash: Option<String>,
}

impl Marks {
    /// Whether something of the answer is not to be trained.
    pub fn leave_something_out(&self) -> bool {
        self.train == Some(false) || self.finish == Some(Finish::Length)
    }
}

/// Keys by which trainers say whether a message or a record counts: OpenAI's, axolotl's, ms-swift's and others'.
const TRAIN_KEYS: [&str; 11] = [
    "weight",
    "train",
    "training",
    "trainable",
    "is_trainable",
    "loss",
    "loss_mask",
    "loss_weight",
    "loss_scale",
    "supervise",
    "supervised",
];
/// The same for a whole record. `loss` and `training` are often measurements or descriptions there.
const RECORD_TRAIN_KEYS: [&str; 6] = ["weight", "train", "trainable", "loss_mask", "loss_weight", "sample_weight"];
/// They train parts of a message, by their characters or tokens.
const DETAIL_KEYS: [&str; 2] = ["train_detail", "training_detail"];
const FINISH_KEYS: [&str; 2] = ["finish", "finish_reason"];

/// Keys that decide elsewhere how a conversation is rendered, or are part of what is said.
const RENDERING_KEYS: [&str; 20] = [
    "chat_template",
    "template_kwargs",
    "template_arguments",
    "enable_thinking",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "system_prompt",
    "system_message",
    "functions",
    "chosen",
    "rejected",
    "input_ids",
    "token_ids",
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
];
/// Words that a number or a truth value makes a decision of.
const TRAINING_WORDS: [&str; 15] = [
    "weight",
    "weights",
    "train",
    "trained",
    "training",
    "trainable",
    "loss",
    "mask",
    "masks",
    "masked",
    "label",
    "labels",
    "supervise",
    "supervised",
    "learn",
];

/// Words that make a decision only where they are true.
const LEAVING_OUT_WORDS: [&str; 6] = ["ignore", "ignored", "skip", "skipped", "exclude", "excluded"];

/// Keys that were passed over, each as it is named in a warning.
pub type PassedOver = Vec<String>;

/// How many records of each file have such a key.
#[derive(Debug, Default)]
pub struct PassedOverCounts {
    /// In the order of the files.
    files: Vec<(PathBuf, BTreeMap<String, usize>)>,
}

impl PassedOverCounts {
    /// Notes the keys of one record; however many messages have a key, it counts once.
    pub fn add(&mut self, path: &Path, keys: PassedOver) {
        let keys: BTreeSet<String> = keys.into_iter().collect();
        if keys.is_empty() {
            return;
        }
        if self.files.last().is_none_or(|(last, _)| last != path) {
            self.files.push((path.to_path_buf(), BTreeMap::new()));
        }
        if let Some((_, counts)) = self.files.last_mut() {
            keys.into_iter().for_each(|key| *counts.entry(key).or_insert(0) += 1);
        }
    }

    /// One line for each file that has any.
    pub fn warnings(&self) -> Vec<String> {
        let line = |(path, counts): &(PathBuf, BTreeMap<String, usize>)| {
            let keys: Vec<String> = counts.iter().map(|(key, count)| format!("{key} ({count} records)")).collect();
            format!("{}: not understood, and passed over: {}", path.display(), keys.join(", "))
        };
        self.files.iter().map(line).collect()
    }
}

/// Takes the marks of a message out of what a template will see.
pub(super) fn of_message(
    role: &str,
    extra: &mut Map<String, Value>,
    passed_over: &mut PassedOver,
) -> Result<Marks, String> {
    let assistant = role == "assistant";
    let train = whether_trained(&TRAIN_KEYS, extra)?;
    if let Some(key) = DETAIL_KEYS.iter().find(|key| extra.contains_key(**key)) {
        return Err(format!("`{key}`: training parts of a message is not supported"));
    }
    for key in extra.keys().filter(|key| looks_decisive(key, &extra[key.as_str()])) {
        // What an answer was generated as is read below.
        if !(assistant && key == "token_ids") {
            passed_over.push(format!("`{key}` in messages"));
        }
    }
    if !assistant {
        return Ok(Marks { train, ..Marks::default() });
    }
    let mut finish = None;
    for key in FINISH_KEYS {
        if let Some(value) = extra.shift_remove(key) {
            agree(&mut finish, finish_of(&value).map_err(|problem| format!("`{key}`: {problem}"))?, key)?;
        }
    }
    let token_ids = extra.shift_remove("token_ids").map(|value| ids_of(&value)).transpose()?;
    let mut hash = |key: &str| match extra.shift_remove(key) {
        None => Ok(None),
        Some(Value::String(hash)) => Ok(Some(hash)),
        Some(_) => Err(format!("`{key}`: expected a string")),
    };
    let (prompt_hash, vocabulary_hash) = (hash("prompt_hash")?, hash("vocabulary_hash")?);
    Ok(Marks { train, finish, token_ids, prompt_hash, vocabulary_hash })
}

/// The marks of a message, and whether the assistant says it.
pub(super) struct Speech<'a> {
    pub(super) assistant: bool,
    pub(super) marks: &'a mut Marks,
}

/// Whether a record is to be trained, and what it says about its messages in a list of its own.
pub(super) fn of_record(object: &Map<String, Value>, messages: &mut [Speech<'_>]) -> Result<bool, String> {
    let mut object = object.clone();
    for key in RECORD_TRAIN_KEYS {
        let Some(Value::Array(list)) = object.get(key) else { continue };
        if list.len() != messages.len() || messages.is_empty() {
            let (count, got) = (messages.len(), list.len());
            return Err(format!("`{key}`: expected one value, or one for each of {count} messages, got {got}"));
        }
        let list = list.iter().map(|value| zero_or_one(key, value)).collect::<Result<Vec<_>, _>>()?;
        for (Speech { marks, .. }, train) in messages.iter_mut().zip(list) {
            agree(&mut marks.train, train, key)?;
        }
        object.shift_remove(key);
    }
    for key in FINISH_KEYS {
        let answers: Vec<&mut Speech<'_>> = messages.iter_mut().filter(|speech| speech.assistant).collect();
        let ends = match object.get(key) {
            None => continue,
            Some(Value::Array(list)) => {
                if list.len() != answers.len() {
                    let (ends, answers) = (list.len(), answers.len());
                    return Err(format!("`{key}` has {ends} entries, but the assistant speaks {answers} times"));
                }
                list.clone()
            }
            // One word is about the last answer.
            Some(one) => std::iter::repeat_n(Value::Null, answers.len().saturating_sub(1))
                .chain(std::iter::once(one.clone()))
                .collect(),
        };
        for (Speech { marks, .. }, end) in answers.into_iter().zip(ends).filter(|(_, end)| !end.is_null()) {
            let end = finish_of(&end).map_err(|problem| format!("`{key}`: {problem}"))?;
            agree(&mut marks.finish, end, key)?;
        }
    }
    Ok(whether_trained(&RECORD_TRAIN_KEYS, &mut object)?.unwrap_or(true))
}

/// Keys of a record that nothing here reads and that look as if they decided about training.
pub(super) fn passed_over_in_record(object: &Map<String, Value>) -> impl Iterator<Item = String> {
    let own = |key: &str| RECORD_TRAIN_KEYS.contains(&key);
    object.iter().filter(move |(key, value)| !own(key) && looks_decisive(key, value)).map(|(key, _)| format!("`{key}`"))
}

fn looks_decisive(key: &str, value: &Value) -> bool {
    let empty = match value {
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    };
    if empty {
        return false;
    }
    if RENDERING_KEYS.contains(&key.to_lowercase().as_str()) {
        return true;
    }
    let number = |value: &Value| value.is_number() || value.is_boolean();
    let decides = match value {
        Value::Array(list) => list.iter().any(number),
        other => number(other),
    };
    let said = value.as_bool().unwrap_or_else(|| value.as_f64() != Some(0.0));
    decides
        && words(key).iter().any(|word| {
            let word = word.as_str();
            TRAINING_WORDS.contains(&word) || (said && LEAVING_OUT_WORDS.contains(&word))
        })
}

/// `lossMask`, `loss_mask` and `loss-mask` have the words `loss` and `mask`.
fn words(key: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut small = false;
    for letter in key.chars() {
        if !letter.is_alphanumeric() || (small && letter.is_uppercase()) {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut().filter(|_| letter.is_alphanumeric()) {
            word.extend(letter.to_lowercase());
        }
        small = letter.is_lowercase();
    }
    words
}

/// What all keys together say, taken out of the object.
fn whether_trained(keys: &[&str], object: &mut Map<String, Value>) -> Result<Option<bool>, String> {
    let mut train = None;
    for key in keys {
        if let Some(value) = object.shift_remove(*key) {
            agree(&mut train, zero_or_one(key, &value)?, key)?;
        }
    }
    Ok(train)
}

/// Notes what a key says, unless another said otherwise.
fn agree<T: PartialEq>(known: &mut Option<T>, value: T, key: &str) -> Result<(), String> {
    if known.as_ref().is_some_and(|known| *known != value) {
        return Err(format!("`{key}` contradicts another key of the same meaning"));
    }
    *known = Some(value);
    Ok(())
}

fn zero_or_one(key: &str, value: &Value) -> Result<bool, String> {
    let said = match value {
        Value::Bool(said) => Some(*said),
        Value::Number(number) => number.as_f64().and_then(|number| match number {
            0.0 => Some(false),
            1.0 => Some(true),
            _ => None,
        }),
        // Tables of strings carry numbers as text.
        Value::String(text) => match text.trim().to_lowercase().as_str() {
            "0" | "0.0" | "false" => Some(false),
            "1" | "1.0" | "true" => Some(true),
            _ => None,
        },
        _ => None,
    };
    said.ok_or_else(|| format!("`{key}`: expected 0 or 1, got {value}; other weights are not supported"))
}

fn finish_of(value: &Value) -> Result<Finish, String> {
    match value.as_str() {
        Some("stop" | "eos" | "end_turn" | "tool_calls" | "tool_use" | "function_call") => Ok(Finish::Stop),
        Some("length" | "max_tokens" | "max_length" | "content_filter" | "abort") => Ok(Finish::Length),
        _ => Err(format!("expected \"stop\" or \"length\", got {value}")),
    }
}

fn ids_of(value: &Value) -> Result<Vec<u32>, String> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = value.as_array().and_then(|list| list.iter().map(id).collect());
    ids.filter(|ids| !ids.is_empty()).ok_or_else(|| "`token_ids`: expected a list of token ids".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn marks(role: &str, message: Value) -> Result<(Marks, PassedOver, Map<String, Value>), String> {
        let Value::Object(mut extra) = message else { panic!("an object") };
        let mut passed_over = Vec::new();
        let marks = of_message(role, &mut extra, &mut passed_over)?;
        Ok((marks, passed_over, extra))
    }

    #[test]
    fn every_spelling_of_a_weight_is_heard() {
        for (message, train) in [
            (json!({"weight": 0}), false),
            (json!({"weight": 1.0}), true),
            (json!({"train": false}), false),
            (json!({"loss_mask": "0"}), false),
            (json!({"loss": true, "trainable": 1}), true),
        ] {
            let (marks, passed_over, extra) = marks("assistant", message.clone()).unwrap();
            assert_eq!((marks.train, passed_over.len(), extra.len()), (Some(train), 0, 0), "{message}");
        }
        for (message, problem) in [
            (json!({"weight": 0.5}), "`weight`: expected 0 or 1, got 0.5"),
            (json!({"loss_mask": [0, 1]}), "`loss_mask`: expected 0 or 1, got [0,1]"),
            (json!({"weight": 1, "train": false}), "contradicts"),
            (json!({"train_detail": []}), "parts of a message"),
            (json!({"finish": "perhaps"}), "expected \"stop\" or \"length\", got \"perhaps\""),
            (json!({"token_ids": []}), "`token_ids`: expected a list"),
            (json!({"token_ids": [-1]}), "`token_ids`: expected a list"),
        ] {
            let error = marks("assistant", message.clone()).unwrap_err();
            assert!(error.contains(problem), "{message}: {error}");
        }
    }

    #[test]
    fn what_only_looks_like_a_decision_is_named_and_kept() {
        let message =
            json!({"loss_multiplier": 2, "name": "Ann", "constraint": 1, "label": "math", "finish": "length"});
        let (marks, passed_over, extra) = marks("assistant", message).unwrap();
        assert_eq!(passed_over, ["`loss_multiplier` in messages"]);
        assert_eq!((marks.finish, extra.len()), (Some(Finish::Length), 4));
        let (marks, passed_over, _) = super::tests::marks("user", json!({"train": true, "finish": "stop"})).unwrap();
        assert_eq!((marks, passed_over.len()), (Marks { train: Some(true), ..Marks::default() }, 0));
        let record = json!({"id": 1, "source": "x", "quality_weight": 0.3, "label": "math", "chat_template": "y",
                            "weight": 1, "labels": [1, 2], "images": [], "ignore": false, "strain": 1});
        let named: Vec<String> = passed_over_in_record(record.as_object().unwrap()).collect();
        assert_eq!(named, ["`quality_weight`", "`chat_template`", "`labels`"]);
        let record = json!({"lossMask": [0, 1], "ignore": true, "images": ["x.png"], "isTrained": false});
        assert_eq!(passed_over_in_record(record.as_object().unwrap()).count(), 4);
    }

    #[test]
    fn a_record_speaks_for_its_messages() {
        let read = |record: Value| {
            let (mut asked, mut first, mut last) = (Marks::default(), Marks::default(), Marks::default());
            let speech = |assistant, marks| Speech { assistant, marks };
            let mut messages = [speech(false, &mut asked), speech(true, &mut first), speech(true, &mut last)];
            let train = of_record(record.as_object().unwrap(), &mut messages)?;
            assert_eq!(asked, Marks { train: asked.train, ..Marks::default() });
            Ok::<_, String>((train, first, last))
        };
        let (train, first, last) = read(json!({"finish": ["length", "stop"], "loss_mask": [0, 0, 1]})).unwrap();
        assert!(train);
        assert_eq!((first.finish, first.train), (Some(Finish::Length), Some(false)));
        assert_eq!((last.finish, last.train), (Some(Finish::Stop), Some(true)));
        let (train, first, last) = read(json!({"finish_reason": "length", "weight": 0})).unwrap();
        assert_eq!((train, first.finish, last.finish), (false, None, Some(Finish::Length)));
        for (record, problem) in [
            (json!({"finish": ["stop"]}), "`finish` has 1 entries, but the assistant speaks 2 times"),
            (json!({"finish": 3}), "`finish`: expected"),
            (json!({"weight": 0.3}), "`weight`: expected 0 or 1, got 0.3"),
            (json!({"loss_mask": [1]}), "one for each of 3 messages, got 1"),
        ] {
            assert!(read(record).unwrap_err().contains(problem), "{problem}");
        }
    }
}
