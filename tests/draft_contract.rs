//! What every draft must keep, those of `tests/plugins` included: a document's plan, losses and gradients depend on the
//! document and the step's key alone, whatever it is packed with.

use std::fs;
use std::ops::Range;
use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::{self, DraftContext, DraftModel, Gradients, ParameterGroup, StepKey, add_counts};
use specforge::features::{FeatureSource, OnlineFeatures};
use specforge::models;
use specforge::nn::noise;
use specforge::vocab::VocabMap;
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

use crate::fixture::{STEP, TOKENIZER_SIZE, largest_difference, write_model};
use crate::plugins;

/// A draft section of each kind.
pub fn drafts() -> Vec<(&'static str, Value)> {
    plugins::register();
    let eagle3 =
        |recompute: bool| json!({"algorithm": "eagle3", "capture": [0, 1], "ttt_steps": 3, "recompute": recompute});
    let mut drafts = vec![
        ("medusa", json!({"algorithm": "medusa", "num_heads": 2})),
        ("eagle3-graph", eagle3(false)),
        ("eagle3-recompute", eagle3(true)),
        (
            "peagle",
            json!({
                "algorithm": "peagle", "capture": [0, 1], "num_layers": 2, "num_depths": 4, "mask_token_id": 3,
                "norm_before_fc": true,
            }),
        ),
        (
            "peagle-sum",
            json!({
                "algorithm": "peagle", "capture": [0, 1], "num_layers": 1, "num_depths": 3, "mask_token_id": 3,
                "loss": {"ce": 0.1, "jsd": 0.4, "lk_hybrid": 0.5}, "labels": "data",
            }),
        ),
        ("anchors", json!({"algorithm": "anchors"})),
    ];
    for (name, shift, objective) in [("fine-tuned", true, "fine_tuning"), ("pretrained", false, "pretraining")] {
        drafts.push((
            name,
            json!({
                "algorithm": "masked_diffusion", "mask_token_id": unseen(), "shift": shift, "objective": objective,
            }),
        ));
    }
    drafts.extend(block_drafts());
    drafts
}

/// A section of each block drafter, and of what the family may be told: windows, weights by what the draft says, a
/// vocabulary of its own.
pub fn block_drafts() -> Vec<(&'static str, Value)> {
    let block = |algorithm: &str, more: Value| {
        let mut section = json!({"algorithm": algorithm, "num_layers": 2, "block_size": 4, "num_anchors": 2,
            "target_layer_ids": [0, -1], "mask_token_id": 1});
        let of = |value: &Value| value.as_object().unwrap().clone();
        section.as_object_mut().unwrap().extend(of(&more));
        section
    };
    let sliding = json!({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5});
    // With as many candidates, the right token is now and then among them.
    let selector = json!({"head": {"selector_rank": 6, "selector_top_k": 120},
        "conv": {"kernel_size": 2, "group_size": 8}});
    let recurrent = json!({"head": {"markov_rank": 6, "markov_head_type": "rnn", "confidence_reach": true}});
    let lilicorr = json!({"num_anchors": 6, "block_size": 3, "head": {"lilicorr_candidate_topk": 256,
        "lilicorr_hidden_size": 24, "lilicorr_num_layers": 1, "lilicorr_num_heads": 3,
        "lilicorr_factor_dim": 10, "margin_weight": 0.2, "calibration_weight": 0.1}});
    let domino = json!({"head": {"gru_hidden_dim": 14, "emb_dim": 10}});
    let xpress = json!({"head": {"xpress_rank": 6}});
    let own = json!({"draft_vocab_size": own_tokens().count(),
        "head": {"markov_rank": 6, "markov_head_type": "gated", "confidence_head": false}});
    vec![
        ("dflash", block("dflash", sliding)),
        ("dflash2", block("dflash2", selector)),
        ("dspark", block("dspark", recurrent)),
        ("lilicorr", block("lilicorr", lilicorr)),
        ("domino", block("domino", domino)),
        ("xpress", block("xpress", xpress)),
        ("d_pace", block("dflash", json!({"weights": {"name": "d_pace"}, "mask_embedding": true}))),
        ("own-vocabulary", block("dspark", own)),
    ]
}

/// Tokens that a draft with a vocabulary of its own can name.
fn own_tokens() -> impl Iterator<Item = i64> {
    (0..TOKENIZER_SIZE).filter(|token| token % 4 != 2)
}

/// The vocabulary of a section of [`drafts`], where it is not the target's.
pub fn vocabulary(section: &Value) -> Option<VocabMap> {
    section
        .get("draft_vocab_size")
        .and_then(Value::as_i64)
        .map(|_| VocabMap::new(own_tokens().collect(), TOKENIZER_SIZE).unwrap())
}

/// A token that no document has.
fn unseen() -> i64 {
    let documents = documents();
    (0..TOKENIZER_SIZE).find(|token| documents.iter().all(|document| !document.ids.contains(token))).unwrap()
}

/// Whether chance decides what a step of a draft trains.
fn is_by_chance(section: &Value) -> bool {
    ["anchors", "peagle", "masked_diffusion"].iter().any(|name| section["algorithm"] == *name)
        || section.get("num_anchors").is_some()
}

