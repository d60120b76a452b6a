use std::sync::Arc;

use serde_json::{Value, json};
use tch::Kind;

use super::*;
use crate::data::{DocumentRef, PackedBatch};
use crate::draft::peagle::rows::{Layout, Row};
use crate::draft::peagle::{Peagle, PeagleConfig};
use crate::draft::{DraftContext, DraftModel, Gradients};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Embedding, noise};

const HIDDEN: i64 = 16;
const TOKENS: i64 = 24;

/// A draft in float64 with random values everywhere.
fn draft(config: &Value) -> Peagle {
    let section = json!({
        "algorithm": "peagle", "capture": [0, 2], "num_depths": 5, "mask_token_id": 7, "config": config,
    });
    let random = |stream: u64| noise::normal(&[TOKENS, HIDDEN], 1.0, 9, stream).to_kind(Kind::Double);
    let context = DraftContext {
        target: TargetInfo::of(HIDDEN, TOKENS, 4, 64),
        embedding: &Embedding::plain(random(0)),
        head: &Head::plain(random(1)),
        vocabulary: None,
        weights: None,
        kind: Kind::Double,
        device: Device::Cpu,
        seed: 1,
        chunk_bytes: 1 << 12,
    };
    let draft = Peagle::new(PeagleConfig::read(&section).unwrap(), &context).unwrap();
    let _guard = tch::no_grad_guard();
    for (stream, parameter) in draft.parameters().iter().enumerate() {
        let change = noise::normal(&parameter.value.size(), 0.2, 3, stream as u64);
        drop(parameter.value.shallow_clone().g_add_(&change.to_kind(Kind::Double)));
    }
    draft
}

fn batch(lengths: &[i64]) -> PackedBatch {
    let mut next = noise::keyed_stream(1, 1);
    let all: i64 = lengths.iter().sum();
    PackedBatch {
        ids: (0..all).map(|_| (next() % TOKENS as u64) as i64).collect(),
        positions: lengths.iter().flat_map(|&length| 0..length).collect(),
        supervised: vec![true; all as usize],
        lengths: lengths.to_vec(),
        documents: (0..).zip(lengths).map(|(number, _)| DocumentRef::new("", number)).collect(),
    }
}

fn features(batch: &PackedBatch) -> FeatureBatch {
    let size = [batch.ids.len() as i64, HIDDEN];
    let hidden = (0..3).map(|stream| noise::normal(&size, 1.0, 4, stream).to_kind(Kind::Double)).collect();
    FeatureBatch::new(Arc::new(batch.clone()), hidden)
}

/// Chains of several lengths in two documents, every row of them trained.
const CHAINS: [(i64, usize); 9] = [(0, 4), (1, 1), (2, 4), (4, 0), (5, 2), (9, 3), (10, 1), (11, 4), (13, 2)];

fn rows() -> Vec<Row> {
    let chain = |&(anchor, length): &(i64, usize)| {
        (0..=length).map(move |depth| Row { anchor, depth, teacher: Some(anchor + 1) })
    };
    CHAINS.iter().flat_map(chain).collect()
}

fn configs() -> [Value; 3] {
    let plain = json!({
        "vocab_size": TOKENS, "hidden_size": HIDDEN, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    });
    let with = |changes: Value| {
        let mut config = plain.clone();
        config.as_object_mut().unwrap().append(&mut changes.as_object().unwrap().clone());
        config
    };
    [
        with(json!({"norm_before_residual": true})),
        with(json!({"model_type": "qwen3", "norm_before_fc": true})),
        with(json!({
            "num_hidden_layers": 3, "sliding_window": 6, "fc_norm": true,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        })),
    ]
}

/// What is trained is what decoding computes: the rows of an anchor are the outputs of one pass behind it.
#[test]
fn rows_in_training_are_rows_in_decoding() {
    let batch = batch(&[8, 9]);
    let features = features(&batch);
    for config in configs() {
        let draft = draft(&config);
        let plan = draft.plan_of_rows(&batch, &rows()).unwrap();
        let trained = draft.outputs(&features, &plan).unwrap(); // by depth and anchor
        let mut order: Vec<(usize, i64)> = rows().iter().map(|row| (row.depth, row.anchor)).collect();
        order.sort_unstable();
        let _guard = tch::no_grad_guard();
        let network = draft.network();
        for (anchor, length) in CHAINS {
            let start = if anchor < 8 { 0 } else { 8 };
            let count = anchor - start + 1;
            let captured: Vec<Tensor> = features.hidden[..2].iter().map(|of| of.narrow(0, start, count)).collect();
            let projected = network.project_hidden_states(&captured).unwrap();
            let ids = (start + 1..=anchor + 1).map(|token| batch.ids[token as usize]).collect();
            let mut cache = network.new_cache(1, 1);
            let output = network.draft(&[projected], &[ids], length as i64, &mut cache).unwrap().squeeze_dim(0);
            assert_eq!(cache.lengths(), [count]);
            for depth in 0..=length {
                let place = order.iter().position(|row| *row == (depth, anchor)).unwrap();
                let off = (output.get(depth as i64) - trained.get(place as i64)).abs().max().double_value(&[]);
                assert!(off < 1e-12, "{config}, anchor {anchor}, depth {depth}: off by {off:e}");
            }
        }
    }
}

/// Losses and gradients are the same however rows lie in memory.
#[test]
fn layouts_agree() {
    let batch = batch(&[8, 9]);
    let features = features(&batch);
    for config in configs() {
        let outcomes = [Layout::Chains, Layout::Depths].map(|layout| {
            let draft = draft(&config).with_layout(layout);
            let plan = draft.plan_of_rows(&batch, &rows()).unwrap();
            let mut totals = Gradients::zeros(draft.parameters()).unwrap();
            let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut totals)).unwrap();
            assert!(totals.iter().all(|total| total.abs().max().double_value(&[]) > 0.0));
            totals.push(tally.objective);
            totals.push(tally.sums);
            totals
        });
        for (left, right) in outcomes[0].iter().zip(&outcomes[1]) {
            assert!((left - right).abs().max().double_value(&[]) < 1e-12);
        }
    }
}

/// A batch without rows, or without chains, has values and gradients of zero where there is nothing.
#[test]
fn batches_with_little_to_train_pass() {
    let batch = batch(&[3, 1]);
    let features = features(&batch);
    let draft = draft(&configs()[0]);
    let first = Row { anchor: 0, depth: 0, teacher: Some(1) };
    for rows in [&[][..], &[first]] {
        let plan = draft.plan_of_rows(&batch, rows).unwrap();
        let mut totals = Gradients::zeros(draft.parameters()).unwrap();
        let tally = draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut totals)).unwrap();
        assert_eq!(tally.counts[0], rows.len() as f64);
        assert!(tally.objective.double_value(&[]).is_finite());
        assert!(totals.iter().all(|total| total.isfinite().all().int64_value(&[]) == 1));
        let evaluated = draft.evaluate(&features, &plan, &plan.counts).unwrap();
        assert!((evaluated.sums - tally.sums).abs().max().double_value(&[]) < 1e-12);
    }
}
