//! Heads with candidates and the refiner on chunks of numbers without meaning.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{HeadKind, Start, lilicorr, selector, xpress};
use crate::draft::block::chunk::{Chunk, Denominator};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::models::TargetInfo;
use crate::nn::Head;
use crate::nn::drawn::Drawn;

const VOCABULARY: i64 = 20;
const HIDDEN: i64 = 12;

fn heads() -> Vec<(&'static HeadKind, Value)> {
    let scorer = json!({"lilicorr_candidate_topk": 4, "lilicorr_hidden_size": 6, "lilicorr_num_heads": 2,
        "lilicorr_factor_dim": 5, "margin_weight": 0.1, "calibration_weight": 0.1});
    vec![
        (&selector::KIND, json!({"selector_rank": 3, "selector_top_k": 4})),
        (&selector::KIND, json!({"selector_rank": 3, "selector_top_k": 4, "detach_backbone": true})),
        (&lilicorr::KIND, scorer),
        (&xpress::KIND, json!({"xpress_rank": 3})),
    ]
}

/// Sums of all terms, metrics, and gradients of the rows and of the head's tensors, of blocks with these supervised slots.
fn run((kind, head): &(&HeadKind, Value), supervised: &[[bool; 4]], element: Kind) -> (Tensor, Vec<f64>, Vec<Tensor>) {
    let section = json!({"algorithm": kind.name, "block_size": 5, "num_layers": 1, "mask_token_id": 19,
        "target_layer_ids": [1], "conv": {"kernel_size": 2, "group_size": 6}, "loss": {"ce": 0.5, "tv": 0.5}, "head": head});
    let config = BlockConfig::read(&section).unwrap();
    let shape: BlockShape = config.shape(&TargetInfo::of(HIDDEN, VOCABULARY, 6, 64)).unwrap();
    let drawn = Drawn::of(31);
    let random = |shape: &[i64]| drawn.normal(shape).to_kind(element);
    let specs = (kind.tensors)(&config, &shape).unwrap();
    let leaves: Vec<(String, Tensor)> = specs
        .into_iter()
        .map(|spec| {
            let norm = spec.start == Start::Ones;
            let value = if norm { random(&spec.shape).ones_like() } else { random(&spec.shape) * 0.3 };
            (spec.name, value.set_requires_grad(true))
        })
        .collect();
    let find = |name: &str| Ok(leaves.iter().find(|(leaf, _)| leaf == name).unwrap().1.shallow_clone());
    let head = (kind.build)(&config, &shape, &find).unwrap();
    let blocks = supervised.len() as i64;
    let hidden = random(&[blocks, 5, HIDDEN]).set_requires_grad(true);
    let marks = Tensor::from_slice(&supervised.concat()).view([blocks, 4]);
    let places = marks.flatten(0, 1).nonzero().view([-1]);
    let rows = places.size()[0];
    let projection = Head::plain(random(&[VOCABULARY, HIDDEN]));
    let embedding = random(&[VOCABULARY, HIDDEN]);
    let tokens = drawn.below(VOCABULARY, &[blocks, 6]);
    let chunk = Chunk {
        shape: &shape,
        hidden: hidden.shallow_clone(),
        context: Some(random(&[blocks, HIDDEN])),
        before: tokens.select(1, 5),
        tokens,
        supervised: marks,
        places,
        teacher: Some(random(&[rows, VOCABULARY]).to_kind(Kind::Float)),
        head: &projection,
        embedding: &embedding,
        vocabulary: None,
        progress: 0.0,
        whole: None,
        document_shares: Tensor::ones([blocks], (Kind::Double, Device::Cpu)),
    };
    let loss = head.loss(&chunk).unwrap();
    let lists: Vec<Vec<bool>> = supervised.iter().map(|block| block.to_vec()).collect();
    let counts = head.counts(&lists);
    let mut sum = Tensor::from(0.0f64);
    for term in loss.terms {
        if let Denominator::Planned(place) = term.denominator {
            assert!(place < counts.len(), "{}", kind.name);
        }
        sum += term.sum * term.factor;
    }
    assert_eq!(loss.metrics.len(), head.metric_counts(&lists).len(), "{}", kind.name);
    assert_eq!(loss.metrics.len(), (kind.metrics)(&config).unwrap().len(), "{}", kind.name);
    let metrics = loss.metrics.iter().map(|metric| metric.double_value(&[])).collect();
    let tensors: Vec<&Tensor> = std::iter::once(&hidden).chain(leaves.iter().map(|(_, leaf)| leaf)).collect();
    let gradients = Tensor::f_run_backward(&[&sum], &tensors, false, false).unwrap();
    (sum.detach(), metrics, gradients)
}

#[test]
fn narrow_numbers_give_narrow_gradients() {
    let supervised = [[true; 4], [true, false, true, true], [false; 4], [true, true, true, false]];
    for head in heads() {
        let (wide, _, _) = run(&head, &supervised, Kind::Float);
        let (narrow, metrics, gradients) = run(&head, &supervised, Kind::BFloat16);
        let name = head.0.name;
        assert!(metrics.iter().all(|metric| metric.is_finite()), "{name}: {metrics:?}");
        for gradient in gradients {
            assert_eq!(gradient.kind(), Kind::BFloat16, "{name}");
            assert!(bool::try_from(gradient.isfinite().all()).unwrap(), "{name}");
        }
        let difference = (wide.double_value(&[]) / narrow.double_value(&[]) - 1.0).abs();
        assert!(difference < 0.1, "{name}: {wide} {narrow}");
    }
}

/// What is not supervised has no gradient, and no loss beside that of the other blocks.
#[test]
fn blocks_without_a_supervised_slot_are_not_there() {
    for head in heads() {
        let (alone, of_one, _) = run(&head, &[[true; 4]], Kind::Double);
        let (both, of_two, gradients) = run(&head, &[[true; 4], [false; 4]], Kind::Double);
        let name = head.0.name;
        assert!(alone.isfinite().int64_value(&[]) == 1 && both.isfinite().int64_value(&[]) == 1, "{name}");
        assert_eq!(of_one.len(), of_two.len());
        assert_eq!(gradients[0].get(1).abs().max().double_value(&[]), 0.0, "{name}");
        assert!(gradients[0].get(0).abs().max().double_value(&[]) > 0.0, "{name}");
        let (none, metrics, _) = run(&head, &[[false; 4]], Kind::Double);
        assert_eq!(none.double_value(&[]), 0.0, "{name}");
        assert!(metrics.iter().all(|&metric| metric == 0.0), "{name}: {metrics:?}");
    }
}

/// LiLiCorr's terms are of whole blocks alone; the base term is of every supervised slot.
#[test]
fn a_partial_block_trains_the_backbone_and_not_the_scorer() {
    let scorer = heads().remove(2);
    let (sum, metrics, gradients) = run(&scorer, &[[true, true, false, true]], Kind::Double);
    assert!(sum.double_value(&[]) > 0.0);
    // Three averages of each slot and the backbone's accuracy come first.
    assert!(metrics[13..].iter().all(|&metric| metric == 0.0), "{metrics:?}");
    assert!(gradients[1..].iter().all(|gradient| gradient.abs().max().double_value(&[]) == 0.0));
}
