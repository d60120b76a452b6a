//! Drafts that read the target's features, and one that is a model of its own, over a sound network and over a bad one.

use super::*;
use crate::decode::Decoded;
use crate::decode::drafter::lossless::eagle3;
use crate::decode::drafter::medusa::heads_for_tests;
use crate::decode::drafter::{DraftSampling, DynamicTree, MedusaDrafter, ModelDrafter};
use crate::decode::tiny;
use crate::tree::ChoiceTree;
use features::Encoding;

type Make<'a> = dyn Fn(DraftSampling) -> Box<dyn Drafter + 'a> + 'a;

fn asked(temperature: f64, key: u64) -> Asked {
    Asked { prompt: vec![5, 17, 3, 9 + key as u32], max_new_tokens: 16, temperature, key }
}

/// The same draft beside the target.
fn beside<'a>(target: &'a dyn TargetModel, drafter: Box<dyn Drafter + 'a>, asked: &Asked) -> Decoded {
    let Choice { processors, policy, key } = asked.choice();
    let options = EngineOptions { processors, policy, stop_tokens: STOP.to_vec(), max_rows: 1 };
    let mut engine = Engine::new(target, drafter, options).unwrap();
    let (prompt, max_new_tokens) = (asked.prompt.clone(), asked.max_new_tokens);
    engine.submit(Request { tag: 0, prompt, max_new_tokens, key }).unwrap();
    engine.run(&mut Silent).unwrap().remove(0).decoded.unwrap()
}

fn every_draft(make: &Make<'_>, target: &dyn TargetModel, encodings: &[Encoding], name: &str) {
    let mut accepted = 0;
    for (temperature, key) in [(0.0, 0), (0.0, 1), (1.0, 2), (1.0, 3)] {
        let asked = asked(temperature, key);
        let want = asked.alone(target);
        let sampling = DraftSampling::for_policy(asked.choice().policy, temperature);
        let local = beside(target, make(sampling), &asked);
        for &encoding in encodings {
            let mut network = Network::new(target, settings(), Rates::default(), key);
            let request = EdgeRequest { encoding, ..asked.request(1, false) };
            let mut edge = Edge::new(request, make(sampling));
            drive(&mut edge, &mut network, &waits(), &|| false, &mut |_| Ok(())).unwrap();
            assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)), "{name}, {encoding:?}");
            if encoding == Encoding::Float32 {
                // It guesses what it guesses beside its target.
                assert_eq!(edge.rounds(), local.rounds, "{name}");
                accepted += edge.rounds().iter().map(|round| round.accepted).sum::<usize>();
            }
        }
        for (seed, ahead) in [(1, true), (2, true), (3, false)] {
            let rates = Rates { lost: 60, doubled: 100, late: 100, cut: 60, cloud_killed: 30, ..Rates::default() };
            let mut network = Network::new(target, settings(), rates, seed);
            let got = answer(&mut network, &asked, ahead, &mut |_| make(sampling)).unwrap();
            assert_eq!(got, want, "{name}, faults {seed}");
        }
    }
    assert!(accepted > 0, "{name}: no guess was right");
}

#[test]
fn drafts_that_read_features_give_the_targets_own_tokens() {
    let encodings = [Encoding::Float32, Encoding::Bfloat16, Encoding::Int8];
    let target = tiny::target(1);
    for tree in [DynamicTree::chain(4), DynamicTree { depth: 3, top_k: 3, nodes: 9, min_probability: 0.0 }] {
        for mapped in [false, true] {
            let layers = if mapped { 2 } else { 1 };
            let make = |sampling| -> Box<dyn Drafter> { Box::new(eagle3(&target, layers, mapped, tree, sampling)) };
            every_draft(&make, &target, &encodings, "eagle3");
        }
    }
    let target = heads_for_tests::target();
    let make = |sampling| -> Box<dyn Drafter> {
        let heads = heads_for_tests::good(&target, 3, 0.3);
        Box::new(MedusaDrafter::new(heads, &ChoiceTree::chain(3), sampling))
    };
    every_draft(&make, &target, &encodings, "medusa");
}

/// Another model whose head is the target's: right now and then.
pub(super) fn model_drafter<'a>(target: &LlamaTarget, tree: DynamicTree, sampling: DraftSampling) -> ModelDrafter<'a> {
    let half = |name: &str, tensor: tch::Tensor| match name {
        "model.layers.1.mlp.down_proj.weight" => tensor * 0.5,
        _ => tensor,
    };
    ModelDrafter::new(Box::new(tiny::target_with(1, &half)), target.info(), tree, sampling).unwrap()
}

