//! The draft of `plugins/anchors.rs` trains what its header says: whole runs of it prove something of the program only then.
//! Loss and gradients are computed again here, from the definition and by autograd.

use std::sync::Arc;

use serde_json::json;
use specforge::data::{DocumentRef, PackedBatch};
use specforge::decode::drafter::{self, Context, DraftSampling, Drafter, Joining};
use specforge::draft::{self, DraftContext, DraftModel, Gradients, StepKey};
use specforge::features::FeatureBatch;
use specforge::models::TargetModel;
use specforge::nn::noise;
use specforge::weights::WeightsFolder;
use tch::{Device, Kind, Tensor};

use crate::fixture::{self, TOKENIZER_SIZE, largest_difference};
use crate::{plugins, small_drafts};

const BLOCK: usize = 3;
const ANCHORS: usize = 4;
const DECAY: f64 = 0.7;
const NOISE: f64 = 0.2;

/// Builds the draft on the tests' target in float64 and hands both over.
fn with_draft(body: impl FnOnce(&dyn DraftModel, &dyn TargetModel)) {
    plugins::register();
    let folder = tempfile::tempdir().unwrap();
    fixture::write_model(folder.path(), &json!({}));
    let weights = WeightsFolder::open(folder.path()).unwrap();
    let target = small_drafts::target(Kind::Double);
    let section = json!({"algorithm": "anchors", "anchors": ANCHORS, "block": BLOCK, "decay": DECAY, "noise": NOISE});
    // Seven rows a chunk, so that a guess takes several.
    let chunk_bytes = 7 * 4 * TOKENIZER_SIZE as usize;
    let context = DraftContext { weights: Some(&weights), chunk_bytes, ..small_drafts::context(&target) };
    let draft = (draft::algorithm(&section).unwrap().build)(&section, &context).unwrap();
    small_drafts::disturb(draft.as_ref());
    body(draft.as_ref(), &target);
}

/// Two documents, the second with a gap in what is supervised.
fn documents() -> PackedBatch {
    let lengths = [23i64, 17];
    let mut next = noise::keyed_stream(5, 0);
    PackedBatch {
        ids: (0..lengths.iter().sum()).map(|_: i64| (next() % TOKENIZER_SIZE as u64) as i64).collect(),
        positions: lengths.iter().flat_map(|&length| 0..length).collect(),
        supervised: lengths.iter().flat_map(|&length| (0..length).map(|token| token > 4 && token != 11)).collect(),
        lengths: lengths.to_vec(),
        documents: vec![DocumentRef::new("one", 3), DocumentRef::new("other", 8)],
    }
}

/// The logits that a guess gives for a state `[H]`, `[V]`, by the header.
fn guessed(draft: &dyn DraftModel, guess: usize, state: &Tensor) -> Tensor {
    let value = |name: &str| {
        let found = draft.parameters().iter().find(|parameter| parameter.name == name);
        found.unwrap_or_else(|| panic!("{name}")).value.shallow_clone()
    };
    let block = value(&format!("blocks.{guess}.weight")).mv(state) + value(&format!("blocks.{guess}.bias"));
    value("target.lm_head.weight").mv(&(state + block.silu()))
}

/// The objective of a step on these states, by the header; evaluations have no noise.
fn objective(draft: &dyn DraftModel, batch: &PackedBatch, states: &Tensor, key: StepKey, noisy: bool) -> Tensor {
    let (mut total, mut weight_of_all, mut start) = (Tensor::zeros([], (Kind::Double, Device::Cpu)), 0.0, 0usize);
    for (&length, document) in batch.lengths.iter().zip(&batch.documents) {
        let length = length as usize;
        // Tokens t + 1 up to t + 2 + guess are supervised.
        let is_trained = |row: i64, guess: usize| {
            (1..=2 + guess).all(|ahead| {
                let token = row as usize + ahead;
                token < length && batch.supervised[start + token]
            })
        };
        let rows: Vec<i64> = (0..length as i64).filter(|&row| is_trained(row, 0)).collect();
        let picked = key.draws(document, 0).choose(&rows, ANCHORS);
        assert!(picked.len() == ANCHORS && rows.len() > ANCHORS);
        for row in picked {
            let hidden = states.size()[1];
            let draws = key.draws(document, 1);
            let noise: Vec<f64> =
                (0..hidden).map(|column| NOISE * (2.0 * draws.uniform(row as u64, column as u64) - 1.0)).collect();
            let state = states.get((start as i64) + row) + Tensor::from_slice(&noise) * f64::from(u8::from(noisy));
            for guess in (0..BLOCK).filter(|&guess| is_trained(row, guess)) {
                let label = batch.ids[start + row as usize + 2 + guess];
                let logits = guessed(draft, guess, &state);
                let weight = DECAY.powi(guess as i32);
                total -= logits.log_softmax(-1, Kind::Double).get(label) * weight;
                weight_of_all += weight;
            }
        }
        start += length;
    }
    total / weight_of_all
}

