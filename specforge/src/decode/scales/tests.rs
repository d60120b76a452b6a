//! What must hold of every decode of images, on small random models in float64: no shape of a pass flips a choice there.

use tch::{Kind, Tensor};

use super::tiny::{Models, config, models, quantizer};
use super::*;
use crate::error::Result;
use crate::models::var::{self, ScaleCache, ScaleInput, Var, VarConfig};

fn samplings() -> Vec<ScaleSampling> {
    let plain = ScaleSampling { seed: 5, ..ScaleSampling::default() };
    vec![
        plain,
        ScaleSampling { cfg: 1.5, ..plain },
        ScaleSampling { temperature: 1.0, ..plain },
        ScaleSampling { cfg: 1.5, top_k: 9, top_p: 0.9, temperature: 0.7, seed: u64::MAX - 3 },
    ]
}

fn decode(models: &Models, draft: Option<(usize, Plan)>, sampling: ScaleSampling, labels: &[i64]) -> Decoded {
    let images: Vec<u64> = (0..labels.len() as u64).collect();
    let draft = draft.map(|(draft, plan)| (&models.drafts[draft], plan));
    let mut decoder = ScaleDecoder::new(&models.target, &models.quantizer, draft, sampling).unwrap();
    decoder.decode(ScaleRequest { labels, images: &images }).unwrap()
}

#[track_caller]
fn assert_same(got: &Decoded, want: &Decoded) {
    let (got, want) = (&got.committed, &want.committed);
    assert_eq!(got.scales(), want.scales());
    assert!(got.maps().iter().zip(want.maps()).all(|(got, want)| got.equal(want)), "{:?}", got.maps());
    assert!(got.f_hat().equal(want.f_hat()));
}

fn exact(gamma: Gamma, bonus: bool) -> Plan {
    Plan::Speculate { gamma, bonus, rule: Rule::Exact }
}

/// I-003-1: maps and what they add up to are those of the target alone, for every draft, gamma and temperature.
#[test]
fn speculation_decodes_what_the_target_decodes_alone() {
    let models = models();
    let mut kept = [0; 3];
    for sampling in samplings() {
        for labels in [&[3i64][..], &[3, 10, 7]] {
            let want = decode(&models, None, sampling, labels);
            assert_eq!((want.target_calls, want.target_tokens, want.rounds.len()), (4, 30, 0));
            for (draft, kept) in kept.iter_mut().enumerate() {
                for gamma in [0, 1, 2, 3, 9].map(Gamma::Fixed).into_iter().chain([Gamma::Auto]) {
                    for bonus in [false, true] {
                        let got = decode(&models, Some((draft, exact(gamma, bonus))), sampling, labels);
                        assert_same(&got, &want);
                        assert!(got.lossless);
                        *kept += got.rounds.iter().map(|round| round.accepted).sum::<usize>();
                    }
                }
            }
        }
    }
    // All three kinds of draft were there.
    assert!(kept[0] < kept[1] && kept[1] < kept[2], "{kept:?}");
}

/// I-003-2: logits of a decode are those of training's forward pass over what was decoded, at every scale.
#[test]
fn logits_of_speculation_are_those_of_the_forward_pass() {
    let models = models();
    let sampling = ScaleSampling { temperature: 1.0, seed: 2, ..ScaleSampling::default() };
    for (draft, gamma) in [(0, 2), (1, 2), (2, 4), (1, 3)] {
        let plan = exact(Gamma::Fixed(gamma), true);
        let draft = Some((&models.drafts[draft], plan));
        let mut decoder = ScaleDecoder::new(&models.target, &models.quantizer, draft, sampling).unwrap();
        let mut logits = Vec::new();
        let mut see = |seen: &ScaleSeen<'_>| -> Result<()> {
            logits.push(seen.logits.copy());
            Ok(())
        };
        let request = ScaleRequest { labels: &[4, 2], images: &[0, 1] };
        let decoded = decoder.decode_seen(request, &mut see).unwrap();
        let inputs = models.quantizer.idx_to_var_input(decoded.committed.maps()).unwrap();
        let want = models.target.forward(&Tensor::from_slice(&[4i64, 2]), &inputs).unwrap();
        assert!(Tensor::cat(&logits, 1).allclose(&want, 0.0, 1e-10, false));
    }
}

