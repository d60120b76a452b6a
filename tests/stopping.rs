//! A training run is asked to stop at every point at which it looks, and goes on: its log and its best checkpoint are those
//! of a run that nobody disturbed. The loop runs in this process, and what raises the flag is a count of the target's
//! forward passes and of the decodes, so that every evaluation is cut at every micro-batch too.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::checkpoint::{self, CheckpointStore, Direction, Inputs, RetentionConfig, Versions};
use specforge::config::RunConfig;
use specforge::data::{PackedBatch, TokenCache, split};
use specforge::dist::{ParallelConfig, ProcessGroup};
use specforge::draft::{self, DraftContext, DraftModel};
use specforge::error::Result;
use specforge::features::{FeatureSource, OnlineFeatures, Pending};
use specforge::models::{self, TargetTables};
use specforge::stop::Stop;
use specforge::tracking::Tracker;
use specforge::train::{Provenance, Split, TrainReport, Trainer, TrainerParts, Writer};
use tch::{Device, Kind};

use crate::data_parallel::on_ranks;
use crate::fixture::{Workspace, litter, tensors_of};

mod ahead;

const SIGNAL: i32 = 15;

/// The log of a run, which checkpoint is best with its figures, those of the last one, and all its numbers.
type End = (Vec<Value>, Value, Value, Vec<(String, Vec<f32>)>);

/// Counts what passes through it and asks the run to stop at one of them.
struct Interrupting<'a> {
    inner: OnlineFeatures,
    stop: &'a Stop,
    passed: &'a Cell<u64>,
    at: Option<u64>,
    seen: &'a ahead::Seen,
}

impl Interrupting<'_> {
    fn pass(&self) {
        self.passed.set(self.passed.get() + 1);
        if self.at == Some(self.passed.get()) {
            self.stop.ask(SIGNAL);
        }
    }
}

impl FeatureSource for Interrupting<'_> {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let number = self.seen.begun(&batch);
        let inner = self.inner.begin(batch, capture);
        Pending::later(move || {
            self.pass();
            self.seen.awaited(number)?;
            inner.wait()
        })
    }
}

struct World {
    workspace: Workspace,
    config: RunConfig,
    cache: TokenCache,
    /// What the source of a run without ranks saw.
    seen: ahead::Seen,
}

