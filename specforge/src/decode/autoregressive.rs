//! Plain decoding, one token a row and pass, with continuous batching.
//!
//! Up to `max_rows` requests run together. A row that ends leaves at once and the next request takes its slots in the
//! cache, so the batch stays full until the queue is empty. New requests are prefilled in right-padded groups of about
//! one length. Sampling is keyed by the request and the absolute position, so what a request gets does not depend on
//! which others share its batch. One limit of that promise: kernels add in another order for another batch shape, so
//! two tokens whose logits differ by less than the rounding error (about 1e-5 in float32) may change places.
//!
//! Shape legend: see `nn`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Kind, Tensor};

pub use crate::data::Finish;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::sampling::Sampling;
use crate::nn::{AttentionMask, KvCache};

/// Tokens of one prefill pass, padding included. More gains nothing and costs memory.
const PREFILL_TOKENS: usize = 8192;

/// Prompts share a prefill pass while the longest has at most this many tokens more than 1.25 times the shortest.
const PREFILL_SLACK: usize = 16;

/// A prompt that waits for its continuation.
#[derive(Debug, Clone)]
pub struct Request {
    /// Comes back with the answer; the generator does not look at it.
    pub tag: u64,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// The request's own key of the sampling noise, added to the seed.
    pub key: u64,
}

/// The continuation of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// New tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

impl Answer {
    /// The tokens without the stop token.
    pub fn text_tokens(&self) -> &[u32] {
        match (self.finish, self.tokens.split_last()) {
            (Finish::Stop, Some((_, text))) => text,
            _ => &self.tokens,
        }
    }
}

/// A request that has left the generator.
#[derive(Debug)]
pub struct Finished {
    /// The request's tag.
    pub tag: u64,
    /// Its continuation, or why there is none.
    pub answer: Result<Answer>,
}

/// What was done in how much time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Throughput {
    /// Prompt tokens processed, without padding.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub new_tokens: u64,
    /// Passes that generated one token for each running row.
    pub decode_passes: u64,
    /// Time spent on prompts.
    pub prefill_time: Duration,
    /// Time spent on generating.
    pub decode_time: Duration,
}

impl Throughput {
    /// Generated tokens a second, the time for the prompts included.
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = (self.prefill_time + self.decode_time).as_secs_f64();
        if seconds > 0.0 { self.new_tokens as f64 / seconds } else { 0.0 }
    }
}

/// A running request.
struct Row {
    tag: u64,
    key: u64,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    /// Tokens this request may have, the context's end considered.
    limit: usize,
}

impl Row {
    /// Key of the next choice: the request's own, and the absolute position of the token to choose.
    fn noise_key(&self) -> (u64, u64) {
        (self.key, (self.prompt.len() + self.tokens.len()) as u64)
    }

    fn finish(&mut self, finish: Finish) -> Finished {
        let tokens = std::mem::take(&mut self.tokens);
        Finished { tag: self.tag, answer: Ok(Answer { tokens, finish }) }
    }
}

/// Runs requests together on one target.
pub struct Generator<'a> {
    target: &'a dyn TargetModel,
    sampling: Sampling,
    stop_tokens: Vec<u32>,
    max_rows: usize,
    queue: VecDeque<Request>,
    /// Row `i` is row `i` of the cache.
    rows: Vec<Row>,
    /// Rows of the batch whose request has ended: their places are free.
    gaps: Vec<usize>,
    cache: Option<KvCache>,
    throughput: Throughput,
}

impl<'a> Generator<'a> {
    /// A generator without requests. `max_rows` is at least one.
    pub fn new(target: &'a dyn TargetModel, sampling: Sampling, stop_tokens: Vec<u32>, max_rows: usize) -> Self {
        Self {
            target,
            sampling,
            stop_tokens,
            max_rows: max_rows.max(1),
            queue: VecDeque::new(),
            rows: Vec::new(),
            gaps: Vec::new(),
            cache: None,
            throughput: Throughput::default(),
        }
    }

