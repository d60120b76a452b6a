use serde_json::{Value, json};
use tch::Tensor;

use super::super::BlockHead;
use super::super::sequential::{SequentialHead, greedy, walk};
use super::super::test_blocks::{Blocks, SIZES, configured, tensors};
use super::*;
use crate::nn::drawn::Drawn;

fn section(layout: &str, prefix: i64) -> Value {
    let head = json!({"gru_hidden_dim": 7, "emb_dim": 5, "pure_draft_prefix_len": prefix});
    json!({"algorithm": "domino", "block_size": 5, "layout": layout, "head": head})
}

fn case(section: &Value, drawn: &Drawn) -> (DominoHead, Domino, Blocks) {
    let (config, shape) = configured(section);
    let own = DominoConfig::read(&config).unwrap();
    let find = tensors(own.tensors(&shape).unwrap(), drawn);
    let training = DominoHead::new(&config, &shape, &find).unwrap();
    (training, Domino::new(&own, &shape, &find).unwrap(), Blocks::random(&shape, drawn))
}

fn close(left: &Tensor, right: &Tensor) -> bool {
    left.size() == right.size() && left.allclose(right, 1e-10, 1e-10, false)
}

#[test]
fn a_walk_is_what_training_makes_of_its_tokens() {
    let drawn = Drawn::of(1);
    for layout in ["fill_in", "shift"] {
        for prefix in [0, 1, 2] {
            let (training, decoding, blocks) = case(&section(layout, prefix), &drawn);
            let walk = blocks.walk(&decoding);
            assert_eq!(walk.tokens.size(), [SIZES[0], 4]);
            let (logits, base) = training.outputs(&blocks.chunk(&walk.tokens)).unwrap();
            let slots = blocks.shape.slots();
            let trained = logits.view([SIZES[0], slots, SIZES[2]]).narrow(1, 0, 4);
            assert!(close(&trained, &Tensor::stack(&walk.logits, 1)), "{layout} {prefix}");
            let base = base.view([SIZES[0], slots, SIZES[2]]);
            assert!(close(&base, &blocks.base()));
            for slot in 0..4 {
                assert_eq!(close(&trained.select(1, slot), &base.select(1, slot)), slot < prefix, "{layout} {prefix}");
            }
        }
    }
}

#[test]
fn the_recurrence_is_pytorchs() {
    let drawn = Drawn::of(2);
    let (config, shape) = configured(&section("shift", 1));
    let own = DominoConfig::read(&config).unwrap();
    let find = tensors(own.tensors(&shape).unwrap(), &drawn);
    let decoding = Domino::new(&own, &shape, &find).unwrap();
    let blocks = Blocks::random(&shape, &drawn);
    let tokens = Tensor::from_slice(&[1i64, 4, 4, 0, 16, 2, 9, 9, 9, 3, 8, 1, 0, 5, 7]).view([3, 5]);
    let embedded = Tensor::embedding(&blocks.embedding, &tokens, -1, false, false);
    let weights = [find("prefix_gru.weight_ih_l0").unwrap(), find("prefix_gru.weight_hh_l0").unwrap()];
    let start = Tensor::zeros([1, 3, 7], (embedded.kind(), embedded.device()));
    let want = embedded.gru(&start, &weights, false, 1, 0.0, false, false, true).0;
    assert!(close(&decoding.states(&blocks.embedding, &tokens).unwrap(), &want));
}

#[test]
fn a_pool_of_all_tokens_is_none_and_a_small_one_is_kept_to() {
    let drawn = Drawn::of(3);
    let (_, decoding, blocks) = case(&section("fill_in", 1), &drawn);
    let base = blocks.base();
    assert!(decoding.pool(&base, SIZES[2]).is_none() && decoding.pool(&base, 0).is_none());
    let free = blocks.walk(&decoding);
    let mut drafted = blocks.drafted(&base);
    drafted.pool = decoding.pool(&base, SIZES[2] - 1);
    let wide = walk(&decoding, &drafted, 4, &mut greedy).unwrap();
    // All tokens but one, which no walk here takes.
    assert!(wide.tokens.equal(&free.tokens));
    drafted.pool = decoding.pool(&base, 3);
    let narrow = walk(&decoding, &drafted, 4, &mut greedy).unwrap();
    let pool = drafted.pool.unwrap();
    let inside = narrow.tokens.narrow(1, 1, 3).unsqueeze(2).eq_tensor(&pool.unsqueeze(1)).any_dim(2, false);
    assert!(bool::try_from(inside.all()).unwrap());
    assert!(narrow.tokens.select(1, 0).equal(&free.tokens.select(1, 0)));
    assert_eq!(narrow.logits[1].size(), [SIZES[0], 3]);
    assert!(walk(&decoding, &blocks.drafted(&base), 5, &mut greedy).is_err());
    assert_eq!(decoding.drafts(), 4);
}

#[test]
fn the_backbones_own_loss_falls_away() {
    let own = DominoConfig { base_weight: 0.8, base_weight_until: 0.5, ..DominoConfig::default() };
    let shares = [0.0, 0.25, 0.5, 0.75, 1.0].map(|progress| own.base_share(progress));
    assert_eq!(shares, [0.8, 0.4, 0.0, 0.0, 0.0]);
    let drawn = Drawn::of(4);
    let (training, decoding, blocks) = case(&section("shift", 1), &drawn);
    let names = (KIND.metrics)(&configured(&section("shift", 1)).0).unwrap();
    let mut chunk = blocks.chunk(&blocks.walk(&decoding).tokens);
    for (progress, factors) in [(0.0, vec![0.0, 1.0]), (0.25, vec![0.5, 0.5]), (0.5, vec![1.0])] {
        chunk.progress = progress;
        let loss = training.loss(&chunk).unwrap();
        assert_eq!(loss.terms.iter().map(|term| term.factor).collect::<Vec<_>>(), factors);
        assert_eq!(loss.metrics.len(), names.len());
    }
    assert_eq!(training.metric_counts(&[vec![true; 5]]).len(), names.len());
}

#[test]
fn keys_are_checked_and_named() {
    for (head, word) in [
        (json!({"gru_hidden_dim": 0}), "gru_hidden_dim"),
        (json!({"emb_dim": -1}), "emb_dim"),
        (json!({"pure_draft_prefix_len": 16}), "expected 0 to 15 slots"),
        (json!({"base_weight": 1.5}), "base_weight"),
        (json!({"base_weight_until": 0.0}), "base_weight_until"),
        (json!({"gru_hidden": 4}), "did you mean `gru_hidden_dim`"),
    ] {
        let config = BlockConfig { head: head.as_object().unwrap().clone(), ..BlockConfig::default() };
        let error = DominoConfig::read(&config).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("draft.head"), "{error}");
    }
}
