//! Hidden states are asked for before they are needed: in which order, how many at once, and what comes of an error. No
//! clock is looked at: what was asked for when is counted where it is asked for.

use std::sync::Mutex;

use serde_json::json;
use specforge::data::PackedBatch;
use specforge::error::{Error, Result};

use super::{World, rows};

/// What a source was asked for, and when that was awaited.
#[derive(Default)]
pub(super) struct Seen(Mutex<Log>);

#[derive(Default)]
struct Log {
    /// Documents of each batch that was asked for.
    begun: Vec<Vec<String>>,
    /// Number of each batch that was awaited, and how many had been asked for by then.
    awaited: Vec<(usize, usize)>,
    /// This one cannot be had.
    fails: Option<usize>,
}

impl Seen {
    /// A batch is asked for: its number.
    pub(super) fn begun(&self, batch: &PackedBatch) -> usize {
        let mut log = self.0.lock().unwrap();
        log.begun.push(batch.documents.iter().map(|document| document.name.clone()).collect());
        log.begun.len() - 1
    }

    pub(super) fn awaited(&self, number: usize) -> Result<()> {
        let mut log = self.0.lock().unwrap();
        let begun = log.begun.len();
        log.awaited.push((number, begun));
        match log.fails {
            Some(fails) if fails == number => Err(Error::Failed("shard 3 is gone".to_owned())),
            _ => Ok(()),
        }
    }

    fn clear(&self, fails: Option<usize>) -> (Vec<Vec<String>>, Vec<(usize, usize)>) {
        let Log { begun, awaited, .. } =
            std::mem::replace(&mut *self.0.lock().unwrap(), Log { fails, ..Log::default() });
        (begun, awaited)
    }
}

/// A run of several epochs and several micro-batches a step, with nothing held out.
fn world() -> World {
    let mut world = World::new();
    world.config.data.eval_fraction = 0.0;
    world.config.train.max_steps = Some(30);
    world
}

/// While a micro-batch is trained on, so many others have been asked for, in their order, over the ends of steps and epochs;
/// and the run is the same run.
#[test]
fn the_next_micro_batches_are_asked_for_before_one_is_trained_on() {
    let mut world = world();
    let mut want = None;
    for prefetch in [0, 1, 3] {
        world.config.train.prefetch = prefetch;
        let report = world.train(&format!("run-{prefetch}"), 0, 0, None).remove(0).0;
        let (begun, awaited) = world.seen.clear(None);
        let all = awaited.len();
        assert!(report.steps == 30 && all > 40, "{all} micro-batches");
        assert_eq!(begun.len(), all, "nothing is asked for in vain");
        let mut further = 0;
        for (place, (number, begun)) in awaited.into_iter().enumerate() {
            assert_eq!(number, place, "batches are taken in the order in which they are asked for");
            // Nobody looks further than to the end of the next step.
            let (least, most) = (place + 1 + prefetch.min(1), place + 1 + prefetch);
            let place = format!("prefetch {prefetch}: {begun} at batch {place} of {all}");
            assert!((least.min(all)..=most.min(all)).contains(&begun), "{place}");
            further = further.max(begun - number - 1);
        }
        assert_eq!(further, prefetch);
        let name = world.path(&format!("run-{prefetch}"));
        let model = std::fs::read(name.join("step-00000030/model.safetensors")).unwrap();
        let end = (begun, model, rows(&name));
        assert!(want.get_or_insert_with(|| end.clone()) == &end, "prefetch {prefetch} is another run");
    }
}

/// Held-out micro-batches are asked for ahead too, and what training had asked for before is still there after them.
#[test]
fn an_evaluation_asks_ahead_and_loses_nothing() {
    let mut world = World::new();
    world.config.train.prefetch = 1;
    world.config.train.eval_every = 1;
    world.train("run", 0, 0, None);
    let (begun, mut awaited) = world.seen.clear(None);
    assert_eq!(awaited.len(), begun.len(), "nothing is asked for twice");
    let ahead = awaited.iter().filter(|(number, begun)| *begun > number + 1).count();
    assert!(ahead * 2 > awaited.len(), "{ahead} of {}", awaited.len());
    awaited.sort_unstable();
    assert!(awaited.iter().map(|(number, _)| *number).eq(0..begun.len()));
}

/// States that cannot be had are an error of the step that needs them: those before are trained and logged.
#[test]
fn an_error_arrives_with_the_batch_that_had_it() {
    let mut world = world();
    world.config.train.log_every = 1;
    world.train("whole", 0, 0, None);
    let whole = rows(&world.path("whole"));
    let (_, awaited) = world.seen.clear(None);
    for prefetch in [0, 1, 3] {
        world.config.train.prefetch = prefetch;
        let fails = awaited.len() / 2;
        world.seen.clear(Some(fails));
        let name = format!("failing-{prefetch}");
        let error = world.try_train(&name, 0, 0, None).remove(0).0.unwrap_err().to_string();
        assert!(error.contains("shard 3 is gone"), "{error}");
        let (_, reached) = world.seen.clear(None);
        assert_eq!(reached.last().unwrap().0, fails);
        let got = rows(&world.path(&name));
        let steps = got.len();
        assert!(steps > 5 && got[..] == whole[..steps], "{steps} steps");
        assert_eq!(got.last().unwrap()["step"], json!(steps));
    }
}
