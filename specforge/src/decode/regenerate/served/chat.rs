//! One turn as servers speak it: `/v1/chat/completions` of OpenAI's protocol, with what vLLM and SGLang add to it.
//!
//! Both give token ids where `return_token_ids` asks for them (vLLM from 0.10.2 on; SGLang since July 2026): the answer's beside the
//! choice (`token_ids`, `response_token_ids`), the prompt's beside the choice (SGLang) or beside all of them (vLLM). Servers that
//! know nothing of it leave them out. What the target thought comes as `reasoning_content`, or `reasoning` in newer vLLM.

use serde_json::{Map, Value, json};

use super::address::Dialect;
use crate::data::conversation::Message;
use crate::data::marks::{Finish, Marks};
use crate::data::recorded::prompt_hash;
use crate::nn::Processors;
use crate::serving::{self, Trouble};

/// Where turns are asked.
pub(super) const PATH: &str = "/v1/chat/completions";

/// How tokens are chosen. What is not said is the server's own choice, which is the model's generation_config.json for
/// vLLM and SGLang.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: Option<f64>,
    /// Only this many of the likeliest tokens; 0 is all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability.
    pub top_p: Option<f64>,
    /// Above 1 makes tokens that are already there less likely.
    pub repetition_penalty: Option<f64>,
}

impl From<Processors> for Sampling {
    fn from(processors: Processors) -> Self {
        let Processors { temperature, top_k, top_p, repetition_penalty } = processors;
        Self {
            temperature: Some(temperature),
            top_k: Some(top_k),
            top_p: Some(top_p),
            repetition_penalty: Some(repetition_penalty),
        }
    }
}

impl Sampling {
    /// Whether it is known that nothing is sampled.
    pub fn is_greedy(&self) -> bool {
        self.temperature == Some(0.0)
    }

    /// These, and the rest from others.
    pub fn over(&self, others: Processors) -> Processors {
        Processors {
            temperature: self.temperature.unwrap_or(others.temperature),
            top_k: self.top_k.unwrap_or(others.top_k),
            top_p: self.top_p.unwrap_or(others.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(others.repetition_penalty),
        }
    }

    /// Refuses what a dialect has no word for.
    pub(super) fn check(&self, dialect: Dialect) -> Result<(), String> {
        let foreign = [
            ("top_k", self.top_k.is_some_and(|top_k| top_k > 0)),
            ("repetition_penalty", self.repetition_penalty.is_some_and(|penalty| penalty != 1.0)),
        ];
        match foreign.into_iter().find(|(_, given)| *given && dialect == Dialect::OpenAi) {
            Some((key, _)) => {
                Err(format!("OpenAI's protocol has no `{key}`; name the engine, as vllm:URL or sglang:URL"))
            }
            None => Ok(()),
        }
    }
}

/// One turn to answer, whoever is asked.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    /// Row of the prompts.
    pub(super) row: usize,
    /// What was said so far.
    pub(super) messages: Vec<Message>,
    pub(super) tools: Option<Value>,
    pub(super) template_arguments: Map<String, Value>,
    pub(super) max_new_tokens: usize,
    pub(super) sampling: Sampling,
    /// Of this turn alone.
    pub(super) seed: u32,
}

impl Turn {
    /// The question in a server's dialect.
    pub(super) fn question(&self, dialect: Dialect, model: &str) -> Result<Value, Trouble> {
        let Self { sampling, .. } = self;
        let messages: Result<Vec<Value>, Trouble> =
            self.messages.iter().map(|message| said(message, dialect)).collect();
        let mut question = json!({"model": model, "messages": messages?, "max_tokens": self.max_new_tokens});
        if let Some(temperature) = sampling.temperature {
            question["temperature"] = temperature.into();
        }
        if !sampling.is_greedy() {
            question["seed"] = self.seed.into();
            if let Some(top_p) = sampling.top_p {
                question["top_p"] = top_p.into();
            }
        }
        if let Some(tools) = &self.tools {
            question["tools"] = tools.clone();
        }
        if dialect == Dialect::OpenAi {
            return match self.template_arguments.keys().next() {
                None => Ok(question),
                Some(key) => Err(Trouble::Final(format!(
                    "`chat_template_kwargs` has `{key}`, and OpenAI's protocol has no place for it; name the engine, as vllm:URL \
                     or sglang:URL"
                ))),
            };
        }
        question["return_token_ids"] = true.into();
        if !self.template_arguments.is_empty() {
            question["chat_template_kwargs"] = self.template_arguments.clone().into();
        }
        if let (Some(top_k), false) = (sampling.top_k, sampling.is_greedy()) {
            // All of them is -1 to both.
            question["top_k"] = if top_k == 0 { (-1).into() } else { top_k.into() };
        }
        if let Some(penalty) = sampling.repetition_penalty {
            question["repetition_penalty"] = penalty.into();
        }
        Ok(question)
    }
}