/// A draft in float64 on a small target, away from its start.
struct Setup {
    draft: Box<dyn DraftModel>,
    source: OnlineFeatures,
    _folder: tempfile::TempDir,
}

impl Setup {
    fn new(section: &Value) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        write_model(folder.path(), &json!({}));
        let target = models::load_target(folder.path(), Kind::Double, Device::Cpu).unwrap();
        let weights = WeightsFolder::open(folder.path()).unwrap();
        let vocabulary = vocabulary(section);
        let context = DraftContext {
            target: target.info().clone(),
            embedding: target.embedding(),
            head: target.head(),
            vocabulary: vocabulary.as_ref(),
            weights: Some(&weights),
            kind: Kind::Double,
            device: Device::Cpu,
            seed: 5,
            // Seven rows a chunk, so that a batch takes several.
            chunk_bytes: 7 * 4 * TOKENIZER_SIZE as usize,
        };
        let draft = (draft::algorithm(section).unwrap().build)(section, &context).unwrap();
        let _no_grad = tch::no_grad_guard();
        for (stream, parameter) in draft.parameters().iter().enumerate() {
            let change = noise::normal(&parameter.value.size(), 0.05, 3, stream as u64);
            drop(parameter.value.shallow_clone().g_add_(&change.to_kind(Kind::Double)));
        }
        Self { draft, source: OnlineFeatures::new(target), _folder: folder }
    }

    /// Gradients, objective and sums of metrics after one batch after another.
    fn outcome(&self, batches: &[PackedBatch], key: StepKey) -> Vec<Tensor> {
        let plans: Vec<_> = batches.iter().map(|batch| self.draft.plan(batch, key).unwrap()).collect();
        let mut counts = Vec::new();
        plans.iter().for_each(|plan| add_counts(&mut counts, &plan.counts));
        let mut outcome = Gradients::zeros(self.draft.parameters()).unwrap();
        let mut results = Vec::new();
        for (batch, plan) in batches.iter().zip(&plans) {
            assert_eq!(plan.counts, self.draft.count(batch, key).unwrap());
            let features = self.source.features(Arc::new(batch.clone()), &self.draft.capture()).unwrap();
            let tally = self.draft.accumulate(&features, plan, &counts, &mut Gradients::new(&mut outcome)).unwrap();
            let evaluated = self.draft.evaluate(&features, plan, &counts).unwrap();
            let rows = Tensor::from_slice(&tally.counts);
            results.push([tally.objective, tally.sums, evaluated.objective, evaluated.sums, rows]);
        }
        for index in 0..results[0].len() {
            outcome.push(results.iter().map(|result| result[index].shallow_clone()).sum());
        }
        outcome
    }
}

/// Documents whose marks say which tokens are supervised.
fn documents() -> Vec<PackedBatch> {
    let marks = ["..xxxxxxx", ".xxxx..xxxxx", "...x", ".....xxxxxxxxxxx", "..xxx", ".xxxxxxx.xxxxxx"];
    let document = |(number, marks): (u64, &&str)| {
        let mut next = noise::keyed_stream(number, 0);
        PackedBatch {
            ids: marks.chars().map(|_| (next() % TOKENIZER_SIZE as u64) as i64).collect(),
            positions: (0..marks.len() as i64).collect(),
            supervised: marks.chars().map(|mark| mark == 'x').collect(),
            lengths: vec![marks.len() as i64],
            documents: vec![DocumentRef::new(format!("document {number}"), 40 + number)],
        }
    };
    (0..).zip(&marks).map(document).collect()
}

fn packed<'a>(documents: impl IntoIterator<Item = &'a PackedBatch>) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for document in documents {
        batch.ids.extend(&document.ids);
        batch.positions.extend(&document.positions);
        batch.supervised.extend(&document.supervised);
        batch.lengths.extend(&document.lengths);
        batch.documents.extend(document.documents.clone());
    }
    batch
}

#[test]
fn packing_and_accumulation_change_nothing() {
    let documents = documents();
    let pack = |range: Range<usize>| packed(&documents[range]);
    for (name, section) in drafts() {
        let setup = Setup::new(&section);
        for key in [STEP, StepKey::EVALUATION] {
            let whole = setup.outcome(&[pack(0..6)], key);
            let names = setup.draft.parameters().iter().map(|parameter| parameter.name.as_str());
            let names: Vec<&str> = names.chain(["objective", "sums", "evaluated", "its sums", "rows"]).collect();
            for (value, of) in whole.iter().zip(&names) {
                assert!(value.abs().max().double_value(&[]) > 0.0, "{name}: {of} is zero");
            }
            let splits = [
                vec![pack(0..2), pack(2..3), pack(3..6)],
                (0..6).map(|index| pack(index..index + 1)).collect(),
                vec![packed(documents.iter().rev())],
            ];
            for split in &splits {
                for ((got, want), of) in setup.outcome(split, key).iter().zip(&whole).zip(&names) {
                    let difference = largest_difference(got, want);
                    assert!(difference < 1e-10, "{name}, {} batches, {of}: {difference:e}", split.len());
                }
            }
        }
    }
}

