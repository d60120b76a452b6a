//! Questions on their way to servers: shared by all, a bounded number at once, asked again where something went wrong.
//!
//! Every server has so many threads. A thread takes the first question that waits and that its server can answer, asks, and
//! hands the answer to whoever waits for it. Where that fails in a way that may pass, the question goes back to the front and
//! is asked again after a while, of another server if there is a healthy one; the server that failed is left alone
//! meanwhile, and asked one question at a time until it answers. A question that was asked often enough comes back with the last reason. So every question comes back once,
//! whatever servers do, and answered as long as one of them does its work.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::{Retries, Trouble, Whose};
use crate::error::{Error, Result, foreign};

/// Longest that a server is left alone because it asks for it.
const LONGEST_WISH: Duration = Duration::from_secs(600);

/// Servers, and how they are asked.
pub trait Fleet: Send + Sync + 'static {
    /// What is asked.
    type Question: Send + 'static;
    /// What comes back.
    type Answer: Send + 'static;

    /// How many servers there are; they have the numbers from 0.
    fn servers(&self) -> usize;

    /// Whether a server can answer a question.
    fn suits(&self, _server: usize, _question: &Self::Question) -> bool {
        true
    }

    /// Asks once.
    fn ask(&self, server: usize, question: &Self::Question) -> Result<Self::Answer, Trouble>;
}

/// A question that came back.
pub struct Outcome<F: Fleet> {
    /// What was asked.
    pub question: F::Question,
    /// Who was asked last.
    pub server: usize,
    /// How often it was asked.
    pub attempts: u32,
    /// What came of it.
    pub result: Result<F::Answer, Failure>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What happened last, in words.
    pub problem: String,
    /// What that says about the question.
    pub cause: Cause,
}

/// What a failure is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The question is wrong.
    Question,
    /// It was asked as often as it may be, and answers were not what they should be.
    Answers,
    /// It was asked as often as it may be, and the last server was in trouble.
    Servers,
    /// A server refuses every question.
    Refused,
}

/// One question that somebody waits for.
struct Job<F: Fleet> {
    question: F::Question,
    /// Attempts that count.
    attempts: u32,
    /// All attempts.
    asked: u32,
    not_before: Instant,
    /// The server that failed last.
    failed_at: Option<usize>,
    answer: Sender<Outcome<F>>,
    /// As long as this is there, somebody wants it.
    wanted: Weak<()>,
}

/// How a server has been doing.
#[derive(Clone, Copy)]
struct Health {
    /// Failures since it last answered, those of one moment once.
    failures: u32,
    rests_until: Instant,
    /// Questions on their way to it.
    busy: usize,
}

struct Queue<F: Fleet> {
    jobs: VecDeque<Job<F>>,
    health: Vec<Health>,
    closed: bool,
}

struct Shared<F: Fleet> {
    fleet: Arc<F>,
    retries: Retries,
    queue: Mutex<Queue<F>>,
    changed: Condvar,
}

/// The threads.
pub struct Pool<F: Fleet> {
    shared: Arc<Shared<F>>,
    /// Number of threads. Nobody waits for their end: one may stand in an answer that takes minutes.
    threads: usize,
}

impl<F: Fleet> Pool<F> {
    /// Starts the threads, so many for each server.
    pub fn start(fleet: Arc<F>, retries: Retries, in_flight: usize) -> Result<Self> {
        let health = vec![Health { failures: 0, rests_until: Instant::now(), busy: 0 }; fleet.servers()];
        let queue = Mutex::new(Queue { jobs: VecDeque::new(), health, closed: false });
        let shared = Arc::new(Shared { fleet, retries, queue, changed: Condvar::new() });
        let mut pool = Self { shared, threads: 0 };
        for server in 0..pool.shared.fleet.servers() {
            for _ in 0..in_flight {
                let shared = Arc::clone(&pool.shared);
                let thread = Builder::new().name(format!("server {server}")).spawn(move || work(server, &shared));
                thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
                pool.threads += 1;
            }
        }
        Ok(pool)
    }

    /// Questions that are on their way at once.
    pub fn in_flight(&self) -> usize {
        self.threads
    }

    /// Asks these questions behind all others. Each comes back once, unless `wanted` is gone by then.
    pub fn ask(&self, questions: impl IntoIterator<Item = F::Question>, answer: &Sender<Outcome<F>>, wanted: &Arc<()>) {
        let mut queue = self.shared.lock();
        for question in questions {
            queue.jobs.push_back(Job::new(question, answer, wanted));
        }
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// The same before all others.
    pub fn ask_first(&self, question: F::Question, answer: &Sender<Outcome<F>>, wanted: &Arc<()>) {
        self.shared.lock().jobs.push_front(Job::new(question, answer, wanted));
        self.shared.changed.notify_all();
    }
}

impl<F: Fleet> Drop for Pool<F> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl<F: Fleet> Job<F> {
    fn new(question: F::Question, answer: &Sender<Outcome<F>>, wanted: &Arc<()>) -> Self {
        Self {
            question,
            attempts: 0,
            asked: 0,
            not_before: Instant::now(),
            failed_at: None,
            answer: answer.clone(),
            wanted: Arc::downgrade(wanted),
        }
    }