/// I-003-3: what is committed is the sum of the committed maps after every scale, to the bit, whatever was drafted on it.
#[test]
fn what_is_committed_is_the_sum_of_its_maps() {
    let models = models();
    for draft in 0..3 {
        let decoded = decode(&models, Some((draft, exact(Gamma::Fixed(3), true))), samplings()[3], &[1, 2]);
        let mut state = Committed::nothing(&models.quantizer, 2);
        for (scale, map) in decoded.committed.maps().iter().enumerate() {
            let before = state.f_hat().copy();
            let next = state.with(&models.quantizer, map.shallow_clone()).unwrap();
            // A scale that somebody else goes on with changes nothing of what is here.
            let _ = state.with(&models.quantizer, map.zeros_like()).unwrap();
            assert!(state.f_hat().equal(&before));
            assert_eq!((state.scales(), next.scales()), (scale, scale + 1));
            state = next;
        }
        assert!(state.f_hat().equal(decoded.committed.f_hat()));
        assert!(state.f_hat().equal(&models.quantizer.f_hat_of(decoded.committed.maps()).unwrap()));
        for (got, want) in decoded.committed.inputs().iter().zip(state.inputs()) {
            assert!(got.equal(want));
        }
    }
}

/// I-003-4: after every round the target's cache is what reading the committed scales anew gives, and no longer; the draft's
/// is the same for as many of them as it has read. Every round of every test here is held to that.
#[test]
fn caches_are_those_of_the_committed_scales() {
    let models = models();
    for sampling in samplings() {
        for draft in 0..3 {
            for bonus in [false, true] {
                let before = fault::fresh_caches();
                let decoded = decode(&models, Some((draft, exact(Gamma::Fixed(2), bonus))), sampling, &[6, 1]);
                assert_eq!(fault::fresh_caches() - before, 2 * decoded.rounds.len());
                for record in &decoded.scales {
                    assert!(record.target_cache >= models.target.config().begin(record.scale + 1));
                }
            }
        }
    }
}

/// I-003-5: a draft that is the target needs one look, and every look commits at least one scale.
#[test]
fn the_target_is_called_as_seldom_as_the_draft_allows() {
    let models = models();
    for sampling in samplings() {
        let best = decode(&models, Some((2, exact(Gamma::Fixed(4), false))), sampling, &[1, 2]);
        assert_eq!((best.target_calls, best.draft_calls, best.target_tokens), (1, 4, 30));
        let best = decode(&models, Some((2, exact(Gamma::Fixed(3), true))), sampling, &[1, 2]);
        assert_eq!((best.target_calls, best.draft_calls), (1, 3));
        assert!(
            best.scales[..3]
                .iter()
                .all(|scale| scale.source == Source::Accepted && scale.agreed == Some(scale.positions))
        );
        assert_eq!(best.scales[3].source, Source::Bonus);
        for draft in 0..3 {
            for gamma in 0..4 {
                let decoded = decode(&models, Some((draft, exact(Gamma::Fixed(gamma), true))), sampling, &[1, 2]);
                assert!(decoded.target_calls <= 4 && decoded.target_calls == decoded.rounds.len());
                let mut start = 0;
                for round in &decoded.rounds {
                    assert!(round.start == start && round.committed >= 1 && round.accepted <= round.drafted);
                    assert_eq!(round.drafted_maps.len(), round.drafted);
                    start += round.committed;
                }
                assert_eq!(start, 4);
            }
        }
    }
}

