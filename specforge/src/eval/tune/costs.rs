//! What rounds cost on this machine, timed in the engine itself: the same passes, the same choices, the same bookkeeping.
//!
//! The target's side is timed with trees of made-up guesses, of one size after the other in turns, so that a machine that
//! becomes slower does so for all of them. The draft's side is timed by drafting down to one depth after the other. What
//! was not timed lies on the line between its neighbours.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;

use super::probe::Prompt;
use crate::decode::drafter::{Context, Joining, Progress};
use crate::decode::engine::Clock;
use crate::decode::event::Silent;
use crate::decode::policy::Proposal;
use crate::decode::{Drafter, Engine, EngineOptions, Request};
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::tree::TokenTree;

/// Seconds by requests that run together and by a size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    /// Requests that ran together, ascending.
    pub rows: Vec<usize>,
    /// Sizes that were timed, ascending.
    pub sizes: Vec<usize>,
    /// Seconds, `[rows][sizes]`.
    pub seconds: Vec<Vec<f64>>,
}

impl Table {
    /// Nothing costs anything.
    pub fn free() -> Self {
        Self { rows: vec![1], sizes: vec![1], seconds: vec![vec![0.0]] }
    }

    /// Seconds of a size for so many requests; beyond what was timed, on the line of the last two. Never below nothing.
    pub fn at(&self, rows: usize, size: usize) -> f64 {
        let by_rows: Vec<f64> = self.seconds.iter().map(|seconds| on_line(&self.sizes, seconds, size)).collect();
        on_line(&self.rows, &by_rows, rows).max(0.0)
    }
}

/// The value at `at` of the line through the points next to it.
fn on_line(places: &[usize], values: &[f64], at: usize) -> f64 {
    let count = places.len().min(values.len());
    if count < 2 {
        return values.first().copied().unwrap_or(0.0);
    }
    let right = places[..count].partition_point(|&place| place < at).clamp(1, count - 1);
    let (left_place, right_place) = (places[right - 1] as f64, places[right] as f64);
    let share = (at as f64 - left_place) / (right_place - left_place);
    values[right - 1] + share * (values[right] - values[right - 1])
}

/// Everything a round costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Costs {
    /// Of a step of plain decoding, by requests.
    pub plain: Table,
    /// Of the target's pass and choices, by tokens of each request's tree, the root included.
    pub verify: Table,
    /// Of what is neither the target's nor the draft's, by the same.
    pub overhead: Table,
    /// Of drafting, by depth: one table for each number of children tried.
    pub draft: Vec<Table>,
}

impl Costs {
    /// Seconds of a round of `rows` requests: `levels` drafted by the way `drafted_by`, `nodes` tokens in the largest tree.
    pub fn round(&self, drafted_by: usize, rows: usize, levels: usize, nodes: usize) -> f64 {
        let draft = self.draft.get(drafted_by).filter(|_| levels > 0).map_or(0.0, |table| table.at(rows, levels));
        draft + self.verify.at(rows, nodes) + self.overhead.at(rows, nodes)
    }
}

/// What a series of timed rounds is made with.
#[derive(Clone, Copy)]
pub struct Timing<'a> {
    /// The target.
    pub target: &'a dyn TargetModel,
    /// What is answered.
    pub prompts: &'a [Prompt],
    /// How the engine decodes.
    pub options: &'a EngineOptions,
    /// Requests that run together, one series for each; ascending.
    pub rows: &'a [usize],
    /// Timed rounds of each size.
    pub repeat: usize,
}

impl Timing<'_> {
    /// Seconds of the target's pass and of the rest, by size of made-up trees, root included. Hidden states of `capture` are
    /// handed out as they are with the draft.
    pub fn verify(&self, sizes: &[usize], capture: &[usize], progress: &mut dyn FnMut()) -> Result<[Table; 2]> {
        let mut tables = [self.table(sizes), self.table(sizes)];
        for &rows in self.rows {
            let turn = Turn::default();
            let made_up = MadeUp {
                sizes: sizes.to_vec(),
                turn: turn.clone(),
                capture: capture.to_vec(),
                vocabulary: self.target.info().vocab_size as u32,
                round: 0,
            };
            let clocks = self.series(Box::new(made_up), rows, sizes.len(), &turn, progress)?;
            let median_of = |of: fn(&Clock) -> Duration| clocks.iter().map(|clocks| median(clocks, of)).collect();
            tables[0].seconds.push(median_of(|clock| clock.verify));
            tables[1].seconds.push(median_of(|clock| clock.overhead));
        }
        Ok(tables)
    }

    /// Seconds of drafting by depth. Only the first level is handed to the target.
    pub fn draft(&self, drafter: &mut dyn Drafter, depths: &[usize], progress: &mut dyn FnMut()) -> Result<Table> {
        let mut table = self.table(depths);
        for &rows in self.rows {
            let turn = Turn::default();
            let paced = Paced { inner: &mut *drafter, depths: depths.to_vec(), turn: turn.clone(), round: 0 };
            let clocks = self.series(Box::new(paced), rows, depths.len(), &turn, progress)?;
            table.seconds.push(clocks.iter().map(|clocks| median(clocks, |clock| clock.draft)).collect());
        }
        Ok(table)
    }

    fn table(&self, sizes: &[usize]) -> Table {
        Table { rows: self.rows.to_vec(), sizes: sizes.to_vec(), seconds: Vec::new() }
    }

    /// Times of `repeat` rounds of each of `count` settings, `rows` requests in each. The first round of each is not timed.
    fn series(
        &self,
        drafter: Box<dyn Drafter + '_>,
        rows: usize,
        count: usize,
        turn: &Turn,
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<Vec<Clock>>> {
        /// Rounds that may be of no use, for each that is.
        const PATIENCE: usize = 8;
        let options = EngineOptions { max_rows: rows, stop_tokens: Vec::new(), ..self.options.clone() };
        let mut engine = Engine::new(self.target, drafter, options)?;
        let mut clocks: Vec<Vec<Clock>> = vec![Vec::new(); count];
        let mut next = 0;
        for _ in 0..PATIENCE * (self.repeat + 1) * count {
            while engine.pending() < rows {
                engine.submit(self.request(next))?;
                next += 1;
            }
            let before = engine.clock();
            let left = engine.step(&mut Silent)?;
            left.into_iter().try_for_each(|left| left.decoded.map(drop))?;
            // A row that has left made the bookkeeping of this round another one, but not its passes.
            let Some(setting) = turn.take() else { continue };
            clocks[setting].push(difference(engine.clock(), before));
            progress();
            if clocks.iter().all(|clocks| clocks.len() > self.repeat) {
                break;
            }
        }
        let running: Vec<u64> = engine.running().map(|(tag, _)| tag).collect();
        for tag in running {
            engine.cancel(tag);
        }
        for clocks in &mut clocks {
            if clocks.len() < 2 {
                let context = self.target.info().max_position_embeddings;
                return Err(Error::Usage(format!(
                    "there is no room behind the prompts to time rounds: the target's context is {context} tokens; give \
                     shorter prompts, or smaller --max-depth and --max-nodes"
                )));
            }
            clocks.remove(0);
        }
        Ok(clocks)
    }

    fn request(&self, number: usize) -> Request {
        /// Long enough that rows are seldom new, short enough that contexts stay those of answers.
        const TOKENS: usize = 256;
        let Prompt { tokens, key, .. } = &self.prompts[number % self.prompts.len()];
        Request { tag: number as u64, prompt: tokens.clone(), max_new_tokens: TOKENS, key: *key }
    }
}

