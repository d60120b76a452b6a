//! What launchers of several machines tell each other, through the run's store.
//!
//! A thread of its own does the talking, because a connection whose other end has vanished may block for good: whoever
//! asks the board is answered at once with what is known, and whether the store still answers.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::dist::Store;
use crate::error::Result;

/// How often launchers talk, and when they lose patience.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rhythm {
    /// Between two looks at the board.
    pub(super) tick: Duration,
    /// A launcher that has said nothing for this long is gone.
    pub(super) silence: Duration,
    /// How long processes may take to end by themselves when one has failed.
    pub(super) grace: Duration,
    /// How long launchers wait for each other's word on a failure.
    pub(super) settle: Duration,
}

pub(super) const RHYTHM: Rhythm = Rhythm {
    tick: Duration::from_millis(100),
    silence: Duration::from_secs(30),
    grace: Duration::from_secs(3),
    settle: Duration::from_secs(10),
};

#[derive(Debug)]
enum Post {
    Set(String, Vec<u8>),
    /// Takes the next number of a series.
    Number(String),
}

/// What is known.
#[derive(Debug)]
struct Known {
    /// Keys that are looked for, and their values once there.
    values: BTreeMap<String, Option<Vec<u8>>>,
    /// Numbers that were taken.
    numbers: BTreeMap<String, i64>,
    /// Heartbeat of each machine and when it last moved.
    beats: Vec<(i64, Instant)>,
    /// When the store last answered.
    answered: Instant,
    /// Why it will not any more.
    lost: Option<String>,
    /// Posts that were handed over and are not written yet.
    waiting: usize,
}

/// A connection to the other launchers.
pub(super) struct Board {
    known: Arc<Mutex<Known>>,
    /// Dropped, it ends the thread.
    posts: Option<Sender<Post>>,
    thread: Option<JoinHandle<()>>,
    rhythm: Rhythm,
}

fn beat_key(node: usize) -> String {
    format!("beat/{node}")
}

