//! Documents on their way to servers: shared by all, a bounded number at once, asked for again where something went wrong.
//!
//! Every server has so many threads. A thread takes the first document that waits, asks its server, and hands the states to
//! whoever waits for them. Where servers give different parts of the states, each part is asked for on its own. Where that fails in a way that may pass, the document goes back to the front and is asked for
//! again after a while, of another server if there is a healthy one; the server that failed is left alone meanwhile. A
//! document that was asked for often enough is an error that says so. So every document is answered once, whatever servers
//! do, as long as one of them does its work.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::http::Http;
use super::server::Server;
use super::{Asking, Engine, Part, ServerAddress, Shape, Trouble, failed, sglang, vllm};
use crate::data::PackedBatch;
use crate::error::{Error, Result, foreign};

/// One document, or a part of its states, that somebody waits for.
struct Job {
    name: String,
    ids: Vec<i64>,
    part: Part,
    /// Attempts so far.
    attempts: u32,
    not_before: Instant,
    /// The server that failed last.
    failed_at: Option<usize>,
    answer: SyncSender<Outcome>,
    /// As long as this is there, somebody wants it.
    wanted: Weak<()>,
}

/// Who answered, and the states.
type Outcome = Result<(String, Vec<Tensor>)>;

/// How a server has been doing.
#[derive(Clone, Copy)]
struct Health {
    /// What it gives.
    part: Part,
    /// Failures since it last answered, those of one moment once.
    failures: u32,
    rests_until: Instant,
}

struct Queue {
    jobs: VecDeque<Job>,
    health: Vec<Health>,
    closed: bool,
}

struct Shared {
    asking: Asking,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// States on their way, part by part.
pub(super) struct Answer {
    arrive: Vec<Receiver<Outcome>>,
    _wanted: Arc<()>,
}

impl Answer {
    /// Waits for the states of the document, and says who gave them.
    pub(super) fn wait(self) -> Result<(String, Vec<Tensor>)> {
        let (mut servers, mut states) = (Vec::new(), Vec::new());
        for part in self.arrive {
            let gone = |_| Err(Error::Failed("the threads that ask servers are gone".to_owned()));
            let (server, more) = part.recv().unwrap_or_else(gone)?;
            servers.push(server);
            states.extend(more);
        }
        Ok((servers.join(" and "), states))
    }
}

/// The threads.
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// Parts that make the states of a document, in this order.
    parts: Vec<Part>,
    /// Number of threads. Nobody waits for their end: one may stand in an answer that takes minutes.
    threads: usize,
}

impl Pool {
    /// Asks each server what it serves, and starts the threads.
    pub(super) fn start(
        servers: &[ServerAddress],
        asking: &Asking,
        key: impl Fn(Engine) -> Option<String>,
        shape: Shape,
    ) -> Result<Self> {
        let mut known = Vec::new();
        for address in servers {
            let key = key(address.engine);
            let http = Http::new(&address.url, key.as_deref(), asking.timeout, asking.in_flight);
            let model = patiently(address, asking, "does not say what it serves", || model(&http))?;
            let part = match address.engine {
                Engine::Vllm => Part::All,
                Engine::Sglang => patiently(address, asking, "gives no states", || sglang::part(&http, shape))?,
            };
            let (address, states_folder, width) = (address.clone(), asking.states_folder.clone(), shape.width);
            known.push(Arc::new(Server { address, http, model, part, width, timeout: asking.timeout, states_folder }));
        }
        let parts = parts(&known, shape)?;
        let health = |server: &Arc<Server>| Health { part: server.part, failures: 0, rests_until: Instant::now() };
        let health = known.iter().map(health).collect();
        let queue = Mutex::new(Queue { jobs: VecDeque::new(), health, closed: false });
        let shared = Arc::new(Shared { asking: asking.clone(), queue, changed: Condvar::new() });
        let mut pool = Self { shared, parts, threads: 0 };
        for (number, server) in known.iter().enumerate() {
            for _ in 0..asking.in_flight {
                let (server, shared) = (Arc::clone(server), Arc::clone(&pool.shared));
                let work = move || work(number, &server, &shared);
                let thread = Builder::new().name(format!("server {number}")).spawn(work);
                thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
                pool.threads += 1;
            }
        }
        Ok(pool)
    }

