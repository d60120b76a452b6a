//! One step of a decode: from the logits of a block to the tokens that become known, the same for every decoder.

use tch::Tensor;

use super::choice::{Choice, Draw, Draws};
use super::network::{Network, Text};
use super::options::{Options, Remasking};
use super::report::{RowDigests, Step};
use crate::device;
use crate::error::Result;

/// A text on its way, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    /// Prompt and answer.
    pub text: Text,
    /// Number of the text among those of the decode.
    pub number: usize,
    /// Key of its noise.
    pub key: u64,
    /// Block of the answer that is being made known.
    pub block: usize,
    /// Passes over it so far.
    pub step: usize,
}

impl State {
    /// First position of the current block.
    pub fn start(&self, options: &Options) -> usize {
        self.text.prompt + self.block * options.block
    }

    /// Masked positions of the current block.
    pub fn candidates(&self, options: &Options, mask: i64) -> Vec<usize> {
        let start = self.start(options);
        (start..start + options.block).filter(|&at| self.text.ids[at] == mask).collect()
    }

    /// Whether nothing is left to do: all blocks are known, or the one before this one ends the answer.
    pub fn is_done(&self, options: &Options) -> bool {
        let start = self.start(options);
        let ends = |token: &i64| options.stop_tokens.iter().any(|&stop| i64::from(stop) == *token);
        start >= self.text.ids.len() || (self.block > 0 && self.text.ids[start - options.block..start].iter().any(ends))
    }

    /// What becomes known by `logits [L, V]` of the current block. The state moves on: to the next pass, or to the next block
    /// where no mask is left in this one. `digests` asks for [`Step::rows`].
    pub fn advance(
        &mut self,
        (logits, digests): (&Tensor, bool),
        network: &Network<'_>,
        options: &Options,
        draws: &mut dyn Draws,
    ) -> Result<Step> {
        let mask = network.diffusion().mask;
        let start = self.start(options);
        let candidates = self.candidates(options, mask);
        let positions: Vec<i64> = candidates.iter().map(|&at| at as i64).collect();
        let places: Vec<i64> = candidates.iter().map(|&at| (at - start) as i64).collect();
        let rows = logits.index_select(0, &device::send(&Tensor::from_slice(&places), logits.device())); // [n, V]
        let draw = Draw { key: self.key, block: self.block, step: self.step };
        let noise = match options.temperature > 0.0 {
            true => Some(draws.gumbel(draw, &positions, logits.size()[1], logits.device())?),
            false => None,
        };
        let Choice { tokens, confidence } =
            Choice::of(&rows, mask, noise.as_ref().map(|noise| (options.temperature, noise)))?;
        let confidence = match options.remasking {
            Remasking::Confidence => confidence,
            Remasking::Random => draws.order(draw, &positions)?,
        };
        let quota = options.rule.quota(options.block, self.step);
        let chosen = options.rule.select(&confidence, quota);
        for &place in &chosen {
            self.text.ids[candidates[place]] = tokens[place];
        }
        let digests = digests.then(|| RowDigests::of(&rows, &tokens)).transpose()?;
        let step = Step {
            text: self.number,
            block: self.block,
            step: self.step,
            start,
            view: (0, self.text.ids.len()),
            transferred: chosen.iter().map(|&place| candidates[place]).collect(),
            candidates,
            tokens,
            confidence,
            quota,
            active: None,
            cosines: None,
            compared: None,
            turned: None,
            logits: (options.block, logits.size()[1] as usize),
            rows: digests,
            cache: None,
        };
        self.step += 1;
        if step.transferred.len() == step.candidates.len() {
            (self.block, self.step) = (self.block + 1, 0);
        }
        Ok(step)
    }
}