/// A message as a server takes it.
fn said(message: &Message, dialect: Dialect) -> Result<Value, Trouble> {
    let mut said = serde_json::to_value(message).map_err(|error| Trouble::Final(error.to_string()))?;
    let thoughts = said.as_object_mut().and_then(|said| said.shift_remove("reasoning_content"));
    match (thoughts, dialect) {
        (None, _) => {}
        // Its templates are given either name.
        (Some(thoughts), Dialect::Vllm) => {
            said["reasoning"] = thoughts.clone();
            said["reasoning_content"] = thoughts;
        }
        (Some(thoughts), Dialect::Sglang) => said["reasoning_content"] = thoughts,
        // No part of the protocol: some refuse a question that has it.
        (Some(_), Dialect::OpenAi) => {}
    }
    Ok(said)
}

/// What a server answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// The assistant's message, with how it ended and its tokens in its marks.
    pub(super) message: Message,
    /// Tokens of the prompt and of the answer, as the server counts them.
    pub(super) prompt_tokens: u64,
    pub(super) new_tokens: u64,
}

impl Answer {
    pub(super) fn finish(&self) -> Option<Finish> {
        self.message.marks.finish
    }
}

/// Reads an answer.
pub(super) fn read(bytes: &[u8]) -> Result<Answer, Trouble> {
    let wrong = |problem: &str| Trouble::answer(format!("{PATH}: {problem}"));
    let value = serving::json(PATH, bytes)?;
    let choice = value.pointer("/choices/0").ok_or_else(|| wrong("the answer has no choices"))?;
    let Some(Value::Object(said)) = choice.get("message") else { return Err(wrong("the choice has no message")) };
    let reason = choice.get("finish_reason").and_then(Value::as_str);
    let finish = match reason {
        Some("stop" | "tool_calls" | "function_call") => Finish::Stop,
        Some("length") => Finish::Length,
        Some("content_filter") => {
            return Err(Trouble::Final("the server's filter cut the answer (content_filter)".to_owned()));
        }
        Some(other) => return Err(wrong(&format!("the answer ended with finish_reason `{other}`"))),
        None => return Err(wrong("the answer does not say why it ended (finish_reason)")),
    };
    let text = |key: &str| match said.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(_) => Err(wrong(&format!("`{key}` of the answer is no text"))),
    };
    let content = text("content")?;
    let thoughts = match text("reasoning_content")? {
        Some(thoughts) => Some(thoughts),
        None => text("reasoning")?,
    };
    let calls = said.get("tool_calls").and_then(Value::as_array).filter(|calls| !calls.is_empty()).cloned();
    let is_named = |call: &Value| call.pointer("/function/name").is_some_and(Value::is_string);
    if calls.as_ref().is_some_and(|calls| !calls.iter().all(is_named)) {
        return Err(wrong("a call of a tool has no function.name"));
    }
    if content.is_none() && calls.is_none() {
        if let Some(words) = text("refusal")? {
            return Err(Trouble::Final(format!("the server refused to answer: {words}")));
        }
        if finish == Finish::Stop || thoughts.is_none() {
            let beside = if thoughts.is_some() { " behind its reasoning" } else { "" };
            return Err(Trouble::Final(format!("the answer is empty{beside}")));
        }
    }
    // vLLM's name, and SGLang's.
    let is_there = |key: &&str| choice.get(*key).is_some_and(|ids| !ids.is_null());
    let key = ["token_ids", "response_token_ids"].into_iter().find(is_there).unwrap_or("token_ids");
    let token_ids = ids(choice.get(key)).map_err(|problem| wrong(&format!("`{key}`: {problem}")))?;
    let asked = choice.get("prompt_token_ids").filter(|ids| !ids.is_null()).or_else(|| value.get("prompt_token_ids"));
    let asked = ids(asked).map_err(|problem| wrong(&format!("`prompt_token_ids`: {problem}")))?;
    let count = |key: &str| value.pointer(&format!("/usage/{key}")).and_then(Value::as_u64);
    let length = |ids: &Option<Vec<u32>>| ids.as_ref().map_or(0, |ids| ids.len() as u64);
    let (prompt_tokens, new_tokens) = (
        count("prompt_tokens").unwrap_or_else(|| length(&asked)),
        count("completion_tokens").unwrap_or_else(|| length(&token_ids)),
    );
    let mut extra = Map::new();
    if let Some(thoughts) = thoughts {
        extra.insert("reasoning_content".to_owned(), thoughts.into());
    }
    if let Some(mut calls) = calls {
        calls.iter_mut().filter_map(Value::as_object_mut).for_each(|call| call.retain(|_, value| !value.is_null()));
        extra.insert("tool_calls".to_owned(), calls.into());
    }
    let prompt_hash = asked.filter(|_| token_ids.is_some()).map(|ids| prompt_hash(&ids));
    let marks = Marks { finish: Some(finish), token_ids, prompt_hash, ..Marks::default() };
    // A message that only calls tools says nothing; one that was cut in its thoughts says an empty text.
    let content = content.or_else(|| (!extra.contains_key("tool_calls")).then(String::new));
    let message = Message { role: "assistant".to_owned(), content, extra, marks, written_arguments: Vec::new() };
    Ok(Answer { message, prompt_tokens, new_tokens })
}