/// Chance has the step's key: other steps and seeds give other rows, the same one the same.
#[test]
fn a_draft_that_chance_takes_part_in_follows_the_key_alone() {
    let documents = documents();
    let batch = packed(&documents);
    for (name, section) in drafts() {
        let setup = Setup::new(&section);
        let objective = |key: StepKey| {
            let outcome = setup.outcome(std::slice::from_ref(&batch), key);
            outcome[setup.draft.parameters().len()].double_value(&[])
        };
        let one = objective(STEP);
        assert_eq!(one, objective(STEP), "{name}");
        for other in [StepKey { step: STEP.step + 1, ..STEP }, StepKey { seed: STEP.seed + 1, ..STEP }] {
            assert_eq!(objective(other) == one, !is_by_chance(&section), "{name}");
        }
    }
}

/// Gradients of block drafters and of masked diffusion models are the slopes of their objective, in float64: along a random direction of each tensor, by
/// central differences. Left out is what an objective does not follow on purpose: weights that the draft's own chances give
/// (`d_pace`), and the acceptance that a confidence learns.
#[test]
fn gradients_are_the_slopes_of_the_objective() {
    let batch = packed(&documents());
    let infilling = drafts().into_iter().filter(|(_, section)| section["algorithm"] == "masked_diffusion");
    for (name, mut section) in block_drafts().into_iter().chain(infilling) {
        match name {
            "d_pace" => section["weights"] = json!({"name": "fixed", "gamma": 2.0}),
            "dspark" => section["head"]["confidence_weight"] = json!(0.0),
            // It jumps where two candidates change places; its golden files hold these gradients.
            "lilicorr" => continue,
            _ => {}
        }
        // Total variation has a kink wherever a token is as likely for either.
        if !["domino", "dflash2", "masked_diffusion"].iter().any(|other| section["algorithm"] == *other) {
            section["loss"] = json!({"ce": 0.5, "kl": 0.5});
        }
        let setup = Setup::new(&section);
        let parameters = setup.draft.parameters();
        let plan = setup.draft.plan(&batch, STEP).unwrap();
        let features = setup.source.features(Arc::new(batch.clone()), &setup.draft.capture()).unwrap();
        let objective = || setup.draft.evaluate(&features, &plan, &plan.counts).unwrap().objective.double_value(&[]);
        let outcome = setup.outcome(std::slice::from_ref(&batch), STEP);
        for (stream, (parameter, gradient)) in parameters.iter().zip(&outcome).enumerate() {
            let direction = noise::normal(&parameter.value.size(), 1.0, 17, stream as u64).to_kind(Kind::Double);
            let along = |step: f64| {
                tch::no_grad(|| drop(parameter.value.shallow_clone().g_add_(&(&direction * step))));
                let value = objective();
                tch::no_grad(|| drop(parameter.value.shallow_clone().g_sub_(&(&direction * step))));
                value
            };
            let step = 1e-6;
            let slope = (along(step) - along(-step)) / (2.0 * step);
            let want = (gradient * &direction).sum(Kind::Double).double_value(&[]);
            let off = (slope - want).abs() / want.abs().max(1e-2);
            assert!(off < 1e-5, "{name}, {}: {want} and not {slope}", parameter.name);
        }
    }
}

#[test]
fn a_copied_tensor_begins_as_the_targets_and_is_a_tensor_of_its_own() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write_model(folder.path(), &json!({}));
    let before = fs::read(folder.path().join("model.safetensors")).unwrap();
    let target = models::load_target(folder.path(), Kind::Float, Device::Cpu).unwrap();
    let weights = WeightsFolder::open(folder.path()).unwrap();
    let context = |weights| DraftContext {
        target: target.info().clone(),
        embedding: target.embedding(),
        head: target.head(),
        vocabulary: None,
        weights,
        kind: Kind::Float,
        device: Device::Cpu,
        seed: 0,
        chunk_bytes: 1 << 20,
    };
    let shape = [TOKENIZER_SIZE, 32];
    let parameter = context(Some(&weights)).target_parameter("lm_head.weight", &shape).unwrap().with_rate(0.5);
    assert_eq!(parameter.name, "target.lm_head.weight");
    assert_eq!(parameter.group, ParameterGroup { decay: true, rate: 0.5 });
    assert!(parameter.value.requires_grad() && parameter.value.equal(&target.head().weight));
    tch::no_grad(|| drop(parameter.value.shallow_clone().fill_(1.0)));
    assert!(!target.head().weight.equal(&parameter.value));
    assert!(fs::read(folder.path().join("model.safetensors")).unwrap() == before);
    for (name, shape, word) in [("model.none", vec![1], "model.none"), ("lm_head.weight", vec![3, 3], "[3, 3]")] {
        let error = context(Some(&weights)).target_parameter(name, &shape).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let error = context(None).target_parameter("lm_head.weight", &shape).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("no folder"), "{error}");
}