impl World {
    /// Evaluations, decodes, saves and log lines that meet in some steps and not in others, each evaluation of several
    /// micro-batches.
    fn new() -> Self {
        let mut workspace = Workspace::new();
        workspace.set("data.eval_fraction", 0.15).set("train.batch_tokens", 256).set("train.micro_batch_tokens", 128);
        workspace.set("train.max_steps", 7).set("train.log_every", 3).set("train.eval_every", 2);
        workspace.set("train.save_every", 4).set("optim.learning_rate", 3e-2);
        let config = RunConfig::from_value(&workspace.configuration).unwrap();
        let tokenizer = config.data.tokenizer(&config.target.path).unwrap();
        let cache = TokenCache::build_or_open(&config.data.train, &tokenizer, &config.data, &|_, _| ()).unwrap().0;
        Self { workspace, config, cache, seen: ahead::Seen::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path(name)
    }

    /// Trains, from the newest checkpoint where there is one, and asks `rank` to stop at pass number `at` of its own.
    /// Returns the report of each rank and how many passes it had.
    fn train(
        &self,
        name: &str,
        ranks: usize,
        decode_every: u64,
        stop: Option<(usize, u64)>,
    ) -> Vec<(TrainReport, u64)> {
        let reports = self.try_train(name, ranks, decode_every, stop);
        reports.into_iter().map(|(report, passed)| (report.unwrap(), passed)).collect()
    }

    fn try_train(
        &self,
        name: &str,
        ranks: usize,
        decode_every: u64,
        stop: Option<(usize, u64)>,
    ) -> Vec<(Result<TrainReport>, u64)> {
        let config = &self.config;
        let out = self.path(name);
        on_ranks(ranks, |group: &ProcessGroup| {
            tch::set_num_threads(1);
            specforge::progress::silence();
            let target = models::load_target(&config.target.path, Kind::Float, Device::Cpu).unwrap();
            let tables = TargetTables::of(target.as_ref());
            let context = DraftContext {
                target: tables.info.clone(),
                embedding: &tables.embedding,
                head: &tables.head,
                vocabulary: None,
                weights: None,
                kind: Kind::Float,
                device: Device::Cpu,
                seed: 7,
                chunk_bytes: 1 << 20,
            };
            let draft = (draft::algorithm(&config.draft).unwrap().build)(&config.draft, &context).unwrap();
            let wish = Stop::default();
            let passed = Cell::new(0);
            let at = stop.filter(|(rank, _)| *rank == group.rank()).map(|(_, at)| at);
            let source =
                Interrupting { inner: OnlineFeatures::new(target), stop: &wish, passed: &passed, at, seen: &self.seen };
            // Stands for a decode of two rounds: a figure that depends on the draft alone.
            let decoding = |draft: &dyn DraftModel| {
                for _ in 0..2 {
                    source.pass();
                    if specforge::train::agreement::signal(group, wish.asked())? != 0 {
                        return Ok(None);
                    }
                }
                let figure = draft.parameters()[0].value.detach().to_kind(Kind::Double).abs().sum(Kind::Double);
                Ok(Some(BTreeMap::from([("acceptance_length".to_owned(), figure.double_value(&[]))])))
            };
            let retention =
                RetentionConfig { keep_last: 2, best_metric: Some("loss".to_owned()), best_is: Direction::Lower };
            let store = group.is_first().then(|| CheckpointStore::open(&out, retention).unwrap());
            let newest = store.as_ref().and_then(|store| store.latest().unwrap().0);
            let resumed = newest.map(|path| checkpoint::read(&path).unwrap());
            let manifest = resumed.as_ref().map(|checkpoint| &checkpoint.manifest);
            let unwritten = manifest.filter(|manifest| !manifest.owed.is_nothing()).map(|_| "eval/");
            let writer = store.map(|store| Writer {
                store,
                tracker: Tracker::open_before(&out, manifest.map(|manifest| manifest.step), unwritten).unwrap(),
            });
            let (train_documents, eval_documents) = split(&self.cache, config.data.eval_fraction);
            let parallel = ParallelConfig::default();
            let parts = TrainerParts {
                config: &config.train,
                optim: &config.optim,
                draft: draft.as_ref(),
                source: &source,
                train: Split { cache: &self.cache, documents: train_documents },
                eval: Split { cache: &self.cache, documents: eval_documents },
                group,
                parallel: &parallel,
                writer,
                decoding: (decode_every, &decoding),
                provenance: Provenance {
                    configuration: self.workspace.configuration.clone(),
                    versions: Versions::current(),
                    data_hashes: BTreeMap::new(),
                    inputs: Inputs::new(),
                },
                stop: &wish,
            };
            let report = Trainer::new(parts, resumed.as_ref()).unwrap().run();
            (report, passed.get())
        })
    }

    /// What a run leaves: its log without what the clock decides, which checkpoint is best and its figures, and the last one.
    fn end(&self, name: &str) -> End {
        let run = self.path(name);
        let read = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let best = read(run.join("best.json"));
        let figures = read(run.join(best["folder"].as_str().unwrap()).join("manifest.json"))["metrics"].clone();
        assert_eq!(best["value"], figures["loss"]);
        let last = run.join("step-00000007");
        let mut tensors = tensors_of(&last.join("model.safetensors"));
        tensors.extend(tensors_of(&last.join("optimizer.safetensors")));
        let values = |tensor: &tch::Tensor| Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap();
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), values(tensor))).collect();
        assert_eq!(litter(&run), Vec::<PathBuf>::new());
        (rows(&run), json!([best["step"], figures]), read(last.join("manifest.json"))["metrics"].clone(), tensors)
    }
}

/// The logged lines of a run without what depends on the clock.
fn rows(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        row.retain(|name, _| name != "time" && !name.ends_with("_seconds") && !name.ends_with("_per_second"));
        Value::Object(row)
    };
    text.lines().map(row).collect()
}

/// Stops at pass `at`, sometimes once more at the first pass of the part that goes on, and then runs to the end.
fn in_parts(world: &World, name: &str, ranks: usize, decode_every: u64, (stopping, at): (usize, u64)) {
    let first = world.train(name, ranks, decode_every, Some((stopping, at)));
    let steps = first[0].0.steps;
    assert!(first.iter().all(|(report, _)| (report.steps, report.stopped_by) == (steps, first[0].0.stopped_by)));
    let checkpoint = world.path(name).join(format!("step-{steps:08}"));
    assert_eq!(checkpoint.is_dir(), steps > 0, "{name}: step {steps}");
    if steps > 0 && at % 3 == 0 {
        world.train(name, ranks, decode_every, Some((stopping, 1)));
    }
    let last = &world.train(name, ranks, decode_every, None)[0].0;
    assert_eq!((last.steps, last.stopped_by), (7, None), "{name}");
}

#[test]
fn a_run_that_is_stopped_anywhere_and_goes_on_has_the_log_and_the_best_checkpoint_of_one_that_is_not() {
    let world = World::new();
    // Without decodes, a few of the places are enough.
    for (decode_every, stride) in [(3, 1), (0, 5)] {
        let whole = format!("whole{decode_every}");
        let (report, passes) = world.train(&whole, 0, decode_every, None).remove(0);
        assert!(passes > 25 && report.steps == 7 && report.stopped_by.is_none(), "{passes} passes");
        let want = world.end(&whole);
        // Log lines at 3, 6 and 7, evaluations before the first step and at 2, 4, 6 and 7, decodes at 3, 6 and 7.
        let at = |name: &str| -> Vec<u64> {
            let rows = want.0.iter().filter(|row| !row[name].is_null());
            rows.map(|row| row["step"].as_u64().unwrap()).collect()
        };
        assert_eq!(at("train/loss"), [3, 6, 7]);
        assert_eq!(at("eval/loss"), [0, 2, 4, 6, 7]);
        assert_eq!(at("eval/acceptance_length"), if decode_every > 0 { vec![0, 3, 6, 7] } else { vec![] });
        for pass in (1..=passes).step_by(stride) {
            let name = format!("{decode_every}-{pass}");
            in_parts(&world, &name, 0, decode_every, (0, pass));
            assert_eq!(world.end(&name), want, "decodes every {decode_every}, stopped at pass {pass}");
        }
    }
}

