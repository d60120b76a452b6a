//! How the processes of a run come together, wait for each other, and learn which of them failed first.
//!
//! Before there is a process group, and beside it later, ranks speak through a [`Store`]. A wait here has no time limit as
//! long as every peer is alive: each rank counts a heartbeat up, and only one that stands still for a minute, or a failure
//! that somebody reported, ends the wait. So building a data set or loading weights may take as long as it takes, and no
//! collective ever waits for it.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::Device;

use super::group::ProcessGroup;
use super::placement::Placement;
use super::store::Store;
use crate::error::{Error, Result};

/// How often things happen while ranks wait for each other.
#[derive(Debug, Clone, Copy)]
struct Rhythm {
    /// Between two heartbeats.
    beat: Duration,
    /// A peer whose heartbeat stands still for this long is taken for gone.
    silence: Duration,
    /// A failed rank that serves the store itself keeps it for this long, so that the others can read why.
    farewell: Duration,
}

const RHYTHM: Rhythm =
    Rhythm { beat: Duration::from_secs(2), silence: Duration::from_secs(60), farewell: Duration::from_millis(1500) };

/// Between two looks at the store, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LONGEST_LOOK: Duration = Duration::from_millis(200);
/// A wait is worth a line after this long.
const WORTH_SAYING: Duration = Duration::from_secs(10);
/// How long a rank whose peer is gone waits for that peer's own words.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A failure, as the ranks tell each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    rank: usize,
    message: String,
}

const FAILURE: &str = "failed";

/// This process among the others of its run.
#[derive(Debug)]
pub struct Meeting {
    placement: Placement,
    store: Store,
    rhythm: Rhythm,
    /// Waits so far; the same number on every rank.
    waits: Cell<u64>,
    has_failed: Cell<bool>,
    heartbeat: Option<Heartbeat>,
}

/// A thread that counts `alive/RANK` up.
#[derive(Debug)]
struct Heartbeat {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Heartbeat {
    fn start(store: Store, rank: usize, beat: Duration) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            // A store that is gone ends this thread; whoever waits for something notices by himself.
            while store.add(&alive_key(rank), 1).is_ok() {
                if stopped.recv_timeout(beat) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        Self { stop, thread }
    }
}

fn alive_key(rank: usize) -> String {
    format!("alive/{rank}")
}

impl Drop for Meeting {
    fn drop(&mut self) {
        if let Some(Heartbeat { stop, thread }) = self.heartbeat.take() {
            drop(stop);
            // It ended well or with its store; either way there is nothing to be told.
            let _ = thread.join();
        }
        if self.has_failed.get() && self.serves_store() {
            thread::sleep(self.rhythm.farewell);
        }
    }
}

impl Meeting {
    /// Opens the run's store, which another rank or the launcher may serve, trying for `timeout`. `say` receives a line
    /// when that takes long.
    pub fn join(placement: Placement, timeout: Duration, say: &dyn Fn(&str)) -> Result<Self> {
        Self::join_with(placement, timeout, say, RHYTHM)
    }

    fn join_with(placement: Placement, timeout: Duration, say: &dyn Fn(&str), rhythm: Rhythm) -> Result<Self> {
        let (host, port) = (placement.master_address.as_str(), placement.master_port);
        let store = if placement.rank == 0 && !placement.store_is_served {
            Store::host(host, listen(host, port)?, timeout)?
        } else {
            wait_for_port(host, port, timeout, say)?;
            Store::connect(host, port, timeout)?
        };
        // The place that torch's own ranks use in a store that a launcher serves: each start has its own.
        let store = store.prefixed(&format!("/worker/attempt_{}", placement.attempt))?;
        let heartbeat = Some(Heartbeat::start(store.another()?, placement.rank, rhythm.beat));
        Ok(Self { placement, store, rhythm, waits: Cell::new(0), has_failed: Cell::new(false), heartbeat })
    }

