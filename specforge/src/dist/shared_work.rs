//! One list of work from which the processes of a run take piece by piece, and whose results come to the first of them.
//!
//! Pieces do not depend on each other, so nothing here is a collective: whoever is done takes the next one, and a slow
//! rank holds nobody up. Results go through the store of the [`Meeting`] into the hands of rank 0, which alone writes
//! what belongs to all: one file, one lock, and no folder that every machine has to see. A process on its own does the
//! same without a store, so that there is one way through every command.
//!
//! Each rank has one letter box. It is filled anew only when rank 0 has emptied it, so that the store never holds more
//! than one letter of each rank; what is finished meanwhile goes into the next letter.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use super::meeting::{Meeting, Peers};
use crate::error::{Error, Result};

/// Between two looks at the store while there is nothing else to do, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LONGEST_LOOK: Duration = Duration::from_millis(100);
/// How long rank 0 waits for the others to go, if it serves the store.
const GOODBYES: Duration = Duration::from_secs(10);

/// A list of work, as one of the processes sees it.
pub struct SharedWork<'a> {
    /// Before the keys of this list.
    name: &'static str,
    others: Option<Others<'a>>,
    /// Pieces taken, and what was counted, where there is no store.
    claimed: Cell<i64>,
    counted: Cell<i64>,
    /// Texts that came from rank 0 so far.
    announced: Cell<u64>,
    /// Results that are not on their way yet; on rank 0, and of a process on its own, its own that nobody asked for.
    results: RefCell<VecDeque<Vec<u8>>>,
}

/// The store, and what this rank knows of the others.
struct Others<'a> {
    meeting: &'a Meeting,
    peers: RefCell<Peers>,
    /// Letters written by this rank.
    written: Cell<i64>,
    /// Letters of all ranks and of each that rank 0 has taken.
    taken: RefCell<Vec<i64>>,
}

impl<'a> SharedWork<'a> {
    /// The list of this name among the processes that meet; of a process on its own where none do.
    pub fn of(meeting: Option<&'a Meeting>, name: &'static str) -> Self {
        let others = meeting.map(|meeting| Others {
            meeting,
            peers: RefCell::new(meeting.peers()),
            written: Cell::new(0),
            taken: RefCell::new(vec![0; meeting.placement().world_size]),
        });
        let (claimed, counted, announced) = (Cell::new(0), Cell::new(0), Cell::new(0));
        Self { name, others, claimed, counted, announced, results: RefCell::default() }
    }