/// I-003-6: an image does not depend on those beside it, nor on its place among them.
#[test]
fn an_image_does_not_depend_on_those_beside_it() {
    let models = models();
    let sampling = samplings()[3];
    for draft in [None, Some((1, exact(Gamma::Fixed(2), true)))] {
        let decoder = |labels: &[i64], images: &[u64]| {
            let draft = draft.map(|(draft, plan)| (&models.drafts[draft], plan));
            let mut decoder = ScaleDecoder::new(&models.target, &models.quantizer, draft, sampling).unwrap();
            decoder.decode(ScaleRequest { labels, images }).unwrap().committed
        };
        let all = decoder(&[1, 2, 7, 7], &[0, 1, 2, 3]);
        let turned = decoder(&[7, 1, 7, 2], &[3, 0, 2, 1]);
        let order = Tensor::from_slice(&[3i64, 0, 2, 1]);
        assert!(turned.f_hat().allclose(&all.f_hat().index_select(0, &order), 0.0, 1e-10, false));
        for scale in 0..4 {
            assert!(turned.maps()[scale].equal(&all.maps()[scale].index_select(0, &order)));
        }
        let alone = decoder(&[7], &[2]);
        for scale in 0..4 {
            assert!(alone.maps()[scale].get(0).equal(&all.maps()[scale].get(2)));
        }
        // Two images of one label are two images.
        assert!(!all.maps()[3].get(2).equal(&all.maps()[3].get(3)));
    }
}

#[test]
fn lossy_plans_say_so() {
    let models = models();
    let sampling = samplings()[2];
    let alone = decode(&models, None, sampling, &[1]);
    for (plan, same) in [
        (Plan::Speculate { gamma: Gamma::Fixed(2), bonus: true, rule: Rule::MatchRate(0.0) }, false),
        (Plan::Speculate { gamma: Gamma::Fixed(2), bonus: true, rule: Rule::TopK(32) }, false),
        (Plan::Speculate { gamma: Gamma::Fixed(2), bonus: true, rule: Rule::Divergence(1e9) }, false),
        (Plan::Speculate { gamma: Gamma::Fixed(2), bonus: true, rule: Rule::MatchRate(1.0) }, true),
        (Plan::HandOver(2), false),
        (Plan::HandOver(4), true),
    ] {
        let decoded = decode(&models, Some((0, plan)), sampling, &[1]);
        assert!(!decoded.lossless, "{plan:?}");
        let maps = decoded.committed.maps().iter().zip(alone.committed.maps());
        assert_eq!(maps.filter(|(got, want)| !got.equal(want)).count() == 0, same, "{plan:?}");
    }
    let handed = decode(&models, Some((0, Plan::HandOver(2))), sampling, &[1]);
    let sources: Vec<Source> = handed.scales.iter().map(|scale| scale.source).collect();
    assert_eq!(sources, [Source::Target, Source::Target, Source::Refiner, Source::Refiner]);
    // The smaller model reads what the target decided in one pass.
    assert_eq!((handed.target_calls, handed.draft_calls, handed.draft_tokens), (2, 2, 30));
    let maximal = Plan::Speculate { gamma: Gamma::Fixed(3), bonus: true, rule: Rule::Maximal };
    assert!(decode(&models, Some((0, maximal)), sampling, &[1]).lossless);
    assert_eq!(decode(&models, Some((2, maximal)), sampling, &[1]).target_calls, 1);
}

/// Pairs of tokens of the first two positions of scale 1 after maximal coupling and after the target alone: one distribution.
#[test]
fn maximal_coupling_decodes_the_targets_distribution() {
    let config = VarConfig { patch_nums: vec![1, 2], vocab_size: 3, ..var::tiny::config() };
    let (target, draft) = (var::tiny::model(&config, 3), var::tiny::model(&config, 8));
    let quantizer = quantizer(&config);
    let sampling = ScaleSampling { temperature: 1.0, seed: 1, ..ScaleSampling::default() };
    let images: Vec<u64> = (0..600).collect();
    let labels = vec![3i64; images.len()];
    // Batches stand and fall together: images must be decoded one by one for the draft to be kept often.
    let count = |draft: Option<(&Var, Plan)>, batch: usize| {
        let mut counts = [0.0f64; 9];
        let mut decoder = ScaleDecoder::new(&target, &quantizer, draft, sampling).unwrap();
        for (labels, images) in labels.chunks(batch).zip(images.chunks(batch)) {
            let maps = decoder.decode(ScaleRequest { labels, images }).unwrap().committed;
            let pairs = &maps.maps()[0].select(1, 0) * 3i64 + maps.maps()[1].select(1, 0);
            Vec::<i64>::try_from(pairs).unwrap().into_iter().for_each(|pair| counts[pair as usize] += 1.0);
        }
        counts
    };
    let want = count(None, 200);
    let plan = Plan::Speculate { gamma: Gamma::Fixed(2), bonus: true, rule: Rule::Maximal };
    let got = count(Some((&draft, plan)), 1);
    let chi_square: f64 =
        got.iter().zip(&want).map(|(one, other)| (one - other).powi(2) / (one + other).max(1.0)).sum();
    assert!(chi_square < 26.1, "{chi_square}: 26.1 is one in a thousand for 8 degrees of freedom\n{got:?}\n{want:?}");
}

