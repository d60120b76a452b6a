//! The machines of a run: how their launchers meet, stop together, and agree on what came first and what comes next.
//!
//! Machine 0 serves the store and decides. The others tell it how their processes ended (a verdict) and do what it says;
//! where it cannot be reached, they stop.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Machines;
use super::board::{Board, Rhythm};
use super::failure::Failure;
use super::relay::Sink;
use crate::dist::Store;
use crate::error::{Error, Result};

/// How long a machine waits for the others at the start.
const PATIENCE: Duration = Duration::from_secs(600);
/// A wait is worth a line after this long.
const WORTH_SAYING: Duration = Duration::from_secs(10);
/// How long one call of the store may take.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks for the others at the start.
const LOOK: Duration = Duration::from_millis(100);
/// How long machine 0 keeps its store for the others to read how it all ended.
const FAREWELL: Duration = Duration::from_secs(5);

/// Processes of one machine, far more than any has.
const MOST_PROCESSES: usize = 1 << 16;

/// How a machine was started; what has to agree with the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Announcement {
    processes: usize,
    nodes: usize,
    max_restarts: u64,
}

/// How one machine's processes ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Verdict {
    failure: Option<Failure>,
    /// Number of the failure among those of all machines, by the store's count; the clocks of machines differ.
    order: Option<i64>,
    /// Whether a signal asked this machine to stop.
    interrupted: bool,
}

/// What happens next, on every machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Decision {
    /// The first failure; nothing where all ended well.
    pub(super) failure: Option<Failure>,
    pub(super) restart: bool,
}

/// This machine among the others.
pub(super) struct Nodes {
    own: usize,
    count: usize,
    max_restarts: u64,
    rhythm: Rhythm,
    /// Nothing for a single machine.
    board: Option<Board>,
    /// Rank of this machine's first process.
    pub(super) first_rank: usize,
    pub(super) world_size: usize,
    pub(super) master_address: String,
    pub(super) master_port: u16,
    /// Machine 0 serves it as long as this lives.
    _store: Store,
}

impl Nodes {
    /// Opens the run's store and meets the other launchers. `signal` ends the wait for them.
    pub(super) fn join(
        machines: &Machines,
        processes: usize,
        max_restarts: u64,
        rhythm: Rhythm,
        signal: &AtomicI32,
        sink: &Sink,
    ) -> Result<Self> {
        let Machines { count, own, address, port } = machines.clone();
        let (store, port) = match own {
            0 => serve(&address, port, count)?,
            _ => connect(&address, port, signal, sink)?,
        };
        let mut nodes = Self {
            own,
            count,
            max_restarts,
            rhythm,
            board: None,
            first_rank: 0,
            world_size: processes,
            master_address: address,
            master_port: port,
            _store: store,
        };
        if count > 1 {
            // The workers' keys lie beside these.
            let store = nodes._store.another()?.prefixed("/launcher")?;
            let own_words = Announcement { processes, nodes: count, max_restarts };
            let all = meet(&store, own, &own_words, signal, sink)?;
            nodes.first_rank = all[..own].iter().map(|node| node.processes).sum();
            nodes.world_size = all.iter().map(|node| node.processes).sum();
            nodes.board = Some(Board::start(store, own, count, rhythm));
        }
        Ok(nodes)
    }

    /// Whether something has gone wrong on another machine.
    pub(super) fn must_stop(&self, attempt: u64) -> bool {
        self.board.as_ref().is_some_and(|board| {
            board.value(&format!("{attempt}/stop")).is_some()
                || board.lost().is_some()
                || (self.own == 0 && board.silent_node().is_some())
        })
    }

    /// Tells the other machines to stop.
    pub(super) fn stop_all(&self, attempt: u64) {
        if let Some(board) = &self.board {
            board.set(format!("{attempt}/stop"), Vec::new());
        }
    }

    /// Notes that a failure with a reason of its own was seen here now.
    pub(super) fn note_cause(&self, attempt: u64) {
        if let Some(board) = &self.board {
            board.take_number(format!("{attempt}/order"));
        }
    }