    /// The list of a process on its own.
    pub fn alone() -> Self {
        Self::of(None, "")
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.others.as_ref().map_or(0, |others| others.meeting.placement().rank)
    }

    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.others.as_ref().map_or(1, |others| others.meeting.placement().world_size)
    }

    /// Whether results come to this process.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What `make` gives on rank 0, on every rank. All call this for the same things in the same order; the others wait,
    /// however long it takes, and learn of a failure.
    pub fn from_first(&self, what: &'static str, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let number = self.announced.replace(self.announced.get() + 1);
        let Some(others) = &self.others else { return make() };
        let key = self.key("announced", number as usize);
        if self.is_first() {
            let made = make()?;
            others.meeting.store().set(&key, &made).map_err(|error| self.gone(what, &error))?;
            return Ok(made);
        }
        let mut look = Look::new();
        loop {
            if let Some(made) = others.meeting.store().try_get(&key).map_err(|error| self.gone(what, &error))? {
                return Ok(made);
            }
            self.check_peers(what)?;
            look.pause();
        }
    }

    /// The number of the next piece, from 0, which from now on is this rank's. They never end: whoever knows how many
    /// there are stops at that.
    pub fn claim(&self) -> Result<usize> {
        let taken = match &self.others {
            None => self.claimed.replace(self.claimed.get() + 1),
            Some(_) => {
                self.check_peers("sharing the work")?;
                self.add("claimed", 0, 1)? - 1
            }
        };
        usize::try_from(taken).map_err(|_| Error::Failed(format!("piece {taken} of the shared work")))
    }

    /// Adds to a count of all ranks, and returns it.
    pub fn count(&self, amount: u64) -> Result<u64> {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        let sum = match &self.others {
            None => {
                self.counted.set(self.counted.get().saturating_add(amount));
                self.counted.get()
            }
            Some(_) => self.add("counted", 0, amount)?,
        };
        Ok(u64::try_from(sum).unwrap_or(0))
    }

    /// Whether any rank was asked to stop; `own` is whether this one was.
    pub fn is_stopped(&self, own: bool) -> Result<bool> {
        match &self.others {
            None => Ok(own),
            Some(_) => {
                self.check_peers("sharing the work")?;
                Ok(self.add("stopped", 0, i64::from(own))? > 0)
            }
        }
    }

    /// Gives a result to rank 0. It may take a while on its way; [`SharedWork::finish`] waits for it.
    pub fn hand_in(&self, result: Vec<u8>) -> Result<()> {
        self.results.borrow_mut().push_back(result);
        self.send().map(drop)
    }

    /// What was handed in since this was last asked, on rank 0; nothing on the others, which send what still waits.
    pub fn received(&self) -> Result<Vec<Vec<u8>>> {
        if !self.is_first() {
            self.send()?;
            return Ok(Vec::new());
        }
        let mut results: Vec<Vec<u8>> = self.results.borrow_mut().drain(..).collect();
        let Some(others) = &self.others else { return Ok(results) };
        self.check_peers("collecting results")?;
        let all = self.add("letters", 0, 0)?;
        let mut taken = others.taken.borrow_mut();
        if taken[0] == all {
            return Ok(results);
        }
        for rank in 1..taken.len() {
            if self.add("written", rank, 0)? == taken[rank] {
                continue;
            }
            let letter = others.meeting.store().get(&self.key("letter", rank));
            results.extend(parts(&letter.map_err(|error| self.gone("collecting results", &error))?)?);
            self.add("taken", rank, 1)?;
            taken[rank] += 1;
            taken[0] += 1;
        }
        Ok(results)
    }

    /// This rank does no more. Returns when no rank does: on rank 0 with every result in the hands of `each`, whichever
    /// rank it came from. Others need not have `each` called.
    pub fn finish(&self, each: &mut dyn FnMut(Vec<u8>) -> Result<()>) -> Result<()> {
        let mut look = Look::new();
        if let (Some(_), false) = (&self.others, self.is_first()) {
            while !self.send()? {
                self.check_peers("handing in results")?;
                look.pause();
            }
            self.add("finished", 0, 1)?;
        }
        let last = self.world_size() as i64 - 1;
        if self.is_first() {
            // Asked before the letters are looked at: nobody writes one who has finished.
            loop {
                let all = self.others.is_none() || self.add("finished", 0, 0)? == last;
                let results = self.received()?;
                let idle = results.is_empty();
                results.into_iter().try_for_each(&mut *each)?;
                if all {
                    break;
                }
                if idle {
                    look.pause();
                } else {
                    look = Look::new();
                }
            }
        }
        let Some(others) = &self.others else { return Ok(()) };
        others.meeting.wait_for_all("the end of the work")?;
        if !self.is_first() {
            // Rank 0 may be gone already, and that is well then.
            let _ = others.meeting.store().add(&self.key("left", 0), 1);
            return Ok(());
        }
        let started = Instant::now();
        let mut look = Look::new();
        while started.elapsed() < GOODBYES && self.add("left", 0, 0)? < last {
            look.pause();
        }
        Ok(())
    }

    /// Puts everything that waits into this rank's letter box, if that is empty. Whether nothing is left to be fetched.
    fn send(&self) -> Result<bool> {
        let Some(others) = self.others.as_ref().filter(|_| !self.is_first()) else { return Ok(true) };
        let rank = self.rank();
        let mut results = self.results.borrow_mut();
        let written = others.written.get();
        if written > 0 && self.add("taken", rank, 0)? < written {
            return Ok(false);
        }
        if results.is_empty() {
            return Ok(true);
        }
        let letter = letter(&results);
        others
            .meeting
            .store()
            .set(&self.key("letter", rank), &letter)
            .map_err(|error| self.gone("handing in", &error))?;
        results.clear();
        others.written.set(written + 1);
        // The sum first: rank 0 looks for letters as long as it has taken fewer.
        self.add("letters", 0, 1)?;
        self.add("written", rank, 1)?;
        Ok(false)
    }

    fn key(&self, what: &str, number: usize) -> String {
        format!("{}/{what}/{number}", self.name)
    }

    fn add(&self, what: &'static str, number: usize, amount: i64) -> Result<i64> {
        let Some(others) = &self.others else { return Ok(0) };
        others
            .meeting
            .store()
            .add(&self.key(what, number), amount)
            .map_err(|error| self.gone("sharing the work", &error))
    }

    fn check_peers(&self, what: &'static str) -> Result<()> {
        self.others.as_ref().map_or(Ok(()), |others| others.peers.borrow_mut().check(others.meeting, what))
    }

    fn gone(&self, operation: &'static str, error: &Error) -> Error {
        Error::Peer { rank: self.rank(), operation, problem: format!("the store does not answer: {error}") }
    }
}

/// Results in one text: eight bytes of length before each.
fn letter(results: &VecDeque<Vec<u8>>) -> Vec<u8> {
    let mut letter = Vec::with_capacity(results.iter().map(|result| result.len() + 8).sum());
    for result in results {
        letter.extend((result.len() as u64).to_le_bytes());
        letter.extend(result);
    }
    letter
}