    /// Gives the question back. Whoever does not want it any more does not listen.
    fn come_back(self, server: usize, result: Result<F::Answer, Failure>) {
        let Self { question, asked, answer, .. } = self;
        let _ = answer.send(Outcome { question, server, attempts: asked, result });
    }
}

/// Asks until there is an answer: a server may be starting, or busy. An error holds the number of attempts, too.
pub fn patiently<T>(retries: Retries, ask: impl Fn() -> Result<T, Trouble>) -> Result<T, (u32, Trouble)> {
    let mut attempt = 1;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(Trouble::Passing { pause: wish, .. }) if attempt < retries.attempts => {
                std::thread::sleep(pause(retries, attempt).max(wish.unwrap_or_default().min(LONGEST_WISH)));
                attempt += 1;
            }
            Err(trouble) => return Err((attempt, trouble)),
        }
    }
}

/// How long to wait after so many failures: twice as long each time, a random part of the second half less.
fn pause(retries: Retries, failures: u32) -> Duration {
    let Retries { first_pause, longest_pause, .. } = retries;
    let doubled = first_pause.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(longest_pause);
    let random = RandomState::new().hash_one(failures) >> 11;
    doubled.mul_f64(0.5 + 0.5 * random as f64 / (1u64 << 53) as f64)
}

impl<F: Fleet> Shared<F> {
    fn lock(&self) -> MutexGuard<'_, Queue<F>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next question for a server; nothing once the pool is closed.
    fn take(&self, server: usize) -> Option<Job<F>> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            queue.jobs.retain(|job| job.wanted.strong_count() > 0);
            let now = Instant::now();
            let Health { failures, rests_until, busy } = queue.health[server];
            // Where another server is well, a question does not go back to the one that failed.
            let others_are_well = |job: &Job<F>| {
                let mut others = queue.health.iter().enumerate().filter(|(other, _)| *other != server);
                others.any(|(other, health)| health.failures == 0 && self.fleet.suits(other, &job.question))
            };
            let is_mine = |job: &Job<F>| {
                self.fleet.suits(server, &job.question) && !(job.failed_at == Some(server) && others_are_well(job))
            };
            let ready = queue.jobs.iter().position(|job| job.not_before <= now && is_mine(job));
            let next = queue.jobs.iter().filter(|job| is_mine(job)).map(|job| job.not_before.max(rests_until)).min();
            // A server in trouble is not given many questions to lose.
            let is_free = failures == 0 || busy == 0;
            if let Some(place) = ready.filter(|_| is_free && rests_until <= now) {
                queue.health[server].busy += 1;
                return queue.jobs.remove(place);
            }
            queue = match next.filter(|&next| next > now) {
                Some(next) => self.changed.wait_timeout(queue, next - now).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// A server has answered.
    fn went_well(&self, server: usize) {
        let mut queue = self.lock();
        let health = &mut queue.health[server];
        health.busy -= 1;
        if health.failures > 0 {
            (health.failures, health.rests_until) = (0, Instant::now());
            self.changed.notify_all();
        }
    }

    /// A question goes back to the others, or to whoever asked it.
    fn went_wrong(&self, server: usize, mut job: Job<F>, trouble: Trouble) {
        let now = Instant::now();
        let mut queue = self.lock();
        queue.health[server].busy -= 1;
        let given_up = |problem, cause| {
            self.changed.notify_all();
            Err(Failure { problem, cause })
        };
        let (problem, wish, whose) = match trouble {
            Trouble::Passing { problem, pause, whose } => (problem, pause, whose),
            Trouble::Final(problem) => {
                drop(queue);
                return job.come_back(server, given_up(problem, Cause::Question));
            }
            Trouble::Refused(problem) => {
                drop(queue);
                return job.come_back(server, given_up(problem, Cause::Refused));
            }
        };
        if whose != Whose::Question && queue.health[server].rests_until <= now {
            let failures = queue.health[server].failures.saturating_add(1);
            let rest = pause(self.retries, failures).max(wish.unwrap_or_default().min(LONGEST_WISH));
            (queue.health[server].failures, queue.health[server].rests_until) = (failures, now + rest);
        }
        // A server with too much to do is no reason to give a question up, unless it never has less.
        let has_time = whose == Whose::Nobody && queue.health[server].failures < self.retries.attempts;
        job.attempts += u32::from(!has_time);
        if job.attempts >= self.retries.attempts {
            drop(queue);
            let cause = if whose == Whose::Question { Cause::Answers } else { Cause::Servers };
            return job.come_back(server, given_up(problem, cause));
        }
        job.not_before = now + pause(self.retries, job.attempts.max(1));
        job.failed_at = Some(server);
        queue.jobs.push_front(job);
        drop(queue);
        self.changed.notify_all();
    }
}

/// What a thread does: question after question.
fn work<F: Fleet>(server: usize, shared: &Shared<F>) {
    while let Some(mut job) = shared.take(server) {
        job.asked += 1;
        let asked = catch_unwind(AssertUnwindSafe(|| shared.fleet.ask(server, &job.question)));
        let asked = asked.unwrap_or_else(|payload| {
            let words = foreign::panic_text(payload.as_ref());
            Err(Trouble::Final(format!("reading the answer failed: {words}")))
        });
        match asked {
            Ok(answer) => {
                shared.went_well(server);
                job.come_back(server, Ok(answer));
            }
            Err(trouble) => shared.went_wrong(server, job, trouble),
        }
    }
}
