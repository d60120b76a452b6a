//! The training loop over several ranks, a thread each, against the loop of a process on its own: the same parameters and
//! the same figures after several steps, whatever the number of ranks and micro-batches.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use specforge::checkpoint::{CheckpointStore, RetentionConfig, Versions};
use specforge::config::RunConfig;
use specforge::data::{ChatTokenizer, DocumentRef, PackedBatch, TokenCache, split};
use specforge::dist::{BucketTime, ParallelConfig, ProcessGroup, Store};
use specforge::draft::{self, DraftContext, DraftModel, Parameter};
use specforge::features::store::Share;
use specforge::features::{FeatureBatch, FeatureSource, OnlineFeatures, StoredFeatures};
use specforge::files::Digests;
use specforge::models::{self, TargetIdentity, TargetInfo, TargetTables};
use specforge::nn::{Embedding, Head, noise};
use specforge::stop::Stop;
use specforge::tracking::Tracker;
use specforge::train::{GradientSums, Provenance, Split, TrainReport, Trainer, TrainerParts, Writer};
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

use crate::draft_contract::{drafts, vocabulary};
use crate::fixture::{STEP, Workspace, json_of, specforge};

mod kept;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// A rank that waits longer for a peer fails.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs `body` on `ranks` ranks, a thread each; on a process without a group where that is 0.
pub(crate) fn on_ranks<T: Send>(ranks: usize, body: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
    if ranks == 0 {
        return vec![body(ProcessGroup::SINGLE)];
    }
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = Store::host("127.0.0.1", listener, PATIENCE).unwrap();
    let body = &body;
    let run = move |rank| {
        let store = Store::connect("127.0.0.1", port, PATIENCE).unwrap();
        let group = ProcessGroup::gloo(&store, rank, ranks, LOOPBACK, PATIENCE).unwrap();
        let result = body(&group);
        group.barrier().unwrap(); // nobody hangs up while another still needs the answer
        result
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A target with conversations, and a store of its states.
struct World {
    workspace: Workspace,
    tokenizer: ChatTokenizer,
    cache: TokenCache,
    /// What ranks kept that kept states.
    kept: kept::Counts,
}

/// How a run is cut.
#[derive(Debug, Clone, Copy)]
struct Cut {
    ranks: usize,
    micro_batch_tokens: usize,
    shard_optimizer: bool,
}

/// The run without a group and without accumulation.
const WHOLE: Cut = Cut { ranks: 0, micro_batch_tokens: 512, shard_optimizer: false };

/// What a rank ends with.
#[derive(Debug, PartialEq)]
struct Outcome {
    parameters: Vec<Vec<f64>>,
    /// Of the held-out documents before and after.
    evaluations: [BTreeMap<String, f64>; 2],
    stopped: (u64, Option<i32>),
}

impl World {
    fn new() -> Self {
        let mut workspace = Workspace::new();
        workspace.set("train.max_steps", 5).set("train.eval_every", 2).set("train.batch_tokens", 512);
        workspace.set("optim.learning_rate", 1e-3);
        let mut command = specforge(&["capture", "--json", "--device", "cpu", "--layers", "0,1,2", "--config"]);
        json_of(command.arg(workspace.config()).arg("--out").arg(workspace.path("store")));
        let config = RunConfig::from_value(&workspace.configuration).unwrap();
        let tokenizer = config.data.tokenizer(&config.target.path).unwrap();
        let cache = TokenCache::build_or_open(&config.data.train, &tokenizer, &config.data, &|_, _| ()).unwrap().0;
        Self { workspace, tokenizer, cache, kept: kept::Counts::default() }
    }

    fn source(&self, config: &RunConfig, kind: Kind) -> (TargetTables, Box<dyn FeatureSource + '_>) {
        let path = &config.target.path;
        if let Some(folder) = &config.target.feature_store {
            let tables = models::load_tables(path, kind, Device::Cpu).unwrap();
            let identity = TargetIdentity::read(path).unwrap();
            let (tokenizer, digests) = (self.tokenizer.fingerprint(), Digests::unnoted());
            let stored =
                StoredFeatures::open(folder, &identity, &tables, tokenizer, &digests, Share::WHOLE, &|_, _| ())
                    .unwrap();
            return (tables, Box::new(stored));
        }
        let target = models::load_target(path, kind, Device::Cpu).unwrap();
        let (tables, online) = (TargetTables::of(target.as_ref()), OnlineFeatures::new(target));
        match config.target.keep_hidden_states {
            true => (tables, Box::new(kept::Counted::new(online, &self.kept))),
            false => (tables, Box::new(online)),
        }
    }

    /// Trains. `signal` says which rank was told to stop before it began, and by what.
    fn train(
        &self,
        name: &str,
        configuration: &Value,
        kind: Kind,
        cut: Cut,
        signal: Option<(usize, i32)>,
    ) -> Vec<Outcome> {
        let config = RunConfig::from_value(configuration).unwrap();
        on_ranks(cut.ranks, |group| {
            tch::set_num_threads(1);
            let (tables, source) = self.source(&config, kind);
            let weights = WeightsFolder::open(&config.target.path).unwrap();
            let vocabulary = vocabulary(&config.draft);
            let context = DraftContext {
                target: tables.info.clone(),
                embedding: &tables.embedding,
                head: &tables.head,
                vocabulary: vocabulary.as_ref(),
                weights: Some(&weights),
                kind,
                device: Device::Cpu,
                // Each rank has other values in mind: the first one's count.
                seed: 7 + group.rank() as u64,
                chunk_bytes: 1 << 20,
            };
            let draft = (draft::algorithm(&config.draft).unwrap().build)(&config.draft, &context).unwrap();
            let out = self.workspace.path(name);
            let writer = || Writer {
                store: CheckpointStore::open(&out, RetentionConfig::default()).unwrap(),
                tracker: Tracker::open(&out, None).unwrap(),
            };
            let mut train = config.train.clone();
            train.micro_batch_tokens = cut.micro_batch_tokens.min(train.batch_tokens);
            let parallel = ParallelConfig { shard_optimizer: cut.shard_optimizer, ..ParallelConfig::default() };
            let (train_documents, eval_documents) = split(&self.cache, config.data.eval_fraction);
            let stop = Stop::default();
            if let Some((_, number)) = signal.filter(|(rank, _)| *rank == group.rank()) {
                stop.ask(number);
            }
            let data_hashes = BTreeMap::from([("train".to_owned(), self.cache.content_hash().to_owned())]);
            let parts = TrainerParts {
                config: &train,
                optim: &config.optim,
                draft: draft.as_ref(),
                source: source.as_ref(),
                train: Split { cache: &self.cache, documents: train_documents },
                eval: Split { cache: &self.cache, documents: eval_documents },
                group,
                parallel: &parallel,
                writer: group.is_first().then(writer),
                decoding: (0, &|_: &dyn DraftModel| Ok(None)),
                provenance: Provenance {
                    configuration: configuration.clone(),
                    versions: Versions::current(),
                    data_hashes,
                    inputs: BTreeMap::new(),
                },
                stop: &stop,
            };
            let TrainReport { steps, stopped_by, start, end, checkpoint, .. } =
                Trainer::new(parts, None).unwrap().run().unwrap();
            assert_eq!(checkpoint.is_dir(), group.is_first() && steps > 0);
            let values = |parameter: &Parameter| {
                Vec::try_from(parameter.value.detach().to_kind(Kind::Double).flatten(0, -1)).unwrap()
            };
            let parameters = draft.parameters().iter().map(values).collect();
            Outcome { parameters, evaluations: [start, end], stopped: (steps, stopped_by) }
        })
    }

    /// Every figure that a run logged, under its step and name, but for those of the clock.
    fn log(&self, name: &str) -> BTreeMap<String, f64> {
        let text = std::fs::read_to_string(self.workspace.path(name).join("metrics.jsonl")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<BTreeMap<String, Value>>(line).unwrap());
        let mut figures = BTreeMap::new();
        for row in rows {
            let step = row["step"].as_u64().unwrap();
            for (name, value) in row.iter().filter(|(name, _)| name.contains('/')) {
                if !name.ends_with("_per_second") && !name.ends_with("_seconds") {
                    figures.insert(format!("{step} {name}"), value.as_f64().unwrap());
                }
            }
        }
        figures
    }
}

/// Block drafters whose steps are those of others behind their heads: `draft_contract` holds them as ranks in threads. Of
/// LiLiCorr's candidates two nearly equal ones may change places in float32, and Adam makes a step of it.
const SHARED: [&str; 5] = ["lilicorr", "domino", "xpress", "d_pace", "own-vocabulary"];

fn largest(left: &[Vec<f64>], right: &[Vec<f64>]) -> f64 {
    assert!(left.iter().map(Vec::len).eq(right.iter().map(Vec::len)));
    let pairs = left.iter().flatten().zip(right.iter().flatten());
    // A difference that is NaN is the largest.
    pairs.map(|(left, right)| (left - right).abs()).fold(0.0, |most, value| if value <= most { most } else { value })
}

/// Holds a cut run to the whole one, and returns the largest differences of parameters and figures.
fn hold(world: &World, name: &str, configuration: &Value, kind: Kind, cuts: &[Cut]) -> (f64, f64) {
    let whole = world.train(&format!("{name}-whole"), configuration, kind, WHOLE, None);
    let figures = world.log(&format!("{name}-whole"));
    assert!(figures.len() > 20 && whole[0].parameters.iter().flatten().all(|value| value.is_finite()));
    let tolerance = if kind == Kind::Double { 1e-10 } else { 1e-5 };
    let mut most = (0f64, 0f64);
    for cut in cuts {
        let run = format!("{name}-{}-{}", cut.ranks, cut.micro_batch_tokens);
        let outcomes = world.train(&run, configuration, kind, *cut, None);
        for outcome in &outcomes {
            assert!(outcome == &outcomes[0], "{run}: the ranks differ");
        }
        let difference = largest(&outcomes[0].parameters, &whole[0].parameters);
        assert!(difference <= tolerance, "{name}, {cut:?}: parameters differ by {difference:e}");
        let got = world.log(&run);
        assert!(got.keys().eq(figures.keys()), "{name}, {cut:?}: other figures");
        for (key, want) in &figures {
            let difference = (got[key] - want).abs() / want.abs().max(1.0);
            assert!(difference <= tolerance, "{name}, {cut:?}: {key} is {}, not {want}", got[key]);
            most.1 = most.1.max(difference);
        }
        most.0 = most.0.max(difference);
    }
    most
}

#[test]
fn any_number_of_ranks_and_micro_batches_gives_the_same_update() {
    let world = World::new();
    let cut = |ranks, micro_batch_tokens, shard_optimizer| Cut { ranks, micro_batch_tokens, shard_optimizer };
    let cuts = [cut(0, 256, false), cut(0, 128, false), cut(1, 512, true), cut(2, 512, false), cut(2, 128, true)];
    let cuts = [&cuts[..], &[cut(4, 512, true), cut(4, 64, false)]].concat();
    for (name, draft) in drafts().into_iter().filter(|(name, _)| !SHARED.contains(name)) {
        for (kind, stored) in [(Kind::Double, false), (Kind::Float, false), (Kind::Double, true), (Kind::Float, true)] {
            let mut configuration = world.workspace.configuration.clone();
            configuration["draft"] = draft.clone();
            if stored {
                configuration["target"]["feature_store"] = json!(world.workspace.path("store"));
            }
            let name = format!("{name}-{kind:?}-{stored}");
            let cuts = if stored { &cuts[3..6] } else { &cuts[..] };
            let (parameters, figures) = hold(&world, &name, &configuration, kind, cuts);
            println!("{name}: parameters within {parameters:.1e}, figures within {figures:.1e}");
        }
    }
}

/// Batches of two to four documents: of five ranks, some have nothing to do in any step.
#[test]
fn ranks_without_documents_take_part() {
    let world = World::new();
    for (name, draft) in drafts().into_iter().filter(|(name, _)| !SHARED.contains(name)) {
        let mut configuration = world.workspace.configuration.clone();
        configuration["draft"] = draft;
        configuration["train"]["batch_tokens"] = json!(128);
        configuration["train"]["micro_batch_tokens"] = json!(64);
        let cuts = [Cut { ranks: 5, micro_batch_tokens: 64, shard_optimizer: true }];
        hold(&world, &format!("few-{name}"), &configuration, Kind::Double, &cuts);
    }
}

/// Whichever rank is asked to stop, all do: here before the first step, for which nothing is saved.
#[test]
fn a_signal_to_one_rank_stops_all() {
    let world = World::new();
    let cut = Cut { ranks: 3, ..WHOLE };
    let outcomes = world.train("stopped", &world.workspace.configuration, Kind::Float, cut, Some((1, 15)));
    assert!(outcomes.iter().all(|outcome| outcome.stopped == (0, Some(15))), "{:?}", outcomes[0].stopped);
}

const HIDDEN: i64 = 64;
const VOCABULARY: i64 = 8192;

/// Heads with projections of 2 MiB each, far from any target.
fn heads(count: usize) -> Box<dyn DraftModel> {
    let table = |stream| noise::normal(&[VOCABULARY, HIDDEN], 0.1, 5, stream);
    let context = DraftContext {
        target: TargetInfo::of(HIDDEN, VOCABULARY, 2, 256),
        embedding: &Embedding::plain(table(0)),
        head: &Head::plain(table(1)),
        vocabulary: None,
        weights: None,
        kind: Kind::Float,
        device: Device::Cpu,
        seed: 0,
        chunk_bytes: 4 << 20,
    };
    let section = json!({"algorithm": "medusa", "num_heads": count});
    (draft::algorithm(&section).unwrap().build)(&section, &context).unwrap()
}

/// A document whose marks say which tokens are supervised.
fn document(name: u64, marks: &str) -> PackedBatch {
    let mut random = noise::keyed_stream(name, 4);
    let length = marks.len() as i64;
    PackedBatch {
        ids: marks.chars().map(|_| (random() % VOCABULARY as u64) as i64).collect(),
        positions: (0..length).collect(),
        supervised: marks.chars().map(|mark| mark == 'x').collect(),
        lengths: vec![length],
        documents: vec![DocumentRef::new(name.to_string(), name)],
    }
}

/// The sums after one step on these documents, a micro-batch each, and when the buckets were summed.
fn summed(
    draft: &dyn DraftModel,
    sums: &mut GradientSums<'_>,
    documents: &[PackedBatch],
    counts: &[f64],
) -> (Vec<Vec<f64>>, Vec<BucketTime>) {
    sums.start().unwrap();
    for (index, batch) in documents.iter().enumerate() {
        let seed = batch.documents[0].number;
        let hidden = vec![noise::normal(&[batch.ids.len() as i64, HIDDEN], 1.0, seed, 9)];
        let features = FeatureBatch::new(Arc::new(batch.clone()), hidden);
        let is_last = index + 1 == documents.len();
        let plan = draft.plan(batch, STEP).unwrap();
        sums.add(is_last, |gradients| draft.accumulate(&features, &plan, counts, gradients)).unwrap();
    }
    sums.finish().unwrap();
    let list = |total: &Tensor| Vec::try_from(total.to_kind(Kind::Double).flatten(0, -1)).unwrap();
    (sums.totals().iter().map(list).collect(), sums.bucket_times().unwrap())
}

/// One rank has documents, one has documents of which no row is trained, one has none.
#[test]
fn ranks_without_trained_rows_take_part() {
    let of_rank = [
        vec![document(1, "..xxxxxxxx"), document(2, ".xxxxx")],
        vec![document(3, "..x.x.x."), document(4, ".....")],
        vec![],
    ];
    let trained = [document(1, "..xxxxxxxx"), document(2, ".xxxxx")];
    let counts = heads(2).count(&document(1, "..xxxxxxxx"), STEP).unwrap();
    let untrained = heads(2).count(&document(3, "..x.x.x."), STEP).unwrap();
    assert!(counts.iter().all(|&count| count > 0.0) && untrained.iter().all(|&count| count == 0.0));
    let run = |group: &ProcessGroup, documents: &[PackedBatch]| {
        let draft = heads(2);
        let parallel = ParallelConfig { bucket_mib: 1, ..ParallelConfig::default() };
        let mut sums = GradientSums::new(draft.parameters(), group, &parallel).unwrap();
        // Twice: buckets are made anew after the first step.
        summed(draft.as_ref(), &mut sums, documents, &counts);
        summed(draft.as_ref(), &mut sums, documents, &counts).0
    };
    let want = run(ProcessGroup::SINGLE, &trained);
    assert!(want.iter().all(|total| total.iter().any(|&value| value != 0.0)));
    for got in on_ranks(3, |group| run(group, &of_rank[group.rank()])) {
        assert!(got == want, "adding zeros changes no bit: {:e}", largest(&got, &want));
    }
}

/// The first head's gradients are back before the last head's are computed.
#[test]
fn gradients_are_summed_while_the_rest_is_computed() {
    let all = on_ranks(2, |group| {
        tch::set_num_threads(1);
        let draft = heads(8);
        let parallel = ParallelConfig { bucket_mib: 1, ..ParallelConfig::default() };
        let mut sums = GradientSums::new(draft.parameters(), group, &parallel).unwrap();
        let marks = "x".repeat(600);
        let documents = [document(group.rank() as u64, &marks)];
        let counts: Vec<f64> = draft.count(&documents[0], STEP).unwrap().iter().map(|count| 2.0 * count).collect();
        (0..3).map(|_| summed(draft.as_ref(), &mut sums, &documents, &counts)).collect::<Vec<_>>()
    });
    for (step, pair) in all[0].iter().zip(&all[1]).enumerate() {
        let ((left, left_times), (right, right_times)) = pair;
        assert!(left == right, "the ranks have other sums");
        let sizes = |times: &[BucketTime]| times.iter().map(|time| time.bytes).collect::<Vec<_>>();
        assert_eq!(sizes(left_times), sizes(right_times));
        // A bucket is summed when the slower rank has it too: looked at by the clock of both, which is the same one.
        let end = |times: &[BucketTime]| times.last().unwrap().launched;
        let times = if end(left_times) > end(right_times) { left_times } else { right_times };
        assert!(times.len() >= 8, "{} buckets", times.len());
        assert!(times[0].finished < end(times), "step {step}: {times:?}");
        let early = times.iter().filter(|time| time.finished < end(times)).count();
        println!("step {step}: {early} of {} buckets were back before the last was ready", times.len());
    }
}