    /// Documents that are on their way at once.
    pub(super) fn in_flight(&self) -> usize {
        self.threads
    }

    /// Asks for the states of one document.
    pub(super) fn ask(&self, document: &PackedBatch) -> Answer {
        let wanted = Arc::new(());
        let name = document.documents.first().map_or_else(String::new, |document| document.name.clone());
        let mut arrive = Vec::new();
        let mut queue = self.shared.lock();
        for &part in &self.parts {
            let (answer, arrives) = mpsc::sync_channel(1);
            arrive.push(arrives);
            queue.jobs.push_back(Job {
                name: name.clone(),
                ids: document.ids.clone(),
                part,
                attempts: 0,
                not_before: Instant::now(),
                failed_at: None,
                answer,
                wanted: Arc::downgrade(&wanted),
            });
        }
        drop(queue);
        self.shared.changed.notify_all();
        Answer { arrive, _wanted: wanted }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

/// Which parts make the states of a document, from servers that give these. One that nobody needs is a mistake.
fn parts(servers: &[Arc<Server>], shape: Shape) -> Result<Vec<Part>> {
    let gives = |part: Part| servers.iter().any(|server| server.part == part);
    let needed = match (gives(Part::All), shape.layers) {
        (true, _) => vec![Part::All],
        (false, 1) => vec![Part::Final],
        (false, _) => vec![Part::Others, Part::Final],
    };
    if let Some(surplus) = servers.iter().find(|server| !needed.contains(&server.part)) {
        let problem = match surplus.part {
            Part::Others => "gives states beside the final one, and none are wanted",
            _ => "is of another kind than the others; name servers of one kind",
        };
        return Err(failed(&surplus.address, problem));
    }
    let lacking = match needed.iter().find(|&&part| !gives(part)) {
        None => return Ok(needed),
        Some(Part::Others) => "--enable-return-aux-hidden-states, which gives the states beside the final one",
        Some(_) => "--enable-return-hidden-states alone, which gives final states",
    };
    Err(Error::Usage(format!(
        "--from: name a server, too, that was started with {lacking}: one SGLang server does not give both (docs/capture.md)"
    )))
}

/// What a server calls its model.
fn model(http: &Http) -> Result<String, Trouble> {
    let models = http.get("/v1/models")?;
    let model = models.pointer("/data/0/id").and_then(serde_json::Value::as_str);
    model.map(str::to_owned).ok_or_else(|| Trouble::Final("/v1/models names no model".to_owned()))
}

/// Asks until there is an answer: a server may be starting, or busy.
fn patiently<T>(
    address: &ServerAddress,
    asking: &Asking,
    what: &str,
    ask: impl Fn() -> Result<T, Trouble>,
) -> Result<T> {
    let mut attempt = 1;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(Trouble::Passing { pause: wanted, .. }) if attempt < asking.attempts => {
                std::thread::sleep(pause(asking, attempt).max(wanted.unwrap_or_default()).min(asking.longest_pause));
                attempt += 1;
            }
            Err(Trouble::Passing { problem, .. } | Trouble::Final(problem)) => {
                return Err(failed(address, &format!("{what} (asked {attempt} times): {problem}")));
            }
        }
    }
}