    /// Puts a request behind all others.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        check(self.target, &request)?;
        self.queue.push_back(request);
        Ok(())
    }

    /// Puts a request before all others: the next turn of a conversation that has begun.
    pub fn submit_first(&mut self, request: Request) -> Result<()> {
        check(self.target, &request)?;
        self.queue.push_front(request);
        Ok(())
    }

    /// Number of requests that wait for a place.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Number of requests that wait or run.
    pub fn pending(&self) -> usize {
        self.queue.len() + self.running()
    }

    fn running(&self) -> usize {
        self.rows.len() - self.gaps.len()
    }

    /// What was done so far.
    pub fn throughput(&self) -> Throughput {
        self.throughput
    }

    /// One pass: fills free places from the queue, generates one token for each running row, and gives back what has
    /// ended. Does nothing where nothing is pending.
    pub fn step(&mut self) -> Result<Vec<Finished>> {
        let mut finished = self.admit()?;
        let start = Instant::now();
        self.decode(&mut finished)?;
        self.throughput.decode_time += start.elapsed();
        Ok(finished)
    }

    /// Runs until nothing is pending or `stop` is set, and hands each ended request over at once. The receiver may
    /// submit more.
    pub fn run(&mut self, stop: &AtomicBool, receive: &mut dyn FnMut(&mut Self, Finished) -> Result<()>) -> Result<()> {
        while self.pending() > 0 && !stop.load(Ordering::Relaxed) {
            for finished in self.step()? {
                receive(self, finished)?;
            }
        }
        Ok(())
    }

    /// Prefills waiting requests until every place is taken. A request may end with its first token.
    fn admit(&mut self) -> Result<Vec<Finished>> {
        let mut finished = Vec::new();
        while self.running() < self.max_rows && !self.queue.is_empty() {
            let start = Instant::now();
            let free = (self.max_rows - self.running()).min(self.queue.len());
            let mut requests: Vec<Request> = self.queue.drain(..free).collect();
            requests.sort_by_key(|request| request.prompt.len());
            while !requests.is_empty() {
                let rest = requests.split_off(group_size(&requests));
                self.prefill(requests, &mut finished)?;
                requests = rest;
            }
            self.throughput.prefill_time += start.elapsed();
        }
        self.close_gaps();
        Ok(finished)
    }

    /// Runs a group of prompts, chooses their first tokens and adds them to the batch.
    fn prefill(&mut self, requests: Vec<Request>, finished: &mut Vec<Finished>) -> Result<()> {
        let device = self.target.device();
        let count = requests.len() as i64;
        let lengths: Vec<i64> = requests.iter().map(|request| request.prompt.len() as i64).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        // Padding is on the right: causal order hides it from the prompt, and later tokens overwrite it in the cache.
        let mut padded = vec![0i64; (count * longest) as usize];
        for (line, request) in padded.chunks_exact_mut(longest as usize).zip(&requests) {
            line.iter_mut().zip(&request.prompt).for_each(|(slot, &id)| *slot = i64::from(id));
        }
        let last: Vec<i64> = (0..count).zip(&lengths).map(|(row, length)| row * longest + length - 1).collect();
        let ids = device::send(&Tensor::from_slice(&padded).view([count, longest]), device); // [B, T]
        let positions = Tensor::arange(longest, (Kind::Int64, device)).expand([count, longest], false); // [B, T]
        let last = device::send(&Tensor::from_slice(&last), device); // [B]
        let mut cache = self.target.new_cache(count, longest);
        let logits = forward(self.target, &ids, &positions, LogitRows::Rows(&last), &mut cache)?; // [B, V]
        cache.advance(&lengths);
        self.throughput.prompt_tokens += lengths.iter().sum::<i64>() as u64;

        let context = self.target.dimensions().max_position_embeddings as usize;
        let begin = |Request { tag, prompt, max_new_tokens, key }| {
            let limit = max_new_tokens.min(context - prompt.len());
            Row { tag, key, prompt, tokens: Vec::new(), limit }
        };
        let mut rows: Vec<Row> = requests.into_iter().map(begin).collect();
        choose(self.sampling, &logits, &mut rows);
        self.throughput.new_tokens += rows.len() as u64;
        // A broken target is found here, once a request, without a look at every token.
        let finite: Vec<bool> = Vec::try_from(logits.isfinite().all_dim(-1, false))?;
        let mut joining: Vec<(i64, Row)> = Vec::with_capacity(rows.len());
        for ((index, mut row), finite) in (0..).zip(rows).zip(finite) {
            if !finite {
                let problem = "the target's logits for this prompt are not finite".to_owned();
                finished.push(Finished { tag: row.tag, answer: Err(Error::Failed(problem)) });
            } else if let Some(finish) = self.ended(&row) {
                finished.push(row.finish(finish));
            } else {
                joining.push((index, row));
            }
        }
        self.join(joining, cache);
        Ok(())
    }

    /// Adds prefilled rows, each with its row of `cache`, to the batch: first into the gaps, then behind the others.
    fn join(&mut self, joining: Vec<(i64, Row)>, mut cache: KvCache) {
        if joining.is_empty() {
            return;
        }
        if (joining.len() as i64) < cache.rows() {
            cache.select_rows(&joining.iter().map(|(index, _)| *index).collect::<Vec<_>>());
        }
        let mut joining: Vec<Row> = joining.into_iter().map(|(_, row)| row).collect();
        let Some(batch) = &mut self.cache else {
            (self.rows, self.cache) = (joining, Some(cache));
            return;
        };
        let behind = joining.split_off(self.gaps.len().min(joining.len()));
        let places: Vec<usize> = self.gaps.drain(..joining.len()).collect();
        batch.replace_rows(&places.iter().map(|&place| place as i64).collect::<Vec<_>>(), &cache);
        places.iter().zip(joining).for_each(|(&place, row)| self.rows[place] = row);
        if !behind.is_empty() {
            if !places.is_empty() {
                cache.select_rows(&(places.len() as i64..cache.rows()).collect::<Vec<_>>());
            }
            batch.append_rows(cache);
            self.rows.extend(behind);
        }
    }

    /// Takes rows that nobody filled out of the batch.
    fn close_gaps(&mut self) {
        if self.gaps.is_empty() {
            return;
        }
        let mut index = 0..;
        let gaps = std::mem::take(&mut self.gaps);
        let keep: Vec<i64> = (0..self.rows.len()).filter(|row| !gaps.contains(row)).map(|row| row as i64).collect();
        self.rows.retain(|_| index.next().is_some_and(|row| !gaps.contains(&row)));
        match &mut self.cache {
            Some(cache) if !keep.is_empty() => cache.select_rows(&keep),
            cache => *cache = None,
        }
    }

    /// One new token for every row of the batch.
    fn decode(&mut self, finished: &mut Vec<Finished>) -> Result<()> {
        let Some(cache) = &mut self.cache else {
            return Ok(());
        };
        let device = self.target.device();
        let column = |values: &[i64]| device::send(&Tensor::from_slice(values).unsqueeze(1), device);
        let last: Vec<i64> = self.rows.iter().map(|row| i64::from(row.tokens.last().copied().unwrap_or(0))).collect();
        let (ids, positions) = (column(&last), column(cache.lengths())); // [B, 1]
        let logits = forward(self.target, &ids, &positions, LogitRows::All, cache)?; // [B, V]
        cache.advance(&vec![1; self.rows.len()]);
        choose(self.sampling, &logits, &mut self.rows);
        self.throughput.new_tokens += self.rows.len() as u64;
        self.throughput.decode_passes += 1;
        for index in 0..self.rows.len() {
            if let Some(finish) = self.ended(&self.rows[index]) {
                finished.push(self.rows[index].finish(finish));
                self.gaps.push(index);
            }
        }
        Ok(())
    }

    fn ended(&self, row: &Row) -> Option<Finish> {
        if row.tokens.last().is_some_and(|token| self.stop_tokens.contains(token)) {
            return Some(Finish::Stop);
        }
        (row.tokens.len() >= row.limit).then_some(Finish::Length)
    }
}

