use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::super::BlockHead;
use super::super::test_blocks::{Blocks, configured, tensors};
use super::*;
use crate::nn::drawn::Drawn;

fn section(kind: &str, layout: &str, head: Value) -> Value {
    let mut head = head;
    head["markov_head_type"] = json!(kind);
    head["markov_rank"] = json!(5);
    json!({"algorithm": "dspark", "block_size": 4, "layout": layout, "head": head})
}

/// A head in training and the same in decoding, and blocks for them.
fn case(section: &Value, drawn: &Drawn) -> (DSpark, Markov, Blocks) {
    let (config, shape) = configured(section);
    let own = MarkovConfig::read(&config).unwrap();
    let find = tensors(own.tensors(&shape), drawn);
    let training = DSpark::new(&config, &shape, &find).unwrap();
    (training, Markov::new(&own, &shape, &find).unwrap(), Blocks::random(&shape, drawn))
}

fn close(left: &Tensor, right: &Tensor) -> bool {
    left.size() == right.size() && left.allclose(right, 1e-10, 1e-10, false)
}

#[test]
fn a_walk_is_what_training_makes_of_its_tokens() {
    let drawn = Drawn::of(1);
    for kind in ["vanilla", "gated", "rnn"] {
        for layout in ["fill_in", "shift"] {
            for (with_markov, anchor_row) in [(true, false), (false, true)] {
                let head = json!({
                    "confidence_head_with_markov": with_markov, "anchor_row_writes_state": anchor_row && kind == "rnn",
                });
                let (training, decoding, blocks) = case(&section(kind, layout, head), &drawn);
                let walk = blocks.walk(&decoding);
                let (logits, confidence) = training.outputs(&blocks.chunk(&walk.tokens)).unwrap();
                let walked = Tensor::stack(&walk.logits, 1);
                assert!(close(&logits, &walked.flatten(0, 1)), "{kind} {layout}");
                assert!(close(&confidence.unwrap(), &walk.confidence.unwrap().flatten(0, -1)), "{kind} {layout}");
                assert!(walked.argmax(-1, false).equal(&walk.tokens));
                // A head that does nothing would pass all of this.
                assert!(!close(&walked, &blocks.base()));
            }
        }
    }
}

#[test]
fn gates_and_states_are_the_formulas_written_out() {
    let drawn = Drawn::of(8);
    for kind in ["vanilla", "gated", "rnn"] {
        let (config, shape) = configured(&section(kind, "shift", json!({})));
        let own = MarkovConfig::read(&config).unwrap();
        let find = tensors(own.tensors(&shape), &drawn);
        let decoding = Markov::new(&own, &shape, &find).unwrap();
        let blocks = Blocks::random(&shape, &drawn);
        let tokens = Tensor::from_slice(&[1i64, 4, 4, 0, 16, 2, 9, 9, 9, 3, 8, 1]).view([3, 4]);
        let (latents, _) = decoding.slot_latents(&blocks.hidden, &tokens).unwrap(); // [3, 4, 5]
        let affine = |name: &str, input: &Tensor| {
            let [weight, bias] = ["weight", "bias"].map(|part| find(&format!("markov_head.{name}.{part}")).unwrap());
            weight.matmul(input) + bias
        };
        for block in 0..3 {
            let mut state = Tensor::zeros([5], (Kind::Double, tch::Device::Cpu));
            for slot in 0..4 {
                let row = blocks.hidden.get(block).get(slot);
                let embedded = find("markov_head.markov_w1.weight").unwrap().get(tokens.int64_value(&[block, slot]));
                let want = match kind {
                    "gated" => affine("gate_proj", &Tensor::cat(&[&row, &embedded], 0)).sigmoid() * &embedded,
                    "rnn" => {
                        let joint = affine("joint_proj", &Tensor::cat(&[&state, &embedded, &row], 0));
                        let gate = joint.narrow(0, 0, 5).sigmoid();
                        state = &gate * state + (1.0 - &gate) * joint.narrow(0, 5, 5).tanh();
                        joint.narrow(0, 10, 5).tanh()
                    }
                    _ => embedded,
                };
                assert!(close(&latents.get(block).get(slot), &want), "{kind}, block {block}, slot {slot}");
            }
        }
    }
}

#[test]
fn the_row_of_the_anchor_matters_where_it_writes_the_state() {
    let logits = |anchor_row: bool| {
        let drawn = Drawn::of(3);
        let head = json!({"anchor_row_writes_state": anchor_row});
        let (_, decoding, blocks) = case(&section("rnn", "fill_in", head), &drawn);
        blocks.walk(&decoding).logits.remove(0)
    };
    assert!(!close(&logits(true), &logits(false)));
}