/// Token ids, where there are any.
fn ids(value: Option<&Value>) -> Result<Option<Vec<u32>>, String> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let list = value.as_array().ok_or("expected a list")?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or("expected token ids");
    let ids = list.iter().map(id).collect::<Result<Vec<u32>, _>>()?;
    Ok(Some(ids).filter(|ids| !ids.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn() -> Turn {
        let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]);
        let extra = Map::from_iter([("reasoning_content".to_owned(), "hm".into()), ("tool_calls".to_owned(), calls)]);
        let answer = Message { content: None, extra, ..Message::new("assistant", "") };
        Turn {
            row: 0,
            messages: vec![Message::new("user", "a"), answer, Message::new("user", "b")],
            tools: Some(json!([{"type": "function"}])),
            template_arguments: Map::new(),
            max_new_tokens: 7,
            sampling: Sampling {
                temperature: Some(0.5),
                top_k: Some(0),
                top_p: Some(0.9),
                repetition_penalty: Some(1.1),
            },
            seed: 3,
        }
    }

    #[test]
    fn every_engine_is_asked_in_its_own_words() {
        let vllm = turn().question(Dialect::Vllm, "m").unwrap();
        assert_eq!(vllm["messages"][1]["tool_calls"][0]["function"]["arguments"], "{\"a\": 1}");
        assert_eq!((&vllm["messages"][1]["reasoning"], &vllm["messages"][1]["content"]), (&json!("hm"), &Value::Null));
        assert_eq!((&vllm["top_k"], &vllm["seed"], &vllm["max_tokens"]), (&json!(-1), &json!(3), &json!(7)));
        assert_eq!((&vllm["return_token_ids"], vllm["tools"].as_array().unwrap().len()), (&json!(true), 1));
        let sglang = turn().question(Dialect::Sglang, "m").unwrap();
        assert_eq!(sglang["messages"][1].get("reasoning"), None);
        assert_eq!(sglang["messages"][1]["reasoning_content"], "hm");
        let openai = turn().question(Dialect::OpenAi, "m").unwrap();
        let keys: Vec<&String> = openai.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["model", "messages", "max_tokens", "temperature", "seed", "top_p", "tools"]);
        assert_eq!(openai["messages"][1].get("reasoning_content"), None);
        let greedy = Turn { sampling: Sampling { temperature: Some(0.0), ..turn().sampling }, ..turn() };
        let question = greedy.question(Dialect::Vllm, "m").unwrap();
        assert!(["seed", "top_p", "top_k"].iter().all(|key| question.get(key).is_none()), "{question}");
        assert_eq!(question["repetition_penalty"], 1.1);
        let arguments = Map::from_iter([("enable_thinking".to_owned(), false.into())]);
        let told = Turn { template_arguments: arguments, ..turn() };
        assert_eq!(told.question(Dialect::Vllm, "m").unwrap()["chat_template_kwargs"]["enable_thinking"], false);
        assert!(told.question(Dialect::OpenAi, "m").unwrap_err().problem().contains("`enable_thinking`"));
        assert!(turn().sampling.check(Dialect::OpenAi).unwrap_err().contains("`repetition_penalty`"));
        assert!(turn().sampling.check(Dialect::Vllm).is_ok());
    }

    fn choice(message: Value, more: Value) -> Value {
        let mut choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        choice.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    }

    #[test]
    fn words_thoughts_calls_and_tokens_are_kept() {
        let read = |value: Value| super::read(value.to_string().as_bytes());
        let plain = read(choice(json!({"role": "assistant", "content": "a", "reasoning": null}), json!({}))).unwrap();
        let marks = Marks { finish: Some(Finish::Stop), ..Marks::default() };
        assert_eq!(plain.message, Message { marks, ..Message::new("assistant", "a") });
        assert_eq!((plain.prompt_tokens, plain.new_tokens), (5, 2));
        for key in ["reasoning", "reasoning_content"] {
            let thought = read(choice(json!({"content": "a", key: "hm"}), json!({}))).unwrap();
            assert_eq!(thought.message.extra["reasoning_content"], "hm");
        }
        let mut vllm = choice(json!({"content": "a"}), json!({"token_ids": [4, 2], "finish_reason": "length"}));
        vllm["prompt_token_ids"] = json!([1, 2, 3]);
        let said = json!({"response_token_ids": [4, 2], "prompt_token_ids": [1, 2, 3]});
        let sglang = choice(json!({"content": "a"}), said);
        for (value, finish) in [(vllm, Finish::Length), (sglang, Finish::Stop)] {
            let Marks { finish: ended, token_ids, prompt_hash: asked, .. } = read(value).unwrap().message.marks;
            assert_eq!((ended, token_ids), (Some(finish), Some(vec![4, 2])));
            assert_eq!(asked, Some(prompt_hash(&[1, 2, 3])));
        }
        let calls = json!([{"id": "c", "index": null, "function": {"name": "f", "arguments": "{}"}}]);
        let called =
            read(choice(json!({"content": null, "tool_calls": calls}), json!({"finish_reason": "tool_calls"})))
                .unwrap();
        assert_eq!((&called.message.content, called.finish()), (&None, Some(Finish::Stop)));
        assert_eq!(
            called.message.extra["tool_calls"],
            json!([{"id": "c", "function": {"name": "f", "arguments": "{}"}}])
        );
        // Cut in the middle of a thought.
        let cut = read(choice(json!({"content": null, "reasoning_content": "hm"}), json!({"finish_reason": "length"})))
            .unwrap();
        assert_eq!((cut.message.content.as_deref(), cut.finish()), (Some(""), Some(Finish::Length)));
    }

    #[test]
    fn what_is_no_answer_says_why() {
        let good = json!({"content": "a"});
        for (value, passing, problem) in [
            (json!({"choices": []}), true, "has no choices"),
            (json!({"object": "error"}), true, "has no choices"),
            (json!({"choices": [{"finish_reason": "stop"}]}), true, "has no message"),
            (choice(good.clone(), json!({"finish_reason": null})), true, "does not say why it ended"),
            (choice(good.clone(), json!({"finish_reason": "abort"})), true, "finish_reason `abort`"),
            (choice(good.clone(), json!({"finish_reason": "content_filter"})), false, "content_filter"),
            (choice(good.clone(), json!({"token_ids": "x"})), true, "`token_ids`: expected a list"),
            (choice(good.clone(), json!({"token_ids": [-1]})), true, "`token_ids`: expected token ids"),
            (choice(json!({"content": 3}), json!({})), true, "`content` of the answer is no text"),
            (choice(json!({"content": "", "tool_calls": []}), json!({})), false, "the answer is empty"),
            (choice(json!({"content": "", "reasoning": "hm"}), json!({})), false, "empty behind its reasoning"),
            (choice(json!({"content": null}), json!({"finish_reason": "length"})), false, "the answer is empty"),
            (choice(json!({"content": null, "refusal": "no"}), json!({})), false, "refused to answer: no"),
            (choice(json!({"content": "a", "tool_calls": [{"id": 1}]}), json!({})), true, "has no function.name"),
        ] {
            let trouble = read(value.to_string().as_bytes()).unwrap_err();
            assert_eq!(matches!(trouble, Trouble::Passing { .. }), passing, "{value}");
            assert!(trouble.problem().contains(problem), "{value}: {trouble:?}");
        }
        assert!(read(b"{\"choices\"").unwrap_err().problem().contains("is not JSON"));
    }
}