/// Refuses requests that no target of these dimensions can answer.
pub(super) fn check(target: &dyn TargetModel, request: &Request) -> Result<()> {
    let dimensions = target.dimensions();
    let (length, context) = (request.prompt.len(), dimensions.max_position_embeddings);
    if length == 0 {
        return Err(Error::Failed("the prompt is empty".to_owned()));
    }
    if length as i64 >= context {
        let problem = format!("the prompt has {length} tokens; the context of {context} leaves no room to answer");
        return Err(Error::Failed(problem));
    }
    if let Some(id) = request.prompt.iter().find(|&&id| i64::from(id) >= dimensions.vocab_size) {
        let vocabulary = dimensions.vocab_size;
        return Err(Error::Failed(format!("token {id} is outside the target's vocabulary of {vocabulary}")));
    }
    if request.max_new_tokens == 0 {
        return Err(Error::Failed("max_new_tokens: expected at least 1, got 0".to_owned()));
    }
    Ok(())
}

/// How many of these requests, sorted by length, go into one pass: at least one.
pub(super) fn group_size(requests: &[Request]) -> usize {
    let shortest = requests.first().map_or(0, |request| request.prompt.len());
    let longest = shortest + shortest / 4 + PREFILL_SLACK;
    let fits = |(index, request): &(usize, &Request)| {
        let length = request.prompt.len();
        length <= longest && (index + 1) * length <= PREFILL_TOKENS
    };
    requests.iter().enumerate().take_while(fits).count().max(1)
}