    /// Where this process stands.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    fn serves_store(&self) -> bool {
        self.placement.rank == 0 && !self.placement.store_is_served
    }

    /// Returns when every rank has called this, however long that takes, or with an error when one of them has failed or
    /// is gone. Ranks must wait for the same things in the same order.
    pub fn wait_for_all(&self, what: &'static str) -> Result<()> {
        let number = self.waits.replace(self.waits.get() + 1);
        let key = format!("wait/{number}");
        let all = self.placement.world_size as i64;
        let gone = |error: Error| self.peer(what, format!("the store does not answer: {error}"));
        let mut peers = self.peers();
        let mut arrived = self.store.add(&key, 1).map_err(gone)?;
        let mut pause = FIRST_LOOK;
        while arrived < all {
            peers.check(self, what)?;
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_LOOK);
            arrived = self.store.add(&key, 0).map_err(gone)?;
        }
        Ok(())
    }

    /// Tells the others what went wrong here, unless somebody was first. An error that is only the echo of a peer's end
    /// becomes that peer's own message, where it left one.
    pub fn report(&self, error: Error) -> Error {
        self.has_failed.set(true);
        if let Error::Peer { rank, operation, .. } = &error {
            let started = Instant::now();
            while started.elapsed() < LAST_WORDS {
                match self.failure() {
                    Ok(Some(failure)) if failure.rank != *rank => return echo(*rank, operation, &failure),
                    Ok(_) => thread::sleep(LONGEST_LOOK / 4),
                    Err(_) => return error,
                }
            }
            return error;
        }
        let failure = Failure { rank: self.placement.rank, message: error.to_string() };
        if let Ok(text) = serde_json::to_vec(&failure) {
            // Where the store is gone, so is everybody who could read this.
            let _ = self.store.set_first(FAILURE, &text);
        }
        error
    }

    /// The process group of all ranks: host memory through Gloo, and that of `device` through NCCL where it is a CUDA
    /// device. `timeout` is how long a collective may take. Everybody must be ready for it: [`Meeting::wait_for_all`]
    /// first.
    pub fn group(&self, device: Device, timeout: Duration) -> Result<ProcessGroup> {
        let Placement { rank, world_size, .. } = self.placement;
        let store = self.store.prefixed("gloo")?;
        let mut group = ProcessGroup::gloo(&store, rank, world_size, self.own_address()?, timeout)?;
        if device.is_cuda() {
            group.add_nccl(&self.store.prefixed("nccl")?, device, timeout)?;
        }
        Ok(group)
    }

    /// The store, for what else the ranks have to agree on before they have a group.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A watch over the other ranks.
    pub(super) fn peers(&self) -> Peers {
        Peers::new(self.placement.world_size)
    }

    /// This machine's address as seen by the others: the one it reaches the master from.
    fn own_address(&self) -> Result<IpAddr> {
        let (host, port) = (self.placement.master_address.as_str(), self.placement.master_port);
        let master = resolve(host, port)?;
        if master.ip().is_loopback() {
            return Ok(master.ip());
        }
        let failed = |error| Error::Failed(format!("no way from here to the master {host}: {error}"));
        let any: IpAddr = if master.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        // Connecting a datagram socket sends nothing; it chooses a route, and with it an address.
        let socket = UdpSocket::bind((any, 0)).map_err(failed)?;
        socket.connect(master).map_err(failed)?;
        Ok(socket.local_addr().map_err(failed)?.ip())
    }

    fn failure(&self) -> Result<Option<Failure>> {
        let text = self.store.try_get(FAILURE)?;
        Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
    }

    fn peer(&self, operation: &'static str, problem: String) -> Error {
        Error::Peer { rank: self.placement.rank, operation, problem }
    }
}

fn echo(rank: usize, operation: &'static str, failure: &Failure) -> Error {
    Error::Peer { rank, operation, problem: format!("rank {} failed first: {}", failure.rank, failure.message) }
}