#[test]
fn models_that_do_not_fit_each_other_are_named() {
    let models = models();
    let refused = |draft: &VarConfig, word: &str| {
        let draft = var::tiny::model(draft, 1);
        let plan = Some((&draft, Plan::exact()));
        let problem = ScaleDecoder::new(&models.target, &models.quantizer, plan, ScaleSampling::default())
            .unwrap_err()
            .to_string();
        assert!(problem.contains(word) && problem.contains("the draft"), "{problem}");
    };
    refused(&VarConfig { vocab_size: 31, ..config() }, "vocab_size");
    refused(&VarConfig { num_classes: 9, ..config() }, "num_classes");
    refused(&var::tiny::config(), "patch_nums");
    for codes in
        [var::tiny::config(), VarConfig { vocab_size: 31, ..config() }, VarConfig { z_channels: 7, ..config() }]
    {
        let problem =
            ScaleDecoder::new(&models.target, &quantizer(&codes), None, ScaleSampling::default()).unwrap_err();
        assert!(problem.to_string().contains("the image tokenizer") && problem.exit_code() == 2, "{problem}");
    }
    let mut decoder = ScaleDecoder::new(&models.target, &models.quantizer, None, ScaleSampling::default()).unwrap();
    for (labels, word) in [(vec![], "a label"), (vec![11], "from 0 to 9, got 11"), (vec![-1], "got -1")] {
        let images: Vec<u64> = (0..labels.len() as u64).collect();
        let problem = decoder.decode(ScaleRequest { labels: &labels, images: &images }).unwrap_err().to_string();
        assert!(problem.contains(word), "{problem}");
    }
    let broken = Var::build(config(), &mut |name, shape| {
        let value = if name == "head.bias" { f64::NAN } else { 0.1 };
        Ok(Tensor::full(shape, value, (Kind::Double, tch::Device::Cpu)))
    });
    let broken = broken.unwrap();
    let mut decoder = ScaleDecoder::new(&broken, &models.quantizer, None, ScaleSampling::default()).unwrap();
    let problem = decoder.decode(ScaleRequest { labels: &[1], images: &[0] }).unwrap_err().to_string();
    assert!(problem.contains("logits of scale 0 are not numbers"), "{problem}");
}

/// A scale reads what the scales before it add up to: its own tokens must not show in its logits.
#[test]
fn a_scale_does_not_see_its_own_tokens() {
    let models = models();
    let maps = |last: i64| -> Vec<Tensor> {
        let full = |token: i64, count: i64| Tensor::full([1, count], token, (Kind::Int64, tch::Device::Cpu));
        vec![full(3, 1), full(4, 4), full(last, 9), full(5, 16)]
    };
    let logits = |last: i64| {
        let inputs = models.quantizer.idx_to_var_input(&maps(last)).unwrap();
        models.target.forward(&Tensor::from_slice(&[1i64]), &inputs).unwrap()
    };
    let (one, other) = (logits(7), logits(8));
    assert!(
        one.narrow(1, 0, 14).equal(&other.narrow(1, 0, 14)) && !one.narrow(1, 14, 16).equal(&other.narrow(1, 14, 16))
    );
    let conditions = models.target.conditions(&Tensor::from_slice(&[1i64])).unwrap();
    let (first, _) = models.target.step(&conditions, &ScaleCache::new(), &[ScaleInput::Start]).unwrap();
    assert!(first[0].allclose(&one.narrow(1, 0, 1), 0.0, 1e-12, false));
}
