//! A draft for tests that knows the answers and says how sure it is.

use std::collections::HashMap;

use super::drafter::{Context, Drafter, Joining, Progress, last};
use super::policy::Proposal;
use crate::error::Result;
use crate::nn::noise::keyed_stream;
use crate::tree::TokenTree;

/// Guesses a chain of what the target will choose, each guess right with a probability that it knows and says as a raw
/// logit, multiplied by the temperature of its slot.
pub(crate) struct Confident {
    answers: HashMap<Vec<u32>, Vec<u32>>,
    temperatures: Vec<f64>,
    next: Box<dyn FnMut() -> u64>,
}

impl Confident {
    /// One temperature for each guess of a chain, and what the target answers to each prompt.
    pub(crate) fn new(answers: HashMap<Vec<u32>, Vec<u32>>, temperatures: &[f64], seed: u64) -> Self {
        Self { answers, temperatures: temperatures.to_vec(), next: Box::new(keyed_stream(seed, 6)) }
    }

    fn uniform(&mut self) -> f64 {
        (((self.next)() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn guess(&mut self, row: &Context<'_>) -> Proposal {
        let known = self.answers.iter().find(|(prompt, _)| row.tokens.starts_with(prompt));
        let right: Vec<u32> = match known {
            Some((prompt, answer)) => answer.iter().skip(row.tokens.len() - prompt.len()).copied().collect(),
            None => Vec::new(),
        };
        let (mut guesses, mut confidence) = (Vec::new(), Vec::new());
        for slot in 0..self.temperatures.len().min(row.depth) {
            let probability = 0.15 + 0.8 * self.uniform();
            let token = right.get(slot).copied().unwrap_or(0);
            guesses.push(if self.uniform() < probability { token } else { (token + 1) % 64 });
            confidence.push((self.temperatures[slot] * (probability / (1.0 - probability)).ln()) as f32);
        }
        let scores = vec![0.0; guesses.len() + 1];
        Proposal::picked(TokenTree::chain(last(row.tokens), &guesses), scores).with_confidence(confidence)
    }
}

impl Drafter for Confident {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        Ok(rows.iter().map(|row| self.guess(row)).collect())
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}

    fn confident_drafts(&self) -> usize {
        self.temperatures.len()
    }
}