    /// Says how this machine's processes ended, and waits until it is known what happens next.
    pub(super) fn settle(&self, attempt: u64, failure: Option<Failure>, interrupted: bool) -> Decision {
        let mut verdict = Verdict { failure, order: None, interrupted };
        let Some(board) = &self.board else {
            return decide(&[Some(verdict)], attempt, self.max_restarts);
        };
        board.flush(self.rhythm.settle);
        verdict.order = board.number(&format!("{attempt}/order"));
        match self.own {
            0 => self.settle_for_all(board, attempt, verdict),
            _ => self.ask(board, attempt, verdict),
        }
    }

    /// Machine 0: collects the verdicts. Waits without limit while nothing has failed and everybody is alive.
    fn settle_for_all(&self, board: &Board, attempt: u64, own: Verdict) -> Decision {
        let mut verdicts = vec![None; self.count];
        verdicts[0] = Some(own);
        let mut trouble: Option<Instant> = None;
        loop {
            for (node, verdict) in verdicts.iter_mut().enumerate().filter(|(_, verdict)| verdict.is_none()) {
                *verdict = board.value(&format!("{attempt}/verdict/{node}")).and_then(|text| read(&text));
            }
            if verdicts.iter().all(Option::is_some) || board.lost().is_some() {
                break;
            }
            let failed = verdicts.iter().flatten().any(|verdict: &Verdict| verdict.failure.is_some());
            if trouble.is_none() && (failed || self.must_stop(attempt)) {
                self.stop_all(attempt);
                trouble = Some(Instant::now());
            }
            if trouble.is_some_and(|since| since.elapsed() > self.rhythm.grace + self.rhythm.settle) {
                break;
            }
            thread::sleep(self.rhythm.tick);
        }
        let decision = decide(&verdicts, attempt, self.max_restarts);
        board.set(format!("{attempt}/decision"), written(&decision));
        board.flush(FAREWELL);
        let started = Instant::now();
        let unread = |node: usize| board.value(&format!("{attempt}/read/{node}")).is_none();
        let present = |node: &usize| verdicts[*node].is_some();
        while !decision.restart && (1..self.count).filter(present).any(unread) && started.elapsed() < FAREWELL {
            thread::sleep(self.rhythm.tick);
        }
        decision
    }

    /// Every other machine: hands in its verdict and does what machine 0 decides.
    fn ask(&self, board: &Board, attempt: u64, verdict: Verdict) -> Decision {
        board.set(format!("{attempt}/verdict/{}", self.own), written(&verdict));
        let mut trouble: Option<Instant> = None;
        // Machine 0 may wait for a third one.
        let limit = self.rhythm.grace * 2 + self.rhythm.settle * 2;
        let why = loop {
            let decision = board.value(&format!("{attempt}/decision")).and_then(|text| read::<Decision>(&text));
            if let Some(decision) = decision {
                board.set(format!("{attempt}/read/{}", self.own), Vec::new());
                board.flush(FAREWELL);
                return decision;
            }
            if let Some(why) = board.lost() {
                break why;
            }
            if trouble.is_none() && (verdict.failure.is_some() || self.must_stop(attempt)) {
                trouble = Some(Instant::now());
            }
            if trouble.is_some_and(|since| since.elapsed() > limit) {
                break format!("no decision for {} s", limit.as_secs());
            }
            thread::sleep(self.rhythm.tick);
        };
        let lost = Failure::new("node 0".to_owned(), format!("its launcher does not answer: {why}"));
        let failure = verdict.failure.filter(|failure| !failure.is_echo).unwrap_or(lost);
        Decision { failure: Some(failure), restart: false }
    }
}

/// The first failure of all, and whether to start again.
fn decide(verdicts: &[Option<Verdict>], attempt: u64, max_restarts: u64) -> Decision {
    let told = verdicts.iter().enumerate().filter_map(|(node, verdict)| match verdict {
        Some(verdict) => {
            let failure = verdict.failure.clone()?;
            Some(((failure.is_echo, verdict.order.unwrap_or(i64::MAX), node), failure))
        }
        // A silent machine is a reason for echoes, but a worse one than somebody's own words.
        None => {
            let failure = Failure::new(format!("node {node}"), "its launcher does not answer".to_owned());
            Some(((false, i64::MAX, node), failure))
        }
    });
    let failure = told.min_by_key(|(order, _)| *order).map(|(_, failure)| failure);
    let may_restart = attempt < max_restarts
        && verdicts.iter().all(|verdict| verdict.as_ref().is_some_and(|verdict| !verdict.interrupted));
    // Wrong usage and bad input stay wrong; after a start that went well, they are something else.
    let restart = failure.as_ref().is_some_and(|failure| may_restart && (failure.code != 2 || attempt > 0));
    Decision { failure, restart }
}

