//! What a server knows about itself: how many wait and run, and what was done. Written by the one who decodes, read by all.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::job::Counts;

/// Upper ends of the classes that times to a first token are counted in, in seconds.
const FIRST_TOKEN_CLASSES: [f64; 9] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Numbers of a server since it started.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Numbers {
    /// Answers that ended with a stop token or string.
    pub stopped: u64,
    /// Answers that reached a limit.
    pub cut: u64,
    /// Answers whose client went away.
    pub cancelled: u64,
    /// Answers that could not be made.
    pub failed: u64,
    /// Answers being decoded.
    pub running: usize,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub counts: Counts,
    /// Passes of the target behind the prompts.
    pub passes: u64,
    /// Time spent on prompts and on answers.
    pub busy: Duration,
    /// Bytes of the target's cache, the room behind what it holds included.
    pub cache_bytes: u64,
    /// Tokens that it holds.
    pub cache_tokens: u64,
    /// Bytes that answers have left for prompts that begin with the same tokens.
    pub prefix_bytes: u64,
    /// Verifications with a guess at depth 1, 2, and so on.
    pub tried: Vec<u64>,
    /// Those in which a guess of that depth was accepted.
    pub accepted: Vec<u64>,
    /// First tokens by the time they took, in the classes above and beyond.
    first_tokens: [u64; FIRST_TOKEN_CLASSES.len() + 1],
    /// All of these times together.
    first_token_time: Duration,
}

impl Numbers {
    /// Counts one more verification whose tree has guesses down to a depth.
    pub fn tried_down_to(&mut self, depth: usize) {
        raise(&mut self.tried, 0..depth);
    }

    /// Counts an accepted guess of a depth, from 1.
    pub fn accepted_at(&mut self, depth: usize) {
        raise(&mut self.accepted, depth.saturating_sub(1)..depth);
    }

    /// Notes how long a client waited for its first token.
    pub fn first_token_after(&mut self, time: Duration) {
        let class = FIRST_TOKEN_CLASSES.iter().position(|&end| time.as_secs_f64() <= end);
        self.first_tokens[class.unwrap_or(FIRST_TOKEN_CLASSES.len())] += 1;
        self.first_token_time += time;
    }
}

fn raise(counts: &mut Vec<u64>, places: std::ops::Range<usize>) {
    if counts.len() < places.end {
        counts.resize(places.end, 0);
    }
    counts[places].iter_mut().for_each(|count| *count += 1);
}

/// What everybody sees.
#[derive(Debug)]
pub struct Board {
    numbers: Mutex<Numbers>,
    waiting: AtomicUsize,
    /// Answers that may wait.
    queue: usize,
    /// Bytes that the target's cache may take.
    cache_limit: u64,
    ending: AtomicBool,
    cut: AtomicBool,
    refused: Mutex<Vec<(u16, u64)>>,
}

impl Board {
    /// Of a server with a queue of so many answers and so many bytes of cache.
    pub fn new(queue: usize, cache_limit: u64) -> Self {
        Self {
            numbers: Mutex::default(),
            waiting: AtomicUsize::new(0),
            queue,
            cache_limit,
            ending: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            refused: Mutex::default(),
        }
    }

    /// The numbers, to be read or changed.
    pub fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Answers that may wait.
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// Bytes that the target's cache may take.
    pub fn cache_limit(&self) -> u64 {
        self.cache_limit
    }

    /// Takes places in the queue, all or none of them.
    pub fn take_places(&self, count: usize) -> bool {
        let more = |waiting: usize| waiting.checked_add(count).filter(|&all| all <= self.queue);
        self.waiting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    /// Gives places in the queue back.
    pub fn give_places(&self, count: usize) {
        self.waiting.fetch_sub(count, Ordering::SeqCst);
    }

    /// From now on no request is taken.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Whether no request is taken any more.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Cuts every answer short: the time for finishing them is over.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Whether answers are to be cut short.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Counts a request that was answered with an error.
    pub fn refused(&self, status: u16) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match refused.iter_mut().find(|(known, _)| *known == status) {
            Some((_, count)) => *count += 1,
            None => refused.push((status, 1)),
        }
    }

