//! A small transformer against its formulas, and what training does to it.

use std::path::Path;
use std::sync::Arc;

use tch::Device;

use super::*;
use crate::data::DocumentRef;
use crate::draft::add_counts;
use crate::features::{FeatureSource, ScaleFeatures};
use crate::models::var::tiny;
use crate::models::{Pictures, TargetInfo};
use crate::nn::{Embedding, noise};
use crate::weights::WeightsFolder;

/// A target with its image tokenizer, in float64.
struct World {
    folder: tempfile::TempDir,
    target: VarConfig,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = vqvae::tiny().config().clone();
        let shapes = vqvae::Vqvae::tensors(&config).unwrap().into_iter().zip(1..);
        let tensors: Vec<_> =
            shapes.map(|((name, shape), stream)| (name, noise::normal(&shape, 0.5, 7, stream))).collect();
        vqvae::write(folder.path(), &config, &tensors).unwrap();
        let target = VarConfig { patch_nums: vec![1, 2, 4], vocab_size: 16, z_channels: 4, ..tiny::config() };
        Self { folder, target }
    }

    fn weights(&self) -> WeightsFolder {
        WeightsFolder::open(self.path()).unwrap()
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn quantizer(&self) -> Quantizer {
        vqvae::load_quantizer(&self.weights(), &self.target.patch_nums, Kind::Double, Device::Cpu).unwrap()
    }

    fn model(&self) -> Var {
        tiny::model(&self.target, 3)
    }

    fn source(&self) -> ScaleFeatures {
        ScaleFeatures::new(Some((self.model(), self.quantizer())))
    }

    fn draft(&self, section: &Value) -> NextScale {
        let quantizer = self.quantizer();
        let pictures = Pictures {
            patch_nums: self.target.patch_nums.clone(),
            z_channels: self.target.z_channels,
            num_classes: Some(self.target.num_classes),
        };
        let info = TargetInfo::of(self.target.embed_dim, self.target.vocab_size, 2, self.target.length() + 1);
        let context = DraftContext {
            target: TargetInfo { pictures: Some(pictures), ..info },
            embedding: &Embedding::plain(quantizer.embedding().shallow_clone()),
            head: &self.model().head(),
            weights: Some(&self.weights()),
            vocabulary: None,
            kind: Kind::Double,
            device: Device::Cpu,
            seed: 5,
            chunk_bytes: 1 << 20,
        };
        let draft = NextScale::new(NextScaleConfig::read(section).unwrap(), &context).unwrap();
        // Away from the start, where gates are closed.
        let _no_grad = tch::no_grad_guard();
        for (stream, parameter) in (0..).zip(draft.parameters()) {
            let change = noise::normal(&parameter.value.size(), 0.1, 9, stream).to_kind(Kind::Double);
            drop(parameter.value.shallow_clone().f_add_(&change).unwrap());
        }
        draft
    }
}

fn section(teacher: &str) -> Value {
    json!({"algorithm": "next_scale", "depth": 1, "embed_dim": 8, "num_heads": 2, "teacher": teacher,
        "scale_weights": [4.0, 1.0, 0.5], "label_dropout": 0.4})
}

fn batch(pictures: std::ops::Range<i64>) -> PackedBatch {
    let count = (pictures.end - pictures.start) as usize;
    let document =
        |picture: i64| std::iter::once(picture % 10).chain((0..21).map(move |place| (place * 7 + picture * 3) % 16));
    PackedBatch {
        ids: pictures.clone().flat_map(document).collect(),
        positions: (0..count).flat_map(|_| 0..22).collect(),
        supervised: (0..count).flat_map(|_| (0..22).map(|place| place > 0)).collect(),
        lengths: vec![22; count],
        documents: pictures.map(|number| DocumentRef::new("picture", number as u64)).collect(),
    }
}