#[test]
fn confidence_does_not_know_later_tokens() {
    let drawn = Drawn::of(4);
    for kind in ["vanilla", "gated", "rnn"] {
        let (training, _, blocks) = case(&section(kind, "shift", json!({})), &drawn);
        let (rows, slots) = (blocks.hidden.size()[0], blocks.shape.slots());
        let confidence = |changed: Option<i64>| {
            let mut tokens = vec![3i64; (rows * slots) as usize];
            if let Some(slot) = changed {
                (0..rows).for_each(|row| tokens[(row * slots + slot) as usize] = 9);
            }
            let chunk = blocks.chunk(&Tensor::from_slice(&tokens).view([rows, slots]));
            training.outputs(&chunk).unwrap().1.unwrap().view([rows, slots])
        };
        let plain = confidence(None);
        for slot in 0..slots {
            let other = confidence(Some(slot));
            assert!(plain.narrow(1, 0, slot + 1).equal(&other.narrow(1, 0, slot + 1)), "{kind}: token of slot {slot}");
            if slot + 1 < slots {
                assert!(
                    !close(&plain.select(1, slot + 1), &other.select(1, slot + 1)),
                    "{kind}: it reads the last one"
                );
            }
        }
    }
}

#[test]
fn a_vocabulary_of_the_drafts_own_is_walked_by_the_targets_numbers() {
    let drawn = Drawn::of(5);
    let (config, shape) = configured(&section("gated", "shift", json!({})));
    let own = MarkovConfig::read(&config).unwrap();
    let mut specs = own.tensors(&shape);
    specs[1].shape[0] = 4;
    let decoding = Markov::new(&own, &shape, &tensors(specs, &drawn)).unwrap();
    let blocks = Blocks::random(&shape, &drawn);
    let numbers = Tensor::from_slice(&[2i64, 3, 11, 16]);
    let base = blocks.base().index_select(2, &numbers);
    let mut drafted = blocks.drafted(&base);
    drafted.tokens = Some(&numbers);
    let walked = super::super::sequential::walk(&decoding, &drafted, 4, &mut super::super::sequential::greedy).unwrap();
    let own_numbers = Tensor::stack(&walked.logits, 1).argmax(-1, false);
    assert!(numbers.index_select(0, &own_numbers.flatten(0, -1)).view_as(&walked.tokens).equal(&walked.tokens));
    // The second slot reads what the first has drafted, by the target's number.
    let embedded = decoding.embed(&walked.tokens.select(1, 0)).unwrap();
    let second = base.select(1, 1) + decoding.bias(&decoding.latents(&drafted.row(1), &embedded));
    assert!(close(&second, &walked.logits[1]));
}

#[test]
fn the_confidence_may_leave_the_backbone_alone() {
    let slope = |detach: bool| {
        let drawn = Drawn::of(7);
        let section = section("vanilla", "shift", json!({"detach_confidence": detach}));
        let (training, decoding, blocks) = case(&section, &drawn);
        let names = (KIND.metrics)(&configured(&section).0).unwrap();
        let tokens = blocks.walk(&decoding).tokens;
        let mut chunk = blocks.chunk(&tokens);
        chunk.hidden = chunk.hidden.set_requires_grad(true);
        let loss = training.loss(&chunk).unwrap();
        assert_eq!(loss.terms.len(), 2);
        assert_eq!(loss.metrics.len(), names.len());
        assert_eq!(training.metric_counts(&[vec![true; 4]]).len(), names.len());
        let sum = &loss.terms[1].sum;
        sum.requires_grad().then(|| sum.backward());
        let gradient = chunk.hidden.grad();
        gradient.defined() && gradient.abs().sum(Kind::Double).double_value(&[]) > 0.0
    };
    assert!(slope(false));
    assert!(!slope(true));
}

#[test]
fn keys_are_checked_and_named() {
    for (head, word) in [
        (json!({"markov_rank": 0, "confidence_head": false}), "markov_rank"),
        (json!({"markov_head_type": "gate"}), "markov_head_type"),
        (json!({"confidence_weight": -1.0}), "confidence_weight"),
        (json!({"confidence_gamma": 0.0}), "confidence_gamma"),
        (json!({"anchor_row_writes_state": true}), "anchor_row_writes_state"),
        (json!({"markov_ranks": 4}), "did you mean `markov_rank`"),
    ] {
        let config = BlockConfig { head: head.as_object().unwrap().clone(), ..BlockConfig::default() };
        let error = MarkovConfig::read(&config).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("draft.head"), "{error}");
    }
}
