//! The prediction put to the test: the same prompts are decoded with the tree and without a draft, in turns of a group of
//! prompts, so that a machine that becomes slower does so for both.

use serde::Serialize;

use super::probe::Prompt;
use crate::decode::drafter::Plain;
use crate::decode::event::Silent;
use crate::decode::{Decoded, Drafter, Engine, EngineOptions, Request};
use crate::error::{Error, Result};
use crate::eval::acceptance::{Answered, Divergence, compare};
use crate::models::TargetModel;

/// What decoding gave.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Tested {
    /// Tokens a second of plain decoding, prompts left out.
    pub plain_tokens_per_second: f64,
    /// The same with the draft.
    pub tokens_per_second: f64,
    /// One over the other.
    pub speedup: f64,
    /// Tokens for each verification.
    pub tokens_per_round: f64,
    /// Answers, of either side.
    pub answers: usize,
    /// Answers that are another token for token: near ties of the target's own logits, and what is wrong.
    pub near_ties: usize,
    /// Of these, what is no tie.
    pub faults: usize,
}

/// A side: an engine, and what it has done.
struct Side<'a> {
    engine: Engine<'a>,
    tokens: usize,
    rounds: usize,
    seconds: f64,
}

impl<'a> Side<'a> {
    fn new(target: &'a dyn TargetModel, drafter: Box<dyn Drafter + 'a>, options: &EngineOptions) -> Result<Self> {
        let engine = Engine::new(target, drafter, options.clone())?;
        Ok(Self { engine, tokens: 0, rounds: 0, seconds: 0.0 })
    }

    /// Answers prompts by their places.
    fn answer(&mut self, prompts: &[Prompt], group: &[usize], max_new_tokens: usize) -> Result<Vec<Decoded>> {
        for (tag, &place) in (0..).zip(group) {
            let Prompt { tokens, key, .. } = &prompts[place];
            self.engine.submit(Request { tag, prompt: tokens.clone(), max_new_tokens, key: *key })?;
        }
        let before = self.engine.clock().decode();
        let left = self.engine.run(&mut Silent)?;
        self.seconds += (self.engine.clock().decode() - before).as_secs_f64();
        let decoded = left.into_iter().zip(group).map(|(left, &place)| {
            left.decoded.map_err(|error| Error::Failed(format!("prompt {}: {error}", prompts[place].id)))
        });
        let decoded = decoded.collect::<Result<Vec<_>>>()?;
        self.tokens += decoded.iter().map(|decoded| decoded.tokens.len() - 1).sum::<usize>();
        self.rounds += decoded.iter().map(|decoded| decoded.rounds.len()).sum::<usize>();
        Ok(decoded)
    }

    fn forget(&mut self) {
        (self.tokens, self.rounds, self.seconds) = (0, 0, 0.0);
    }

    fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }
}

/// Decodes groups of prompts, by their places, without a draft and with each of some drafters. `progress` hears of groups done.
pub fn decode<'a>(
    target: &'a dyn TargetModel,
    drafters: Vec<Box<dyn Drafter + 'a>>,
    prompts: &[Prompt],
    (options, max_new_tokens): (&EngineOptions, usize),
    groups: &[Vec<usize>],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Tested>> {
    /// Tokens before the clock counts, so that no side pays for first times.
    const WARM_UP: usize = 8;
    let mut plain = Side::new(target, Box::new(Plain), options)?;
    let sides = drafters.into_iter().map(|drafter| Side::new(target, drafter, options));
    let mut sides = sides.collect::<Result<Vec<_>>>()?;
    if let Some(first) = groups.first().and_then(|group| group.get(..1)) {
        for side in std::iter::once(&mut plain).chain(&mut sides) {
            side.answer(prompts, first, max_new_tokens.min(WARM_UP))?;
            side.forget();
        }
    }
    let mut tested = vec![Tested::default(); sides.len()];
    for (done, group) in (1..).zip(groups) {
        let expected = plain.answer(prompts, group, max_new_tokens)?;
        for (side, tested) in sides.iter_mut().zip(&mut tested) {
            let answers = side.answer(prompts, group, max_new_tokens)?;
            for ((plain, drafted), &place) in expected.iter().zip(answers).zip(group) {
                tested.answers += 1;
                let parted = parting(target, &prompts[place], place, options, [plain.clone(), drafted])?;
                tested.near_ties += usize::from(parted.as_ref().is_some_and(|parted| parted.near_tie));
                tested.faults += usize::from(parted.is_some_and(|parted| !parted.near_tie));
            }
        }
        progress(done);
    }
    for (side, tested) in sides.iter().zip(&mut tested) {
        tested.plain_tokens_per_second = plain.tokens_per_second();
        tested.tokens_per_second = side.tokens_per_second();
        tested.speedup = tested.tokens_per_second / tested.plain_tokens_per_second.max(f64::MIN_POSITIVE);
        tested.tokens_per_round = side.tokens as f64 / side.rounds.max(1) as f64;
    }
    Ok(tested)
}

fn parting(
    target: &dyn TargetModel,
    prompt: &Prompt,
    place: usize,
    options: &EngineOptions,
    decoded: [Decoded; 2],
) -> Result<Option<Divergence>> {
    let [plain, drafted] =
        decoded.map(|decoded| Answered { question: place, turn: 0, prompt: prompt.tokens.clone(), decoded });
    compare(target, &prompt.id, options, &plain, &drafted)
}