/// Gradients, and objectives and sums of metrics, after one batch after another.
fn outcome(world: &World, draft: &NextScale, batches: &[PackedBatch], key: StepKey) -> (Vec<Tensor>, Tensor) {
    let source = world.source();
    let plans: Vec<_> = batches.iter().map(|batch| draft.plan(batch, key).unwrap()).collect();
    let mut counts = Vec::new();
    plans.iter().for_each(|plan| add_counts(&mut counts, &plan.counts));
    let mut gradients = Gradients::zeros(draft.parameters()).unwrap();
    let mut sums = Tensor::zeros([1 + draft.metrics().len() as i64], (Kind::Double, Device::Cpu));
    for (batch, plan) in batches.iter().zip(&plans) {
        let features = source.features(Arc::new(batch.clone()), &draft.capture()).unwrap();
        let tally = draft.accumulate(&features, plan, &counts, &mut Gradients::new(&mut gradients)).unwrap();
        let evaluated = draft.evaluate(&features, plan, &counts).unwrap();
        let joined = |tally: &Tally| Tensor::cat(&[tally.objective.view([1]), tally.sums.shallow_clone()], 0);
        assert!(joined(&tally).equal(&joined(&evaluated)));
        sums += joined(&tally);
    }
    (gradients, sums)
}

const STEP: StepKey = StepKey { seed: 1, step: 3, total: 9 };

#[test]
fn neighbours_and_cuts_change_nothing() {
    let world = World::new();
    for teacher in ["codes", "target"] {
        let draft = world.draft(&section(teacher));
        let (whole, figures) = outcome(&world, &draft, &[batch(0..5)], STEP);
        let (cut, summed) = outcome(&world, &draft, &[batch(3..5), batch(0..3)], STEP);
        assert!(figures.allclose(&summed, 1e-12, 1e-12, false), "{teacher}");
        for ((one, other), parameter) in whole.iter().zip(&cut).zip(draft.parameters()) {
            assert!(one.allclose(other, 1e-10, 1e-12, false), "{teacher} {}", parameter.name);
            assert!(one.abs().max().double_value(&[]) > 0.0, "{teacher}: nothing reaches {}", parameter.name);
        }
    }
}

#[test]
fn labels_are_lost_by_chance_in_training_and_never_in_an_evaluation() {
    let world = World::new();
    let draft = world.draft(&section("target"));
    let lost = |key: StepKey| draft.plan(&batch(0..200), key).unwrap().own::<Vec<bool>>().unwrap().clone();
    let share = lost(STEP).iter().filter(|lost| **lost).count();
    assert!((60..=100).contains(&share), "{share} of 200");
    assert_ne!(lost(STEP), lost(StepKey { step: 4, ..STEP }));
    assert!(!lost(StepKey::EVALUATION).contains(&true));
    assert_eq!(draft.count(&batch(0..7), STEP).unwrap(), [7.0]);
}

/// The losses of both teachers and the metrics, written as their formulas, of one picture after another.
#[test]
fn losses_and_metrics_are_their_formulas() {
    let world = World::new();
    let (model, quantizer) = (world.model(), world.quantizer());
    let all = batch(0..3);
    for teacher in ["codes", "target"] {
        let draft = world.draft(&section(teacher));
        let plan = draft.plan(&all, STEP).unwrap();
        let lost = plan.own::<Vec<bool>>().unwrap().clone();
        assert!(lost.contains(&true) && lost.contains(&false), "a step that loses some");
        let (_, figures) = outcome(&world, &draft, std::slice::from_ref(&all), STEP);
        let _no_grad = tch::no_grad_guard();
        let (mut objective, mut first, mut chain) = (0.0, [0.0, 0.0], 0.0);
        for (document, lost) in all.each().zip(&lost) {
            let pictures = PackedPictures::of(&document, 21, Device::Cpu).unwrap();
            let label = if *lost { 10 } else { document.ids[0] };
            let labels = Tensor::from_slice(&[label]);
            let inputs = quantizer.idx_to_var_input(&pictures.maps(&[1, 2, 4]).unwrap()).unwrap();
            let q = draft.model.forward(&labels, &inputs).unwrap().softmax(-1, Kind::Double).squeeze_dim(0);
            let p = match teacher {
                "codes" => pictures.codes.squeeze_dim(0).one_hot(16).to_kind(Kind::Double),
                _ => model.forward(&labels, &inputs).unwrap().softmax(-1, Kind::Double).squeeze_dim(0),
            };
            let mut product = 1.0;
            for place in 0..21 {
                let weight = match place {
                    0 => 4.0,
                    1..5 => 1.0,
                    _ => 0.5,
                } / (4.0 + 4.0 + 8.0);
                let (mut loss, mut shared) = (0.0, 0.0);
                for code in 0..16 {
                    let (p, q) = (p.double_value(&[place, code]), q.double_value(&[place, code]));
                    if p > 0.0 {
                        loss += p * (p.ln() - q.ln());
                    }
                    shared += p.min(q);
                }
                objective += weight * loss / 3.0;
                product *= shared;
                if place == 0 {
                    first[0] += loss;
                    first[1] += shared;
                }
            }
            chain += product;
        }
        let got = |place: i64| figures.double_value(&[place]);
        assert!((got(0) - objective).abs() < 1e-10, "{teacher}");
        assert!((got(1) - first[0]).abs() < 1e-10 && (got(2) - first[1]).abs() < 1e-10, "{teacher}");
        assert_eq!(draft.metrics()[11], "scale3/chain");
        assert!((got(12) / chain - 1.0).abs() < 1e-9, "{teacher}");
        let averages: Vec<f64> = (0..12).map(f64::from).collect();
        let summary = draft.summary(&averages);
        assert_eq!(summary[0], ("expected_scales".to_owned(), 3.0 + 7.0 + 11.0));
        assert_eq!(summary[1], ("acceptance".to_owned(), (1.0 + 4.0 * 5.0 + 16.0 * 9.0) / 21.0));
    }
}

