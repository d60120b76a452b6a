//! Answers in OpenAI's shape, whole and in pieces. A whole answer is what its pieces say together.
//!
//! `usage` says more than OpenAI's: `drafted_tokens`, `accepted_tokens` and `verifications`. Sampled answers come with their
//! `seed`, so that they can be asked for again.

use serde_json::{Map, Value, json};

use super::ask::{Ask, Interface};
use super::job::{Chance, Counts, End, Piece, Told};

/// What all parts of a reply have in common.
#[derive(Debug, Clone)]
pub struct Reply {
    id: String,
    created: u64,
    model: String,
    interface: Interface,
    seed: Option<u64>,
    logprobs: bool,
    /// Whether ids of tokens are told.
    token_ids: bool,
    include_usage: bool,
    prompts: Vec<Vec<u32>>,
    choices: usize,
}

/// One answer as it was told so far.
#[derive(Debug, Clone, Default)]
struct Choice {
    piece: Piece,
    end: Option<End>,
}

impl Reply {
    /// The reply to what was asked, under a name of its own.
    pub fn new(ask: &Ask, id: u64, created: u64, model: &str) -> Self {
        let name = if ask.interface == Interface::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            id: format!("{name}-{id:016x}"),
            created,
            model: model.to_owned(),
            interface: ask.interface,
            seed: (!ask.processors.is_greedy()).then_some(ask.seed),
            logprobs: ask.logprobs.is_some(),
            token_ids: ask.token_ids,
            include_usage: ask.include_usage,
            prompts: if ask.token_ids { ask.prompts.clone() } else { Vec::new() },
            choices: ask.choices,
        }
    }

    fn envelope(&self, is_piece: bool, choices: Vec<Value>) -> Value {
        let object = match (self.interface, is_piece) {
            (Interface::Chat, false) => "chat.completion",
            (Interface::Chat, true) => "chat.completion.chunk",
            (Interface::Text, _) => "text_completion",
        };
        let mut envelope = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        if let Some(seed) = self.seed {
            envelope["seed"] = seed.into();
        }
        envelope
    }

    /// The first piece of an answer, where the interface has one.
    pub fn opening(&self, choice: usize) -> Option<Value> {
        let mut opening = json!({
            "index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null,
        });
        self.add_prompt(&mut opening, choice);
        (self.interface == Interface::Chat).then(|| self.in_piece(opening))
    }

    fn in_piece(&self, choice: Value) -> Value {
        let mut piece = self.envelope(true, vec![choice]);
        if self.include_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }

    /// A piece of an answer.
    pub fn piece(&self, choice: usize, piece: &Piece) -> Value {
        let logprobs = self.logprobs(&piece.tokens);
        let mut value = match self.interface {
            Interface::Chat => json!({"index": choice, "delta": {"content": piece.text}}),
            Interface::Text => json!({"index": choice, "text": piece.text}),
        };
        value["logprobs"] = logprobs;
        value["finish_reason"] = Value::Null;
        self.add_tokens(&mut value, piece.tokens.iter().map(|told| told.id));
        self.in_piece(value)
    }

    /// The last piece of an answer.
    pub fn ending(&self, choice: usize, end: &End) -> Value {
        let mut value = match self.interface {
            Interface::Chat => json!({"index": choice, "delta": {}}),
            Interface::Text => json!({"index": choice, "text": ""}),
        };
        value["logprobs"] = Value::Null;
        value["finish_reason"] = end.reason.into();
        self.add_tokens(&mut value, end.token.into_iter());
        self.in_piece(value)
    }

    /// What a stream ends with where it was asked to.
    pub fn last(&self, prompt_tokens: usize, counts: Counts) -> Option<Value> {
        let mut last = self.envelope(true, Vec::new());
        last["usage"] = usage(prompt_tokens, counts);
        self.include_usage.then_some(last)
    }

    fn add_tokens(&self, value: &mut Value, ids: impl Iterator<Item = u32>) {
        if self.token_ids {
            value["token_ids"] = ids.collect();
        }
    }

    fn add_prompt(&self, value: &mut Value, choice: usize) {
        if let Some(prompt) = self.prompts.get(choice / self.choices.max(1)) {
            value["prompt_token_ids"] = prompt.as_slice().into();
        }
    }

    fn logprobs(&self, tokens: &[Told]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let told = tokens.iter().filter_map(|told| Some((told.offset, told.chances.as_ref()?)));
        if self.interface == Interface::Chat {
            let entry = |chance: &Chance| {
                let Chance { text, logprob } = chance;
                // A token that is part of a character only has bytes of its own, which the tokenizer does not tell.
                let bytes = (!text.contains('\u{FFFD}')).then_some(text.as_bytes());
                json!({"token": text, "logprob": logprob, "bytes": bytes})
            };
            let entries = told.map(|(_, chances)| {
                let mut own = entry(&chances.own);
                own["top_logprobs"] = chances.top.iter().map(entry).collect();
                own
            });
            return json!({"content": entries.collect::<Vec<_>>(), "refusal": null});
        }
        let (mut texts, mut own, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (offset, chances) in told {
            texts.push(&chances.own.text);
            own.push(chances.own.logprob);
            // Parts of characters look alike; the likeliest of them stands for all.
            let mut entries = Map::new();
            for Chance { text, logprob } in &chances.top {
                entries.entry(text.as_str()).or_insert_with(|| json!(logprob));
            }
            top.push(Value::Object(entries));
            offsets.push(offset);
        }
        json!({"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets})
    }
}

fn usage(prompt_tokens: usize, counts: Counts) -> Value {
    let Counts { tokens, drafted, accepted, rounds, known } = counts;
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens as u64 + tokens,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "verifications": rounds,
        "prompt_tokens_details": {"cached_tokens": known.min(prompt_tokens as u64)},
    })
}

