//! How requests come in: their prompts are run in groups, their first tokens chosen, and their rows added to the batch.

use tch::Tensor;

use super::prefixes::Given;
use super::request::Left;
use super::rows::{Row, Waiting};
use super::target_rows::TargetRows;
use super::{Engine, logits};
use crate::decode::drafter::{Joining, last};
use crate::decode::event::{Committed, Listener, Source, Started};
use crate::decode::policy::Proposal;
use crate::device;
use crate::error::Result;
use crate::models::{ForwardOutput, LogitRows};
use crate::nn::{AttentionMask, KvCache};

impl Engine<'_> {
    /// Prefills waiting requests until every place is taken; a request may end with its first token. Whether there were
    /// any.
    pub(super) fn admit(&mut self, listener: &mut dyn Listener, left: &mut Vec<Left>) -> Result<bool> {
        let waited = self.queue.len();
        let most = self.options.max_rows.max(1);
        while self.rows.len() < most && !self.queue.is_empty() {
            let free = (most - self.rows.len()).min(self.queue.len());
            let mut requests: Vec<Waiting> = self.queue.drain(..free).collect();
            requests.sort_by_key(Waiting::prompt_length);
            while !requests.is_empty() {
                // What is there of a prompt is not run again; each of these goes alone.
                if let Some(known) = requests.iter().position(|waiting| self.shared(waiting) > 0) {
                    let request = requests.remove(known);
                    self.prefill(vec![request], requests.len(), listener, left)?;
                    continue;
                }
                let group = self.passes.group(requests.iter().map(Waiting::prompt_length));
                let rest = requests.split_off(group);
                self.prefill(requests, rest.len(), listener, left)?;
                requests = rest;
            }
        }
        Ok(self.queue.len() < waited)
    }

    /// Runs a group of prompts and chooses their first tokens. `coming` requests join behind it.
    fn prefill(
        &mut self,
        requests: Vec<Waiting>,
        coming: usize,
        listener: &mut dyn Listener,
        left: &mut Vec<Left>,
    ) -> Result<()> {
        let context = self.target.info().max_position_embeddings as usize;
        let mut rows: Vec<Row> = requests.into_iter().map(|request| Row::new(request, context)).collect();
        let longest = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let empty = self.target.new_cache(rows.len() as i64, longest as i64);
        let Given { mut cache, features } = self.known(&rows, empty);
        let known = cache.len() as usize;
        let output = self.run_prompts(&rows, (known, features), &mut cache)?;
        #[cfg(test)]
        self.seeded_prefill(&rows, &mut cache)?;
        let choices = self.choices(&output, 1, (&rows, None))?;
        self.done.prompt_tokens += rows.iter().map(|row| (row.tokens.len() - known) as u64).sum::<u64>();
        self.done.known_tokens += known as u64;
        let mut joining = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter_mut().enumerate() {
            listener.started(&Started { tag: row.tag, key: row.key, prompt: &row.tokens, known, limit: row.limit })?;
            let chosen = choices[index].as_deref();
            let mut target = TargetRows::new(logits(&output)?, index, &row.tokens, chosen, &row.processors);
            // The first token is the target's own under every policy: there is no guess yet.
            let token = match self.verdict(&Proposal::nothing(last(&row.tokens)), row, &mut target) {
                Ok(verdict) => verdict.tokens[0],
                Err(error) => {
                    listener.ended(row.tag, None)?;
                    left.push(Left { tag: row.tag, decoded: Err(error) });
                    continue;
                }
            };
            let (position, slot) = (row.tokens.len(), row.tokens.len() - 1);
            let raw = listener.wants_rows().then(|| target.raw(0));
            listener.committed(&Committed {
                tag: row.tag,
                position,
                token,
                source: Source::Prefill,
                round: 0,
                slot,
                parent_slot: slot.saturating_sub(1),
                depth: 0,
                cache_length: 0,
                row: raw.as_ref(),
            })?;
            row.tokens.push(token);
            self.done.new_tokens += 1;
            match row.ended(&self.options.stop_tokens) {
                Some(finish) => {
                    listener.ended(row.tag, Some(finish))?;
                    left.push(row.finish(finish));
                }
                None => joining.push(index),
            }
        }
        let joined = super::rows::select(rows, &joining);
        self.join(joined, &joining, (cache, &output.hidden), coming)
    }

    /// How many of a prompt's tokens need not be run.
    fn shared(&self, waiting: &Waiting) -> usize {
        self.prefixes.as_ref().map_or(0, |prefixes| prefixes.shared(&waiting.request.prompt))
    }

    /// What is there of a prompt that goes alone; of others nothing.
    fn known(&mut self, rows: &[Row], empty: KvCache) -> Given {
        match (rows, &mut self.prefixes) {
            ([row], Some(prefixes)) => prefixes.give(&row.tokens, empty),
            _ => Given { cache: empty, features: Vec::new() },
        }
    }

    /// The target over prompts, padded to one length, in as many passes as they take, but for the `known` first tokens, which
    /// the cache holds. Logits are those behind each prompt, `[B, V]`, captured states those of all their tokens, `[B, T, H]`
    /// each.
    fn run_prompts(
        &self,
        rows: &[Row],
        (known, features): (usize, Vec<Tensor>),
        cache: &mut KvCache,
    ) -> Result<ForwardOutput> {
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut output = ForwardOutput { hidden: Vec::new(), logits: None };
        let mut pieces = Vec::new();
        if known > 0 {
            pieces.push(features.iter().map(|layer| layer.unsqueeze(0)).collect::<Vec<_>>());
        }
        for piece in self.passes.pieces(longest - known) {
            let piece = known + piece.start..known + piece.end;
            let (width, is_last) = (piece.len(), piece.end == longest);
            let (mut ids, mut positions) = (Vec::new(), Vec::new());
            for row in rows {
                // Padding is on the right: causal order hides it, and the cache does not keep it.
                ids.extend(piece.clone().map(|place| row.tokens.get(place).map_or(0, |&id| i64::from(id))));
                positions.extend(piece.clone().map(|place| place as i64));
            }
            let end = |(row, &length): (usize, &usize)| (row * width + length - piece.start - 1) as i64;
            let ends = match is_last {
                true => Some(device::upload(
                    &lengths.iter().enumerate().map(end).collect::<Vec<_>>(),
                    self.target.device(),
                )?), // [B]
                false => None,
            };
            let wanted = ends.as_ref().map_or(LogitRows::None, LogitRows::Rows);
            output = self.forward((&ids, &positions), (rows.len(), width), &AttentionMask::Causal, wanted, cache)?;
            let own = |&length: &usize| length.clamp(piece.start, piece.end) - piece.start;
            cache.advance(&lengths.iter().map(|length| own(length) as i64).collect::<Vec<_>>());
            pieces.push(std::mem::take(&mut output.hidden));
        }
        output.hidden = match pieces.len() {
            1 => pieces.remove(0),
            _ => {
                let layers = 0..pieces.first().map_or(0, Vec::len);
                let whole = |layer: usize| {
                    Tensor::cat(&pieces.iter().map(|piece| &piece[layer]).collect::<Vec<_>>(), 1) // [B, T, H]
                };
                layers.map(whole).collect()
            }
        };
        Ok(output)
    }

    /// Adds prefilled rows behind those that run. `places` are their rows of the cache and of the captured states.
    fn join(
        &mut self,
        mut joined: Vec<Row>,
        places: &[usize],
        (mut cache, hidden): (KvCache, &[Tensor]),
        coming: usize,
    ) -> Result<()> {
        if joined.is_empty() {
            return Ok(());
        }
        if (joined.len() as i64) < cache.rows() {
            cache.select_rows(&places.iter().map(|&row| row as i64).collect::<Vec<_>>());
        }
        let news: Vec<Joining<'_>> = joined
            .iter()
            .zip(places)
            .map(|(row, &place)| {
                let prompt = |layer: &Tensor| layer.get(place as i64).narrow(0, 0, row.prompt_length as i64); // [P, H]
                Joining { tokens: &row.tokens, features: hidden.iter().map(prompt).collect() }
            })
            .collect();
        self.drafter.join(&news)?;
        let features: Vec<Vec<Tensor>> = news.into_iter().map(|new| new.features).collect();
        // Room for all who are known to come, so that they do not move those that run.
        let known = self.rows.len() + joined.len() + coming + self.queue.len();
        let room = known.min(self.options.max_rows.max(1)) as i64;
        match &mut self.cache {
            Some(batch) => {
                batch.reserve_rows(room);
                batch.append_rows(cache);
            }
            none => none.insert(cache).reserve_rows(room),
        }
        if self.prefixes.is_some() {
            joined.iter_mut().zip(features).for_each(|(row, features)| row.features.push(features));
        }
        self.rows.extend(joined);
        Ok(())
    }
}