/// Watches over the other ranks during a wait.
pub(super) struct Peers {
    looked: Instant,
    /// Heartbeat of each rank and when it last moved.
    beats: Vec<(i64, Instant)>,
}

impl Peers {
    fn new(world_size: usize) -> Self {
        let now = Instant::now();
        Self { looked: now, beats: vec![(-1, now); world_size] }
    }

    /// An error if one of them failed or is silent. Looks once a beat.
    pub(super) fn check(&mut self, meeting: &Meeting, what: &'static str) -> Result<()> {
        let Meeting { store, placement, rhythm, .. } = meeting;
        if self.looked.elapsed() < rhythm.beat {
            return Ok(());
        }
        self.looked = Instant::now();
        let gone = |error: Error| meeting.peer(what, format!("the store does not answer: {error}"));
        if let Some(failure) = meeting.failure().map_err(gone)? {
            return Err(echo(placement.rank, what, &failure));
        }
        for (rank, (beat, moved)) in self.beats.iter_mut().enumerate() {
            let now = store.add(&alive_key(rank), 0).map_err(gone)?;
            if now != *beat {
                (*beat, *moved) = (now, Instant::now());
            // A rank that never came has not failed: it may still be on its way.
            } else if *beat > 0 && moved.elapsed() > rhythm.silence {
                let seconds = moved.elapsed().as_secs();
                return Err(meeting.peer(what, format!("rank {rank} has been silent for {seconds} s")));
            }
        }
        Ok(())
    }
}

fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let failed =
        |problem: String| Error::Failed(format!("the master's address `{host}` cannot be resolved: {problem}"));
    let mut found = (host, port).to_socket_addrs().map_err(|error| failed(error.to_string()))?;
    found.next().ok_or_else(|| failed("it has none".to_owned()))
}

/// The store's socket: on this machine alone where the master is, else for all.
fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let failed = |error: std::io::Error| {
        Error::Failed(format!(
            "cannot serve the store of this run at {host}:{port}: {error}; choose another MASTER_PORT"
        ))
    };
    if resolve(host, port)?.ip().is_loopback() {
        return TcpListener::bind((host, port)).map_err(failed);
    }
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
        .map_err(failed)
}

