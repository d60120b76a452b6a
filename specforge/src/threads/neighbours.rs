//! Threads wait as the machine allows: by spinning while nobody else wants their cores, asleep while somebody does.
//!
//! A waiting thread that sleeps is woken through the kernel, which costs tens of microseconds, on a virtual machine more
//! than a hundred, for each of the thousands of operators of a training step: up to a quarter of its time. One that
//! spins holds a core that a neighbour wants, and a step takes three times as long beside a single busy process. So a
//! thread of ours watches how long this process waits for cores, which the kernel counts, and tells libgomp.
//!
//! libgomp offers no call for it. It stops spinning by itself, though, while it has more threads than there are processors:
//! a crowd of threads that sleep (csrc/crowd.cpp) makes it so for as long as neighbours are there.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often it is looked.
const WINDOW: Duration = Duration::from_millis(50);

/// Windows that are judged together. Every system has something that wakes now and then for some milliseconds: a single window
/// is full of that.
const TOGETHER: usize = 5;

/// Share of these windows that threads of this process waited for a core, from which on there is a neighbour. On a virtual machine of
/// two cores it was 0.02 with nobody else there, at most 0.07, and 0.46 to 0.99 beside one busy process.
const NEIGHBOUR: f64 = 0.2;

/// Windows without a neighbour after which threads spin again: a second.
const CALM: u32 = 20;

unsafe extern "C" {
    fn specforge_crowd() -> i32;
}

/// Starts to watch, for as long as the process lives.
pub fn watch() {
    // Without this thread everything works, only not as fast beside others.
    let _ = thread::Builder::new().name("neighbours".to_owned()).spawn(|| {
        let (mut judge, mut waits, mut crowd) = (Judge::default(), Waits::default(), None);
        loop {
            thread::sleep(WINDOW);
            let share = waits.since_last().as_secs_f64() / WINDOW.as_secs_f64();
            match (judge.has_neighbour(share), &crowd) {
                (true, None) => crowd = Crowd::gather(),
                (false, Some(_)) => crowd = None,
                _ => (),
            }
        }
    });
}

/// What the last windows say.
#[derive(Debug, Default)]
struct Judge {
    /// Shares of the last windows, in no order.
    shares: [f64; TOGETHER],
    /// Windows that were looked at.
    seen: usize,
    /// Windows that a neighbour is still reckoned with.
    left: u32,
}

impl Judge {
    /// Whether somebody else wants our cores, after a window that was waited for this share of it.
    fn has_neighbour(&mut self, share: f64) -> bool {
        self.shares[self.seen % TOGETHER] = share;
        self.seen += 1;
        let mean = self.shares.iter().sum::<f64>() / TOGETHER as f64;
        self.left = if mean > NEIGHBOUR { CALM } else { self.left.saturating_sub(1) };
        self.left > 0
    }
}

/// Time that each thread of this process has waited for a core, in nanoseconds, when it was last looked.
#[derive(Debug, Default)]
struct Waits(HashMap<OsString, u64>);

impl Waits {
    /// Time that the threads of this process would have computed since the last look if there had been a core.
    ///
    /// Each thread's own: one that ended takes its time with it, and the sum of all would hide what others waited meanwhile.
    fn since_last(&mut self) -> Duration {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let now: HashMap<_, _> = tasks
            .filter_map(|task| {
                let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
                Some((task.file_name(), text.split(' ').nth(1)?.parse().ok()?))
            })
            .collect();
        let before = std::mem::replace(&mut self.0, now);
        let since = |(task, waited): (_, &u64)| waited.saturating_sub(before.get(task).copied().unwrap_or(0));
        Duration::from_nanos(self.0.iter().map(since).sum())
    }
}

/// Threads that sleep, too many for libgomp to spin.
struct Crowd {
    thread: Option<JoinHandle<()>>,
    /// Its end ends the thread, and with it the team.
    stay: Option<mpsc::Sender<()>>,
}

impl Crowd {
    fn gather() -> Option<Self> {
        let (stay, leave) = mpsc::channel::<()>();
        let body = move || {
            // SAFETY: takes nothing and starts threads of the calling thread's own.
            unsafe { specforge_crowd() };
            let _ = leave.recv();
        };
        let thread = thread::Builder::new().name("crowd".to_owned()).spawn(body).ok()?;
        Some(Self { thread: Some(thread), stay: Some(stay) })
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        drop(self.stay.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    use std::time::Instant;

    #[test]
    fn a_neighbour_is_reckoned_with_for_a_second() {
        let mut judge = Judge::default();
        assert!(!judge.has_neighbour(0.02));
        let comes = (1..).find(|_| judge.has_neighbour(0.8)).unwrap();
        assert_eq!(comes, 2, "windows until a busy process is a neighbour");
        let calm = (1..).take_while(|_| judge.has_neighbour(0.0)).count();
        assert!((CALM as usize..CALM as usize + TOGETHER).contains(&calm), "{calm} windows");
        assert!(!judge.has_neighbour(0.02));
    }

    /// Shares of quiet machines: a core is taken for half a window now and then, and a thread starts every second.
    #[test]
    fn what_wakes_now_and_then_is_no_neighbour() {
        let mut judge = Judge::default();
        for window in 0..1000 {
            let share = if window % 10 == 0 { 0.5 } else { 0.03 };
            assert!(!judge.has_neighbour(share), "window {window}");
        }
    }

    /// More threads than processors, or libgomp goes on spinning; and they leave when they are told.
    #[test]
    fn a_crowd_is_larger_than_the_machine_and_leaves() {
        let threads = || fs::read_dir("/proc/self/task").map_or(0, |tasks| tasks.flatten().filter(is_of_crowd).count());
        fn is_of_crowd(task: &fs::DirEntry) -> bool {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "crowd")
        }
        let processors = thread::available_parallelism().unwrap().get();
        // Looks, not seconds: on a busy machine a look takes as long as the crowd has to wait for its turn.
        let comes_to = |wanted: &dyn Fn(usize) -> bool| {
            (0..10_000).any(|_| {
                thread::sleep(Duration::from_millis(1));
                wanted(threads())
            })
        };
        let crowd = Crowd::gather().unwrap();
        assert!(comes_to(&|count| count > processors), "{} threads beside {processors} processors", threads());
        drop(crowd);
        assert!(comes_to(&|count| count == 0), "{} threads stay", threads());
    }

    /// Threads that share one core wait for it, and the kernel says so.
    #[test]
    fn waiting_for_a_core_is_counted() {
        let ours = sched_getaffinity(None).unwrap();
        let core = (0..CpuSet::MAX_CPU).find(|&core| ours.is_set(core)).unwrap();
        let mut waits = Waits::default();
        waits.since_last();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut one = CpuSet::new();
                    one.set(core);
                    sched_setaffinity(None, &one).unwrap();
                    let until = Instant::now() + Duration::from_millis(500);
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                });
            }
            thread::sleep(Duration::from_millis(300));
            // One of the two waits at any time; that others of this process end meanwhile takes nothing away.
            assert!(waits.since_last() > Duration::from_millis(100), "nobody waited for a core");
        });
    }

    /// A thread's end is no gain of time for the others.
    #[test]
    fn a_thread_that_ends_takes_nothing_from_the_others() {
        let long = Duration::from_secs(1 << 20).as_nanos() as u64;
        let mut waits = Waits(HashMap::from([(OsString::from("ended"), long)]));
        assert!(waits.since_last() > Duration::ZERO, "what living threads waited");
    }
}
