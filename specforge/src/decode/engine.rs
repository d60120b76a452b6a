//! Draft and verify: the loop that every draft and every tree goes through, plain decoding included.
//!
//! Of `n` committed tokens the target's cache holds the first `n - 1`; the last one is the root of the next tree. A
//! round is: the drafter proposes a tree for every row, the target runs over all trees at once, a pure walk over its
//! rows (`policy`) decides what is committed, and both caches keep the walk's path and forget the rest.
//!
//! Up to `max_rows` requests run together, of any lengths and acceptances; one that ends makes room for the next.
//!
//! Shape legend: see `nn`; `T` is the number of nodes of the largest tree of a round.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::Serialize;
use tch::Tensor;

use super::autoregressive::{self, Finish, Request};
use super::drafter::{Context, Drafter, Joining, Progress, last};
use super::event::{Committed, Listener, Round, Source, Started};
use super::policy::{self, Limits, Policy, Proposal, Verdict};
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, ForwardOutput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, KvCache, Processors};
use crate::tree::TokenTree;
use target_rows::{TargetRows, greedy_choices};

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

/// One verification of one request, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RoundOutcome {
    /// Guesses verified.
    pub guesses: usize,
    /// Depth of the tree.
    pub depth: usize,
    /// Tokens committed.
    pub tokens: usize,
    /// Guesses among them.
    pub accepted: usize,
}

/// A request that has been decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The request's tag.
    pub tag: u64,
    /// New tokens, the stop token included; nothing behind it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Its verifications. The first token comes from the prefill and belongs to none.
    pub rounds: Vec<RoundOutcome>,
}

/// A request that has left the engine, or why it could not be decoded.
#[derive(Debug)]
pub struct Left {
    /// The request's tag.
    pub tag: u64,
    /// What became of it.
    pub decoded: Result<Decoded>,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Clock {
    /// Prompts, the draft's part included.
    pub prefill: Duration,
    /// Drafting.
    pub draft: Duration,
    /// The target's passes over trees.
    pub verify: Duration,
    /// Everything else while decoding.
    pub overhead: Duration,
}

impl Clock {
    /// Time behind the prompts.
    pub fn decode(&self) -> Duration {
        self.draft + self.verify + self.overhead
    }
}

/// A running request.
struct Row {
    tag: u64,
    key: u64,
    /// Everything committed, the prompt first.
    tokens: Vec<u32>,
    prompt_length: usize,
    /// New tokens this request may have, the context's end considered.
    limit: usize,
    rounds: Vec<RoundOutcome>,
}

impl Row {
    fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_length
    }

    fn left(&self) -> usize {
        self.limit - self.new_tokens()
    }

    fn finish(self, finish: Finish) -> Left {
        let tokens = self.tokens[self.prompt_length..].to_vec();
        Left { tag: self.tag, decoded: Ok(Decoded { tag: self.tag, tokens, finish, rounds: self.rounds }) }
    }
}

/// Decodes requests on one target with one drafter.
pub struct Engine<'a> {
    target: &'a dyn TargetModel,
    drafter: Box<dyn Drafter + 'a>,
    options: EngineOptions,
    queue: VecDeque<Request>,
    /// Row `i` is row `i` of both caches.
    rows: Vec<Row>,
    cache: Option<KvCache>,
    clock: Clock,
}

impl<'a> Engine<'a> {
    /// An engine without requests.
    pub fn new(target: &'a dyn TargetModel, drafter: Box<dyn Drafter + 'a>, options: EngineOptions) -> Result<Self> {
        options.processors.check().map_err(Error::Usage)?;
        let (queue, rows, cache, clock) = (VecDeque::new(), Vec::new(), None, Clock::default());
        Ok(Self { target, drafter, options, queue, rows, cache, clock })
    }

