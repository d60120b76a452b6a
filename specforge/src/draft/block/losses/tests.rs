//! Losses against their definitions: printed numbers, identities, finite differences, and what must not become NaN.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::draft::block::chunk::{Chunk, Denominator};
use crate::draft::block::config::{BlockConfig, BlockShape};
use crate::models::TargetInfo;
use crate::nn::Head;
use crate::nn::drawn;

const VOCABULARY: i64 = 9;

fn compound(value: Value) -> Compound {
    serde_json::from_value(value).unwrap()
}

/// Every loss alone. `lk_lambda` has other numbers than its own.
fn losses() -> Vec<RowLoss> {
    let own = LkLambda { scale: 0.8, decay: 2.0 };
    let with = |loss| if matches!(loss, RowLoss::LkLambda(_)) { RowLoss::LkLambda(own) } else { loss };
    RowLoss::NAMES.iter().map(|(_, loss)| with(*loss)).collect()
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    drawn::randn(shape, (Kind::Double, Device::Cpu)).to_kind(kind)
}

fn labels(rows: i64) -> Tensor {
    Tensor::arange(rows, (Kind::Int64, Device::Cpu)).remainder(VOCABULARY)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

fn assert_near(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let off = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().max().double_value(&[]);
    assert!(off <= tolerance, "{what}: off by {off:e}\n{got:?}\n{want:?}");
}

/// Values of a loss, and the gradient of their sum with respect to the logits.
fn slope(loss: RowLoss, logits: &Tensor, teacher: &Tensor, mean: Option<&Tensor>) -> (Tensor, Tensor) {
    let leaf = logits.detach().copy().set_requires_grad(true);
    let rows = Rows::new(&leaf, Some(teacher), &labels(leaf.size()[0])).unwrap();
    let values = rows.values(loss, mean).unwrap();
    let gradient = Tensor::run_backward(&[values.sum(Kind::Double)], &[&leaf], false, false).remove(0);
    (values.detach(), gradient)
}

/// Two blocks of three slots, the second without its middle.
struct Blocks {
    shape: BlockShape,
    head: Head,
    supervised: Vec<Vec<bool>>,
}

impl Blocks {
    fn new(supervised: &[&[bool]]) -> Self {
        let slots = supervised[0].len() as i64;
        let config = BlockConfig {
            num_layers: 1,
            block_size: slots + 1,
            mask_token_id: Some(0),
            head_dim: Some(2),
            ..BlockConfig::default()
        };
        let shape = config.shape(&TargetInfo::of(VOCABULARY, VOCABULARY, 4, 64)).unwrap();
        let head = Head::plain(Tensor::eye(VOCABULARY, (Kind::Float, Device::Cpu)));
        Self { shape, head, supervised: supervised.iter().map(|block| block.to_vec()).collect() }
    }

    fn chunk(&self, teacher: Option<Tensor>) -> Chunk<'_> {
        let blocks = self.supervised.len() as i64;
        let marks: Vec<bool> = self.supervised.concat();
        let supervised = Tensor::from_slice(&marks).view([blocks, -1]);
        let width = self.shape.block_size + 1;
        Chunk {
            shape: &self.shape,
            hidden: Tensor::zeros([blocks, self.shape.block_size, 1], (Kind::Float, Device::Cpu)),
            context: None,
            tokens: labels(blocks * width).view([blocks, width]),
            before: Tensor::zeros([blocks], (Kind::Int64, Device::Cpu)),
            places: supervised.flatten(0, 1).nonzero().squeeze_dim(1),
            supervised,
            teacher,
            head: &self.head,
            embedding: &self.head.weight,
            vocabulary: None,
            progress: 0.0,
            whole: None,
            document_shares: Tensor::from_slice(&document_shares(&vec![0; blocks as usize], &self.supervised)),
        }
    }
}

fn two_blocks() -> Blocks {
    Blocks::new(&[&[true, true, true], &[true, false, true]])
}