#[test]
fn it_trains_what_its_header_says() {
    with_draft(|draft, target| {
        let batch = documents();
        let states =
            noise::normal(&[batch.ids.len() as i64, target.info().hidden_size], 1.0, 9, 1).to_kind(Kind::Double);
        let features = FeatureBatch::new(Arc::new(batch.clone()), vec![states.shallow_clone()]);
        let mut objectives = Vec::new();
        for step in [1, 2] {
            let key = StepKey { seed: 3, step, total: 8 };
            let plan = draft.plan(&batch, key).unwrap();
            let mut gradients = Gradients::zeros(draft.parameters()).unwrap();
            let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut gradients)).unwrap();
            let want = objective(draft, &batch, &states, key, true);
            assert!(largest_difference(&tally.objective, &want) < 1e-10, "{tally:?}, {want:?}");
            let values: Vec<&Tensor> = draft.parameters().iter().map(|parameter| &parameter.value).collect();
            let wanted = Tensor::f_run_backward(&[&want], &values, false, false).unwrap();
            for ((got, want), parameter) in gradients.iter().zip(&wanted).zip(draft.parameters()) {
                assert!(want.abs().max().double_value(&[]) > 1e-6, "{}", parameter.name);
                assert!(largest_difference(got, want) < 1e-10, "{}", parameter.name);
            }
            let silent = draft.evaluate(&features, &plan, &plan.counts).unwrap();
            let want = objective(draft, &batch, &states, key, false);
            assert!(largest_difference(&silent.objective, &want) < 1e-10, "{silent:?}, {want:?}");
            objectives.push(want.double_value(&[]));
        }
        assert!((objectives[0] - objectives[1]).abs() > 1e-6, "two steps pick the same: {objectives:?}");
    });
}

/// The guesses of a block stand behind each other as they were trained, and belong to their own row.
#[test]
fn it_guesses_what_it_was_trained_to_guess() {
    with_draft(|draft, target| {
        let sampling = DraftSampling::Greedy;
        let mut drafter = drafter::of_training(draft, None, target, sampling).unwrap().drafter;
        let hidden = target.info().hidden_size;
        let states: Vec<Tensor> =
            (0..3).map(|row| noise::normal(&[4, hidden], 1.0, 9, row).to_kind(Kind::Double)).collect();
        let joining =
            states.iter().map(|state| Joining { tokens: &[1, 2, 3, 4, 5], features: vec![state.shallow_clone()] });
        drafter.join(&joining.collect::<Vec<_>>()).unwrap();
        let best = |state: &Tensor| {
            (0..BLOCK)
                .map(|guess| guessed(draft, guess, state).argmax(-1, false).int64_value(&[]) as u32)
                .collect::<Vec<_>>()
        };
        let rows = [0, 1, 2].map(|key| Context { tokens: &[1, 2, 3, 4, 5], depth: BLOCK, key, temperature: 0.0 });
        let mut want: Vec<Vec<u32>> = states.iter().map(|state| best(&state.get(3))).collect();
        assert!(want.iter().any(|guesses| guesses[0] != guesses[1]) && want[0] != want[1] && want[1] != want[2]);
        let guesses = |drafter: &mut dyn Drafter, rows: &[Context<'_>]| {
            let proposals = drafter.propose(rows).unwrap();
            proposals.iter().map(|proposal| proposal.tree.tokens()[1..].to_vec()).collect::<Vec<_>>()
        };
        assert_eq!(guesses(drafter.as_mut(), &rows), want);
        // The first row leaves, and the last comes to its place.
        drafter.retain(&[2, 1]);
        want.swap(0, 2);
        want.pop();
        assert_eq!(guesses(drafter.as_mut(), &rows[..2]), want);
    });
}
