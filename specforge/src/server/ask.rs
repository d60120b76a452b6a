//! What a client asks for: the body of a request becomes prompts in tokens and everything that decides about the answers.
//!
//! The fields are OpenAI's (`/v1/chat/completions` and `/v1/completions`, API reference of 2025) with `top_k`,
//! `repetition_penalty`, `chat_template_kwargs` and `return_token_ids` of vLLM. What a field says is honoured or refused.
//! Fields of others that change nothing about the answer, and fields that nobody knows, are passed over.

use std::hash::{BuildHasher, Hasher, RandomState};

use serde_json::{Map, Value, json};

use super::fields::{Fields, whole};
use super::house::House;
use super::refusal::Refusal;
use crate::data::conversation::{Conversation, Sample, parse_checked};
use crate::error::Error;
use crate::nn::Processors;
use crate::strict;

/// Stop strings of one request.
const MOST_STOPS: usize = 16;
/// Likeliest tokens that can be told beside a token.
const MOST_LOGPROBS: i64 = 20;
/// Fields that would change the answer and are not understood, with what they may say nevertheless.
type Harmless = fn(&Value) -> bool;
const NOT_SUPPORTED: &[(&str, Harmless)] = &[
    ("tools", is_empty),
    ("functions", is_empty),
    ("tool_choice", |value| value == "none" || value == "auto"),
    ("function_call", |value| value == "none" || value == "auto"),
    ("response_format", |value| value["type"] == "text"),
    ("modalities", |value| *value == json!(["text"])),
    ("audio", |_| false),
    ("logit_bias", is_empty),
    ("presence_penalty", is_zero),
    ("frequency_penalty", is_zero),
    ("reasoning_effort", |_| false),
    ("suffix", |value| value == ""),
    ("echo", is_off),
    ("prompt_logprobs", |_| false),
    ("min_p", is_zero),
    ("min_tokens", is_zero),
    ("ignore_eos", is_off),
    ("stop_token_ids", is_empty),
    ("bad_words", is_empty),
    ("allowed_token_ids", is_empty),
    ("use_beam_search", is_off),
    ("guided_json", |_| false),
    ("guided_regex", |_| false),
    ("guided_choice", |_| false),
    ("guided_grammar", |_| false),
    ("structured_outputs", |_| false),
    ("chat_template", |_| false),
    ("continue_final_message", is_off),
    ("add_generation_prompt", |value| *value == json!(true)),
    ("documents", is_empty),
];

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_off(value: &Value) -> bool {
    *value == json!(false)
}

/// Which of the two interfaces is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Text,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Which interface was asked.
    pub interface: Interface,
    /// One or more prompts; each is shorter than the context.
    pub prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub choices: usize,
    /// Most tokens of an answer to each prompt.
    pub max_tokens: Vec<usize>,
    /// What is done to the target's rows.
    pub processors: Processors,
    /// Seed of the first answer to each prompt; the next one's is larger by 1.
    pub seed: u64,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// Likeliest tokens told beside each token; `None` where no probability is told.
    pub logprobs: Option<usize>,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether a stream ends with what it took.
    pub include_usage: bool,
    /// Whether ids of tokens are told.
    pub token_ids: bool,
}

impl Ask {
    /// Reads the body of a request. Rendering and encoding a long prompt takes its time.
    pub fn read(interface: Interface, body: &[u8], house: &House) -> Result<Self, Refusal> {
        let value: Value = strict::from_json(body)
            .map_err(|problem| Refusal::request(format!("the body is not the JSON that it should be: {problem}")))?;
        let Value::Object(object) = &value else {
            return Err(Refusal::request("the body: expected a JSON object"));
        };
        let fields = Fields::of(object);
        match fields.text("model")? {
            Some(model) if model != house.model => return Err(Refusal::no_model(model, &house.model)),
            _ => {}
        }
        for (key, harmless) in NOT_SUPPORTED {
            fields.refuse(key, harmless)?;
        }
        let choices = fields.whole("n", (1, house.board.queue() as i64))?.unwrap_or(1) as usize;
        fields.refuse("best_of", |value| whole(value) == Some(choices as i64))?;
        let processors = processors(&fields, house)?;
        let stream = fields.flag("stream")?;
        let (logprobs, stop) = (logprobs(&fields, interface)?, stop(&fields)?);
        let include_usage = include_usage(&fields, stream)?;
        let token_ids = fields.flag("return_token_ids")?;
        let seed = seed(&fields, house, processors)?;
        let asked = max_tokens(&fields, interface, house)?;
        let prompts = match interface {
            Interface::Chat => vec![conversation(&fields, house)?],
            Interface::Text => texts(&fields, house)?,
        };
        if prompts.len().saturating_mul(choices) > house.board.queue() {
            let (prompts, queue) = (prompts.len(), house.board.queue());
            let problem =
                format!("{prompts} prompts with {choices} answers each are more than the {queue} that may wait");
            return Err(Refusal::field(if prompts > 1 { "prompt" } else { "n" }, problem));
        }
        let name = if interface == Interface::Chat { "messages" } else { "prompt" };
        let max_tokens =
            prompts.iter().map(|prompt| room_for(prompt, (name, asked), house)).collect::<Result<_, _>>()?;
        Ok(Self {
            interface,
            prompts,
            choices,
            max_tokens,
            processors,
            seed,
            stop,
            logprobs,
            stream,
            include_usage,
            token_ids,
        })
    }