/// How long to wait after so many failures: twice as long each time, a random part of the second half less.
fn pause(asking: &Asking, failures: u32) -> Duration {
    let doubled = asking.first_pause.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(asking.longest_pause);
    let random = RandomState::new().hash_one(failures) >> 11;
    doubled.mul_f64(0.5 + 0.5 * random as f64 / (1u64 << 53) as f64)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next document for a server; nothing once the pool is closed.
    fn take(&self, server: usize) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            queue.jobs.retain(|job| job.wanted.strong_count() > 0);
            let now = Instant::now();
            let Health { part, rests_until, .. } = queue.health[server];
            let is_well =
                |(other, health): (usize, &Health)| other != server && health.part == part && health.failures == 0;
            let others_are_well = queue.health.iter().enumerate().any(is_well);
            let is_mine = |job: &Job| job.part == part && !(job.failed_at == Some(server) && others_are_well);
            let ready = queue.jobs.iter().position(|job| job.not_before <= now && is_mine(job));
            match ready {
                Some(place) if rests_until <= now => return queue.jobs.remove(place),
                _ => {}
            }
            let mut next =
                queue.jobs.iter().filter(|job| is_mine(job)).map(|job| job.not_before.max(rests_until)).min();
            next = next.filter(|&next| next > now);
            queue = match next {
                Some(next) => self.changed.wait_timeout(queue, next - now).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// A server has answered.
    fn went_well(&self, server: usize) {
        let now = Instant::now();
        let mut queue = self.lock();
        if queue.health[server].failures > 0 {
            queue.health[server] = Health { part: queue.health[server].part, failures: 0, rests_until: now };
            self.changed.notify_all();
        }
    }

    /// A document goes back, or becomes an error.
    fn went_wrong(&self, number: usize, server: &Server, mut job: Job, trouble: Trouble) {
        let now = Instant::now();
        let (problem, wanted, of_server) = match trouble {
            Trouble::Final(problem) => {
                let error = failed(&server.address, &about(&job, &problem));
                let _ = job.answer.send(Err(error));
                return;
            }
            Trouble::Passing { problem, pause, of_server } => (problem, pause, of_server),
        };
        job.attempts += 1;
        let most = self.asking.attempts;
        let mut queue = self.lock();
        if of_server && queue.health[number].rests_until <= now {
            let failures = queue.health[number].failures.saturating_add(1);
            let rest = pause(&self.asking, failures).max(wanted.unwrap_or_default()).min(self.asking.longest_pause);
            queue.health[number] = Health { part: server.part, failures, rests_until: now + rest };
        }
        if job.attempts >= most {
            let problem = format!("asked {most} times without an answer, the last time: {problem}");
            let error = failed(&server.address, &about(&job, &problem));
            let _ = job.answer.send(Err(error));
        } else {
            job.not_before = now + pause(&self.asking, job.attempts);
            job.failed_at = Some(number);
            queue.jobs.push_front(job);
        }
        drop(queue);
        self.changed.notify_all();
    }
}

/// A problem with the document it is about.
fn about(job: &Job, problem: &str) -> String {
    format!("document `{}` ({} tokens): {problem}", foreign::name(&job.name), job.ids.len())
}

/// What a server gives of a document.
fn states(server: &Server, ids: &[i64]) -> Result<Vec<Tensor>, Trouble> {
    match server.address.engine {
        Engine::Vllm => vllm::states(server, ids),
        Engine::Sglang => sglang::states(server, ids),
    }
}

/// What a thread does: document after document.
fn work(number: usize, server: &Server, shared: &Shared) {
    while let Some(job) = shared.take(number) {
        let asked = catch_unwind(AssertUnwindSafe(|| states(server, &job.ids)));
        let asked = asked.unwrap_or_else(|payload| {
            Err(Trouble::Final(format!("reading its states failed: {}", foreign::panic_text(payload.as_ref()))))
        });
        match asked {
            Ok(states) => {
                shared.went_well(number);
                // Whoever does not want it any more does not listen.
                let _ = job.answer.send(Ok((server.address.to_string(), states)));
            }
            Err(trouble) => shared.went_wrong(number, server, job, trouble),
        }
    }
}