#[test]
fn credit_has_the_printed_numbers() {
    let acceptance = Tensor::from_slice(&[0.8f64, 0.6, 0.7]).view([1, 3]);
    let all = acceptance.gt(0.0);
    let got = credit::credit(&acceptance, &all, 0.5);
    assert_near("credit", &got, &Tensor::from_slice(&[2.232f64, 1.332, 0.612]).view([1, 3]), 1e-12);
    let product = credit::survival(&acceptance, &all, 0.5) * credit::continuation(&acceptance, &all, 0.5);
    assert_near("credit as a product", &product, &got, 1e-12);
    let reach = credit::reach(&acceptance, &all);
    assert_near("reach", &reach, &Tensor::from_slice(&[1.0f64, 0.8, 0.48]).view([1, 3]), 1e-12);

    // A slot that is not supervised is passed, and an impossible one leaves the continuation finite.
    let some = Tensor::from_slice(&[true, false, true]).view([1, 3]);
    let got = credit::credit(&acceptance, &some, 0.5);
    assert_near("a gap", &got, &Tensor::from_slice(&[0.9 + 0.9 * 0.85, 0.0, 0.9 * 0.85]).view([1, 3]), 1e-12);
    let none = acceptance.zeros_like();
    let got = credit::continuation(&none, &all, 0.0);
    assert_near("nothing survives", &got, &none.ones_like(), 0.0);
}

