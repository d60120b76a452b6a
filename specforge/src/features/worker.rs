//! A thread that makes features while the loop trains on those before.
//!
//! It works on one batch at a time, in the order in which they were asked for, and starts with the first of them. Dropped,
//! it ends what it is at and leaves the rest. What it asks of a GPU goes to a stream of its own: the loop's stream waits on
//! the device for what it takes, and for nothing else.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use tch::Device;

use super::FeatureBatch;
use super::pending::{Begun, Made, Pending};
use crate::error::{Error, Result, foreign};
use crate::streams::{Mark, Stream};
use crate::threads;

/// The thread, once something was asked of it.
pub(super) struct Worker {
    name: &'static str,
    /// Where its features are made.
    device: Device,
    running: Mutex<Option<Running>>,
}

struct Running {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

struct Job {
    make: Box<dyn FnOnce() -> Result<FeatureBatch> + Send>,
    answer: SyncSender<Result<Made>>,
    wanted: Weak<()>,
}

impl Worker {
    /// A thread of this name for features on this device. Nobody starts it yet.
    pub(super) fn new(name: &'static str, device: Device) -> Self {
        Self { name, device, running: Mutex::new(None) }
    }

    /// Asks for what `make` gives.
    pub(super) fn begin(&self, make: impl FnOnce() -> Result<FeatureBatch> + Send + 'static) -> Pending<'static> {
        let (answer, answered) = mpsc::sync_channel(1);
        let wanted = Arc::new(());
        let job = Job { make: Box::new(make), answer, wanted: Arc::downgrade(&wanted) };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_none() {
            match self.start() {
                Ok(started) => *running = Some(started),
                Err(error) => return Pending::later(move || Err(error)),
            }
        }
        if let Some(running) = running.as_ref() {
            // Where the thread is gone, so is the other end of the answer, and whoever waits is told.
            let _ = running.jobs.send(job);
        }
        Pending::begun(Begun { answer: answered, wanted, maker: self.name })
    }

    fn start(&self) -> Result<Running> {
        let device = self.device;
        // What the target is made of may still be on its way there.
        let loaded = Stream::current(device)?.map(Stream::mark).transpose()?;
        let (jobs, arriving) = mpsc::channel();
        let work = move || work(arriving, device, loaded);
        let thread = thread::Builder::new().name(self.name.to_owned()).spawn(work);
        let thread = thread.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Running { jobs, thread })
    }
}

fn work(jobs: Receiver<Job>, device: Device, loaded: Option<Mark>) {
    if device == Device::Cpu {
        // The cores are the training step's.
        threads::compute_alone();
    }
    let stream = own_stream(device, loaded.as_ref()).map_err(|error| error.to_string());
    for Job { make, answer, wanted } in jobs {
        if wanted.strong_count() == 0 {
            continue;
        }
        let stream = stream.as_ref().map_err(|problem| Error::Failed(problem.clone()));
        let make = || -> Result<Made> {
            let stream = *stream?;
            let features = make()?;
            Ok(Made { features, ready: stream.map(Stream::mark).transpose()? })
        };
        let made = catch_unwind(AssertUnwindSafe(make));
        let made = made.unwrap_or_else(|payload| Err(panicked("making features ahead", payload.as_ref())));
        // Whoever does not want it any more does not listen.
        let _ = answer.send(made);
    }
}

/// The stream of this thread, behind what was asked of the device before.
fn own_stream(device: Device, loaded: Option<&Mark>) -> Result<Option<Stream>> {
    let stream = Stream::beside(device)?;
    if let (Some(stream), Some(loaded)) = (stream, loaded) {
        stream.enter()?;
        stream.follow(loaded)?;
    }
    Ok(stream)
}

/// The error that a panic of a thread becomes.
pub(super) fn panicked(what: &str, payload: &(dyn std::any::Any + Send)) -> Error {
    Error::Failed(format!("{what} failed: {}", foreign::panic_text(payload)))
}

impl Drop for Worker {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(Running { jobs, thread }) = running.take() {
            drop(jobs);
            // Its panics are answers.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Worker({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::data::{DocumentRef, PackedBatch};

