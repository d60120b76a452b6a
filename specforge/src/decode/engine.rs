//! The one loop that decodes text: every draft, every tree, and plain decoding, which is a tree of one node.
//!
//! Of `n` committed tokens the target's cache holds the first `n - 1`; the last one is the root of the next tree. A
//! round is: the drafter proposes a tree for every row, the target runs over all trees at once, a pure walk over its
//! rows (`policy`) decides what is committed, and both caches keep the walk's path and forget the rest. Where the draft says
//! how sure it is and a budget is given, chains are cut to what is worth verifying before the target sees them.
//!
//! Up to `max_rows` requests run together, of any lengths and acceptances. One that ends leaves at once: the last row of
//! the batch takes its place, and the next request comes in behind, in room that is there already. Choices are keyed by
//! the request and the absolute position, so what a request gets does not depend on which others share its batch. One
//! limit of that promise: kernels add in another order for another batch shape, so two tokens whose logits differ by less
//! than the rounding error (about 1e-5 in float32) may change places.
//!
//! The host waits for the device once a round, for what the target chose; a draft waits where it must read its guesses.
//! Times are taken where the host waits in any case.
//!
//! Shape legend: see `nn`; `T` is the number of nodes of the largest tree of a round.

use std::collections::VecDeque;
use std::time::Instant;

use tch::Tensor;

use super::drafter::Drafter;
use super::event::Listener;
use super::policy::{self, Limits, Policy, Proposal, Verdict};
use super::prefill::Passes;
use super::verify_budget::VerifyBudget;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, ForwardOutput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, KvCache, Processors};
use prefixes::Prefixes;
use rows::{Row, Waiting};
use target_rows::TargetRows;

mod admission;
mod budget;
mod prefixes;
mod request;
mod round;
mod rows;
mod sequence;
mod target_rows;
mod trees;

pub use request::{Clock, Decoded, Left, Request, RoundOutcome, Throughput};
pub use sequence::{Sequence, SequenceRows, Step};
pub(crate) use trees::tree_mask;

/// How an engine decodes.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// What is done to the target's rows.
    pub processors: Processors,
    /// How guesses are accepted.
    pub policy: Policy,
    /// Tokens that end a sequence.
    pub stop_tokens: Vec<u32>,
    /// Requests that run together; at least one.
    pub max_rows: usize,
}

/// Decodes requests on one target with one drafter.
pub struct Engine<'a> {
    target: &'a dyn TargetModel,
    drafter: Box<dyn Drafter + 'a>,
    options: EngineOptions,
    budget: Option<VerifyBudget>,
    passes: Passes,
    queue: VecDeque<Waiting>,
    /// Row `i` is row `i` of both caches.
    rows: Vec<Row>,
    cache: Option<KvCache>,
    prefixes: Option<Prefixes>,
    clock: Clock,
    done: Throughput,
}

impl<'a> Engine<'a> {
    /// An engine without requests.
    pub fn new(target: &'a dyn TargetModel, drafter: Box<dyn Drafter + 'a>, options: EngineOptions) -> Result<Self> {
        options.processors.check().map_err(Error::Usage)?;
        let (queue, rows, cache) = (VecDeque::new(), Vec::new(), None);
        let (passes, clock, done) = (Passes::default(), Clock::default(), Throughput::default());
        Ok(Self { target, drafter, options, budget: None, passes, queue, rows, cache, prefixes: None, clock, done })
    }

    /// The same engine that keeps what finished requests leave, up to so many bytes, for prompts that begin with the same
    /// tokens. A target with layers that keep states has nothing to leave.
    pub fn keeping_prefixes(self, bytes: u64) -> Self {
        let can_keep = bytes > 0 && self.target.new_cache(1, 1).can_go_back();
        Self { prefixes: can_keep.then(|| Prefixes::new(bytes)), ..self }
    }

    /// Bytes that finished requests have left.
    pub fn prefix_bytes(&self) -> u64 {
        self.prefixes.as_ref().map_or(0, Prefixes::bytes)
    }

