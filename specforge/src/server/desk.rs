//! The one who decodes: takes answers to be made in the order in which they came, lets as many run together as there are
//! rows and as their cache may take, and hands every token on. Everything of libtorch happens here, on one thread.
//!
//! Between two rounds answers join and leave. Whoever waits longest is next, also where somebody behind would fit before:
//! otherwise a long request could wait for ever.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::answer::{Answer, chances};
use super::board::Board;
use super::job::{End, Event, Job, Piece, What};
use super::memory::{Cost, TREE};
use super::refusal::Refusal;
use crate::data::ChatTokenizer;
use crate::decode::event::{Committed, Listener, Round, Source, Started};
use crate::decode::{Engine, Finish, Left, Request};
use crate::error::{Error, Result};
use crate::progress;

/// An answer that is being decoded.
struct Seat<'a> {
    choice: usize,
    answer: Answer<'a>,
    logprobs: Option<usize>,
    arrived: Instant,
    /// Tokens that its row may come to hold.
    tokens: usize,
    events: UnboundedSender<Event>,
    /// Why it cannot go on.
    fault: Option<Error>,
}

impl Seat<'_> {
    fn send(&self, what: What) {
        // Whoever has gone is noticed before the next round.
        let _ = self.events.send(Event { choice: self.choice, what });
    }

    fn send_piece(&self, piece: Piece) {
        if !piece.is_empty() {
            self.send(What::Piece(piece));
        }
    }
}

/// The answers that are being decoded, by their tags.
struct Seats<'a> {
    by_tag: HashMap<u64, Seat<'a>>,
    tokenizer: &'a ChatTokenizer,
    stop_tokens: Vec<u32>,
    board: &'a Board,
    /// Nodes of the largest tree so far.
    largest_tree: usize,
}

impl Seats<'_> {
    /// Takes one token of an answer.
    fn take(&mut self, event: &Committed<'_>) -> Result<()> {
        let Some(seat) = self.by_tag.get_mut(&event.tag) else { return Ok(()) };
        if seat.answer.is_stopped() {
            return Ok(());
        }
        seat.answer.counts.accepted += u64::from(event.source == Source::Accepted);
        if self.stop_tokens.contains(&event.token) {
            seat.answer.push_end();
            return Ok(());
        }
        let chances = match (seat.logprobs, event.row) {
            (Some(count), Some(row)) => Some(chances(self.tokenizer, row, event.token, count)?),
            _ => None,
        };
        let piece = seat.answer.push(event.token, chances)?;
        seat.send_piece(piece);
        Ok(())
    }
}

impl Listener for Seats<'_> {
    fn wants_rows(&self) -> bool {
        self.by_tag.values().any(|seat| seat.logprobs.is_some())
    }

    fn started(&mut self, event: &Started<'_>) -> Result<()> {
        if let Some(seat) = self.by_tag.get_mut(&event.tag) {
            seat.answer.counts.known = event.known as u64;
        }
        Ok(())
    }

    fn round(&mut self, round: &Round<'_>) -> Result<()> {
        self.largest_tree = self.largest_tree.max(round.tree.len());
        let mut numbers = self.board.numbers();
        numbers.tried_down_to(round.tree.topology().depth());
        numbers.counts.drafted += (round.tree.len() - 1) as u64;
        drop(numbers);
        if let Some(seat) = self.by_tag.get_mut(&round.tag) {
            seat.answer.counts.rounds += 1;
            seat.answer.counts.drafted += (round.tree.len() - 1) as u64;
        }
        Ok(())
    }

    fn committed(&mut self, event: &Committed<'_>) -> Result<()> {
        match event.source {
            Source::Accepted => {
                let mut numbers = self.board.numbers();
                numbers.accepted_at(event.depth + 1);
                numbers.counts.accepted += 1;
            }
            Source::Prefill => {
                if let Some(seat) = self.by_tag.get(&event.tag) {
                    self.board.numbers().first_token_after(seat.arrived.elapsed());
                }
            }
            Source::Correction | Source::Bonus => {}
        }
        // What goes wrong with one answer is no business of the others.
        if let Err(error) = self.take(event)
            && let Some(seat) = self.by_tag.get_mut(&event.tag)
        {
            seat.fault.get_or_insert(error);
        }
        Ok(())
    }
}