    /// Answers of the whole request.
    pub fn answers(&self) -> usize {
        self.prompts.len() * self.choices
    }
}

fn processors(fields: &Fields<'_>, house: &House) -> Result<Processors, Refusal> {
    let others = house.defaults.processors;
    let processors = Processors {
        temperature: fields.number("temperature")?.unwrap_or(others.temperature),
        // -1 is how vLLM says all.
        top_k: fields.whole("top_k", (-1, i64::from(u32::MAX)))?.map_or(others.top_k, |count| count.max(0) as usize),
        top_p: fields.number("top_p")?.unwrap_or(others.top_p),
        repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(others.repetition_penalty),
    };
    processors.check().map_err(|problem| match problem.split_once(": ") {
        Some((name, problem)) => Refusal::field(name, problem),
        None => Refusal::request(problem),
    })?;
    Ok(processors)
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, Refusal> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let expected = format!("a string or at most {MOST_STOPS} of them, none of which is empty");
    let list = match value {
        Value::String(_) => std::slice::from_ref(value),
        Value::Array(list) if list.len() <= MOST_STOPS => list,
        _ => return Err(fields.wrong("stop", &expected, value)),
    };
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    list.iter().map(text).collect::<Option<_>>().ok_or_else(|| fields.wrong("stop", &expected, value))
}