fn written<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: for<'a> Deserialize<'a>>(text: &[u8]) -> Option<T> {
    serde_json::from_slice(text).ok()
}

/// Serves the store: for this machine alone, or for all.
fn serve(address: &str, port: u16, count: usize) -> Result<(Store, u16)> {
    let failed = |error: std::io::Error| {
        Error::Failed(format!(
            "cannot serve the store of this run on port {port}: {error}; choose another --master-port"
        ))
    };
    let listener = match count {
        1 => TcpListener::bind((address, port)).map_err(failed)?,
        _ => {
            let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
            TcpListener::bind(any.map(|any| (any, port).into()).as_slice()).map_err(failed)?
        }
    };
    let port = listener.local_addr().map_err(failed)?.port();
    let own = if count == 1 { address } else { "127.0.0.1" };
    Ok((Store::host(own, listener, STORE_TIMEOUT)?, port))
}

/// Connects to the store of machine 0, waiting for it.
fn connect(address: &str, port: u16, signal: &AtomicI32, sink: &Sink) -> Result<(Store, u16)> {
    let mut wait = Wait::new(signal, sink);
    loop {
        let found = (address, port).to_socket_addrs().map(|mut found| found.next());
        let problem = match found {
            Ok(Some(socket)) => match TcpStream::connect_timeout(&socket, Duration::from_secs(2)) {
                Ok(_) => return Ok((Store::connect(address, port, STORE_TIMEOUT)?, port)),
                Err(error) => error.to_string(),
            },
            Ok(None) => "the name has no address".to_owned(),
            Err(error) => error.to_string(),
        };
        wait.pause(|| format!("the launcher of node 0 at {address}:{port} ({problem})"))?;
    }
}

/// Announces this machine and waits for all others.
fn meet(
    store: &Store,
    own: usize,
    own_words: &Announcement,
    signal: &AtomicI32,
    sink: &Sink,
) -> Result<Vec<Announcement>> {
    let key = |node: usize| format!("node/{node}");
    if own >= own_words.nodes || !store.set_first(&key(own), &written(own_words))? {
        return Err(Error::Usage(format!(
            "--node-rank {own}: another launcher of this run has that number; expected one of 0 to {} on each machine, once",
            own_words.nodes - 1
        )));
    }
    let mut all: Vec<Option<Announcement>> = vec![None; own_words.nodes];
    let mut wait = Wait::new(signal, sink);
    loop {
        for (node, words) in all.iter_mut().enumerate().filter(|(_, words)| words.is_none()) {
            let Some(text) = store.try_get(&key(node))? else { continue };
            // Numbers of another machine: sums are made of them.
            let read = read(&text).filter(|read: &Announcement| (1..=MOST_PROCESSES).contains(&read.processes));
            let words = words.insert(read.ok_or_else(|| {
                let problem = "what it says of itself cannot be read: is it of the same version?";
                Error::Failed(format!("the launcher of node {node}: {problem}"))
            })?);
            let (there, here) = ((words.nodes, words.max_restarts), (own_words.nodes, own_words.max_restarts));
            if there != here {
                return Err(Error::Usage(format!(
                    "node {node} was started with --nnodes {} --max-restarts {}, this one, node {own}, with --nnodes {} \
                     --max-restarts {}: expected the same on every machine",
                    there.0, there.1, here.0, here.1
                )));
            }
        }
        let missing: Vec<String> =
            all.iter().enumerate().filter(|(_, words)| words.is_none()).map(|(node, _)| node.to_string()).collect();
        if missing.is_empty() {
            return Ok(all.into_iter().flatten().collect());
        }
        wait.pause(|| format!("the launcher of node {}", missing.join(", ")))?;
    }
}

/// A wait for other machines: it says so after a while, and ends at a signal or when patience does.
struct Wait<'a> {
    signal: &'a AtomicI32,
    sink: &'a Sink,
    started: Instant,
    said: bool,
}

impl<'a> Wait<'a> {
    fn new(signal: &'a AtomicI32, sink: &'a Sink) -> Self {
        Self { signal, sink, started: Instant::now(), said: false }
    }