/// What a desk is told.
pub struct Rules {
    /// Answers that are decoded together.
    pub rows: usize,
    /// What the target's cache takes.
    pub cost: Cost,
    /// The seed that the engine adds to every answer's own.
    pub engine_seed: u64,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

/// Decodes until nobody can send a job any more and all are done.
pub struct Desk<'a> {
    engine: Engine<'a>,
    jobs: Receiver<Job>,
    rules: Rules,
    waiting: VecDeque<Job>,
    seats: Seats<'a>,
    next_tag: u64,
}

impl<'a> Desk<'a> {
    /// A desk with nothing to do yet.
    pub fn new(
        engine: Engine<'a>,
        tokenizer: &'a ChatTokenizer,
        jobs: Receiver<Job>,
        board: &'a Board,
        rules: Rules,
    ) -> Self {
        let stop_tokens = rules.stop_tokens.clone();
        let seats = Seats { by_tag: HashMap::new(), tokenizer, stop_tokens, board, largest_tree: TREE };
        Self { engine, jobs, rules, waiting: VecDeque::new(), seats, next_tag: 0 }
    }

    /// Works to the end.
    pub fn run(mut self) -> Result<()> {
        while self.receive() {
            self.let_go();
            self.admit();
            if self.engine.pending() > 0 {
                let ended = self.engine.step(&mut self.seats)?;
                // Whoever has a whole answer finds it in the numbers.
                self.publish();
                ended.into_iter().for_each(|left| self.leave(left));
                self.end_early();
            }
            self.publish();
        }
        Ok(())
    }