/// Gradients against differences of the objective.
#[test]
fn gradients_are_slopes() {
    let world = World::new();
    for teacher in ["codes", "target"] {
        let draft = world.draft(&section(teacher));
        let all = [batch(0..2)];
        let (gradients, _) = outcome(&world, &draft, &all, STEP);
        for (index, parameter) in draft.parameters().iter().enumerate().step_by(3) {
            let objective = |by: f64| {
                let mut value = parameter.value.detach().view([-1]).narrow(0, 0, 1);
                let _ = value.f_add_scalar_(by).unwrap();
                let (_, figures) = outcome(&world, &draft, &all, STEP);
                let _ = value.f_add_scalar_(-by).unwrap();
                figures.double_value(&[0])
            };
            let slope = (objective(1e-5) - objective(-1e-5)) / 2e-5;
            let got = gradients[index].view([-1]).double_value(&[0]);
            assert!((slope - got).abs() < 1e-7, "{teacher} {}: {slope} {got}", parameter.name);
        }
    }
}

/// Steps downhill on the teacher's distribution bring the draft closer to it.
#[test]
fn distillation_lowers_the_divergence_and_raises_acceptance() {
    let world = World::new();
    let draft = world.draft(&json!({"algorithm": "next_scale", "depth": 1, "embed_dim": 8, "num_heads": 2,
        "teacher": "target", "label_dropout": 0.0}));
    let figures = || {
        let (gradients, figures) = outcome(&world, &draft, &[batch(0..6)], STEP);
        let accepted = (0..3).map(|scale| figures.double_value(&[2 + 4 * scale])).sum::<f64>();
        (gradients, figures.double_value(&[0]), accepted)
    };
    let (_, loss, accepted) = figures();
    for _ in 0..40 {
        let (gradients, _, _) = figures();
        let _no_grad = tch::no_grad_guard();
        let norm =
            gradients.iter().map(|gradient| gradient.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
        for (parameter, gradient) in draft.parameters().iter().zip(&gradients) {
            let _ = parameter.value.shallow_clone().f_sub_(&(gradient * (0.2 / norm.max(1.0)))).unwrap();
        }
    }
    let (_, after, more) = figures();
    assert!(after < 0.8 * loss && more > accepted, "{loss} {after}, {accepted} {more}");
}

#[test]
fn what_the_reference_does_not_decay_does_not() {
    let world = World::new();
    let draft = world.draft(&section("codes"));
    let decays = |name: &str| draft.parameters().iter().find(|parameter| parameter.name == name).unwrap().group.decay;
    for name in ["pos_1LC", "pos_start", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11", "head.bias"] {
        assert!(!decays(name), "{name}");
    }
    assert!(decays("head.weight") && decays("blocks.0.attn.mat_qkv.weight"));
}