    /// Puts a request behind all others.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        self.submit_with(request, self.options.processors)
    }

    /// The same with processors of the request's own. How the target chooses for it is its own business: requests with
    /// other processors may run beside it.
    pub fn submit_with(&mut self, request: Request, processors: Processors) -> Result<()> {
        processors.check().map_err(Error::Usage)?;
        request.check(self.target)?;
        self.queue.push_back(Waiting { request, processors });
        Ok(())
    }

    /// Puts a request before all others: the next turn of a conversation that has begun.
    pub fn submit_first(&mut self, request: Request) -> Result<()> {
        request.check(self.target)?;
        self.queue.push_front(Waiting { request, processors: self.options.processors });
        Ok(())
    }

    /// Lets go of a request between two steps, whether it waits or runs; it does not come back, and nobody is told that it
    /// ended. Whether there was one.
    pub fn cancel(&mut self, tag: u64) -> bool {
        let waited = self.queue.len();
        self.queue.retain(|waiting| waiting.request.tag != tag);
        let gone: Vec<bool> = self.rows.iter().map(|row| row.tag == tag).collect();
        let runs = gone.contains(&true);
        if let Some(row) = gone.iter().position(|&gone| gone) {
            // A conversation may go on behind an answer that was cut. Where that part cannot be kept, it is run again.
            let _ = self.keep_prefix(row);
            self.keep_rows(&rows::staying(&gone));
        }
        runs || self.queue.len() < waited
    }

    /// Number of requests that wait for a place.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Number of requests that wait or run.
    pub fn pending(&self) -> usize {
        self.queue.len() + self.rows.len()
    }

    /// Where the time went so far.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// What was done so far.
    pub fn throughput(&self) -> Throughput {
        Throughput { prefill_time: self.clock.prefill, decode_time: self.clock.decode(), ..self.done }
    }

    /// The target's cache, row `i` that of the `i`-th running request.
    pub fn cache(&self) -> Option<&KvCache> {
        self.cache.as_ref()
    }

    /// Gives back what the cache has room for beside what it holds, which longer requests have left.
    pub fn shrink_cache(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.shrink();
        }
    }

    /// The drafter.
    pub fn drafter(&self) -> &dyn Drafter {
        self.drafter.as_ref()
    }

    /// Tags and committed tokens of the running requests, in the order of the caches' rows.
    pub fn running(&self) -> impl Iterator<Item = (u64, &[u32])> {
        self.rows.iter().map(|row| (row.tag, row.tokens.as_slice()))
    }

    /// Decodes everything submitted and gives it back in the order of submission.
    pub fn run(&mut self, listener: &mut dyn Listener) -> Result<Vec<Left>> {
        let mut order: Vec<u64> = self.rows.iter().map(|row| row.tag).collect();
        order.extend(self.queue.iter().map(|waiting| waiting.request.tag));
        let mut left = Vec::new();
        while self.pending() > 0 {
            left.extend(self.step(listener)?);
        }
        left.sort_by_key(|left: &Left| order.iter().position(|&tag| tag == left.tag));
        Ok(left)
    }

    /// Fills free places from the queue, runs one round, and gives back what has ended. Between two steps requests may be
    /// submitted; whoever wants to stop makes no further step.
    pub fn step(&mut self, listener: &mut dyn Listener) -> Result<Vec<Left>> {
        let _guard = tch::no_grad_guard();
        let mut left = Vec::new();
        let start = Instant::now();
        if self.admit(listener, &mut left)? {
            self.clock.prefill += start.elapsed();
        }
        if self.rows.is_empty() {
            return Ok(left);
        }
        let start = Instant::now();
        let (draft, verify) = self.round(listener, &mut left)?;
        self.clock.draft += draft;
        self.clock.verify += verify;
        self.clock.overhead += start.elapsed().saturating_sub(draft + verify);
        Ok(left)
    }

    /// One pass of the target; the caller moves the cache's lengths.
    fn forward(
        &self,
        (ids, positions): (&[i64], &[i64]),
        (rows, tokens): (usize, usize),
        mask: &AttentionMask,
        logits: LogitRows<'_>,
        cache: &mut KvCache,
    ) -> Result<ForwardOutput> {
        // One copy to the device for both.
        let both = Tensor::from_slice(&[ids, positions].concat()).view([2, rows as i64, tokens as i64]);
        let both = device::send(&both, self.target.device()); // [2, B, T]
        let capture = self.drafter.capture();
        let input = ForwardInput { ids: &both.get(0), positions: &both.get(1), mask, capture: &capture, logits };
        self.target.forward(&input, Some(cache))
    }

    /// What the target chooses behind every node of each row's part of a pass, `T` numbers each, where that can be chosen
    /// at once: with one copy from the device for rows that are processed alike, which is what a round waits for. Nodes
    /// whose logits hold NaN have no choice. The target's rows of a request with `None` are looked at where the walk over
    /// its tree comes to them. `proposals` are there where trees were run.
    fn choices(
        &self,
        output: &ForwardOutput,
        nodes: usize,
        (rows, proposals): (&[Row], Option<&[Proposal]>),
    ) -> Result<Vec<Option<Vec<i64>>>> {
        let (logits, policy) = (logits(output)?, self.options.policy);
        let mut choices = vec![None; rows.len()];
        for (processors, places) in rows::alike(rows) {
            let own = own_logits(logits, nodes, &places, rows.len())?; // [b * T, V]
            let of_trees = |seed| {
                let trees = proposals.unwrap_or_default();
                round::tree_nodes(
                    seed,
                    nodes,
                    places.iter().filter_map(|&place| Some((&rows[place], trees.get(place)?))),
                )
            };
            let sampled = match proposals {
                Some(_) => target_rows::sampled(policy, &processors, &own, of_trees)?,
                None => None,
            };
            let chosen = match (sampled, target_rows::at_once(policy, processors, nodes)) {
                (Some(sampled), _) => sampled,
                (None, Some(sampling)) => {
                    let key = |&place: &usize| (rows[place].key, rows[place].tokens.len() as u64);
                    let keys: Vec<(u64, u64)> = places.iter().map(key).collect();
                    let committed: Vec<&[u32]> = places.iter().map(|&place| rows[place].tokens.as_slice()).collect();
                    sampling.choose(&own, &keys, |row| vec![committed[row]])
                }
                (None, None) => continue,
            };
            for (&place, chosen) in places.iter().zip(chosen.chunks_exact(nodes)) {
                choices[place] = Some(chosen.to_vec());
            }
        }
        Ok(choices)
    }

    fn verdict(&self, proposal: &Proposal, row: &Row, rows: &mut TargetRows<'_>) -> Result<Verdict> {
        let EngineOptions { policy, stop_tokens, .. } = &self.options;
        let limits = Limits { tokens: row.left(), stop: stop_tokens };
        #[cfg(test)]
        let limits = seeded::limits(limits);
        let verdict = match rows.chosen_at_once() {
            true => policy::walk(&proposal.tree, limits, &mut |path| rows.chosen(path)),
            false => {
                policy::verify(*policy, row.processors.is_greedy(), proposal, (row.tokens.len(), row.key), limits, rows)
            }
        }?;
        #[cfg(test)]
        let verdict = seeded::verdict(verdict, &proposal.tree, limits, rows)?;
        Ok(verdict)
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.cache.as_ref().map_or_else(Vec::new, |cache| cache.lengths().to_vec())
    }
}

/// Of the logits `[B * T, V]` of a pass over `count` rows, those of some of them, `[b * T, V]`.
fn own_logits(logits: &Tensor, nodes: usize, places: &[usize], count: usize) -> Result<Tensor> {
    if places.len() == count {
        return Ok(logits.shallow_clone());
    }
    let first = |&place: &usize| (place * nodes) as i64;
    let index: Vec<i64> = places.iter().flat_map(|place| first(place)..first(place) + nodes as i64).collect();
    Ok(logits.f_index_select(0, &device::send(&Tensor::from_slice(&index), logits.device()))?)
}

/// Logits of a pass that was asked for them, `[R, V]`.
fn logits(output: &ForwardOutput) -> Result<&Tensor> {
    let missing = || Error::Failed("the target returned no logits although they were asked for".to_owned());
    output.logits.as_ref().ok_or_else(missing)
}

#[cfg(test)]
mod batches;
#[cfg(test)]
mod budgets;
#[cfg(test)]
mod seeded;
#[cfg(test)]
mod tests;