#[test]
fn support_ends_with_the_first_error() {
    let all = Tensor::from_slice(&[true, true, true, true, true, true, false, true, true]).view([3, 3]);
    let hits = Tensor::from_slice(&[true, false, true, true, true, true, false, true, false]).view([3, 3]);
    let got = numbers(&credit::accepted_and_first_error(&hits, &all));
    assert_eq!(got, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]);
    assert_eq!(numbers(&credit::first_error(&hits, &all)), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn gradients_are_those_of_finite_differences() {
    drawn::seed(3);
    let (logits, teacher) = (random(&[5, VOCABULARY], Kind::Double), random(&[5, VOCABULARY], Kind::Double));
    let mean = Tensor::from(0.37f64);
    // The share of `lk_hybrid` is held fixed, which differences are not.
    for loss in losses().into_iter().filter(|loss| *loss != RowLoss::LkHybrid) {
        let (_, gradient) = slope(loss, &logits, &teacher, Some(&mean));
        let step = 1e-6;
        for row in 0..5 {
            for token in 0..VOCABULARY {
                let moved = |by: f64| {
                    let moved = logits.copy();
                    let _ = moved.get(row).get(token).g_add_scalar_(by);
                    slope(loss, &moved, &teacher, Some(&mean)).0.sum(Kind::Double).double_value(&[])
                };
                let want = (moved(step) - moved(-step)) / (2.0 * step);
                let got = gradient.double_value(&[row, token]);
                assert!((got - want).abs() < 1e-7, "{}: row {row}, token {token}: {got} and {want}", loss.name());
            }
        }
    }
    let (values, gradient) = slope(RowLoss::LkHybrid, &logits, &teacher, None);
    let [(kl, of_kl), (tv, of_tv)] = [RowLoss::Kl, RowLoss::Tv].map(|loss| slope(loss, &logits, &teacher, None));
    let share: Tensor = 1.0 - &tv;
    let share = (share * -3.0).exp();
    assert_near("lk_hybrid", &values, &(&share * kl + (1.0 - &share) * tv), 1e-12);
    let share = share.unsqueeze(1);
    assert_near("gradient of lk_hybrid", &gradient, &(&share * of_kl + (1.0 - &share) * of_tv), 1e-12);
}

#[test]
fn renyi_has_its_closed_gradient() {
    drawn::seed(4);
    let (logits, teacher) = (random(&[6, VOCABULARY], Kind::Double), random(&[6, VOCABULARY], Kind::Double));
    let (draft, target) = (logits.softmax(-1, Kind::Double), teacher.softmax(-1, Kind::Double));
    let root = (&draft * target).sqrt();
    let want = draft - &root / root.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
    assert_near("gradient", &slope(RowLoss::Renyi, &logits, &teacher, None).1, &want, 1e-12);
}

#[test]
fn equal_distributions_are_at_rest() {
    drawn::seed(5);
    for kind in [Kind::Double, Kind::Float] {
        let logits = random(&[6, VOCABULARY], kind) * 2.0;
        for loss in losses().into_iter().filter(|loss| loss.wants_teacher()) {
            // The target's logits may lie elsewhere, and the distributions still be equal but for rounding.
            for teacher in [&logits + 0.0, &logits + 1.0] {
                let (values, gradient) = slope(loss, &logits, &teacher, None);
                let exact = teacher.equal(&logits);
                let tolerance = if kind == Kind::Double { 1e-12 } else { 1e-6 };
                if loss != RowLoss::SoftCe {
                    assert_near(loss.name(), &values, &values.zeros_like(), tolerance);
                }
                let corner =
                    matches!(loss, RowLoss::Tv | RowLoss::L1 | RowLoss::Nla | RowLoss::LkHybrid | RowLoss::LogOverlap);
                if exact || !corner {
                    assert_near(&format!("gradient of {}", loss.name()), &gradient, &gradient.zeros_like(), tolerance);
                }
                // And it is a minimum.
                let (others, _) = slope(loss, &(&logits + random(&[6, VOCABULARY], kind) * 0.3), &teacher, None);
                assert!(numbers(&(others - values)).iter().all(|more| *more > 0.0), "{}", loss.name());
            }
        }
    }
}

#[test]
fn nothing_becomes_nan() {
    let row = |numbers: &[f32]| Tensor::from_slice(numbers).view([1, -1]);
    let infinite = f32::NEG_INFINITY;
    let cases = [
        ("sure and wrong", row(&[0.0, 300.0, 0.0]), row(&[0.0, 0.0, 300.0])),
        ("sure as far as numbers go", row(&[0.0, 3e4, 0.0]), row(&[3e4, 0.0, 0.0])),
        ("sure and right", row(&[3e4, 0.0, 0.0]), row(&[3e4, 0.0, 0.0])),
        ("impossible tokens", row(&[1.0, 2.0, 3.0]), row(&[0.5, infinite, infinite])),
        ("impossible and unlikely", row(&[0.0, 3e4, 0.0]), row(&[0.5, infinite, 1.0])),
    ];
    for (what, logits, teacher) in &cases {
        for loss in losses() {
            let (values, gradient) = slope(loss, logits, teacher, None);
            let finite = |tensor: &Tensor| numbers(tensor).iter().all(|number| number.is_finite());
            assert!(finite(&values) && finite(&gradient), "{what}: {}: {values:?} {gradient:?}", loss.name());
        }
    }
    // Where `nla` has its floor, `log_overlap` still knows where to go.
    let (_, gradient) = slope(RowLoss::LogOverlap, &cases[0].1, &cases[0].2, None);
    assert!(gradient.double_value(&[0, 2]) < -0.3);
}

#[test]
fn a_target_that_is_sure_turns_d_pard_into_d_pace() {
    drawn::seed(6);
    let blocks = two_blocks();
    let chosen = blocks.chunk(None).labels().flatten(0, 1).index_select(0, &blocks.chunk(None).places);
    let sure = Tensor::full([5, VOCABULARY], f64::NEG_INFINITY, (Kind::Double, Device::Cpu));
    let sure = sure.scatter_value(1, &chosen.unsqueeze(1), 0.0);
    let chunk = blocks.chunk(Some(sure));
    let logits = random(&[5, VOCABULARY], Kind::Double);
    let outcome = |loss, weights| {
        let objective = Objective::new(compound(json!(loss)), Labels::Data, weights, Denominators::Auto).unwrap();
        let leaf = logits.copy().set_requires_grad(true);
        let (term, values) = objective.term(&chunk, &leaf).unwrap();
        assert!(matches!(term.denominator, Denominator::Planned(0)));
        let gradient = Tensor::run_backward(&[&term.sum], &[&leaf], false, false).remove(0);
        [term.sum.detach(), values.weights, gradient]
    };
    let pard = outcome("renyi", Weighting::DPard { alpha: 0.3 });
    let pace = outcome("ce", Weighting::DPace { alpha: 0.3, part: CreditPart::Whole });
    for (what, (pard, pace)) in ["sum", "weights", "gradient"].iter().zip(pard.iter().zip(&pace)) {
        assert_near(what, pard, pace, 1e-12);
    }
}

#[test]
fn compounds_are_read_strictly() {
    let mixed = compound(json!({"ce": 0.1, "tv": 0.9}));
    assert_eq!(mixed.terms(), [(RowLoss::Ce, 0.1), (RowLoss::Tv, 0.9)]);
    assert!(mixed.wants_teacher() && !Compound::default().wants_teacher());
    assert_eq!(compound(json!("kl_div")), compound(json!({"kl": 1.0})));
    assert_eq!(compound(json!("rkl")), Compound::of(RowLoss::ReverseKl));
    let lambda = compound(json!({"lk_lambda": {"scale": 0.5, "factor": 2}}));
    assert_eq!(lambda.terms(), [(RowLoss::LkLambda(LkLambda { scale: 0.5, decay: 1.0 }), 2.0)]);
    for text in [json!("kl"), json!({"ce": 0.1, "tv": 0.9}), json!("lk_lambda"), Value::from(lambda)] {
        let read = compound(text.clone());
        assert_eq!(compound(Value::from(read.clone())), read, "{text}");
    }
    for (name, loss) in RowLoss::NAMES {
        assert_eq!((RowLoss::named(name), loss.name()), (Some(*loss), *name));
    }

    let refused =
        |value: Value| BlockConfig::read(&json!({"algorithm": "dflash", "loss": value})).unwrap_err().to_string();
    for (value, part) in [
        (json!("kll"), "expected one of ce, soft_ce, kl, reverse_kl"),
        (json!({"ce": -1}), "factor of `ce`: expected 0 or a positive number, got -1"),
        (json!({"ce": "much"}), "factor of `ce`"),
        (json!({"ce": {"scale": 1}}), "factor of `ce`: expected a number"),
        (json!({"lk_lambda": {"rate": 1}}), "factor, scale and decay"),
        (json!({"kl": 1, "kl_div": 1}), "`kl` stands twice"),
        (json!({"kl": 0}), "nothing would be trained"),
        (json!({}), "nothing would be trained"),
        (json!(3), "an object of such names"),
    ] {
        let message = refused(value);
        assert!(message.contains("draft.loss") && message.contains(part), "{message}");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let read = |mut section: Value| {
        section["algorithm"] = json!("dflash");
        BlockConfig::read(&section).and_then(|config| Objective::of(&config))
    };
    let message = |section: Value| read(section).unwrap_err().to_string();
    let pard = message(json!({"weights": {"name": "d_pard"}, "loss": {"ce": 1, "lk_tv": 0.5}}));
    assert!(pard.contains("looks at one token alone") && pard.contains("ce + lk_tv"), "{pard}");
    for (weights, part) in [
        (json!({"name": "fixed", "gamma": 0}), "draft.weights.gamma"),
        (json!({"name": "auf", "gamma": -1}), "draft.weights.gamma"),
        (json!({"name": "d_pace", "alpha": 1.5}), "draft.weights.alpha"),
        (json!({"name": "d_pard", "alpha": 1.0}), "draft.weights.alpha"),
        (json!({"name": "fixed"}), "gamma"),
        (json!({"name": "d_pace", "gamma": 4}), "draft.weights.gamma`: unknown key"),
        (
            json!({"name": "linear"}),
            "unknown variant `linear`, expected one of `even`, `fixed`, `d_pace`, `d_pard`, `auf`",
        ),
    ] {
        let message = message(json!({"weights": weights, "loss": "kl"}));
        assert!(message.contains(part), "{message}");
    }
    assert!(message(json!({"first_error_focal": {"alpha": -1}})).contains("draft.first_error_focal.alpha"));
    for section in [
        json!({"weights": {"name": "d_pace", "part": "confidence"}, "loss": "kl"}),
        json!({"weights": {"name": "d_pard"}, "loss": "renyi", "denominators": "blocks"}),
        json!({"weights": {"name": "auf"}, "labels": "teacher", "loss": "lk_lambda"}),
        json!({"first_error_focal": {"alpha": 0.5, "gamma": 4, "labels": "teacher"}}),
    ] {
        read(section).unwrap();
    }
    // What is missing when it is needed is an error too, and no panic.
    let blocks = two_blocks();
    let (chunk, logits) = (blocks.chunk(None), random(&[5, VOCABULARY], Kind::Float));
    let kl = Objective::new(compound(json!("kl")), Labels::Data, Weighting::Even, Denominators::Auto).unwrap();
    assert!(kl.wants_teacher());
    assert!(kl.term(&chunk, &logits).unwrap_err().to_string().contains("target's distribution"));
    let chosen = Objective { loss: Compound::default(), labels: Labels::Teacher, ..kl.clone() };
    assert!(chosen.term(&chunk, &logits).is_err());
    let narrow = blocks.chunk(Some(random(&[5, VOCABULARY - 1], Kind::Float)));
    assert!(kl.term(&narrow, &logits).unwrap_err().to_string().contains("draft's shape"));
}

#[test]
fn planned_counts_add_up() {
    let first = [vec![true, true, true], vec![false, false, false]];
    let second = [vec![true, false, true]];
    let both = [first[0].clone(), first[1].clone(), second[0].clone()];
    let weightings = [Weighting::Even, Weighting::Fixed { gamma: 2.0 }, Weighting::DPard { alpha: 0.5 }];
    let all = [Denominators::Auto, Denominators::Weights, Denominators::Rows, Denominators::Blocks];
    for (weighting, denominators) in weightings.into_iter().flat_map(|w| all.map(|d| (w, d))) {
        let count = |blocks: &[Vec<bool>]| denominators.count(weighting, blocks);
        assert!((count(&first) + count(&second) - count(&both)).abs() < 1e-12);
    }
    let fixed = Denominators::Auto.count(Weighting::Fixed { gamma: 2.0 }, &both);
    assert!((fixed - (2.0 + (-0.5f64).exp() + 2.0 * (-1f64).exp())).abs() < 1e-12);
    assert_eq!(Denominators::Blocks.count(Weighting::Even, &both), 2.0);
    assert_eq!(Denominators::Auto.resolve(Weighting::DPard { alpha: 0.5 }), Denominators::Rows);

    // The planned sum is that of the device's weights.
    let blocks = Blocks::new(&[&[true, true, true], &[true, false, true]]);
    let fixed = Weighting::Fixed { gamma: 2.0 };
    let objective = Objective::new(Compound::default(), Labels::Data, fixed, Denominators::Auto).unwrap();
    let values = objective.term(&blocks.chunk(None), &random(&[5, VOCABULARY], Kind::Float)).unwrap().1;
    assert!((values.weights.sum(Kind::Double).double_value(&[]) - objective.count(&blocks.supervised)).abs() < 1e-6);

    // Shares of blocks sum to the documents, those without a supervised slot too.
    let supervised = [vec![true], vec![false], vec![true], vec![false], vec![false]];
    let shares = document_shares(&[0, 0, 0, 2, 2], &supervised);
    assert_eq!(shares, [0.5, 0.0, 0.5, 0.5, 0.5]);
}

#[test]
fn a_selector_finds_the_right_token() {
    let blocks = two_blocks();
    let teacher = Tensor::zeros([5, VOCABULARY], (Kind::Float, Device::Cpu));
    let teacher = teacher.scatter_value(1, &Tensor::from_slice(&[8i64, 8, 8, 8, 8]).unsqueeze(1), 1.0);
    let chunk = blocks.chunk(Some(teacher));
    // Labels of the supervised slots are 1, 2, 3, 6 and 8.
    let candidates = Tensor::from_slice(&[1i64, 8, 2, 0, 8, 2, 4, 5, 6, 7, 8, 0, 7, 6, 5]).view([5, 3]);
    let gold = SelectorObjective::Automodel.gold(&chunk, &candidates).unwrap();
    assert_eq!(numbers(&gold.among), [1.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(numbers(&gold.places.narrow(0, 0, 2)), [0.0, 2.0]);
    assert!(gold.candidates.equal(&candidates));
    let gold = SelectorObjective::Speculators.gold(&chunk, &candidates).unwrap();
    assert_eq!(numbers(&gold.places), [1.0, 1.0, 2.0, 1.0, 2.0]);
    assert_eq!(numbers(&gold.candidates.select(1, 2)), [2.0, 2.0, 8.0, 0.0, 8.0]);
    assert_eq!(numbers(&gold.among), [1.0; 5]);
}
