//! Invariants of Medusa training, in this process: accumulation, independence of packed documents, gradients.

use std::sync::Arc;

use serde_json::json;
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::medusa::{Medusa, MedusaConfig};
use specforge::draft::{DraftContext, DraftModel, Gradients, Tally};
use specforge::features::{FeatureSource, OnlineFeatures};
use specforge::nn::noise;
use tch::{Kind, Tensor};

use crate::fixture::{STEP, TOKENIZER_SIZE, largest_difference};
use crate::small_drafts;

/// A target with heads on it, and the target's features.
struct Setup {
    draft: Medusa,
    source: OnlineFeatures,
}

impl Setup {
    /// Heads of two blocks that are not at their start: random noise on every parameter.
    fn new(kind: Kind, projection: &str) -> Self {
        let target = small_drafts::target(kind);
        let heads = MedusaConfig::read(&json!({"num_heads": 3, "num_layers": 2, "projection": projection})).unwrap();
        // Seven rows a chunk, so that a batch takes several.
        let chunk_bytes = 7 * 4 * TOKENIZER_SIZE as usize;
        let draft = Medusa::new(heads, &DraftContext { chunk_bytes, ..small_drafts::context(&target) }).unwrap();
        small_drafts::disturb(&draft);
        Self { draft, source: OnlineFeatures::new(target) }
    }

    /// Gradients of an objective divided by `counts`, after one batch after another.
    fn gradients(&self, batches: &[&PackedBatch], counts: &[f64]) -> (Vec<Tensor>, Vec<Tally>) {
        let zeros = |value: &Tensor| value.zeros_like().detach().set_requires_grad(false);
        let mut gradients: Vec<Tensor> =
            self.draft.parameters().iter().map(|parameter| zeros(&parameter.value)).collect();
        let tallies = batches
            .iter()
            .map(|batch| {
                let features = self.source.features(Arc::new((*batch).clone()), &self.draft.capture()).unwrap();
                let plan = self.draft.plan(batch, STEP).unwrap();
                self.draft.accumulate(&features, &plan, counts, &mut Gradients::new(&mut gradients)).unwrap()
            })
            .collect();
        (gradients, tallies)
    }

    fn counts(&self, batches: &[&PackedBatch]) -> Vec<f64> {
        let each: Vec<Vec<f64>> = batches.iter().map(|batch| self.draft.count(batch, STEP).unwrap()).collect();
        (0..each[0].len()).map(|term| each.iter().map(|counts| counts[term]).sum()).collect()
    }
}

/// A document of random tokens; the marks say which are supervised.
fn document(name: u64, marks: &str) -> PackedBatch {
    let mut next = noise::keyed_stream(name, 0);
    let length = marks.len() as i64;
    PackedBatch {
        ids: marks.chars().map(|_| (next() % TOKENIZER_SIZE as u64) as i64).collect(),
        positions: (0..length).collect(),
        supervised: marks.chars().map(|mark| mark == 'x').collect(),
        lengths: vec![length],
        documents: vec![DocumentRef::new(name.to_string(), name)],
    }
}