/// The flag is raised on one rank of two, and both have something to owe.
#[test]
fn ranks_owe_the_same() {
    let world = World::new();
    let reports = world.train("whole", 2, 3, None);
    let want = world.end("whole");
    for (stopping, pass) in [(0, 1), (1, 2), (1, reports[1].1 / 2), (0, reports[0].1 / 2 + 1), (1, reports[1].1)] {
        let name = format!("{stopping}-{pass}");
        in_parts(&world, &name, 2, 3, (stopping, pass));
        assert_eq!(world.end(&name), want, "rank {stopping} stopped at pass {pass}");
    }
}

/// Evaluations fall between saves: the best one has a checkpoint nevertheless.
#[test]
fn the_best_evaluation_has_a_checkpoint_whatever_the_intervals() {
    let mut world = World::new();
    for (eval_every, save_every) in [(3, 2), (1, 0), (2, 5)] {
        world.config.train.eval_every = eval_every;
        world.config.train.save_every = save_every;
        let name = format!("{eval_every}-{save_every}");
        world.train(&name, 0, 0, None);
        let losses = rows(&world.path(&name)).into_iter().filter(|row| row["step"] != 0);
        let losses = losses.filter_map(|row| Some((row["step"].as_u64().unwrap(), row["eval/loss"].as_f64()?)));
        let best = losses.min_by(|left, right| left.1.total_cmp(&right.1)).unwrap();
        assert_eq!(world.end(&name).1[0], best.0, "{name}");
    }
}

/// The names that a configuration may choose from are those that evaluations give.
#[test]
fn the_figures_of_an_algorithm_are_known_before_it_is_built() {
    let mut world = World::new();
    for draft in [
        json!({"algorithm": "medusa", "num_heads": 2}),
        json!({"algorithm": "eagle3", "capture": [0, 1], "ttt_steps": 2}),
    ] {
        let name = draft["algorithm"].as_str().unwrap().to_owned();
        world.workspace.configuration["draft"] = draft;
        world.config = RunConfig::from_value(&world.workspace.configuration).unwrap();
        let report = world.train(&name, 0, 0, None).remove(0).0;
        let mut known = (draft::algorithm(&world.config.draft).unwrap().figures)(&world.config.draft).unwrap();
        known.sort_unstable();
        assert!(report.end.keys().eq(&known), "{:?} and {known:?}", report.end.keys());
    }
}

/// Time is that of training, and what else was done stands beside it.
#[test]
fn speed_is_that_of_training_alone() {
    let world = World::new();
    let report = world.train("run", 0, 0, None).remove(0).0;
    let time = &report.time;
    assert!(time.target > 0.0 && time.draft > 0.0 && time.evaluation > 0.0 && time.saving > 0.0, "{time:?}");
    let sum: f64 = time.parts().iter().map(|(_, seconds)| seconds).sum();
    assert!(sum <= report.seconds && time.training() < sum, "{time:?} of {}", report.seconds);
    let rate = report.tokens as f64 / time.training();
    assert!((report.tokens_per_second / rate - 1.0).abs() < 1e-9);
    let text = fs::read_to_string(world.path("run").join("metrics.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rows: Vec<&Value> = rows.iter().filter(|row| row["train/loss"].is_number()).collect();
    let number = |row: &Value, name: &str| row[format!("train/{name}")].as_f64().unwrap();
    let mut before = 0.0;
    for row in &rows {
        let training: f64 =
            ["data", "target", "draft"].iter().map(|part| number(row, &format!("{part}_seconds"))).sum();
        let tokens = number(row, "tokens") - before;
        before = number(row, "tokens");
        assert!((number(row, "tokens_per_second") * training / tokens - 1.0).abs() < 1e-6, "{row}");
        assert!(row["train/communication_seconds"].is_null() && row["train/waiting_seconds"].is_null(), "{row}");
    }
    // The evaluation before the first step is in the first line, a save between two lines in the second.
    assert!(number(rows[0], "evaluation_seconds") > 0.0 && number(rows[1], "saving_seconds") > 0.0);
    // A line holds what came before it, so what the last step was followed by is in the report alone.
    let logged: f64 = rows.iter().map(|row| number(row, "evaluation_seconds")).sum();
    assert!(logged < time.evaluation);
}