    /// Everything in the text format of Prometheus, version 0.0.4.
    pub fn metrics(&self) -> String {
        let numbers = self.numbers().clone();
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, lines: &[(String, f64)]| {
            let _ = writeln!(text, "# HELP specforge_{name} {help}\n# TYPE specforge_{name} {kind}");
            for (labels, value) in lines {
                let _ = writeln!(text, "specforge_{name}{labels} {value}");
            }
        };
        let one = |value: f64| [(String::new(), value)];
        let over = |value: f64, by: f64| if by > 0.0 { value / by } else { 0.0 };
        let label = |key: &str, value: &dyn std::fmt::Display| format!("{{{key}=\"{value}\"}}");
        let ended = [
            ("stop", numbers.stopped),
            ("length", numbers.cut),
            ("cancelled", numbers.cancelled),
            ("failed", numbers.failed),
        ];
        let ended = ended.map(|(how, count)| (label("finish", &how), count as f64));
        metric("answers_total", "counter", "Answers by how they ended.", &ended);
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let refused: Vec<_> = refused.iter().map(|(status, count)| (label("status", status), *count as f64)).collect();
        metric("refused_total", "counter", "Requests answered with an error, by HTTP status.", &refused);
        metric("running", "gauge", "Answers being decoded.", &one(numbers.running as f64));
        metric("waiting", "gauge", "Answers in the queue.", &one(self.waiting() as f64));
        metric("queue_limit", "gauge", "Answers that may wait.", &one(self.queue as f64));
        metric("prompt_tokens_total", "counter", "Prompt tokens processed.", &one(numbers.prompt_tokens as f64));
        let Counts { tokens, drafted, accepted, rounds, known } = numbers.counts;
        let help = "Prompt tokens that earlier answers had left.";
        metric("known_prompt_tokens_total", "counter", help, &one(known as f64));
        metric("generated_tokens_total", "counter", "Tokens of answers.", &one(tokens as f64));
        metric("drafted_tokens_total", "counter", "Guesses of the draft that were verified.", &one(drafted as f64));
        metric("accepted_tokens_total", "counter", "Guesses that are in answers.", &one(accepted as f64));
        metric("verifications_total", "counter", "Verifications, each answer's counted.", &one(rounds as f64));
        metric("passes_total", "counter", "Passes of the target behind the prompts.", &one(numbers.passes as f64));
        let first: u64 = numbers.first_tokens.iter().sum();
        let tau = over(tokens.saturating_sub(first) as f64, rounds as f64);
        metric("tau", "gauge", "Tokens a verification, since the start.", &one(tau));
        let busy = numbers.busy.as_secs_f64();
        metric("busy_seconds_total", "counter", "Time spent on prompts and answers.", &one(busy));
        let speed = over(tokens as f64, busy);
        metric("tokens_per_second", "gauge", "Tokens generated a second of that time, since the start.", &one(speed));
        metric("cache_bytes", "gauge", "Bytes of the target's cache.", &one(numbers.cache_bytes as f64));
        metric("cache_limit_bytes", "gauge", "Bytes that it may take.", &one(self.cache_limit as f64));
        let help = "Bytes that answers have left for prompts that begin with the same tokens.";
        metric("prefix_bytes", "gauge", help, &one(numbers.prefix_bytes as f64));
        metric("cache_tokens", "gauge", "Tokens that it holds.", &one(numbers.cache_tokens as f64));
        let by_depth = |counts: &[u64]| -> Vec<_> {
            counts.iter().zip(1..).map(|(count, depth): (_, u32)| (label("depth", &depth), *count as f64)).collect()
        };
        let help = "Verifications with a guess at this depth.";
        metric("tried_at_depth_total", "counter", help, &by_depth(&numbers.tried));
        let help = "Verifications in which a guess of this depth was accepted.";
        metric("accepted_at_depth_total", "counter", help, &by_depth(&numbers.accepted));
        let name = "time_to_first_token_seconds";
        let (mut below, mut classes) = (0, Vec::new());
        for (count, end) in numbers.first_tokens.iter().zip(FIRST_TOKEN_CLASSES) {
            below += count;
            classes.push((format!("_bucket{{le=\"{end}\"}}"), below as f64));
        }
        classes.push(("_bucket{le=\"+Inf\"}".to_owned(), first as f64));
        classes.push(("_sum".to_owned(), numbers.first_token_time.as_secs_f64()));
        classes.push(("_count".to_owned(), first as f64));
        metric(name, "histogram", "From a request's arrival to its answer's first token.", &classes);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_the_queue_are_taken_together_or_not_at_all() {
        let board = Board::new(3, 0);
        assert!(board.take_places(2) && !board.take_places(2) && board.take_places(1) && !board.take_places(1));
        board.give_places(2);
        assert!(!board.take_places(usize::MAX) && board.take_places(2));
        assert_eq!(board.waiting(), 3);
    }

    #[test]
    fn metrics_are_lines_with_a_name_and_a_number() {
        let board = Board::new(3, 1 << 20);
        board.refused(429);
        board.refused(429);
        {
            let mut numbers = board.numbers();
            numbers.tried_down_to(2);
            numbers.tried_down_to(3);
            numbers.accepted_at(1);
            numbers.first_token_after(Duration::from_millis(200));
            numbers.first_token_after(Duration::from_secs(100));
            numbers.counts = Counts { tokens: 12, drafted: 9, accepted: 5, rounds: 5, known: 4 };
        }
        let text = board.metrics();
        for line in [
            "specforge_refused_total{status=\"429\"} 2",
            "specforge_tau 2",
            "specforge_tried_at_depth_total{depth=\"2\"} 2",
            "specforge_tried_at_depth_total{depth=\"3\"} 1",
            "specforge_accepted_at_depth_total{depth=\"1\"} 1",
            "specforge_time_to_first_token_seconds_bucket{le=\"0.1\"} 0",
            "specforge_time_to_first_token_seconds_bucket{le=\"0.25\"} 1",
            "specforge_time_to_first_token_seconds_bucket{le=\"+Inf\"} 2",
            "specforge_time_to_first_token_seconds_count 2",
            "specforge_cache_limit_bytes 1048576",
        ] {
            assert!(text.lines().any(|found| found == line), "no line `{line}` in\n{text}");
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("specforge_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