    /// Puts a request behind all others.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        autoregressive::check(self.target, &request)?;
        self.queue.push_back(request);
        Ok(())
    }

    /// Number of requests that wait or run.
    pub fn pending(&self) -> usize {
        self.queue.len() + self.rows.len()
    }

    /// Where the time went so far.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The target's cache, row `i` that of the `i`-th running request.
    pub fn cache(&self) -> Option<&KvCache> {
        self.cache.as_ref()
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
        order.extend(self.queue.iter().map(|request| request.tag));
        let mut left = Vec::new();
        while self.pending() > 0 {
            left.extend(self.step(listener)?);
        }
        left.sort_by_key(|left: &Left| order.iter().position(|&tag| tag == left.tag));
        Ok(left)
    }

    /// Fills free places from the queue, runs one round, and gives back what has ended.
    pub fn step(&mut self, listener: &mut dyn Listener) -> Result<Vec<Left>> {
        let _guard = tch::no_grad_guard();
        let mut left = Vec::new();
        let start = Instant::now();
        if self.admit(listener, &mut left)? {
            self.clock.prefill += self.done() - start;
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

    /// The time, once the device has done what it was told. It is asked at the ends of what the models do, and nowhere
    /// else: each time costs a GPU the work that could have been waiting for it.
    fn done(&self) -> Instant {
        device::synchronize(self.target.device());
        Instant::now()
    }

    /// Prefills waiting requests until every place is taken. Whether there were any.
    fn admit(&mut self, listener: &mut dyn Listener, left: &mut Vec<Left>) -> Result<bool> {
        let waited = self.queue.len();
        while self.rows.len() < self.options.max_rows.max(1) && !self.queue.is_empty() {
            let free = (self.options.max_rows.max(1) - self.rows.len()).min(self.queue.len());
            let mut requests: Vec<Request> = self.queue.drain(..free).collect();
            requests.sort_by_key(|request| request.prompt.len());
            while !requests.is_empty() {
                let rest = requests.split_off(autoregressive::group_size(&requests));
                self.prefill(requests, listener, left)?;
                requests = rest;
            }
        }
        Ok(self.queue.len() < waited)
    }

    /// Runs a group of prompts and chooses their first tokens.
    fn prefill(&mut self, requests: Vec<Request>, listener: &mut dyn Listener, left: &mut Vec<Left>) -> Result<()> {
        let lengths: Vec<usize> = requests.iter().map(|request| request.prompt.len()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let count = requests.len();
        // Padding is on the right: causal order hides it, and the cache does not keep it.
        let mut ids = vec![0i64; count * longest];
        for (line, request) in ids.chunks_exact_mut(longest).zip(&requests) {
            line.iter_mut().zip(&request.prompt).for_each(|(slot, &id)| *slot = i64::from(id));
        }
        let positions: Vec<i64> = (0..count).flat_map(|_| 0..longest as i64).collect();
        let ends: Vec<i64> =
            lengths.iter().enumerate().map(|(row, length)| (row * longest + length - 1) as i64).collect();
        let ends = device::upload(&ends, self.target.device())?; // [B]
        let mut cache = self.target.new_cache(count as i64, longest as i64);
        let logits = LogitRows::Rows(&ends);
        let output = self.forward((&ids, &positions), (count, longest), &AttentionMask::Causal, logits, &mut cache)?;
        cache.advance(&lengths.iter().map(|&length| length as i64).collect::<Vec<_>>());
        #[cfg(test)]
        self.seeded_prefill(&requests, &mut cache)?;

        let context = self.target.dimensions().max_position_embeddings as usize;
        let begin = |Request { tag, prompt, max_new_tokens, key }| {
            let (prompt_length, limit) = (prompt.len(), max_new_tokens.min(context - prompt.len()));
            Row { tag, key, tokens: prompt, prompt_length, limit, rounds: Vec::new() }
        };
        let mut joining: Vec<(usize, Row)> = Vec::new();
        for (index, mut row) in requests.into_iter().map(begin).enumerate() {
            listener.started(&Started { tag: row.tag, key: row.key, prompt: &row.tokens, limit: row.limit })?;
            let mut rows = TargetRows::new(&output, index, 1, &row.tokens, None, &self.options.processors)?;
            // The first token is the target's own under every policy: there is no guess yet.
            let proposal = Proposal::nothing(last(&row.tokens));
            let verdict = match self.verdict(&proposal, &row, &mut rows) {
                Ok(verdict) => verdict,
                Err(error) => {
                    listener.ended(row.tag, None)?;
                    left.push(Left { tag: row.tag, decoded: Err(error) });
                    continue;
                }
            };
            let (position, slot) = (row.tokens.len(), row.tokens.len() - 1);
            let raw = listener.wants_rows().then(|| rows.raw(0));
            listener.committed(&Committed {
                tag: row.tag,
                position,
                token: verdict.tokens[0],
                source: Source::Prefill,
                round: 0,
                slot,
                parent_slot: slot.saturating_sub(1),
                depth: 0,
                cache_length: 0,
                row: raw.as_ref(),
            })?;
            row.tokens.push(verdict.tokens[0]);
            match self.ended(&row) {
                Some(finish) => {
                    listener.ended(row.tag, Some(finish))?;
                    left.push(row.finish(finish));
                }
                None => joining.push((index, row)),
            }
        }
        self.join(joining, cache, &output.hidden)
    }

    /// Adds prefilled rows, each with its row of `cache` and of the features, behind those that run.
    fn join(&mut self, joining: Vec<(usize, Row)>, mut cache: KvCache, hidden: &[Tensor]) -> Result<()> {
        if joining.is_empty() {
            return Ok(());
        }
        if (joining.len() as i64) < cache.rows() {
            cache.select_rows(&joining.iter().map(|(index, _)| *index as i64).collect::<Vec<_>>());
        }
        let news: Vec<Joining<'_>> = joining
            .iter()
            .map(|(index, row)| {
                let prompt = |layer: &Tensor| layer.select(0, *index as i64).narrow(0, 0, row.prompt_length as i64); // [P, H]
                Joining { tokens: &row.tokens, features: hidden.iter().map(prompt).collect() }
            })
            .collect();
        self.drafter.join(&news)?;
        match &mut self.cache {
            Some(batch) => batch.append_rows(cache),
            none => *none = Some(cache),
        }
        self.rows.extend(joining.into_iter().map(|(_, row)| row));
        Ok(())
    }

    /// One round of every row. Returns the time of drafting and of the target's pass.
    fn round(&mut self, listener: &mut dyn Listener, left: &mut Vec<Left>) -> Result<(Duration, Duration)> {
        // 1. Guess.
        let start = Instant::now();
        let proposals = self.propose()?;
        let mut draft = self.done() - start;
        let lengths = self.cache_lengths();
        for (index, row) in self.rows.iter().enumerate() {
            let draft_cache = self.drafter.cache_lengths().get(index).copied().unwrap_or(0);
            listener.round(&Round {
                tag: row.tag,
                round: row.rounds.len() as u64 + 1,
                committed: row.tokens.len(),
                target_cache: lengths[index],
                draft_cache,
                tree: &proposals[index].tree,
                scores: &proposals[index].scores,
            })?;
        }
        // 2. One pass of the target over all trees.
        let start = Instant::now();
        let nodes = proposals.iter().map(|proposal| proposal.tree.len()).max().unwrap_or(1);
        let output = self.run_trees(&proposals, nodes)?;
        let verify = self.done() - start;
        // 3. Decide, and tell.
        let greedy = greedy_choices(&self.options.processors, &output)?;
        let verdicts = self.decide(&proposals, nodes, &output, greedy.as_deref(), listener)?;
        // 4. Keep the paths, forget the rest.
        let mut survivors = Vec::new();
        let mut features: Vec<Vec<i64>> = Vec::new();
        let mut places: Vec<Vec<i64>> = Vec::new();
        for (index, verdict) in verdicts.iter().enumerate() {
            let path = verdict.as_ref().map(|verdict| verdict.path.as_slice()).unwrap_or(&[0]);
            places.push(path.iter().map(|&node| node as i64).collect());
            features.push(path.iter().map(|&node| (index * nodes + node) as i64).collect());
        }
        #[cfg(test)]
        seeded::places(&mut places, &proposals);
        if let Some(cache) = &mut self.cache {
            cache.keep(&places);
        }
        #[cfg(test)]
        self.seeded_keep(&places, &verdicts)?;
        let rows = std::mem::take(&mut self.rows);
        let mut kept = Vec::new();
        for (index, (mut row, verdict)) in rows.into_iter().zip(verdicts).enumerate() {
            let verdict = match verdict {
                Ok(verdict) => verdict,
                Err(error) => {
                    listener.ended(row.tag, None)?;
                    left.push(Left { tag: row.tag, decoded: Err(error) });
                    continue;
                }
            };
            row.tokens.extend(&verdict.tokens);
            row.rounds.push(outcome(&proposals[index].tree, &verdict));
            match self.ended(&row) {
                Some(finish) => {
                    listener.ended(row.tag, Some(finish))?;
                    left.push(row.finish(finish));
                }
                None => {
                    survivors.push((index, verdict.tokens.len()));
                    kept.push(row);
                }
            }
        }
        self.rows = kept;
        // 5. The draft hears of what goes on.
        let indices: Vec<usize> = survivors.iter().map(|(index, _)| *index).collect();
        if indices.len() < proposals.len() {
            self.drafter.retain(&indices);
            match &mut self.cache {
                Some(cache) if !indices.is_empty() => {
                    cache.select_rows(&indices.iter().map(|&index| index as i64).collect::<Vec<_>>());
                }
                cache => *cache = None,
            }
        }
        if !survivors.is_empty() {
            let start = Instant::now();
            let progress: Vec<Progress<'_>> = survivors
                .iter()
                .zip(&self.rows)
                .map(|(&(index, new), row)| {
                    let path = device::send(&Tensor::from_slice(&features[index]), self.target.device());
                    let path = |layer: &Tensor| layer.flatten(0, 1).index_select(0, &path); // [new, H]
                    Progress { tokens: &row.tokens, new, features: output.hidden.iter().map(path).collect() }
                })
                .collect();
            self.drafter.commit(&progress)?;
            draft += self.done() - start;
        }
        Ok((draft, verify))
    }

    fn propose(&mut self) -> Result<Vec<Proposal>> {
        let contexts: Vec<Context<'_>> =
            self.rows.iter().map(|row| Context { tokens: &row.tokens, depth: row.left() - 1, key: row.key }).collect();
        let proposals = self.drafter.propose(&contexts)?;
        if proposals.len() != contexts.len() {
            let (got, want) = (proposals.len(), contexts.len());
            return Err(Error::Failed(format!("the draft made {got} proposals for {want} rows")));
        }
        let fitted: Vec<Proposal> =
            proposals.into_iter().zip(&contexts).map(|(proposal, context)| proposal.cut(context.depth)).collect();
        let vocabulary = self.target.dimensions().vocab_size;
        for (proposal, context) in fitted.iter().zip(&contexts) {
            let tokens = proposal.tree.tokens();
            if tokens[0] != last(context.tokens) {
                return Err(Error::Failed("a draft tree does not begin with the last committed token".to_owned()));
            }
            if let Some(token) = tokens.iter().find(|&&token| i64::from(token) >= vocabulary) {
                let problem = format!("the draft guessed token {token}; the target's vocabulary has {vocabulary}");
                return Err(Error::Failed(problem));
            }
        }
        Ok(fitted)
    }

    /// The target over the trees of all rows, padded to `nodes` each. Logits are `[B * T, V]`.
    fn run_trees(&mut self, proposals: &[Proposal], nodes: usize) -> Result<ForwardOutput> {
        let lengths = self.cache_lengths();
        let count = proposals.len();
        #[cfg(test)]
        let lengths = seeded::lengths(lengths);
        let mut ids = vec![0i64; count * nodes];
        let mut positions = vec![0i64; count * nodes];
        for (row, (proposal, &length)) in proposals.iter().zip(&lengths).enumerate() {
            let tree = &proposal.tree;
            for (node, (&token, &depth)) in tree.tokens().iter().zip(tree.topology().depths()).enumerate() {
                ids[row * nodes + node] = i64::from(token);
                positions[row * nodes + node] = length + depth as i64;
            }
        }
        #[cfg(test)]
        seeded::positions(&mut positions, nodes, &lengths);
        // A root alone is an ordinary next token.
        let mask = match nodes {
            1 => AttentionMask::Causal,
            _ => {
                let trees: Vec<&TokenTree> = proposals.iter().map(|proposal| &proposal.tree).collect();
                AttentionMask::Visible(device::send(&visible(&trees, nodes, &lengths), self.target.device()))
            }
        };
        #[cfg(test)]
        let mask = seeded::mask(mask, proposals, nodes, &lengths);
        let mut cache =
            self.cache.take().ok_or_else(|| Error::Failed("there is no cache to decode with".to_owned()))?;
        let output = self.forward((&ids, &positions), (count, nodes), &mask, LogitRows::All, &mut cache);
        self.cache = Some(cache);
        output
    }

    fn forward(
        &self,
        (ids, positions): (&[i64], &[i64]),
        (rows, tokens): (usize, usize),
        mask: &AttentionMask,
        logits: LogitRows<'_>,
        cache: &mut KvCache,
    ) -> Result<ForwardOutput> {
        let device = self.target.device();
        let shaped =
            |values: &[i64]| device::send(&Tensor::from_slice(values).view([rows as i64, tokens as i64]), device); // [B, T]
        let (ids, positions) = (shaped(ids), shaped(positions));
        let capture = self.drafter.capture();
        let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &capture, logits };
        self.target.forward(&input, Some(cache))
    }

    /// What is committed to each row, or why it cannot go on.
    fn decide(
        &self,
        proposals: &[Proposal],
        nodes: usize,
        output: &ForwardOutput,
        greedy: Option<&[i64]>,
        listener: &mut dyn Listener,
    ) -> Result<Vec<Result<Verdict>>> {
        let lengths = self.cache_lengths();
        let mut verdicts = Vec::with_capacity(proposals.len());
        for (index, (row, proposal)) in self.rows.iter().zip(proposals).enumerate() {
            let greedy = greedy.map(|choices| &choices[index * nodes..(index + 1) * nodes]);
            let mut rows =
                TargetRows::new(output, index * nodes, nodes, &row.tokens, greedy, &self.options.processors)?;
            rows.tree = Some(&proposal.tree);
            let verdict = self.verdict(proposal, row, &mut rows);
            if let Ok(verdict) = &verdict {
                let choices = verdict.path.iter().zip(&verdict.tokens).zip(&verdict.sources);
                for (offset, ((&node, &token), &source)) in choices.enumerate() {
                    let raw = listener.wants_rows().then(|| rows.raw(node));
                    #[cfg(test)]
                    let (raw, source) = seeded::told(raw, source, || rows.raw(offset));
                    #[cfg(test)]
                    if seeded::untold(offset) {
                        continue;
                    }
                    let topology = proposal.tree.topology();
                    listener.committed(&Committed {
                        tag: row.tag,
                        position: row.tokens.len() + offset,
                        token,
                        source,
                        round: row.rounds.len() as u64 + 1,
                        slot: node,
                        parent_slot: topology.parents()[node],
                        depth: topology.depths()[node],
                        cache_length: lengths[index],
                        row: raw.as_ref(),
                    })?;
                }
            }
            verdicts.push(verdict);
        }
        Ok(verdicts)
    }

    fn verdict(&self, proposal: &Proposal, row: &Row, rows: &mut TargetRows<'_>) -> Result<Verdict> {
        let EngineOptions { policy, processors, stop_tokens, .. } = &self.options;
        let limits = Limits { tokens: row.left(), stop: stop_tokens };
        #[cfg(test)]
        let limits = seeded::limits(limits);
        let verdict =
            policy::verify(*policy, processors.is_greedy(), proposal, (row.tokens.len(), row.key), limits, rows)?;
        #[cfg(test)]
        let verdict = seeded::verdict(verdict, &proposal.tree, limits, rows)?;
        Ok(verdict)
    }

    fn ended(&self, row: &Row) -> Option<Finish> {
        if row.new_tokens() > 0 && self.options.stop_tokens.contains(&last(&row.tokens)) {
            return Some(Finish::Stop);
        }
        (row.left() == 0).then_some(Finish::Length)
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.cache.as_ref().map_or_else(Vec::new, |cache| cache.lengths().to_vec())
    }
}

fn outcome(tree: &TokenTree, verdict: &Verdict) -> RoundOutcome {
    RoundOutcome {
        guesses: tree.len() - 1,
        depth: tree.topology().depth(),
        tokens: verdict.tokens.len(),
        accepted: verdict.sources.iter().filter(|source| **source == Source::Accepted).count(),
    }
}

/// What each node sees: its row's cache, its ancestors and itself. `[B, T, S + T]`, where `S` is the longest row's cache.
/// Padding sees itself, so that its softmax is defined.
pub(crate) fn visible(trees: &[&TokenTree], nodes: usize, lengths: &[i64]) -> Tensor {
    let slots = lengths.iter().copied().max().unwrap_or(0) as usize + nodes;
    let mut mask = vec![false; trees.len() * nodes * slots];
    for (row, (tree, &length)) in trees.iter().zip(lengths).enumerate() {
        let (length, own) = (length as usize, tree.len());
        let ancestors = tree.topology().visible();
        for node in 0..nodes {
            let line = &mut mask[(row * nodes + node) * slots..][..slots];
            if node < own {
                line[..length].fill(true);
                line[length..length + own].copy_from_slice(&ancestors[node * own..(node + 1) * own]);
            } else {
                line[length + node] = true;
            }
        }
    }
    Tensor::from_slice(&mask).view([trees.len() as i64, nodes as i64, slots as i64])
}

mod target_rows;

#[cfg(test)]
mod seeded;
#[cfg(test)]
mod tests;