    /// Takes what has come; waits where there is nothing else to do. Whether there may be more to do.
    fn receive(&mut self) -> bool {
        if self.waiting.is_empty() && self.seats.by_tag.is_empty() {
            match self.jobs.recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(_) => return false,
            }
        }
        loop {
            match self.jobs.try_recv() {
                Ok(job) => self.waiting.push_back(job),
                // What was taken is finished first.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    /// Forgets answers that nobody waits for any more, and all of them where the time is over.
    fn let_go(&mut self) {
        let (board, is_cut) = (self.seats.board, self.seats.board.is_cut());
        let waited = self.waiting.len();
        self.waiting.retain(|job| {
            if is_cut {
                let _ = job.events.send(Event { choice: job.choice, what: What::Failed(Refusal::ending()) });
            }
            !is_cut && !job.events.is_closed()
        });
        board.give_places(waited - self.waiting.len());
        let gone = |seat: &Seat<'_>| is_cut || seat.events.is_closed();
        let tags: Vec<u64> = self.seats.by_tag.iter().filter(|(_, seat)| gone(seat)).map(|(&tag, _)| tag).collect();
        for tag in &tags {
            self.engine.cancel(*tag);
            if let Some(seat) = self.seats.by_tag.remove(tag).filter(|_| is_cut) {
                seat.send(What::Failed(Refusal::ending()));
            }
        }
        board.numbers().cancelled += (waited - self.waiting.len() + tags.len()) as u64;
    }

    /// Lets those who wait begin, the first first, as long as there is room.
    fn admit(&mut self) {
        while self.seats.by_tag.len() < self.rules.rows {
            let Some(job) = self.waiting.pop_front() else { return };
            let tokens = job.prompt.len() + job.max_tokens + self.seats.largest_tree;
            if !self.has_room_for(tokens) {
                self.waiting.push_front(job);
                return;
            }
            self.seats.board.give_places(1);
            let tag = self.next_tag;
            self.next_tag += 1;
            let Job { choice, prompt, max_tokens, processors, seed, stop, logprobs, arrived, events } = job;
            let answer = Answer::new(self.seats.tokenizer, stop);
            let seat = Seat { choice, answer, logprobs, arrived, tokens, events, fault: None };
            // The engine adds its own seed to a request's key.
            let key = seed.wrapping_sub(self.rules.engine_seed);
            let request = Request { tag, prompt, max_new_tokens: max_tokens, key };
            match self.engine.submit_with(request, processors) {
                Ok(()) => drop(self.seats.by_tag.insert(tag, seat)),
                Err(error) => self.fail(&seat, &error),
            }
        }
    }

    /// Whether one more row of so many tokens keeps the cache within its limit.
    fn has_room_for(&mut self, tokens: usize) -> bool {
        let Rules { cost, .. } = &self.rules;
        let limit = self.seats.board.cache_limit();
        let rows = self.seats.by_tag.len() + 1;
        // What no cache has room for was refused before it came here; trees may turn out larger than was thought then.
        if rows == 1 {
            return true;
        }
        let longest = self.seats.by_tag.values().map(|seat| seat.tokens).max().unwrap_or(0).max(tokens);
        let (capacity, room) =
            self.engine.cache().map_or((0, 0), |cache| (cache.capacity() as usize, cache.room() as usize));
        if cost.bytes(rows.max(room), longest, capacity) <= limit {
            return true;
        }
        // The room of long answers that have left may be in the way.
        let fits = cost.bytes(rows, longest, 0) <= limit;
        if fits {
            self.engine.shrink_cache();
        }
        fits
    }

    /// An answer has come to its end.
    fn leave(&mut self, left: Left) {
        let Some(mut seat) = self.seats.by_tag.remove(&left.tag) else { return };
        let decoded = match (left.decoded, seat.fault.take()) {
            (Ok(decoded), None) => decoded,
            (Err(error), _) | (_, Some(error)) => return self.fail(&seat, &error),
        };
        match seat.answer.finish() {
            Ok(piece) => seat.send_piece(piece),
            Err(error) => return self.fail(&seat, &error),
        }
        let by_token = decoded.finish == Finish::Stop && !seat.answer.is_stopped();
        let token = if by_token { decoded.tokens.last().copied() } else { None };
        let reason = if by_token || seat.answer.is_stopped() { "stop" } else { "length" };
        self.end(&seat, End { reason, token, counts: seat.answer.counts });
    }

    /// Answers that are over before the engine knows it.
    fn end_early(&mut self) {
        let over = |seat: &Seat<'_>| seat.answer.is_stopped() || seat.fault.is_some();
        let tags: Vec<u64> = self.seats.by_tag.iter().filter(|(_, seat)| over(seat)).map(|(&tag, _)| tag).collect();
        for tag in tags {
            self.engine.cancel(tag);
            let Some(mut seat) = self.seats.by_tag.remove(&tag) else { continue };
            match seat.fault.take() {
                Some(error) => self.fail(&seat, &error),
                None => self.end(&seat, End { reason: "stop", token: None, counts: seat.answer.counts }),
            }
        }
    }

    fn end(&self, seat: &Seat<'_>, end: End) {
        let mut numbers = self.seats.board.numbers();
        match end.reason {
            "stop" => numbers.stopped += 1,
            _ => numbers.cut += 1,
        }
        drop(numbers);
        seat.send(What::End(end));
    }

    fn fail(&self, seat: &Seat<'_>, error: &Error) {
        self.seats.board.numbers().failed += 1;
        // Which model is served is known; where its files lie is not for a log that others may read.
        let folder = self.seats.tokenizer.folder().display().to_string();
        progress::say(&format!("an answer failed: {}", error.to_string().replace(&folder, "the target")));
        seat.send(What::Failed(Refusal::failed()));
    }

    /// Writes down how things stand.
    fn publish(&self) {
        let done = self.engine.throughput();
        let cache = self.engine.cache();
        let mut numbers = self.seats.board.numbers();
        numbers.running = self.seats.by_tag.len();
        (numbers.prompt_tokens, numbers.counts.known) = (done.prompt_tokens, done.known_tokens);
        numbers.prefix_bytes = self.engine.prefix_bytes();
        (numbers.counts.tokens, numbers.counts.rounds) = (done.new_tokens, done.rounds);
        (numbers.passes, numbers.busy) = (done.passes, done.prefill_time + done.decode_time);
        numbers.cache_bytes = cache.map_or(0, crate::nn::KvCache::bytes);
        numbers.cache_tokens = cache.map_or(0, |cache| cache.lengths().iter().sum::<i64>() as u64);
    }
}
