//! What a draft's guesses are worth: a few prompts decoded with it, in process, by a chain.

use serde::Serialize;

use super::case::Case;
use super::finding::Findings;
use super::folder::words;
use crate::data::{ChatTokenizer, Message};
use crate::decode::drafter::{self, Drafter};
use crate::decode::engine::{Clock, Decoded, Engine, EngineOptions};
use crate::decode::event::Silent;
use crate::decode::{Policy, Request};
use crate::error::{Error, Result};
use crate::nn::Processors;

/// Guesses of a chain.
pub const DEPTH: usize = 5;
/// Below this acceptance length no guess is worth its price, whatever the machine.
const NOTHING: f64 = 1.02;

/// Prompts that are decoded where nobody names others.
pub const PROMPTS: [&str; 4] = [
    "Explain in a few sentences why the sky is blue.",
    "Write a short Python function that returns the largest number of a list.",
    "A train covers 120 km in 1.5 hours. What is its average speed? Think step by step.",
    "Name three things to check before a long drive in winter.",
];

/// How prompts are decoded.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// Prompts as tokens.
    pub prompts: Vec<Vec<u32>>,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

impl Decoding {
    /// Questions as the target's template renders them; as they are where it has none.
    pub fn of(tokenizer: &ChatTokenizer, questions: &[Vec<Message>], max_new_tokens: usize) -> Result<Self> {
        let encode = |question: &Vec<Message>| match tokenizer.parts().template {
            Some(_) => tokenizer.encode(&tokenizer.render(question, None, true)?),
            None => {
                let text: Vec<&str> = question.iter().filter_map(|message| message.content.as_deref()).collect();
                tokenizer.encode(&text.join("\n"))
            }
        };
        let prompts: Vec<Vec<u32>> = questions.iter().map(encode).collect::<Result<_>>()?;
        let prompts = prompts.into_iter().filter(|prompt| !prompt.is_empty()).collect();
        Ok(Self { prompts, max_new_tokens, stop_tokens: tokenizer.eos_token_ids().to_vec() })
    }
}

/// What came of a decode.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Verifications.
    pub rounds: usize,
    /// Tokens committed for each verification.
    pub acceptance_length: f64,
    /// By depth from 1: the share of verifications of a tree that deep that accept so many guesses or more.
    pub per_position: Vec<f64>,
    /// Seconds for a guess of the draft.
    pub guess_seconds: f64,
    /// Seconds for a verification and what belongs to it.
    pub verify_seconds: f64,
    /// Square of the error that chance leaves in the acceptance length.
    #[serde(skip)]
    pub error: f64,
    /// Prompts and what was answered.
    #[serde(skip)]
    pub answers: Vec<(Vec<u32>, Decoded)>,
}

/// Decodes with the draft in the folder.
pub fn measure(case: &Case<'_>, decoding: &Decoding) -> Result<Measured> {
    let folder = case.folder.path.display().to_string();
    let target = (case.target.model, case.target.path);
    let tree = format!("chain:{DEPTH}");
    let opened = drafter::open(Some(&folder), Some(&tree), target, drafter::DraftSampling::Greedy)?;
    measure_with(case, decoding, opened.drafter)
}

/// Decodes with this draft.
pub fn measure_with<'a>(case: &Case<'a>, decoding: &Decoding, drafter: Box<dyn Drafter + 'a>) -> Result<Measured> {
    let options = EngineOptions {
        processors: Processors::default(),
        policy: Policy::Keyed { seed: 0 },
        stop_tokens: decoding.stop_tokens.clone(),
        max_rows: 1,
    };
    let mut engine = Engine::new(case.target.model, drafter, options)?;
    for (tag, prompt) in (0..).zip(&decoding.prompts) {
        let max_new_tokens = decoding.max_new_tokens;
        engine.submit(Request { tag, prompt: prompt.clone(), max_new_tokens, key: tag })?;
    }
    let left = engine.run(&mut Silent)?;
    let answers: Vec<Decoded> = left.into_iter().map(|left| left.decoded).collect::<Result<_>>()?;
    let rounds: Vec<_> = answers.iter().flat_map(|answer| answer.rounds.iter().copied()).collect();
    let deepest = rounds.iter().map(|round| round.depth).max().unwrap_or(0);
    let share = |depth: usize| {
        let tried = rounds.iter().filter(|round| round.depth >= depth);
        let (tries, hits) =
            tried.fold((0, 0), |(tries, hits), round| (tries + 1, hits + usize::from(round.accepted >= depth)));
        hits as f64 / f64::from(tries.max(1))
    };
    let tokens: usize = rounds.iter().map(|round| round.tokens).sum();
    let guesses: usize = rounds.iter().map(|round| round.depth).sum();
    let Clock { draft, verify, overhead, .. } = engine.clock();
    let count = rounds.len().max(1) as f64;
    let acceptance_length = if rounds.is_empty() { 1.0 } else { tokens as f64 / count };
    let off = |tokens: usize| (tokens as f64 - acceptance_length).powi(2);
    let error = rounds.iter().map(|round| off(round.tokens)).sum::<f64>() / (count * count);
    Ok(Measured {
        rounds: rounds.len(),
        acceptance_length,
        error,
        per_position: (1..=deepest).map(share).collect(),
        guess_seconds: draft.as_secs_f64() / guesses.max(1) as f64,
        verify_seconds: (verify + overhead).as_secs_f64() / rounds.len().max(1) as f64,
        answers: decoding.prompts.iter().cloned().zip(answers).collect(),
    })
}

/// Decodes, and says what the acceptance comes from. `explain` is asked for what would make it larger.
pub fn look(
    case: &Case<'_>,
    decoding: &Decoding,
    explain: impl FnOnce(&Measured) -> Result<(Vec<String>, usize)>,
    found: &mut Findings,
) -> Result<Option<Measured>> {
    if decoding.prompts.is_empty() {
        return Err(Error::Usage("doctor: there is no prompt to decode".to_owned()));
    }
    let measured = match measure(case, decoding) {
        Ok(measured) => measured,
        // What cannot be loaded was named by the checks before.
        Err(error) if case.folder.loads.is_err() => {
            let text = format!("not decoded, the draft cannot be loaded: {}", words(&error));
            found.warning(text, "mend what the other lines name");
            return Ok(None);
        }
        Err(error) => {
            found.fault(format!("cannot be decoded with: {}", words(&error)), "mend what the other lines name");
            return Ok(None);
        }
    };
    let shares: Vec<String> = measured.per_position.iter().map(|share| format!("{share:.3}")).collect();
    let length = measured.acceptance_length;
    let text = format!(
        "acceptance length {length:.2} on {} prompts ({} verifications), by position {}",
        decoding.prompts.len(),
        measured.rounds,
        shares.join(" ")
    );
    let (explanations, tried) = explain(&measured)?;
    for explanation in &explanations {
        found.fault(format!("{text}; {explanation}"), "the draft was trained that way: write it so, or train it again");
    }
    if explanations.is_empty() && length < NOTHING {
        let tried =
            if tried > 0 { format!("; none of {tried} other readings of the files is better") } else { String::new() };
        found.fault(
            format!("{text}: hardly a guess is right{tried}"),
            "it was trained for another target, template or kind of text, or hardly at all",
        );
    } else if explanations.is_empty() {
        found.ok(text);
    }
    Ok(Some(measured))
}
