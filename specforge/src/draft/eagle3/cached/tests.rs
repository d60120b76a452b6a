use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::super::steps::Steps;
use super::super::{Eagle3, Eagle3Config};
use super::*;
use crate::data::{DocumentRef, PackedBatch};
use crate::draft::supervision::MaskAlignment;
use crate::draft::{DraftContext, DraftModel};
use crate::models::TargetInfo;
use crate::nn::{Embedding, Head, noise};

const VOCABULARY: i64 = 23;
const HIDDEN: i64 = 12;
const STEPS: usize = 5;

pub(in crate::draft::eagle3) fn draft(kind: Kind, extra: &Value) -> Eagle3 {
    let mut config = json!({
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": HIDDEN, "intermediate_size": 20,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 1,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    });
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let config = Eagle3Config::read(&json!({"algorithm": "eagle3", "config": config, "ttt_steps": STEPS})).unwrap();
    let table = |stream| noise::normal(&[VOCABULARY, HIDDEN], 1.0, 11, stream).to_kind(kind);
    let (embedding, head) = (Embedding::plain(table(0)), Head::plain(table(1)));
    let context = DraftContext {
        target: TargetInfo::of(HIDDEN, VOCABULARY, 8, 64),
        embedding: &embedding,
        head: &head,
        vocabulary: None,
        weights: None,
        kind,
        device: Device::Cpu,
        seed: 4,
        chunk_bytes: 1 << 20,
    };
    let draft = Eagle3::new(config, &context).unwrap();
    let _guard = tch::no_grad_guard();
    for (stream, parameter) in (100..).zip(draft.parameters()) {
        let mut value = noise::normal(&parameter.value.size(), 0.15, 7, stream).to_kind(kind);
        if parameter.value.dim() == 1 {
            value += 1.0;
        }
        parameter.value.shallow_clone().copy_(&value);
    }
    draft
}

/// Every row `t` starts a chain of steps: row `t` of step 0, then its own guesses, each behind the one before.
#[test]
fn a_chain_of_guesses_is_a_chain_of_training_steps() {
    let _guard = tch::no_grad_guard();
    let shapes = [
        json!({}),
        json!({"num_hidden_layers": 2}),
        json!({"num_hidden_layers": 3, "norm_feedback": true}),
        json!({"norm_before_residual": true, "fc_norm": true}),
        json!({"norm_before_fc": true, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}),
    ];
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for shape in &shapes {
            let draft = draft(kind, shape);
            let network = draft.network();
            let tokens = 14i64;
            let batch = PackedBatch {
                ids: (0..tokens).map(|token| (token * 7 + 3) % VOCABULARY).collect(),
                positions: (0..tokens).collect(),
                supervised: vec![true; tokens as usize],
                lengths: vec![tokens],
                documents: vec![DocumentRef::new("one", 0)],
            };
            let captured: Vec<Tensor> =
                (0..3).map(|layer| noise::normal(&[tokens, HIDDEN], 1.0, 31, layer).to_kind(kind)).collect();
            let projected = network.project_hidden_states(&captured).unwrap();
            let plan = Steps::new(&batch, STEPS, MaskAlignment::Exact, Device::Cpu).unwrap();
            let want = network.backbone(&plan, &projected).unwrap();
            assert_eq!(want.len(), STEPS);
            // Known tokens, in two passes.
            let mut cache = network.new_cache(1, 2);
            let row = |tensor: &Tensor, start: i64, count: i64| tensor.narrow(0, start, count).unsqueeze(0);
            let ids = Tensor::from_slice(&batch.ids[1..]);
            let positions = Tensor::arange(tokens, (Kind::Int64, Device::Cpu));
            let known = tokens - 1;
            let mut first = Vec::new();
            for (start, count) in [(0, 5), (5, known - 5)] {
                let (features, ids) = (row(&projected, start, count), row(&ids, start, count));
                let positions = row(&positions, start, count);
                first.push(
                    network.forward_cached(&features, &ids, &positions, &AttentionMask::Causal, &mut cache).unwrap(),
                );
                cache.advance(&[count]);
            }
            let first = Tensor::cat(&first, 1).squeeze_dim(0); // [known, H]
            let near = |got: &Tensor, want: &Tensor, what: &str| {
                // Un-normed outputs are large; float32 counts relative to them.
                let size = want.abs().max().double_value(&[]).max(1.0);
                let difference = (got - want).abs().max().double_value(&[]) / size;
                assert!(difference < tolerance, "{shape} {kind:?} {what}: {difference:e}");
            };
            let rows: Vec<i64> = Vec::try_from(&plan.steps[0].rows).unwrap();
            near(&first.index_select(0, &plan.steps[0].rows), &want[0], "step 0");
            // A chain behind each row, the rest of the prefix forgotten.
            for &start in rows.iter().rev() {
                cache.truncate(&[start + 1]);
                let mut hidden = first.narrow(0, start, 1).unsqueeze(0); // [1, 1, H]
                for (k, step) in plan.steps.iter().enumerate().skip(1) {
                    let steps: Vec<i64> = Vec::try_from(&step.rows).unwrap();
                    let Ok(place) = steps.binary_search(&start) else { break };
                    let place = place as i64;
                    let pick = |tensor: &Tensor| tensor.narrow(0, place, 1).unsqueeze(0);
                    hidden = network
                        .forward_cached(
                            &network.fed_back(&hidden),
                            &pick(&step.tokens),
                            &pick(&step.positions),
                            &AttentionMask::Causal,
                            &mut cache,
                        )
                        .unwrap();
                    cache.advance(&[1]);
                    near(&hidden.squeeze_dim(0), &want[k].narrow(0, place, 1), &format!("row {start}, step {k}"));
                    let logits = network.compute_logits(&want[k].narrow(0, place, 1)).unwrap();
                    near(&network.logits(&hidden).squeeze_dim(0), &logits, "logits");
                }
            }
        }
    }
}