fn logprobs(fields: &Fields<'_>, interface: Interface) -> Result<Option<usize>, Refusal> {
    let count = |key: &str| fields.whole(key, (0, MOST_LOGPROBS)).map(|count| count.map(|count| count as usize));
    if interface == Interface::Text {
        return count("logprobs");
    }
    match (fields.flag("logprobs")?, count("top_logprobs")?) {
        (false, Some(1..)) => Err(Refusal::field("top_logprobs", "is only given with `logprobs` true")),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

fn include_usage(fields: &Fields<'_>, stream: bool) -> Result<bool, Refusal> {
    match fields.object("stream_options")? {
        None => Ok(false),
        Some(_) if !stream => Err(Refusal::field("stream_options", "is only given with `stream` true")),
        Some(options) => Fields::within(options, "stream_options.").flag("include_usage"),
    }
}

fn seed(fields: &Fields<'_>, house: &House, processors: Processors) -> Result<u64, Refusal> {
    let expected = "a whole number of 64 bits";
    if let Some(value) = fields.get("seed") {
        let seed = value.as_u64().or_else(|| whole(value).map(|seed| seed as u64));
        return seed.ok_or_else(|| fields.wrong("seed", expected, value));
    }
    Ok(match house.defaults.seed {
        Some(seed) => seed,
        None if processors.is_greedy() => 0,
        // Randomly keyed by the standard library. JSON's readers keep 53 bits of a number.
        None => RandomState::new().build_hasher().finish() >> 11,
    })
}

/// Most tokens that are asked for, and the field that says so; nothing where the request leaves it open.
fn max_tokens(
    fields: &Fields<'_>,
    interface: Interface,
    house: &House,
) -> Result<Option<(&'static str, usize)>, Refusal> {
    let limits = (1, house.limits.answer as i64);
    let older = fields.whole("max_tokens", limits)?.map(|count| ("max_tokens", count as usize));
    let newer = match interface {
        Interface::Chat => fields.whole("max_completion_tokens", limits)?,
        Interface::Text => None,
    };
    Ok(newer.map(|count| ("max_completion_tokens", count as usize)).or(older))
}

/// Most tokens of the answer to a prompt, which must be one.
fn room_for(prompt: &[u32], (name, asked): (&str, Option<(&str, usize)>), house: &House) -> Result<usize, Refusal> {
    let (length, context) = (prompt.len(), house.context);
    if length == 0 {
        return Err(Refusal::field(name, "has no tokens"));
    }
    let most = house.limits.prompt.min(context - 1);
    if length > most {
        return Err(Refusal::too_long(name, format!("has {length} tokens; expected at most {most}")));
    }
    let wanted = asked.map_or(house.defaults.max_tokens.min(house.limits.answer), |(_, count)| count);
    let tokens = wanted.min(context - length);
    let (needed, limit) = (house.cost.alone(length, tokens), house.board.cache_limit());
    if needed > limit {
        let name = asked.map_or(name, |(name, _)| name);
        let problem = format!(
            "{length} tokens of the prompt and {tokens} of the answer would take {needed} bytes of cache, which has {limit}"
        );
        return Err(Refusal::too_long(name, problem));
    }
    Ok(tokens)
}

/// The prompt that a conversation is.
fn conversation(fields: &Fields<'_>, house: &House) -> Result<Vec<u32>, Refusal> {
    let expected = "a list of messages";
    let messages = fields.get("messages").ok_or_else(|| Refusal::field("messages", format!("expected {expected}")))?;
    match messages.as_array() {
        None => return Err(fields.wrong("messages", expected, messages)),
        Some(list) if list.is_empty() => return Err(Refusal::field("messages", "is empty")),
        Some(_) => {}
    }
    let arguments = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    // Read as a file's records are, with all that messages may hold.
    let record = json!({"messages": messages, "chat_template_kwargs": arguments}).to_string();
    let wrong = |problem: String| {
        let of_arguments = problem.contains("chat_template_kwargs");
        Refusal::field(if of_arguments { "chat_template_kwargs" } else { "messages" }, problem)
    };
    let parsed = parse_checked(record.as_bytes(), String::new)
        .map_err(|faults| wrong(faults.into_iter().next().map(|fault| fault.problem).unwrap_or_default()))?;
    let Sample::Conversation(conversation) = parsed.sample else {
        return Err(fields.wrong("messages", expected, messages));
    };
    rendered(&conversation, house)
}

fn rendered(conversation: &Conversation, house: &House) -> Result<Vec<u32>, Refusal> {
    let prepared = house.tokenizer.prepare_conversation(conversation);
    let text = prepared.and_then(|prepared| prepared.render(conversation.messages.len(), true));
    let text = text.map_err(|error| match error {
        // The template's own words to whoever wrote the messages; everything else may name files.
        Error::Failed(words) if words.starts_with("the chat template refuses it") => Refusal::field("messages", words),
        _ => Refusal::field("messages", "the model's chat template cannot render them; does it have one?"),
    })?;
    encoded("messages", &text, house)
}

fn encoded(name: &str, text: &str, house: &House) -> Result<Vec<u32>, Refusal> {
    house.tokenizer.encode(text).map_err(|_| Refusal::field(name, "the model's tokenizer cannot encode it"))
}

/// The prompts of `/v1/completions`: a text, a list of token ids, or a list of either.
fn texts(fields: &Fields<'_>, house: &House) -> Result<Vec<Vec<u32>>, Refusal> {
    let expected = "a text, a list of token ids, or a list of texts or of lists of token ids";
    let value = fields.get("prompt").ok_or_else(|| Refusal::field("prompt", format!("expected {expected}")))?;
    let wrong = || fields.wrong("prompt", expected, value);
    let ids = |list: &[Value]| {
        let id = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < house.vocabulary as u64);
            id.map(|id| id as u32).ok_or_else(|| match value.as_i64() {
                Some(id) => {
                    let most = house.vocabulary - 1;
                    Refusal::field("prompt", format!("{id} is no token: expected ids from 0 to {most}"))
                }
                None => wrong(),
            })
        };
        list.iter().map(id).collect::<Result<Vec<u32>, Refusal>>()
    };
    match value {
        Value::String(text) => Ok(vec![encoded("prompt", text, house)?]),
        Value::Array(list) if list.is_empty() => Err(Refusal::field("prompt", "is empty")),
        Value::Array(list) if list.iter().all(Value::is_number) => Ok(vec![ids(list)?]),
        // More than may wait cannot be answered, and need not be encoded.
        Value::Array(list) if list.len() > house.board.queue() => {
            let (got, most) = (list.len(), house.board.queue());
            Err(Refusal::field("prompt", format!("holds {got} prompts; expected at most {most}")))
        }
        Value::Array(list) => {
            let prompt = |value: &Value| match value {
                Value::String(text) => encoded("prompt", text, house),
                Value::Array(list) => ids(list),
                _ => Err(wrong()),
            };
            list.iter().map(prompt).collect()
        }
        _ => Err(wrong()),
    }
}