/// Waits until somebody listens there.
fn wait_for_port(host: &str, port: u16, timeout: Duration, say: &dyn Fn(&str)) -> Result<()> {
    let started = Instant::now();
    let mut said = false;
    loop {
        // A name may come to mean something while a cluster starts.
        let problem = match resolve(host, port) {
            Ok(address) => match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(_) => return Ok(()),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        if started.elapsed() > timeout {
            let seconds = timeout.as_secs();
            return Err(Error::Failed(format!(
                "the store of this run at {host}:{port} could not be reached in {seconds} s: {problem}; rank 0 or the \
                 launcher serves it"
            )));
        }
        if !said && started.elapsed() > WORTH_SAYING {
            said = true;
            say(&format!("waiting for the store of this run at {host}:{port}: {problem}"));
        }
        thread::sleep(LONGEST_LOOK);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tch::Tensor;

    use super::super::group::ReduceOp;
    use super::*;

    /// Short enough for a test, long enough for threads that wait for a core beside other work.
    const QUICK: Rhythm =
        Rhythm { beat: Duration::from_millis(30), silence: Duration::from_secs(4), farewell: Duration::from_secs(2) };
    const TIMEOUT: Duration = Duration::from_secs(120);

    fn free_port() -> u16 {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
    }

    fn placement(rank: usize, world_size: usize, port: u16) -> Placement {
        Placement {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            master_address: "127.0.0.1".to_owned(),
            master_port: port,
            store_is_served: false,
            attempt: 0,
        }
    }

    /// Runs `body` on ranks that are threads.
    pub(in super::super) fn meet<T: Send>(world_size: usize, body: impl Fn(&Meeting) -> T + Sync) -> Vec<T> {
        let port = free_port();
        let body = &body;
        let run = move |rank| {
            let meeting = Meeting::join_with(placement(rank, world_size, port), TIMEOUT, &|_| (), QUICK).unwrap();
            body(&meeting)
        };
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || run(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// A rank that takes far longer than any limit of this test's collectives, and than what counts as silence.
    #[test]
    fn slow_work_meets_no_limit() {
        const COLLECTIVE: Duration = Duration::from_secs(3);
        let sums = meet(3, |meeting| {
            if meeting.placement().rank == 1 {
                thread::sleep(QUICK.silence + 2 * COLLECTIVE);
            }
            meeting.wait_for_all("the data")?;
            meeting.wait_for_all("the draft")?;
            let group = meeting.group(Device::Cpu, COLLECTIVE)?;
            let sum = Tensor::from_slice(&[group.rank() as f64]);
            group.all_reduce(&sum, ReduceOp::Sum)?;
            // Nobody leaves before the others are done.
            meeting.wait_for_all("the end")?;
            Ok::<f64, Error>(sum.double_value(&[0]))
        });
        for sum in sums {
            assert_eq!(sum.unwrap(), 3.0);
        }
    }

    #[test]
    fn a_failure_ends_every_wait_with_its_own_words() {
        let errors = meet(3, |meeting| {
            let error = match meeting.placement().rank {
                2 => Error::Failed("the cat sat on the cable".to_owned()),
                _ => meeting.wait_for_all("the data").unwrap_err(),
            };
            // As the wait gave it: reporting would look for those words itself.
            let text = error.to_string();
            meeting.report(error);
            text
        });
        assert_eq!(errors[2], "the cat sat on the cable");
        for (rank, error) in errors[..2].iter().enumerate() {
            let want = format!("rank {rank}: the data: rank 2 failed first: the cat sat on the cable");
            assert_eq!(*error, want);
        }
    }

    /// The rank that serves the store fails: the others still learn why.
    #[test]
    fn the_first_rank_says_why_before_its_store_goes() {
        let errors = meet(2, |meeting| {
            meeting.wait_for_all("the data").unwrap();
            let group = meeting.group(Device::Cpu, TIMEOUT).unwrap();
            match meeting.placement().rank {
                0 => meeting.report(Error::Failed("the disk is full".to_owned())),
                _ => {
                    let error = group.all_reduce(&Tensor::from_slice(&[1f32]), ReduceOp::Sum).unwrap_err();
                    meeting.report(error)
                }
            }
        });
        assert_eq!(errors[1].to_string(), "rank 1: all-reduce: rank 0 failed first: the disk is full");
    }

    #[test]
    fn a_silent_rank_is_found() {
        let outcomes = meet(2, |meeting| {
            if meeting.placement().rank == 1 {
                return Ok(()); // its heart stops
            }
            thread::sleep(QUICK.beat * 5);
            meeting.wait_for_all("the data")
        });
        let error = outcomes[0].as_ref().unwrap_err().to_string();
        assert!(error.starts_with("rank 0: the data: rank 1 has been silent for"), "{error}");
    }

    #[test]
    fn a_store_that_nobody_serves_is_an_error() {
        let alone = placement(1, 2, free_port());
        let error = Meeting::join(alone, Duration::from_millis(300), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("could not be reached in 0 s: Connection refused"), "{error}");
        let mut unknown = placement(1, 2, 1);
        unknown.master_address = "no-such-host.invalid".to_owned();
        let error = Meeting::join(unknown, Duration::from_millis(300), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("`no-such-host.invalid` cannot be resolved"), "{error}");
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = Meeting::join(placement(0, 2, port), TIMEOUT, &|_| ()).unwrap_err().to_string();
        assert!(error.contains("choose another MASTER_PORT"), "{error}");
    }
}
