//! Exact parallel decoding: the tokens of the decoder that passes over the whole text for every step, in fewer passes.
//!
//! From a state that is known, further states are guessed that the decoder would go through. One pass runs all of them side by
//! side, each a row of its own. What the decoder does in the first state is then known; if that leads to the second, what it
//! does there is known as well, and so on: the longest such run of steps is kept, at least one. Noise belongs to positions,
//! so that this holds at every temperature.
//!
//! A pass over `n` states costs the arithmetic of `n` passes. It gains where a pass waits for the weights to be read, as one
//! over a short text does on a GPU, and nothing where arithmetic is what takes the time, as on a CPU.
//!
//! The idea is published: Self Speculative Decoding (<https://arxiv.org/abs/2510.04147>), Spiffy
//! (<https://arxiv.org/abs/2509.18085>). No program was read for it.

use tch::Tensor;

use super::choice::Draws;
use super::network::{Network, Rows, Text, View, guided};
use super::options::{Guess, Options, Parallel};
use super::report::{Step, Watcher, Work};
use super::steps::State;
use crate::error::Result;
use crate::nn::KvCache;

/// Takes one text to its end.
pub(super) fn decode(
    (network, options): (&Network<'_>, &Options),
    parallel: Parallel,
    known: &mut State,
    work: &mut Work,
    (draws, watcher): (&mut dyn Draws, &mut dyn Watcher),
) -> Result<()> {
    let mut guesses: Vec<State> = Vec::new();
    while !known.is_done(options) {
        let mut states = vec![known.clone()];
        states.append(&mut guesses);
        let pass = Pass::over(network, options, &states, parallel.guess == Guess::Cache, work)?;
        // The steps of the decoder, as far as the guesses were right.
        let mut last = 0;
        loop {
            let logits = pass.logits.get(last as i64); // [L, V]
            let step = known.advance((&logits, watcher.wants_rows()), network, options, draws)?;
            work.steps += 1;
            watcher.step(&step, &known.text.ids)?;
            match states.get(last + 1) {
                Some(guess) if guess == known && !known.is_done(options) => last += 1,
                _ => break,
            }
        }
        if parallel.states > 1 && !known.is_done(options) {
            guesses = pass.guess((network, options), parallel, (known, last), work, draws)?;
        }
    }
    Ok(())
}

/// The step that the decoder without a cache takes from a text of which everything before a block is known, and of the block
/// perhaps something: `(block, step)` says where that is, `key` whose noise it has.
pub fn step_from(
    (network, options): (&Network<'_>, &Options),
    text: &Text,
    (block, step): (usize, usize),
    key: u64,
    draws: &mut dyn Draws,
) -> Result<Step> {
    let mut state = State { text: text.clone(), number: 0, key, block, step };
    let mut work = Work::none(network.layers());
    let pass = Pass::over(network, options, std::slice::from_ref(&state), false, &mut work)?;
    state.advance((&pass.logits.get(0), true), network, options, draws)
}

/// A pass over several states of one text.
struct Pass {
    /// Of the block that each state is at, `[n, L, V]`.
    logits: Tensor,
    /// What it left, where guesses come from it.
    cache: Option<KvCache>,
    states: usize,
}

impl Pass {
    fn over(network: &Network<'_>, options: &Options, states: &[State], keeps: bool, work: &mut Work) -> Result<Self> {
        let texts: Vec<&Text> = states.iter().map(|state| &state.text).collect();
        let rows = Rows { texts: &texts, guided: options.guidance > 0.0 };
        let length = texts.first().map_or(0, |text| text.ids.len());
        let mut cache = keeps.then(|| network.new_cache(rows.count(), length as i64));
        let view = view_of(network, options, &rows, states);
        let last = network.whole(&rows, &view, cache.as_mut(), &mut |_, _| {})?;
        work.pass(rows.count() as usize * length);
        work.whole_passes += 1;
        let logits = logits_of(network, options, &last); // [n, L, V]
        Ok(Self { logits, cache, states: states.len() })
    }

    /// States that the decoder may go through behind `known`, which came from state number `last`.
    fn guess(
        self,
        (network, options): (&Network<'_>, &Options),
        parallel: Parallel,
        (known, last): (&State, usize),
        work: &mut Work,
        draws: &mut dyn Draws,
    ) -> Result<Vec<State>> {
        let logits = self.logits.get(last as i64); // [L, V]
        let mut guesses = Vec::new();
        let mut state = known.clone();
        let mut cache = self.cache.map(|mut cache| {
            let guided = (options.guidance > 0.0).then_some((self.states + last) as i64);
            cache.select_rows(&[Some(last as i64), guided].into_iter().flatten().collect::<Vec<_>>());
            cache
        });
        while guesses.len() + 1 < parallel.states {
            let logits = match &mut cache {
                Some(cache) => {
                    let texts = [&state.text];
                    let rows = Rows { texts: &texts, guided: options.guidance > 0.0 };
                    let view = view_of(network, options, &rows, std::slice::from_ref(&state));
                    work.pass(rows.count() as usize * view.width as usize);
                    logits_of(network, options, &network.view(&rows, &view, cache)?).get(0)
                }
                // The logits at hand are those of one block.
                None if state.block == known.block && known.step > 0 => logits.shallow_clone(),
                None => break,
            };
            state.advance((&logits, false), network, options, draws)?;
            if state.is_done(options) {
                break;
            }
            guesses.push(state.clone());
        }
        Ok(guesses)
    }
}

/// The blocks that states are at.
fn view_of(network: &Network<'_>, options: &Options, rows: &Rows<'_>, states: &[State]) -> View {
    let origin: Vec<i64> = states.iter().map(|state| state.start(options) as i64 - network.shift()).collect();
    View::new(rows, &origin, options.block as i64 + network.shift())
}

/// Logits of blocks, guided where there are two sides, from what the last layer gives for their views.
fn logits_of(network: &Network<'_>, options: &Options, last: &Tensor) -> Tensor {
    let logits = network.logits(&last.narrow(1, 0, options.block as i64));
    if options.guidance > 0.0 { guided(&logits, options.guidance) } else { logits }
}