/// Which setting a round had, where it had one wholly.
type Turn = Rc<Cell<Option<usize>>>;

fn difference(after: Clock, before: Clock) -> Clock {
    Clock {
        prefill: after.prefill - before.prefill,
        draft: after.draft - before.draft,
        verify: after.verify - before.verify,
        overhead: after.overhead - before.overhead,
    }
}

fn median(clocks: &[Clock], of: fn(&Clock) -> Duration) -> f64 {
    let mut seconds: Vec<f64> = clocks.iter().map(|clock| of(clock).as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(0.0)
}

/// Guesses made-up trees, of one size after the other.
struct MadeUp {
    sizes: Vec<usize>,
    turn: Turn,
    capture: Vec<usize>,
    vocabulary: u32,
    round: usize,
}

impl MadeUp {
    /// A complete binary tree: what a pass costs depends on the number of its nodes.
    fn tree(&self, root: u32, nodes: usize) -> TokenTree {
        let mut tree = TokenTree::root(root);
        for node in 1..nodes as u32 {
            tree.push((node as usize - 1) / 2, (root + node) % self.vocabulary);
        }
        tree
    }
}

impl Drafter for MadeUp {
    fn capture(&self) -> Vec<usize> {
        self.capture.clone()
    }

    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let setting = self.round % self.sizes.len();
        let propose = |row: &Context<'_>| {
            let tree = self.tree(row.tokens.last().copied().unwrap_or_default(), self.sizes[setting]);
            let scores = vec![0.0; tree.len()];
            Proposal::picked(tree, scores)
        };
        let proposals: Vec<Proposal> = rows.iter().map(propose).collect();
        let is_whole = |(row, proposal): (&Context<'_>, &Proposal)| proposal.tree.topology().depth() <= row.depth;
        self.turn.set(rows.iter().zip(&proposals).all(is_whole).then_some(setting));
        self.round += 1;
        Ok(proposals)
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}
}

/// Drafts down to one depth after the other, and lets the target see the first level.
struct Paced<'d, 'a> {
    inner: &'d mut (dyn Drafter + 'a),
    depths: Vec<usize>,
    turn: Turn,
    round: usize,
}

impl Drafter for Paced<'_, '_> {
    fn capture(&self) -> Vec<usize> {
        self.inner.capture()
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        self.inner.join(rows)
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let setting = self.round % self.depths.len();
        let wanted = self.depths[setting];
        self.turn.set(rows.iter().all(|row| row.depth >= wanted).then_some(setting));
        self.round += 1;
        let cut: Vec<Context<'_>> = rows.iter().map(|row| Context { depth: row.depth.min(wanted), ..*row }).collect();
        Ok(self.inner.propose(&cut)?.into_iter().map(|proposal| proposal.cut(1)).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.inner.commit(rows)
    }

    fn retain(&mut self, rows: &[usize]) {
        self.inner.retain(rows);
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.inner.cache_lengths()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_timed_lies_between_its_neighbours() {
        let table =
            Table { rows: vec![1, 4], sizes: vec![1, 3, 7], seconds: vec![vec![1.0, 2.0, 3.0], vec![4.0, 8.0, 16.0]] };
        for (rows, size, want) in [
            (1, 1, 1.0),
            (1, 2, 1.5),
            (1, 5, 2.5),
            (1, 11, 4.0),
            (4, 3, 8.0),
            (2, 1, 2.0),
            (3, 7, 3.0 + 2.0 / 3.0 * 13.0),
            (7, 1, 7.0),
        ] {
            assert!((table.at(rows, size) - want).abs() < 1e-12, "{rows} x {size}: {}", table.at(rows, size));
        }
        assert_eq!(Table::free().at(5, 9), 0.0);
        let falling = Table { rows: vec![1], sizes: vec![1, 2], seconds: vec![vec![1.0, 0.5]] };
        assert_eq!(falling.at(1, 9), 0.0);
    }
}