    fn pause(&mut self, what: impl Fn() -> String) -> Result<()> {
        if self.signal.load(Ordering::Relaxed) != 0 {
            return Err(Error::Failed(format!("interrupted while waiting for {}", what())));
        }
        let elapsed = self.started.elapsed();
        if elapsed > PATIENCE {
            return Err(Error::Failed(format!("waited {} s for {}", elapsed.as_secs(), what())));
        }
        if !self.said && elapsed > WORTH_SAYING {
            self.said = true;
            self.sink.say(&format!("waiting for {}", what()));
        }
        thread::sleep(LOOK);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::relay::tests::Page;
    use super::*;

    fn ended(failure: Option<(&str, bool, u8)>, order: Option<i64>) -> Option<Verdict> {
        let failure = failure.map(|(who, is_echo, code)| Failure {
            is_echo,
            code,
            ..Failure::new(who.to_owned(), "problem".to_owned())
        });
        Some(Verdict { failure, order, interrupted: false })
    }

    fn first(verdicts: &[Option<Verdict>]) -> Option<String> {
        decide(verdicts, 0, 0).failure.map(|failure| failure.who)
    }

    #[test]
    fn the_first_failure_of_all_machines_is_the_reason() {
        let (echo, early, late) = (("echo", true, 1), ("early", false, 1), ("late", false, 1));
        assert_eq!(first(&[ended(None, None), ended(None, None)]), None);
        let all = [ended(Some(echo), None), ended(Some(late), Some(2)), ended(Some(early), Some(1))];
        assert_eq!(first(&all).as_deref(), Some("early"));
        assert_eq!(first(&all[..2]).as_deref(), Some("late"));
        assert_eq!(first(&[all[0].clone(), ended(None, None)]).as_deref(), Some("echo"));
        // A machine that vanished explains an echo, and nothing else.
        assert_eq!(first(&[all[0].clone(), None]).as_deref(), Some("node 1"));
        assert_eq!(first(&[None, all[1].clone()]).as_deref(), Some("late"));
    }

    #[test]
    fn what_may_be_tried_again() {
        let failed = |code| ended(Some(("rank 0", false, code)), None);
        let restarts = |verdicts: &[Option<Verdict>], attempt| decide(verdicts, attempt, 2).restart;
        assert!(restarts(&[failed(1)], 0) && restarts(&[failed(1)], 1));
        assert!(!restarts(&[failed(1)], 2), "no more than asked for");
        assert!(!restarts(&[failed(2)], 0), "bad input stays bad");
        assert!(restarts(&[failed(2)], 1));
        assert!(!restarts(&[ended(None, None)], 0));
        assert!(!restarts(&[failed(1), None], 0), "a machine is gone");
        let stopped = Some(Verdict { interrupted: true, ..failed(1).unwrap() });
        assert!(!restarts(&[failed(1), stopped], 0), "somebody asked to stop");
    }

    #[test]
    fn machines_that_do_not_fit_together_say_so() {
        let (store, _) = serve("127.0.0.1", 0, 1).unwrap();
        let words = Announcement { processes: 1, nodes: 2, max_restarts: 0 };
        let (signal, page) = (AtomicI32::new(0), Page::default());
        store.set_first("node/0", &written(&Announcement { max_restarts: 3, ..words.clone() })).unwrap();
        let error = meet(&store, 1, &words, &signal, &page.sink()).unwrap_err().to_string();
        assert!(error.starts_with("node 0 was started with --nnodes 2 --max-restarts 3, this one, node 1"), "{error}");
        let error = meet(&store, 1, &words, &signal, &page.sink()).unwrap_err().to_string();
        assert!(error.starts_with("--node-rank 1: another launcher"), "{error}");
    }

    #[test]
    fn a_signal_ends_the_wait_for_other_machines() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = connect("127.0.0.1", free, &AtomicI32::new(15), &Page::default().sink()).unwrap_err().to_string();
        assert!(error.starts_with("interrupted while waiting for the launcher of node 0 at 127.0.0.1:"), "{error}");
        assert!(error.contains("Connection refused"), "{error}");
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = serve("127.0.0.1", port, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port}: Address already in use")), "{error}");
        assert!(error.contains("--master-port"), "{error}");
    }
}