fn forward(
    target: &dyn TargetModel,
    ids: &Tensor,
    positions: &Tensor,
    logits: LogitRows<'_>,
    cache: &mut KvCache,
) -> Result<Tensor> {
    let input = ForwardInput { ids, positions, mask: &AttentionMask::Causal, capture: &[], logits };
    let output = target.forward(&input, Some(cache))?;
    output.logits.ok_or_else(|| Error::Failed("the target returned no logits although they were asked for".to_owned()))
}

/// Chooses the next token of each row; the only copy from the device of a pass.
fn choose(sampling: Sampling, logits: &Tensor, rows: &mut [Row]) {
    let keys: Vec<(u64, u64)> = rows.iter().map(Row::noise_key).collect();
    let before = &*rows;
    let chosen =
        sampling.choose(logits, &keys, |row| vec![before[row].prompt.as_slice(), before[row].tokens.as_slice()]);
    rows.iter_mut().zip(chosen).for_each(|(row, token)| row.tokens.push(token as u32));
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::tiny;
    use super::*;
    use crate::nn::Processors;

    const SAMPLED: Sampling = Sampling {
        processors: Processors { temperature: 1.5, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 },
        seed: 3,
    };

    /// Prompts of many lengths, tokens drawn from the keyed stream.
    fn requests(count: u64, max_new_tokens: usize) -> Vec<Request> {
        let mut next = crate::nn::noise::keyed_stream(5, 1);
        let mut request = |tag| {
            let length = 1 + next() % 40;
            let prompt = (0..length).map(|_| (next() % 64) as u32).collect();
            Request { tag, prompt, max_new_tokens: 1 + next() as usize % max_new_tokens, key: tag * 1000 }
        };
        (0..count).map(&mut request).collect()
    }

    fn answers(
        target: &dyn TargetModel,
        sampling: Sampling,
        stop: &[u32],
        max_rows: usize,
        requests: Vec<Request>,
    ) -> Vec<Answer> {
        let mut generator = Generator::new(target, sampling, stop.to_vec(), max_rows);
        let mut answers = vec![None; requests.len()];
        requests.into_iter().for_each(|request| generator.submit(request).unwrap());
        let mut receive = |_: &mut Generator<'_>, finished: Finished| {
            assert!(answers[finished.tag as usize].replace(finished.answer?).is_none(), "delivered twice");
            Ok(())
        };
        generator.run(&AtomicBool::new(false), &mut receive).unwrap();
        answers.into_iter().map(Option::unwrap).collect()
    }

    /// No cache, no batch: the whole sequence again for every token.
    fn plain(target: &dyn TargetModel, sampling: Sampling, stop: &[u32], request: &Request) -> Answer {
        let mut tokens: Vec<i64> = request.prompt.iter().map(|&id| i64::from(id)).collect();
        let prompt_length = tokens.len();
        loop {
            let ids = Tensor::from_slice(&tokens).unsqueeze(0);
            let positions = Tensor::arange(tokens.len() as i64, (Kind::Int64, tch::Device::Cpu)).unsqueeze(0);
            let last = Tensor::from_slice(&[tokens.len() as i64 - 1]);
            let mask = &AttentionMask::Causal;
            let logits = LogitRows::Rows(&last);
            let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits };
            let logits = target.forward(&input, None).unwrap().logits.unwrap();
            let before: Vec<u32> = tokens.iter().map(|&id| id as u32).collect();
            let token = sampling.choose(&logits, &[(request.key, tokens.len() as u64)], |_| vec![before.as_slice()])[0];
            tokens.push(token);
            let new = tokens[prompt_length..].iter().map(|&id| id as u32).collect::<Vec<_>>();
            if stop.contains(&(token as u32)) {
                return Answer { tokens: new, finish: Finish::Stop };
            }
            if new.len() == request.max_new_tokens || tokens.len() == tiny::CONTEXT {
                return Answer { tokens: new, finish: Finish::Length };
            }
        }
    }

    #[test]
    fn every_batch_gives_each_request_what_plain_decoding_gives() {
        let target = tiny::target(1);
        let penalised = Processors { repetition_penalty: 1.4, top_k: 9, top_p: 0.8, ..SAMPLED.processors };
        let penalised = Sampling { processors: penalised, seed: 3 };
        for sampling in [Sampling::greedy(), SAMPLED, penalised] {
            let stop = [7, 8, 9];
            let requests = requests(24, 40);
            let want: Vec<Answer> = requests.iter().map(|request| plain(&target, sampling, &stop, request)).collect();
            assert!(want.iter().any(|answer| answer.finish == Finish::Stop));
            assert!(want.iter().any(|answer| answer.finish == Finish::Length));
            for max_rows in [1, 5, 24] {
                assert_eq!(answers(&target, sampling, &stop, max_rows, requests.clone()), want, "{max_rows} rows");
            }
        }
    }

    #[test]
    fn later_requests_fill_a_gap_and_go_behind_the_rows_that_run() {
        let target = tiny::target(1);
        let request = |tag: u64, max_new_tokens| Request {
            tag,
            prompt: (0..5).map(|id| id + tag as u32).collect(),
            max_new_tokens,
            key: tag,
        };
        let (first, second): (Vec<_>, Vec<_>) = (
            [5, 20, 20].into_iter().zip(0..).map(|(limit, tag)| request(tag, limit)).collect(),
            (3..7).map(|tag| request(tag, 20)).collect(),
        );
        let mut generator = Generator::new(&target, SAMPLED, vec![], 6);
        first.iter().for_each(|request| generator.submit(request.clone()).unwrap());
        let mut seen = 0;
        let mut receive = |generator: &mut Generator<'_>, finished: Finished| {
            if finished.tag == 0 {
                assert_eq!((generator.rows.len(), generator.gaps.as_slice()), (3, [0].as_slice()));
                second.iter().for_each(|request| generator.submit(request.clone()).unwrap());
            }
            let request = first.iter().chain(&second).find(|request| request.tag == finished.tag).unwrap();
            assert_eq!(finished.answer?, plain(&target, SAMPLED, &[], request), "request {}", finished.tag);
            seen += 1;
            Ok(())
        };
        generator.run(&AtomicBool::new(false), &mut receive).unwrap();
        assert_eq!(seen, 7);
    }

    #[test]
    fn seed_and_key_change_a_sample() {
        let target = tiny::target(1);
        let base = Request { tag: 0, prompt: vec![1, 2, 3], max_new_tokens: 30, key: 1 };
        let other_key = Request { key: 2, ..base.clone() };
        let run = |sampling, request: &Request| answers(&target, sampling, &[], 4, vec![request.clone()]);
        assert_eq!(run(SAMPLED, &base), run(SAMPLED, &base));
        assert_ne!(run(SAMPLED, &base), run(SAMPLED, &other_key));
        assert_ne!(run(SAMPLED, &base), run(Sampling { seed: 4, ..SAMPLED }, &base));
    }

    #[test]
    fn the_end_of_the_context_ends_an_answer() {
        let target = tiny::target(1);
        let prompt: Vec<u32> = (0..tiny::CONTEXT as u32 - 3).map(|id| id % 64).collect();
        let request = Request { tag: 0, prompt, max_new_tokens: 50, key: 0 };
        let answer = &answers(&target, Sampling::greedy(), &[], 2, vec![request])[0];
        assert_eq!((answer.tokens.len(), answer.finish), (3, Finish::Length));
    }

    #[test]
    fn impossible_requests_are_refused() {
        let target = tiny::target(1);
        let mut generator = Generator::new(&target, Sampling::greedy(), vec![], 2);
        for (prompt, max_new_tokens, message) in [
            (vec![], 5, "empty"),
            (vec![1; tiny::CONTEXT], 5, "no room to answer"),
            (vec![64], 5, "outside the target's vocabulary of 64"),
            (vec![1], 0, "expected at least 1"),
        ] {
            let error = generator.submit(Request { tag: 0, prompt, max_new_tokens, key: 0 }).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
        assert_eq!(generator.pending(), 0);
    }

    #[test]
    fn a_target_that_gives_nan_fails_its_requests_and_ends() {
        let target = tiny::target_with(1, &|name, tensor| {
            if name == "model.norm.weight" { tensor * f64::NAN } else { tensor }
        });
        let mut generator = Generator::new(&target, Sampling::greedy(), vec![], 2);
        requests(5, 9).into_iter().for_each(|request| generator.submit(request).unwrap());
        let failed = Cell::new(0);
        let mut receive = |_: &mut Generator<'_>, finished: Finished| {
            assert!(finished.answer.unwrap_err().to_string().contains("not finite"));
            failed.set(failed.get() + 1);
            Ok(())
        };
        generator.run(&AtomicBool::new(false), &mut receive).unwrap();
        assert_eq!(failed.get(), 5);
    }

    #[test]
    fn the_batch_stays_full_while_requests_wait_and_follow_ups_come_first() {
        let target = tiny::target(1);
        let mut generator = Generator::new(&target, Sampling::greedy(), vec![], 3);
        let request = |tag, max_new_tokens| Request { tag, prompt: vec![1, 2], max_new_tokens, key: 0 };
        (0..6).for_each(|tag| generator.submit(request(tag, 3 + tag as usize)).unwrap());
        let mut order = Vec::new();
        while generator.pending() > 0 {
            for finished in generator.step().unwrap() {
                order.push(finished.tag);
                if finished.tag == 0 {
                    generator.submit_first(request(9, 1)).unwrap();
                }
            }
            assert!(generator.waiting() == 0 || generator.running() >= 2);
        }
        assert_eq!(order, [0, 9, 1, 2, 3, 4, 5]);
        assert_eq!(generator.throughput().new_tokens, 3 + 4 + 5 + 6 + 7 + 8 + 1);
        assert_eq!(generator.throughput().prompt_tokens, 14);
    }

    #[test]
    fn groups_hold_prompts_of_similar_length_and_bounded_size() {
        let request = |length| Request { tag: 0, prompt: vec![0; length], max_new_tokens: 1, key: 0 };
        let group = |lengths: &[usize]| group_size(&lengths.iter().map(|&length| request(length)).collect::<Vec<_>>());
        assert_eq!(group(&[4, 10, 21, 22]), 3);
        assert_eq!(group(&[100, 141, 142]), 2);
        assert_eq!(group(&[4000, 4000, 4000]), 2);
        assert_eq!(group(&[9000, 9000]), 1);
    }
}
