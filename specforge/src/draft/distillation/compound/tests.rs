//! Losses that both paths have: by autograd as by the formulas of `distill`.

use tch::Device;

use super::*;
use crate::draft::distillation::{self, DistillationLoss, DraftVocabulary, Objective, Order, Teacher, Weighting};
use crate::nn::Head;
use crate::nn::drawn;
use crate::vocab::VocabMap;

#[test]
fn autograd_equals_the_formulas() {
    drawn::seed(3);
    let options = (Kind::Double, Device::Cpu);
    let positions = [4i64, 0, 2, 2, 4, 4, 1, 0, 5, 2, 3];
    let (rows, size, hidden) = (positions.len() as i64, 23, 7);
    let random = |shape: &[i64]| drawn::randn(shape, options);
    let (states, head) = (random(&[6, 9]), Head::plain(random(&[size, 9])));
    let map = VocabMap::new((0..size).step_by(2).collect(), size).unwrap();
    let map = DraftVocabulary::new(&map, Device::Cpu).unwrap();
    let order = Order::new(&positions, Device::Cpu).unwrap();
    let weights = Tensor::arange(rows, options) * 0.1 + 1.0;
    let both = [
        (DistillationLoss::CrossEntropy, "soft_ce", true),
        (DistillationLoss::Kl, "kl", true),
        (DistillationLoss::ReverseKl, "reverse_kl", true),
        // With a vocabulary of its own they compare with other distributions.
        (DistillationLoss::TotalVariation, "tv", false),
        (DistillationLoss::LkAlpha, "nla", false),
    ];
    for (loss, name, mapped) in both {
        for vocabulary in [None, Some(&map)].into_iter().take(if mapped { 2 } else { 1 }) {
            let draft_size = vocabulary.map_or(size, |_| (size + 1) / 2);
            let (input, mut draft_head) = (random(&[rows, hidden]), Head::plain(random(&[draft_size, hidden])));
            draft_head.softcap = Some(4.0);
            let teacher = Teacher { hidden: &states, head: &head, vocabulary };
            let targets = Soft { order: &order, teacher: &teacher, remembered: None };
            let compound: Compound = serde_json::from_value(serde_json::json!({ name: 1.0 })).unwrap();
            let outcomes = |autograd: bool| {
                let mut total = Tensor::zeros([draft_size, hidden], options);
                let mut projection = Projection { head: &draft_head, gradient: Some(&mut total) };
                let rows = Rows { input: &input, targets, weights: Some(&weights) };
                let (positions_per_chunk, lift) = (2, 4.0);
                let outcomes = if autograd {
                    let objective = CompoundObjective { loss: &compound, tokens: None, positions_per_chunk };
                    distill_compound(rows, &mut projection, objective, Some(lift)).unwrap()
                } else {
                    let objective = Objective { loss, lambda: (1.0, 1.0), positions_per_chunk };
                    let weighting = Weighting { parity: None, lift };
                    distillation::distill(rows, &mut projection, objective, Some(&weighting)).unwrap()
                };
                let RowOutcomes { losses, hits, acceptance, covered, objective, input_gradient } = outcomes;
                [losses, hits, acceptance, covered, objective, total, input_gradient.unwrap()]
            };
            for (index, (got, want)) in outcomes(true).iter().zip(&outcomes(false)).enumerate() {
                let off = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
                assert!(off < 1e-12, "{name}, smaller {}: {index} off by {off:e}", vocabulary.is_some());
            }
        }
    }
}

/// With tokens of the text, those that the draft cannot name carry no loss, and the others count whatever the target says.
#[test]
fn right_tokens_may_be_given() {
    let options = (Kind::Double, Device::Cpu);
    drawn::seed(4);
    let (input, states) = (drawn::randn([4, 5], options), drawn::randn([2, 5], options));
    let (head, draft_head) = (Head::plain(drawn::randn([6, 5], options)), Head::plain(drawn::randn([3, 5], options)));
    let map = DraftVocabulary::new(&VocabMap::new(vec![1, 2, 5], 6).unwrap(), Device::Cpu).unwrap();
    let teacher = Teacher { hidden: &states, head: &head, vocabulary: Some(&map) };
    let order = Order::new(&[1, 0, 1, 0], Device::Cpu).unwrap();
    let rows =
        Rows { input: &input, targets: Soft { order: &order, teacher: &teacher, remembered: None }, weights: None };
    let tokens = Tensor::from_slice(&[5i64, 0, 1, 2]);
    let objective = CompoundObjective { loss: &Compound::default(), tokens: Some(&tokens), positions_per_chunk: 1 };
    let mut projection = Projection { head: &draft_head, gradient: None };
    let outcomes = distill_compound(rows, &mut projection, objective, None).unwrap();
    let log = draft_head.logits(&input).log_softmax(-1, Kind::Double);
    for (row, draft_id) in [Some(2), None, Some(0), Some(1)].into_iter().enumerate() {
        let want = draft_id.map_or(0.0, |id| -log.double_value(&[row as i64, id]));
        let got = outcomes.losses.double_value(&[row as i64]);
        assert!((got - want).abs() < 1e-12, "{row}: {got}, expected {want}");
    }
    let covered: Vec<bool> = outcomes.covered.try_into().unwrap();
    assert_eq!(covered, [true, false, true, true]);
}
