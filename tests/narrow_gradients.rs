//! Gradients in float16 and bfloat16 are those of float32, however many rows the objective is divided by: a batch's share
//! of a large step is no smaller a number for what is computed with it.

use std::sync::Arc;

use serde_json::{Value, json};
use specforge::data::{DocumentRef, PackedBatch};
use specforge::draft::{self, DraftContext, DraftModel, Gradients};
use specforge::features::FeatureBatch;
use specforge::models::{LayerShape, TargetInfo};
use specforge::nn::{Embedding, Head, RopeConfig, RopeScaling, noise};
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use crate::fixture::STEP;

const VOCABULARY: i64 = 211;
const HIDDEN: i64 = 64;
const LAYERS: usize = 6;

fn dimensions() -> TargetInfo {
    let rope = RopeConfig { theta: 1e4, head_dim: 16, max_position_embeddings: 512, scaling: RopeScaling::Default };
    let layer = LayerShape {
        intermediate_size: 96,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope,
    };
    TargetInfo { template: layer, ..TargetInfo::of(HIDDEN, VOCABULARY, LAYERS, 512) }
}

/// A long document and two short ones; the last two thirds of each are supervised.
fn batch() -> PackedBatch {
    let lengths = [260i64, 70, 30];
    let mut random = noise::keyed_stream(5, 0);
    PackedBatch {
        ids: (0..lengths.iter().sum()).map(|_| (random() % VOCABULARY as u64) as i64).collect(),
        positions: lengths.iter().flat_map(|&length| 0..length).collect(),
        supervised: lengths.iter().flat_map(|&length| (0..length).map(move |at| at * 3 >= length)).collect(),
        lengths: lengths.to_vec(),
        documents: lengths
            .iter()
            .map(|&length| DocumentRef::new(format!("document of {length}"), length as u64))
            .collect(),
    }
}

/// Gradients of one batch, by parameter, with the same numbers in every element type: those that `narrow` can hold.
fn gradients(section: &Value, narrow: Kind, kind: Kind, count: f64) -> Vec<(String, Tensor)> {
    let random =
        |shape: &[i64], size: f64, stream: u64| noise::normal(shape, size, 11, stream).to_kind(narrow).to_kind(kind);
    let (embedding, head) = (random(&[VOCABULARY, HIDDEN], 1.0, 0), random(&[VOCABULARY, HIDDEN], 0.2, 1));
    let map = VocabMap::new((0..90).map(|id| id * 2).collect(), VOCABULARY).unwrap();
    let context = DraftContext {
        target: dimensions(),
        embedding: &Embedding::plain(embedding),
        head: &Head::plain(head),
        vocabulary: section.get("draft_vocab_size").map(|_| &map),
        weights: None,
        kind,
        device: Device::Cpu,
        seed: 3,
        chunk_bytes: 70 * 4 * VOCABULARY as usize,
    };
    let algorithm = draft::algorithm(section).unwrap();
    let draft: Box<dyn DraftModel> = (algorithm.build)(section, &context).unwrap();
    for (stream, parameter) in draft.parameters().iter().enumerate() {
        let _guard = tch::no_grad_guard();
        let shape = parameter.value.size();
        let (size, start) = if shape.len() == 1 { (0.1, 1.0) } else { ((shape[1] as f64).powf(-0.5), 0.0) };
        let value = (random(&shape, size, 20 + stream as u64) + start).to_kind(narrow);
        parameter.value.shallow_clone().copy_(&value);
    }
    let batch = batch();
    let rows = batch.ids.len() as i64;
    let hidden = draft.capture().iter().map(|&layer| random(&[rows, HIDDEN], 1.0, 100 + layer as u64)).collect();
    let features = FeatureBatch::new(Arc::new(batch.clone()), hidden);
    let plan = draft.plan(&batch, STEP).unwrap();
    let counts = vec![count; plan.counts.len()];
    let mut totals = Gradients::zeros(draft.parameters()).unwrap();
    draft.accumulate(&features, &plan, &counts, &mut Gradients::new(&mut totals)).unwrap();
    draft.parameters().iter().map(|parameter| parameter.name.clone()).zip(totals).collect()
}