#[test]
fn a_model_of_its_own_gives_the_targets_own_tokens() {
    let target = tiny::target(1);
    for tree in [DynamicTree::chain(3), DynamicTree { depth: 3, top_k: 3, nodes: 9, min_probability: 0.0 }] {
        let make = |sampling| -> Box<dyn Drafter> { Box::new(model_drafter(&target, tree, sampling)) };
        every_draft(&make, &target, &[Encoding::Float32], "model");
    }
}

/// Guessing on while a verdict travels changes which guesses are made when, and no token; a draft that is always right sends
/// what it guessed ahead.
#[test]
fn what_is_guessed_ahead_is_sent_where_the_verdict_allows_it() {
    let target = tiny::target(1);
    let (mut promoted, mut dropped) = (0, 0);
    for (temperature, key) in [(0.0, 0), (0.0, 4), (1.0, 2), (1.0, 3)] {
        let asked = asked(temperature, key);
        let want = asked.alone(&target);
        let sampling = DraftSampling::for_policy(asked.choice().policy, temperature);
        let own = ModelDrafter::new(Box::new(tiny::target(1)), target.info(), DynamicTree::chain(2), sampling).unwrap();
        let other =
            model_drafter(&target, DynamicTree { depth: 2, top_k: 3, nodes: 6, min_probability: 0.0 }, sampling);
        for (drafter, is_right) in [(own, true), (other, false)] {
            let mut network = Network::new(&target, settings(), Rates::default(), key);
            let mut edge = Edge::new(asked.request(1, true), Box::new(drafter));
            drive(&mut edge, &mut network, &waits(), &|| false, &mut |_| Ok(())).unwrap();
            assert_eq!((edge.answer(), edge.finish()), (&want.0[..], Some(want.1)));
            assert!(!is_right || edge.ahead().dropped == 0, "{:?}", edge.ahead());
            promoted += edge.ahead().promoted;
            dropped += edge.ahead().dropped;
        }
    }
    assert!(promoted > 5 && dropped > 0, "{promoted} promoted, {dropped} dropped");
}

/// Lossy gates over the network are the gates beside the target: the same text, and the same marks.
#[test]
fn gates_travel() {
    let target = tiny::target(1);
    let mut unverified = 0;
    for policy in [Policy::Rank { k: 3, seed: 3 }, Policy::Entropy { most: 4.1, seed: 3 }] {
        for key in 0..4 {
            let asked = asked(0.0, key);
            let choice = Choice { policy, ..asked.choice() };
            let sampling = DraftSampling::for_policy(policy, 0.0);
            let make = || Box::new(eagle3(&target, 1, false, DynamicTree::chain(3), sampling)) as Box<dyn Drafter>;
            let options =
                EngineOptions { processors: choice.processors, policy, stop_tokens: STOP.to_vec(), max_rows: 1 };
            let mut engine = Engine::new(&target, make(), options).unwrap();
            let (prompt, max_new_tokens) = (asked.prompt.clone(), asked.max_new_tokens);
            engine.submit(Request { tag: 0, prompt, max_new_tokens, key }).unwrap();
            let want = engine.run(&mut Silent).unwrap().remove(0).decoded.unwrap();
            let mut network = Network::new(&target, settings(), Rates::default(), key);
            let mut edge = Edge::new(EdgeRequest { choice, ..asked.request(1, false) }, make());
            drive(&mut edge, &mut network, &waits(), &|| false, &mut |_| Ok(())).unwrap();
            assert_eq!(edge.answer(), want.tokens, "{policy}, {key}");
            assert!(!edge.is_lossless());
            // What is not marked is what the target would have chosen behind the same tokens.
            for (place, &token) in edge.answer().iter().enumerate() {
                let before = [&asked.prompt[..], &edge.answer()[..place]].concat();
                let own = Asked { prompt: before, max_new_tokens: 1, temperature: 0.0, key }.alone(&target).0[0];
                assert_eq!(own == token, !edge.unverified().contains(&place), "{policy}, token {place}");
            }
            unverified += edge.unverified().len();
        }
    }
    assert!(unverified > 5, "{unverified} tokens were kept against the target");
}
