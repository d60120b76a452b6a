//! What the ways to decode a masked diffusion model are worth: the same prompts answered by the decoder without a cache and by
//! others, side by side on one machine, with the work, the time, how far the answers agree, and how likely the model finds them.

use std::time::Instant;

use serde::Serialize;

use super::acceptance::Question;
use crate::data::{ChatTokenizer, Finish, Message};
use crate::decode::diffusion::{Answer, Decoder, Keyed, Network, Options, Prompt, Unwatched, Work};
use crate::error::{Error, Result};
use crate::nn::noise;

pub mod likelihood;
pub mod report;

pub use likelihood::log_likelihood;
pub use report::InfillingReport;

/// A way to decode.
#[derive(Debug, Clone, PartialEq)]
pub struct Mode {
    /// In a word or two.
    pub name: String,
    /// How.
    pub options: Options,
}

/// How an evaluation runs.
#[derive(Debug, Clone)]
pub struct InfillingOptions {
    /// The ways; all others are compared with the first.
    pub modes: Vec<Mode>,
    /// Seed of all noise.
    pub seed: u64,
    /// Masked copies of an answer by which its likelihood is estimated; 0 leaves it out.
    pub samples: usize,
}

/// One answer in one way.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Tokens of the answer.
    pub tokens: Vec<u32>,
    /// What it took.
    #[serde(flatten)]
    pub work: Work,
    /// Wall time.
    pub seconds: f64,
    /// Positions of the answer with the token that the first way has there, and all of them.
    pub agreement: (usize, usize),
    /// Estimated logarithm of the probability of the answer behind its prompt, for each token, in nats.
    pub log_likelihood: Option<f64>,
}

/// One prompt, answered in all ways.
#[derive(Debug, Clone, Serialize)]
pub struct Answered {
    /// Id of the question.
    pub question: String,
    /// Turn of it, from 1.
    pub turn: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// In the order of the ways.
    pub answers: Vec<Measured>,
}

/// Asks every question in every way. A further turn stands behind the first way's answers, so that all ways answer the same
/// prompts. `progress` is told how many questions are done.
pub fn measure(
    network: Network<'_>,
    tokenizer: &ChatTokenizer,
    questions: &[Question],
    options: &InfillingOptions,
    progress: &dyn Fn(usize),
) -> Result<Vec<Answered>> {
    let decoders: Vec<Decoder<'_>> =
        options.modes.iter().map(|mode| Decoder::new(network, mode.options.clone())).collect::<Result<_>>()?;
    let mut run = Run { network, tokenizer, options, decoders, answered: Vec::new() };
    // Nobody pays for first times.
    if let Some(question) = questions.first() {
        run.question(0, question, 1)?;
        run.answered.clear();
    }
    for (number, question) in questions.iter().enumerate() {
        run.question(number, question, question.turns.len())?;
        progress(number + 1);
    }
    Ok(run.answered)
}

struct Run<'a> {
    network: Network<'a>,
    tokenizer: &'a ChatTokenizer,
    options: &'a InfillingOptions,
    decoders: Vec<Decoder<'a>>,
    answered: Vec<Answered>,
}

impl Run<'_> {
    fn question(&mut self, number: usize, question: &Question, turns: usize) -> Result<()> {
        let mut messages = question.before.clone();
        for (turn, said) in question.turns.iter().enumerate().take(turns) {
            messages.push(Message::new("user", said.as_str()));
            let prepared = self.tokenizer.prepare(&messages, question.tools.as_ref())?;
            let prepared = prepared.with_arguments(&question.template_arguments)?;
            let prompt = self.tokenizer.encode(&prepared.render(messages.len(), true)?)?;
            let named = |error: Error| Error::Failed(format!("question {}, turn {}: {error}", question.id, turn + 1));
            let key = noise::keyed_bits(0, 1 << 8, number as u64, turn as u64);
            let (answers, first) = self.prompt(prompt.clone(), key).map_err(named)?;
            // Everything it said but the end of its turn.
            let count = first.tokens.len() - usize::from(first.finish == Finish::Stop);
            messages.push(Message::new("assistant", self.tokenizer.decode(&first.tokens[..count], false)?));
            let (question, turn, prompt_tokens) = (question.id.clone(), turn + 1, prompt.len());
            self.answered.push(Answered { question, turn, prompt_tokens, answers });
        }
        Ok(())
    }

    /// One prompt in all ways; the first way's answer.
    fn prompt(&self, tokens: Vec<u32>, key: u64) -> Result<(Vec<Measured>, Answer)> {
        let prompts = [Prompt { tokens, key }];
        let mut measured = Vec::with_capacity(self.decoders.len());
        let mut first: Option<Answer> = None;
        for decoder in &self.decoders {
            let begun = Instant::now();
            let answers = decoder.decode(&prompts, &mut Keyed { seed: self.options.seed }, &mut Unwatched)?;
            let seconds = begun.elapsed().as_secs_f64();
            let answer = answers.into_iter().next().ok_or_else(no_answer)?;
            let agreement = first
                .as_ref()
                .map_or((answer.tokens.len(), answer.tokens.len()), |first| agreement(&first.tokens, &answer.tokens));
            let log_likelihood = match self.options.samples {
                0 => None,
                samples => {
                    let end = answer.text.prompt + answer.tokens.len();
                    let text = (&answer.text.ids[..end], answer.text.prompt);
                    Some(log_likelihood(&self.network, text, samples, (self.options.seed, key))?)
                }
            };
            let (tokens, work) = (answer.tokens.clone(), answer.work.clone());
            measured.push(Measured { tokens, work, seconds, agreement, log_likelihood });
            first.get_or_insert(answer);
        }
        Ok((measured, first.ok_or_else(no_answer)?))
    }
}

fn no_answer() -> Error {
    Error::Failed("the decoder gave no answer".to_owned())
}

/// Positions at which two answers have the same token, and those that either has.
fn agreement(one: &[u32], other: &[u32]) -> (usize, usize) {
    (one.iter().zip(other).filter(|(one, other)| one == other).count(), one.len().max(other.len()))
}