/// Largest distance of a direction or a length from float32's, over all parameters, and whose it is.
fn worst(section: &Value, narrow: Kind, count: f64) -> (f64, String) {
    let want = gradients(section, narrow, Kind::Float, count);
    let got = gradients(section, narrow, narrow, count);
    let mut worst = (0.0, String::new());
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        let [got, want] = [got, want].map(|gradient| gradient.to_kind(Kind::Double).flatten(0, -1));
        let [length, wanted] = [&got, &want].map(|gradient| gradient.norm().double_value(&[]));
        let cosine = got.dot(&want).double_value(&[]) / (length * wanted);
        assert!(wanted > 0.0, "{name} has no gradient");
        let off = (1.0 - cosine).max((length / wanted - 1.0).abs());
        if off.is_nan() || off > worst.0 {
            worst = (off, format!("{name}: cosine {cosine:.4}, length {:.4}", length / wanted));
        }
    }
    worst
}

/// float16 has eight times the digits of bfloat16.
fn check(what: &str, section: &Value) {
    for (narrow, limit) in [(Kind::Half, 5e-3), (Kind::BFloat16, 2e-2)] {
        for count in [1e2, 1e5, 1e6] {
            let (off, place) = worst(section, narrow, count);
            println!("{what}, {narrow:?}, {count:e} rows: {off:.1e} at {place}");
            assert!(off < limit, "{what}, {narrow:?}, {count:e} rows in the step: {place}");
        }
    }
}

fn eagle3(extra: &Value) -> Value {
    let mut section = json!({"algorithm": "eagle3", "ttt_steps": 4, "draft_vocab_size": 90, "capture": [1, 2, 4]});
    section.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    section
}

#[test]
fn eagle3_keeps_its_gradients_in_every_loss() {
    for loss in ["cross_entropy", "kl", "reverse_kl", "total_variation", "lk_alpha", "lk_lambda"] {
        check(loss, &eagle3(&json!({"loss": loss})));
    }
}

#[test]
fn eagle3_keeps_its_gradients_with_steps_computed_again() {
    for loss in ["cross_entropy", "lk_lambda"] {
        check(&format!("{loss}, recomputed"), &eagle3(&json!({"loss": loss, "recompute": true})));
    }
}

/// The division by the rows of the batch, which is known on the device alone.
#[test]
fn eagle3_keeps_its_gradients_in_the_parity_mode() {
    for loss in ["lk_alpha", "lk_lambda"] {
        let parity = json!({"loss": loss, "mask": "specforge", "normalisation": "all_positions"});
        check(&format!("{loss}, parity"), &eagle3(&parity));
    }
}

#[test]
fn medusa_keeps_its_gradients() {
    for projection in ["own", "shared"] {
        let section = json!({"algorithm": "medusa", "num_heads": 2, "num_layers": 2, "projection": projection});
        check(&format!("medusa, {projection}"), &section);
    }
}

fn block(algorithm: &str, extra: &Value) -> Value {
    let mut section = json!({"algorithm": algorithm, "num_layers": 2, "block_size": 6, "num_anchors": 40,
        "target_layer_ids": [0, 2, 4], "mask_token_id": 7});
    section.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    section
}

#[test]
fn dflash_keeps_its_gradients() {
    check("dflash", &block("dflash", &json!({})));
    let sliding = json!({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20,
        "weights": {"name": "d_pace"}, "conv": {"kernel_size": 2, "group_size": 8}});
    check("dflash, a window, d_pace", &block("dflash", &sliding));
}

#[test]
fn dspark_keeps_its_gradients() {
    for kind in ["vanilla", "gated", "rnn"] {
        let head = json!({"head": {"markov_rank": 16, "markov_head_type": kind}, "draft_vocab_size": 90});
        check(&format!("dspark, {kind}"), &block("dspark", &head));
    }
}

/// A weight that users may choose is not too large for float16 either.
#[test]
fn large_weights_and_few_rows_do_not_overflow() {
    let weights = json!({"loss_weights": [3e4, 2e4, 1e4, 1e4]});
    let (off, place) = worst(&eagle3(&weights), Kind::Half, 10.0);
    assert!(off < 2e-3, "{place}");
}