    fn named(name: &str) -> Result<FeatureBatch> {
        let batch = PackedBatch { documents: vec![DocumentRef::new(name, 0)], ..PackedBatch::default() };
        Ok(FeatureBatch::new(Arc::new(batch), Vec::new()))
    }

    fn name(features: FeatureBatch) -> String {
        features.batch.documents[0].name.clone()
    }

    /// A second batch is made while nobody has waited for the first, in order, and each answer is that of its question.
    #[test]
    fn what_was_asked_for_first_is_made_first_whoever_waits_when() {
        let worker = Worker::new("test", Device::Cpu);
        let (sender, order) = mpsc::channel();
        let begin = |label: &'static str| {
            let sender = sender.clone();
            worker.begin(move || {
                sender.send(label).unwrap();
                named(label)
            })
        };
        let (first, second) = (begin("one"), begin("two"));
        assert_eq!([order.recv().unwrap(), order.recv().unwrap()], ["one", "two"]);
        assert_eq!(name(second.wait().unwrap()), "two");
        assert_eq!(name(first.wait().unwrap()), "one");
    }

    /// An operator that is large enough for several threads starts none, whose being there would make all others sleep.
    #[test]
    fn features_on_a_cpu_are_made_by_one_thread() {
        let count = |name: &str| {
            let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
            let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
            names.filter(|own| own.trim() == name).count()
        };
        let compute = || {
            let _ = tch::Tensor::ones([1 << 20], (tch::Kind::Float, Device::Cpu)).f_exp_()?;
            named("large")
        };
        let worker = Worker::new("made alone", Device::Cpu);
        worker.begin(compute).wait().unwrap();
        if count("made alone") == 0 {
            eprintln!("SKIPPED: this system does not say what threads there are");
            return;
        }
        assert_eq!(count("made alone"), 1);
        // The same work on a thread that nothing was said to.
        let (done, stay) = mpsc::channel::<()>();
        let own = thread::Builder::new().name("made together".to_owned()).spawn(move || {
            compute().map(drop).unwrap();
            let _ = stay.recv();
        });
        let expected = (tch::get_num_threads() as usize).min(2);
        let comes = (0..10_000).any(|_| {
            thread::sleep(std::time::Duration::from_millis(1));
            count("made together") >= expected
        });
        assert!(comes, "{} threads", count("made together"));
        drop(done);
        own.unwrap().join().unwrap();
    }

    #[test]
    fn errors_and_panics_belong_to_the_batch_that_had_them() {
        let worker = Worker::new("test", Device::Cpu);
        let failing = worker.begin(|| Err(Error::Failed("shard 3 is gone".to_owned())));
        let panicking = worker.begin(|| panic!("index 7 out of range"));
        let sound = worker.begin(|| named("three"));
        assert_eq!(name(sound.wait().unwrap()), "three");
        let text = |pending: Pending<'_>| pending.wait().unwrap_err().to_string();
        assert!(text(failing).contains("shard 3 is gone"));
        let text = text(panicking);
        assert!(text.contains("making features ahead failed: index 7 out of range"), "{text}");
    }

    /// The thread stands in the first batch until the others are dropped: none of them is made any more.
    #[test]
    fn what_nobody_wants_is_not_made() {
        let made = Arc::new(AtomicUsize::new(0));
        let worker = Worker::new("test", Device::Cpu);
        let (release, held) = mpsc::channel();
        let first = worker.begin(move || {
            held.recv().unwrap();
            named("first")
        });
        for _ in 0..3 {
            let made = Arc::clone(&made);
            drop(worker.begin(move || {
                made.fetch_add(1, Ordering::SeqCst);
                named("unwanted")
            }));
        }
        release.send(()).unwrap();
        assert_eq!(name(first.wait().unwrap()), "first");
        assert_eq!(name(worker.begin(|| named("last")).wait().unwrap()), "last");
        assert_eq!(made.load(Ordering::SeqCst), 0);
        drop(worker); // joins
    }
}