/// The results of a letter.
fn parts(mut letter: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut results = Vec::new();
    while let Some((length, rest)) = letter.split_first_chunk() {
        let whole = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| rest.split_at_checked(length));
        let Some((result, rest)) = whole else {
            return Err(Error::Failed("a result of another process is cut off".to_owned()));
        };
        results.push(result.to_vec());
        letter = rest;
    }
    Ok(results)
}

/// Pauses that become longer.
struct Look(Duration);

impl Look {
    fn new() -> Self {
        Self(FIRST_LOOK)
    }

    fn pause(&mut self) {
        thread::sleep(self.0);
        self.0 = (self.0 * 2).min(LONGEST_LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::super::meeting::tests::meet;
    use super::*;

    /// Takes pieces until there are no more, and hands in each with the rank that did it.
    fn take_all(work: &SharedWork<'_>, pieces: usize, got: &mut Vec<Vec<u8>>) -> usize {
        let mut done = 0;
        loop {
            got.extend(work.received().unwrap());
            let piece = work.claim().unwrap();
            if piece >= pieces {
                return done;
            }
            work.hand_in(vec![piece as u8; piece % 7]).unwrap();
            work.hand_in(format!("piece {piece}").into_bytes()).unwrap();
            work.count(piece as u64).unwrap();
            done += 1;
        }
    }

    #[test]
    fn every_piece_is_done_once_and_every_result_arrives() {
        const PIECES: usize = 60;
        let check = |mut got: Vec<Vec<u8>>| {
            let mut want: Vec<Vec<u8>> = (0..PIECES).map(|piece| vec![piece as u8; piece % 7]).collect();
            want.extend((0..PIECES).map(|piece| format!("piece {piece}").into_bytes()));
            got.sort();
            want.sort();
            assert_eq!(got, want);
        };
        let mut got = Vec::new();
        let alone = SharedWork::alone();
        assert_eq!(take_all(&alone, PIECES, &mut got), PIECES);
        alone
            .finish(&mut |result| {
                got.push(result);
                Ok(())
            })
            .unwrap();
        check(got);
        for ranks in [1, 2, 4] {
            let all = meet(ranks, |meeting| {
                let work = SharedWork::of(Some(meeting), "test");
                let start = work.from_first("the start", || Ok(format!("from {}", work.rank()).into_bytes())).unwrap();
                let mut got = Vec::new();
                let done = take_all(&work, PIECES, &mut got);
                work.finish(&mut |result| {
                    got.push(result);
                    Ok(())
                })
                .unwrap();
                (start, done, got)
            });
            assert_eq!(all.iter().map(|(_, done, _)| done).sum::<usize>(), PIECES);
            assert!(all.iter().all(|(start, ..)| start == b"from 0"));
            assert!(all[1..].iter().all(|(.., got)| got.is_empty()));
            check(all.into_iter().next().unwrap().2);
        }
    }

    #[test]
    fn a_wish_to_stop_reaches_all_and_counts_are_sums() {
        let all = meet(3, |meeting| {
            let work = SharedWork::of(Some(meeting), "test");
            work.count(10 + work.rank() as u64).unwrap();
            meeting.wait_for_all("the counts").unwrap();
            let before = work.is_stopped(false).unwrap();
            meeting.wait_for_all("the first look").unwrap();
            work.is_stopped(work.rank() == 1).unwrap();
            meeting.wait_for_all("the wish").unwrap();
            let seen = (work.count(0).unwrap(), before, work.is_stopped(false).unwrap());
            work.finish(&mut |_| Ok(())).unwrap();
            seen
        });
        assert_eq!(all, [(33, false, true); 3]);
    }

    /// A rank that fails ends the others, which wait for it at the end.
    #[test]
    fn a_failure_of_one_rank_is_the_error_of_all() {
        let errors = meet(3, |meeting| {
            let work = SharedWork::of(Some(meeting), "test");
            let outcome = match work.rank() {
                2 => Err(Error::Failed("the cat sat on the cable".to_owned())),
                _ => work.finish(&mut |_| Ok(())),
            };
            let error = outcome.unwrap_err();
            let text = error.to_string();
            meeting.report(error);
            text
        });
        for (rank, error) in errors[..2].iter().enumerate() {
            assert!(error.starts_with(&format!("rank {rank}: ")), "{error}");
            assert!(error.ends_with("rank 2 failed first: the cat sat on the cable"), "{error}");
        }
    }

    #[test]
    fn a_letter_that_is_cut_off_is_refused() {
        let whole = letter(&VecDeque::from([b"one".to_vec(), Vec::new(), b"three".to_vec()]));
        assert_eq!(parts(&whole).unwrap(), [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
        assert!(parts(&whole[..whole.len() - 1]).is_err());
    }
}