impl Board {
    /// Starts talking as `node`, one of `nodes`.
    pub(super) fn start(store: Store, node: usize, nodes: usize, rhythm: Rhythm) -> Self {
        let now = Instant::now();
        let known = Known {
            values: BTreeMap::new(),
            numbers: BTreeMap::new(),
            beats: vec![(-1, now); nodes],
            answered: now,
            lost: None,
            waiting: 0,
        };
        let known = Arc::new(Mutex::new(known));
        let (posts, received) = mpsc::channel();
        let talker = Talker { store, known: Arc::clone(&known), posts: received, node };
        let thread = thread::spawn(move || talker.talk(rhythm.tick));
        Self { known, posts: Some(posts), thread: Some(thread), rhythm }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a value, soon.
    pub(super) fn set(&self, key: String, value: Vec<u8>) {
        self.post(Post::Set(key, value));
    }

    /// Takes the next number of a series, soon: see [`Board::number`].
    pub(super) fn take_number(&self, key: String) {
        self.post(Post::Number(key));
    }

    fn post(&self, post: Post) {
        self.known().waiting += 1;
        if let Some(posts) = &self.posts {
            // A thread that has ended says so in `lost`.
            let _ = posts.send(post);
        }
    }

    /// The number that was taken, once it is known.
    pub(super) fn number(&self, key: &str) -> Option<i64> {
        self.known().numbers.get(key).copied()
    }

    /// A value, once it is there; looks for it from the first question on.
    pub(super) fn value(&self, key: &str) -> Option<Vec<u8>> {
        self.known().values.entry(key.to_owned()).or_default().clone()
    }

    /// Why the store is out of reach, if it is.
    pub(super) fn lost(&self) -> Option<String> {
        let known = self.known();
        let silent = known.answered.elapsed();
        let too_long = || (silent > self.rhythm.silence).then(|| format!("no answer for {} s", silent.as_secs()));
        known.lost.clone().or_else(too_long)
    }

    /// A machine whose launcher is silent.
    pub(super) fn silent_node(&self) -> Option<(usize, Duration)> {
        let known = self.known();
        let silent = |(node, (_, moved)): (usize, &(i64, Instant))| (node, moved.elapsed());
        known.beats.iter().enumerate().map(silent).find(|(_, silent)| *silent > self.rhythm.silence)
    }

    /// Waits until everything is written that was to be, or it is clear that it will not be.
    pub(super) fn flush(&self, limit: Duration) {
        let started = Instant::now();
        while self.known().waiting > 0 && self.lost().is_none() && started.elapsed() < limit {
            thread::sleep(self.rhythm.tick / 4);
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.posts = None;
        let started = Instant::now();
        if let Some(thread) = self.thread.take() {
            // One that is stuck in a call is left to the end of the process.
            while !thread.is_finished() && started.elapsed() < Duration::from_secs(1) {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

struct Talker {
    store: Store,
    known: Arc<Mutex<Known>>,
    posts: Receiver<Post>,
    node: usize,
}

impl Talker {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn talk(&self, tick: Duration) {
        loop {
            match self.once() {
                Ok(true) => thread::sleep(tick),
                Ok(false) => return,
                Err(error) => {
                    self.known().lost = Some(error.to_string());
                    return;
                }
            }
        }
    }

    /// Says and asks everything once. False when nobody wants to know any more.
    fn once(&self) -> Result<bool> {
        loop {
            match self.posts.try_recv() {
                Ok(Post::Set(key, value)) => self.store.set(&key, &value)?,
                Ok(Post::Number(key)) => {
                    let number = self.store.add(&key, 1)?;
                    self.known().numbers.insert(key, number);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
            self.known().waiting -= 1;
        }
        self.store.add(&beat_key(self.node), 1)?;
        let (wanted, nodes) = {
            let known = self.known();
            let missing = known.values.iter().filter(|(_, value)| value.is_none()).map(|(key, _)| key.clone());
            (missing.collect::<Vec<_>>(), known.beats.len())
        };
        for key in wanted {
            if let Some(value) = self.store.try_get(&key)? {
                self.known().values.insert(key, Some(value));
            }
        }
        for node in 0..nodes {
            let beat = self.store.add(&beat_key(node), 0)?;
            let mut known = self.known();
            if known.beats[node].0 != beat {
                known.beats[node] = (beat, Instant::now());
            }
        }
        self.known().answered = Instant::now();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const QUICK: Rhythm = Rhythm { tick: Duration::from_millis(5), silence: Duration::from_secs(1), ..RHYTHM };

    fn until(what: &str, reached: impl Fn() -> bool) {
        let started = Instant::now();
        while !reached() {
            assert!(started.elapsed() < Duration::from_secs(20), "{what} never came");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn boards() -> (Store, Board, Board) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = Store::host("127.0.0.1", listener, Duration::from_secs(10)).unwrap();
        let [first, second] = [0, 1].map(|node| Board::start(store.another().unwrap(), node, 2, QUICK));
        (store, first, second)
    }

    #[test]
    fn what_one_writes_the_other_reads() {
        let (_store, first, second) = boards();
        assert_eq!(second.value("verdict"), None);
        first.set("verdict".to_owned(), b"fine".to_vec());
        first.flush(Duration::from_secs(10));
        until("the value", || second.value("verdict").as_deref() == Some(b"fine"));
        for board in [&first, &second] {
            board.take_number("order".to_owned());
            board.flush(Duration::from_secs(10));
        }
        assert_eq!((first.number("order"), second.number("order")), (Some(1), Some(2)));
        assert_eq!((first.lost(), second.silent_node()), (None, None));
    }

    #[test]
    fn a_launcher_that_falls_silent_is_found() {
        let (_store, first, second) = boards();
        thread::sleep(QUICK.silence * 3 / 2);
        assert_eq!(first.silent_node(), None, "both are alive");
        drop(second);
        until("the silence", || first.silent_node().is_some_and(|(node, _)| node == 1));
        assert_eq!(first.lost(), None);
    }

    #[test]
    fn a_store_that_goes_away_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let store = Store::host("127.0.0.1", listener, Duration::from_secs(10)).unwrap();
        let away = Store::connect("127.0.0.1", port, Duration::from_secs(2)).unwrap();
        let board = Board::start(away, 1, 2, QUICK);
        board.set("key".to_owned(), b"value".to_vec());
        board.flush(Duration::from_secs(10));
        drop(store);
        until("the loss", || board.lost().is_some());
    }
}