/// All answers of a request, as they come in.
#[derive(Debug)]
pub struct Whole {
    reply: Reply,
    answers: Vec<Choice>,
}

impl Whole {
    /// Nothing told yet.
    pub fn new(reply: Reply, answers: usize) -> Self {
        Self { reply, answers: vec![Choice::default(); answers] }
    }

    /// Takes a piece of an answer.
    pub fn add(&mut self, choice: usize, piece: Piece) {
        if let Some(answer) = self.answers.get_mut(choice) {
            answer.piece.text.push_str(&piece.text);
            answer.piece.tokens.extend(piece.tokens);
        }
    }

    /// Takes the end of an answer.
    pub fn end(&mut self, choice: usize, end: End) {
        if let Some(answer) = self.answers.get_mut(choice) {
            answer.end = Some(end);
        }
    }

    /// The whole reply.
    pub fn value(&self, prompt_tokens: usize) -> Value {
        let reply = &self.reply;
        let mut counts = Counts::default();
        let mut choices = Vec::with_capacity(self.answers.len());
        for (index, Choice { piece, end }) in self.answers.iter().enumerate() {
            counts += end.map(|end| end.counts).unwrap_or_default();
            let mut value = match reply.interface {
                Interface::Chat => {
                    json!({"index": index, "message": {"role": "assistant", "content": piece.text, "refusal": null}})
                }
                Interface::Text => json!({"index": index, "text": piece.text}),
            };
            value["logprobs"] = reply.logprobs(&piece.tokens);
            value["finish_reason"] = end.map(|end| end.reason).into();
            let last = end.and_then(|end| end.token);
            reply.add_tokens(&mut value, piece.tokens.iter().map(|told| told.id).chain(last));
            reply.add_prompt(&mut value, index);
            choices.push(value);
        }
        let mut envelope = reply.envelope(false, choices);
        envelope["usage"] = usage(prompt_tokens, counts);
        envelope
    }
}