fn packed(documents: &[&PackedBatch]) -> PackedBatch {
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

fn is_bit_equal(left: &Tensor, right: &Tensor) -> bool {
    left.size() == right.size() && left.eq_tensor(right).all().int64_value(&[]) == 1
}

#[test]
fn gradients_do_not_depend_on_the_split_into_micro_batches() {
    let marks = ["..xxxxxxx", ".xxxx..xxxxx", "...x", ".....xxxxxxxxxxx", "..xxx", ".xxxxxxx.xxxxxx"];
    let documents: Vec<PackedBatch> = (0..6).map(|index| document(index as u64, marks[index])).collect();
    for projection in ["own", "shared"] {
        let setup = Setup::new(Kind::Double, projection);
        let pack = |range: std::ops::Range<usize>| packed(&documents[range].iter().collect::<Vec<_>>());
        let splits =
            [vec![pack(0..6)], vec![pack(0..2), pack(2..3), pack(3..6)], (0..6).map(|n| pack(n..n + 1)).collect()];
        let outcomes = splits.map(|split| {
            let batches: Vec<&PackedBatch> = split.iter().collect();
            let (gradients, tallies) = setup.gradients(&batches, &setup.counts(&batches));
            let sums = Tensor::stack(&tallies.iter().map(|tally| &tally.sums).collect::<Vec<_>>(), 0);
            (gradients, sums.sum_dim_intlist(0, false, Kind::Double))
        });
        let (whole, whole_sums) = &outcomes[0];
        for (parts, sums) in &outcomes[1..] {
            assert!(largest_difference(sums, whole_sums) < 1e-10, "{projection}");
            for ((part, whole), parameter) in parts.iter().zip(whole).zip(setup.draft.parameters()) {
                let difference = largest_difference(part, whole);
                assert!(difference < 1e-10, "{projection}, {}: {difference:e}", parameter.name);
            }
        }
    }
}

/// What a document holds, and whether it is supervised, is nothing to its neighbours.
#[test]
fn a_packed_document_does_not_touch_its_neighbours() {
    let (first, last) = (document(1, "..xxxxxxxxx"), document(4, ".xxxx.xxxx"));
    let setup = Setup::new(Kind::Float, "own");
    let gradients = |middle: &PackedBatch| {
        let batch = packed(&[&first, middle, &last]);
        setup.gradients(&[&batch], &setup.counts(&[&first, &last])).0
    };
    let unsupervised = |name| gradients(&document(name, "............."));
    let (one, other) = (unsupervised(2), unsupervised(3));
    for ((one, other), parameter) in one.iter().zip(&other).zip(setup.draft.parameters()) {
        assert!(is_bit_equal(one, other), "{}", parameter.name);
        assert!(one.abs().max().double_value(&[]) > 0.0, "{}", parameter.name);
    }

    // In float64, a pack's gradient is the sum of its documents' own, whatever the middle one is.
    let setup = Setup::new(Kind::Double, "own");
    for middle in [document(2, "..xxxxx..xx"), document(3, "xxxxxxxxxxxxxxxxx"), document(5, ".")] {
        let counts = setup.counts(&[&first, &middle, &last]);
        let (together, _) = setup.gradients(&[&packed(&[&first, &middle, &last])], &counts);
        let (one_by_one, _) = setup.gradients(&[&first, &middle, &last], &counts);
        for (together, alone) in together.iter().zip(&one_by_one) {
            assert!(largest_difference(together, alone) < 1e-10);
        }
    }
}

#[test]
fn every_parameter_of_every_head_gets_a_gradient_from_the_first_step_on() {
    for projection in ["own", "shared"] {
        let setup = Setup::new(Kind::Float, projection);
        for fresh in [true, false] {
            let _no_grad = tch::no_grad_guard();
            for parameter in
                setup.draft.parameters().iter().filter(|parameter| fresh && parameter.name.contains("linear"))
            {
                drop(parameter.value.shallow_clone().zero_());
            }
            drop(_no_grad);
            let batch = document(9, "..xxxxxxxxxxxx");
            let (gradients, _) = setup.gradients(&[&batch], &setup.counts(&[&batch]));
            for (gradient, parameter) in gradients.iter().zip(setup.draft.parameters()) {
                assert!(gradient.abs().max().double_value(&[]) > 1e-8, "{projection}, {}", parameter.name);
            }
        }
    }
}

/// A batch of which no head trains a row is no reason to fail, and moves nothing.
#[test]
fn a_batch_without_trained_rows_gives_zero_gradients() {
    let setup = Setup::new(Kind::Float, "own");
    let batch = document(1, "..x.x.");
    assert_eq!(setup.counts(&[&batch]), [0.0; 3]);
    let (gradients, tallies) = setup.gradients(&[&batch], &[0.0; 3]);
    assert!(gradients.iter().all(|gradient| gradient.abs().max().double_value(&[]) == 0.0));
    assert_eq!(tallies[0].objective.double_value(&[]), 0.0);
}
