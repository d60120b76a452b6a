//! Drafters that run a model: whatever they guess, the output is the target's own, and their caches are those of a fresh
//! prefill.

use tch::{Device, Kind, Tensor};

use super::super::engine::{Decoded, Engine, EngineOptions};
use super::super::event::Silent;
use super::super::policy::Policy;
use super::super::prefill::Passes;
use super::super::{Request, tiny};
use super::*;
use crate::draft::eagle3::{Eagle3Shape, HeadStart};
use crate::draft::peagle::PeagleShape;
use crate::models::llama::{LlamaConfig, LlamaTarget};
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, KvCache, Processors, noise};
use crate::vocab::VocabMap;

mod arrivals;
mod blocks;
mod turns;

const SEED: u64 = 3;

/// The tiny target in another element type, its head `peak` times as steep.
fn target(seed: u64, peak: f64, kind: Kind) -> LlamaTarget {
    let steeper =
        |name: &str, tensor: Tensor| if name == "lm_head.weight" { tensor * peak } else { tensor }.to_kind(kind);
    tiny::target_with(seed, &steeper)
}

/// A random EAGLE-3 draft of a tiny target, of so many layers, with or without a vocabulary of its own.
pub(crate) fn eagle3(
    target: &LlamaTarget,
    layers: usize,
    mapped: bool,
    tree: DynamicTree,
    sampling: DraftSampling,
) -> Eagle3Drafter {
    Eagle3Drafter::new(eagle3_parts(target, layers, mapped), target, tree, sampling).unwrap()
}

fn eagle3_parts(target: &LlamaTarget, layers: usize, mapped: bool) -> Eagle3Parts {
    let dimensions = target.info();
    let vocabulary =
        mapped.then(|| VocabMap::new((0..64).filter(|token| token % 3 != 1).collect(), dimensions.vocab_size).unwrap());
    let shape = Eagle3Shape {
        hidden_size: dimensions.hidden_size,
        target_hidden_size: dimensions.hidden_size,
        num_target_layers: dimensions.num_layers(),
        vocab_size: dimensions.vocab_size,
        draft_vocab_size: vocabulary.as_ref().map_or(dimensions.vocab_size, VocabMap::draft_size),
        num_layers: layers,
        max_position_embeddings: dimensions.max_position_embeddings,
        layer: dimensions.template,
        capture: vec![0, 1, 2],
        fc_norm: false,
        norm_before_fc: false,
        norm_before_residual: false,
        norm_output: true,
        norm_feedback: layers > 1,
        head_norms: false,
    };
    let tensor = |(stream, (name, size)): (u64, (String, Vec<i64>))| {
        let value = match name.as_str() {
            "lm_head.weight" => head_rows(target, vocabulary.as_ref()),
            _ => noise::normal(&size, 0.2, 21, stream) + if size.len() == 1 { 1.0 } else { 0.0 },
        };
        (name, value)
    };
    let tensors = (0..).zip(shape.tensors()).map(tensor).collect();
    Eagle3Parts { shape, tensors, vocabulary, embedding: None }
}

/// The same beside a lookup, which is alone where three tokens stood before, and takes the place of guesses beyond six.
fn with_lookup(target: &LlamaTarget, tree: DynamicTree, sampling: DraftSampling) -> WithLookup<'static> {
    let lookup = PromptLookup { longest_match: 4, shortest_match: 1, depth: 3, nodes: 5 };
    WithLookup { draft: Box::new(eagle3(target, 1, true, tree, sampling)), lookup, alone: 3, most: Some(6) }
}

/// A random P-EAGLE draft of a tiny target: with a vocabulary of its own where it has two layers, of which one has a window.
fn peagle(target: &LlamaTarget, layers: usize, tree: DynamicTree, sampling: DraftSampling) -> PeagleDrafter {
    PeagleDrafter::new(peagle_parts(target, layers), target, tree, sampling).unwrap()
}

fn peagle_parts(target: &LlamaTarget, layers: usize) -> PeagleParts {
    let dimensions = target.info();
    let vocabulary = (layers > 1)
        .then(|| VocabMap::new((0..64).filter(|token| token % 3 != 1).collect(), dimensions.vocab_size).unwrap());
    let Eagle3Parts { shape: network, .. } = eagle3_parts(target, layers, vocabulary.is_some());
    let network = Eagle3Shape { norm_before_residual: true, norm_feedback: false, head_norms: layers > 1, ..network };
    let windows = (0..layers).map(|layer| (layer > 0).then_some(6)).collect();
    let shape = PeagleShape { network, mask_token_id: 63, num_depths: 4, windows };
    let tensor = |(stream, (name, size)): (u64, (String, Vec<i64>))| {
        let value = match name.as_str() {
            "lm_head.weight" => head_rows(target, vocabulary.as_ref()),
            "embed_tokens.weight" => target.embedding().table.shallow_clone(),
            _ => noise::normal(&size, 0.2, 22, stream) + if size.len() == 1 { 1.0 } else { 0.0 },
        };
        (name, value)
    };
    let tensors = (0..).zip(shape.tensors()).map(tensor).collect();
    PeagleParts { shape, tensors, vocabulary }
}

/// The target's own head, which makes a few guesses right.
fn head_rows(target: &LlamaTarget, vocabulary: Option<&VocabMap>) -> Tensor {
    match vocabulary {
        Some(map) => target.head().weight.index_select(0, &Tensor::from_slice(map.target_ids())),
        None => target.head().weight.shallow_clone(),
    }
}

fn model<'a>(draft: LlamaTarget, target: &LlamaTarget, tree: DynamicTree, sampling: DraftSampling) -> ModelDrafter<'a> {
    ModelDrafter::new(Box::new(draft), target.info(), tree, sampling).unwrap()
}

fn requests() -> Vec<Request> {
    let mut next = noise::keyed_stream(5, 1);
    let request = |tag: u64| {
        // The shortest prompts are much shorter than the trees.
        let length = 1 + (tag + next() % 3) * (tag % 3);
        let prompt = (0..length).map(|_| (next() % 64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 10 + next() as usize % 9, key: tag * 1000 }
    };
    (0..4).map(request).collect()
}

fn options(policy: Policy, temperature: f64, max_rows: usize) -> EngineOptions {
    EngineOptions { processors: Processors::at_temperature(temperature), policy, stop_tokens: vec![7], max_rows }
}

fn decode<'a>(target: &'a LlamaTarget, drafter: Box<dyn Drafter + 'a>, options: EngineOptions) -> Vec<Decoded> {
    let mut engine = Engine::new(target, drafter, options).unwrap();
    requests().into_iter().for_each(|request| engine.submit(request).unwrap());
    engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect()
}

fn texts(decoded: &[Decoded]) -> Vec<Vec<u32>> {
    decoded.iter().map(|one| one.tokens.clone()).collect()
}

fn accepted(decoded: &[Decoded]) -> usize {
    decoded.iter().flat_map(|one| &one.rounds).map(|round| round.accepted).sum()
}

/// Chains and trees of 1, 2, 17, 63, 64, 65 and 128 nodes, the root included where there are guesses.
fn trees() -> Vec<DynamicTree> {
    let mut trees = vec![DynamicTree::chain(1), DynamicTree::chain(4), DynamicTree::chain(16)];
    for nodes in [1, 2, 16, 17, 62, 63, 64, 65, 127, 128] {
        trees.push(DynamicTree { depth: 5, top_k: 6, nodes, min_probability: 0.0 });
    }
    trees.push(DynamicTree { depth: 6, top_k: 64, nodes: 70, min_probability: 0.0 });
    trees.push(DynamicTree { depth: 6, top_k: 4, nodes: 30, min_probability: 0.05 });
    trees
}

/// Numbers that bfloat16 holds, where a draft of a float32 target keeps them.
fn narrow(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::BFloat16).to_kind(Kind::Double)
}

/// What a drafter got right in every round, of a target in float32, where it may be compact, and in float64, where it is not.
fn assert_compact_guesses_are_the_same(name: &str, make: &dyn Fn(&LlamaTarget) -> Box<dyn Drafter>) {
    let [compact, wide] = [Kind::Float, Kind::Double].map(|kind| {
        let target = target(4, 6.0, kind);
        let decoded = decode(&target, make(&target), options(Policy::Keyed { seed: SEED }, 0.0, 1));
        let rounds = |one: &Decoded| one.rounds.iter().map(|round| round.accepted).collect::<Vec<_>>();
        decoded.iter().map(rounds).collect::<Vec<_>>()
    });
    assert_eq!(compact, wide, "{name}");
    assert!(wide.iter().flatten().sum::<usize>() > 0, "{name}: no guess was right");
}

fn sampling(temperature: f64) -> DraftSampling {
    DraftSampling::for_policy(Policy::Keyed { seed: SEED }, temperature)
}

fn every_tree(kind: Kind, trees: &[DynamicTree]) {
    let mut total = 0;
    for (turn, (seed, peak)) in [(1, 1.0), (4, 6.0)].into_iter().enumerate() {
        let target = target(seed, peak, kind);
        let other = || {
            let change = |name: &str, tensor: Tensor| match name {
                "model.layers.1.mlp.down_proj.weight" => tensor * 0.5,
                "lm_head.weight" => tensor * peak,
                _ => tensor,
            };
            tiny::target_with(seed, &|name, tensor| change(name, tensor).to_kind(kind))
        };
        for temperature in [0.0, 1.0] {
            let keyed = |rows| options(Policy::Keyed { seed: SEED }, temperature, rows);
            let plain = texts(&decode(&target, Box::new(Plain), keyed(1)));
            // Each tree on one of the targets.
            for (index, &tree) in trees.iter().enumerate().filter(|(index, _)| index % 2 == turn) {
                let rows = if index % 4 < 2 { 4 } else { 1 };
                let sampling = sampling(temperature);
                let drafters: [(&str, Box<dyn Drafter + '_>); 6] = [
                    ("eagle3", Box::new(eagle3(&target, 1, false, tree, sampling))),
                    ("eagle3, 2 layers, own vocabulary", Box::new(eagle3(&target, 2, true, tree, sampling))),
                    ("peagle", Box::new(peagle(&target, 1, tree, sampling))),
                    ("peagle, 2 layers, own vocabulary", Box::new(peagle(&target, 2, tree, sampling))),
                    ("model", Box::new(model(other(), &target, tree, sampling))),
                    ("eagle3 with lookup", Box::new(with_lookup(&target, tree, sampling))),
                ];
                for (name, drafter) in drafters {
                    let decoded = decode(&target, drafter, keyed(rows));
                    assert_eq!(texts(&decoded), plain, "{name}, {tree:?}, {temperature}, {rows} rows, peak {peak}");
                    total += accepted(&decoded);
                }
            }
        }
    }
    assert!(total > 100, "{total} guesses were right");
}

#[test]
fn drafts_in_bfloat16_guess_what_their_numbers_guess_in_float64() {
    let tree = DynamicTree { depth: 4, top_k: 4, nodes: 12, min_probability: 0.0 };
    assert_compact_guesses_are_the_same("eagle3", &|target| {
        let mut parts = eagle3_parts(target, 2, true);
        parts.tensors.iter_mut().for_each(|(_, tensor)| *tensor = narrow(tensor));
        Box::new(Eagle3Drafter::new(parts, target, tree, sampling(0.0)).unwrap())
    });
    assert_compact_guesses_are_the_same("peagle", &|target| {
        let mut parts = peagle_parts(target, 2);
        parts.tensors.iter_mut().for_each(|(_, tensor)| *tensor = narrow(tensor));
        Box::new(PeagleDrafter::new(parts, target, tree, sampling(0.0)).unwrap())
    });
}

#[test]
fn every_tree_of_every_draft_gives_what_plain_decoding_gives() {
    every_tree(Kind::Double, &trees());
}

/// Requests of several temperatures in one batch: each is guessed at, and answered, as it is alone with a draft for its own.
#[test]
fn every_request_is_guessed_at_with_its_own_temperature() {
    let target = target(1, 1.0, Kind::Double);
    let keyed = Policy::Keyed { seed: SEED };
    let tree = DynamicTree { depth: 4, top_k: 4, nodes: 12, min_probability: 0.0 };
    let temperatures = [0.0, 1.0, 0.7, 2.0];
    let drafters: [&dyn Fn(DraftSampling) -> Box<dyn Drafter>; 3] = [
        &|sampling| Box::new(eagle3(&target, 1, true, tree, sampling)),
        &|sampling| Box::new(peagle(&target, 1, tree, sampling)),
        &|sampling| Box::new(model(tiny::target(2), &target, tree, sampling)),
    ];
    for drafter in drafters {
        let any = DraftSampling::for_any_request(keyed, 9.0);
        let mut engine = Engine::new(&target, drafter(any), options(keyed, 9.0, 4)).unwrap();
        for request in requests() {
            let temperature = temperatures[request.tag as usize];
            engine.submit_with(request, Processors::at_temperature(temperature)).unwrap();
        }
        let mixed = engine.run(&mut Silent).unwrap();
        let mut right = 0;
        for (request, mixed) in requests().into_iter().zip(mixed) {
            let temperature = temperatures[request.tag as usize];
            let mut alone =
                Engine::new(&target, drafter(sampling(temperature)), options(keyed, temperature, 1)).unwrap();
            alone.submit(request).unwrap();
            let want = alone.run(&mut Silent).unwrap().remove(0).decoded.unwrap();
            assert_eq!(mixed.decoded.unwrap(), want, "temperature {temperature}");
            right += accepted(&[want]);
        }
        assert!(right > 0);
    }
}

#[test]
fn so_in_float32() {
    every_tree(Kind::Float, &[trees()[2], trees()[4], trees()[8], trees()[13]]);
}

#[test]
fn a_draft_that_is_the_target_is_always_right() {
    let target = target(1, 1.0, Kind::Double);
    for temperature in [0.0, 1.0] {
        for tree in [DynamicTree::chain(4), DynamicTree { depth: 4, top_k: 3, nodes: 12, min_probability: 0.0 }] {
            let drafter = model(tiny::target(1), &target, tree, sampling(temperature));
            let decoded = decode(&target, Box::new(drafter), options(Policy::Keyed { seed: SEED }, temperature, 3));
            for round in decoded.iter().flat_map(|one| &one.rounds) {
                // The last round of a request may end inside an accepted run.
                assert!(round.accepted >= round.tokens - 1, "{round:?}, {tree:?}, {temperature}");
                assert!(
                    round.depth == 0 || tree.top_k > 1 || round.tokens > round.depth || round.accepted == round.tokens
                );
            }
            let rounds: usize = decoded.iter().map(|one| one.rounds.len()).sum();
            let tokens: usize = decoded.iter().map(|one| one.tokens.len()).sum();
            assert!(rounds * 3 < tokens, "{rounds} rounds for {tokens} tokens");
        }
    }
}

/// Knowing the noise is worth much: without it, a perfect draft is often wrong at temperature 1.
#[test]
fn known_noise_raises_acceptance() {
    let target = target(1, 1.0, Kind::Double);
    let rounds = |sampling| {
        let drafter = model(tiny::target(1), &target, DynamicTree::chain(4), sampling);
        let decoded = decode(&target, Box::new(drafter), options(Policy::Keyed { seed: SEED }, 1.0, 3));
        decoded.iter().map(|one| one.rounds.len()).sum::<usize>()
    };
    let (known, unknown) = (rounds(sampling(1.0)), rounds(DraftSampling::Greedy));
    assert!(known < unknown, "{known} rounds with, {unknown} without");
}

#[test]
fn a_draft_that_is_the_target_is_always_right_under_rejection_too() {
    let target = target(1, 1.0, Kind::Double);
    let policy = Policy::Maximal { seed: 8 };
    let tree = DynamicTree { depth: 3, top_k: 2, nodes: 9, min_probability: 0.0 };
    let drafter = model(tiny::target(1), &target, tree, DraftSampling::for_policy(policy, 1.0));
    let decoded = decode(&target, Box::new(drafter), options(policy, 1.0, 3));
    for round in decoded.iter().flat_map(|one| &one.rounds) {
        assert!(round.accepted >= round.tokens - 1);
    }
}

fn near(got: [Tensor; 2], want: [Tensor; 2], what: &str) {
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got.size(), want.size(), "{what}");
        let difference = if got.numel() == 0 { 0.0 } else { (got - want).abs().max().double_value(&[]) };
        assert!(difference < 1e-11, "{what}: {difference:e}");
    }
}

/// Row `row` of a cache against row 0 of a fresh one that may hold more.
fn equals_fresh(cache: &KvCache, row: usize, mut fresh: KvCache, what: &str) {
    fresh.truncate(&[cache.lengths()[row]]);
    for layer in 0..cache.layers() {
        near(cache.contents(layer, row), fresh.contents(layer, 0), what);
    }
}

/// The target, or a draft model, over known tokens: its cache and hidden states.
fn prefilled(model: &LlamaTarget, tokens: &[u32], capture: &[usize]) -> (KvCache, Vec<Tensor>) {
    let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let count = ids.len() as i64;
    let ids = Tensor::from_slice(&ids).unsqueeze(0);
    let positions = Tensor::arange(count, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let input = ForwardInput {
        ids: &ids,
        positions: &positions,
        mask: &AttentionMask::Causal,
        capture,
        logits: LogitRows::None,
    };
    let mut cache = model.new_cache(1, count);
    let output = model.forward(&input, Some(&mut cache)).unwrap();
    cache.advance(&[count]);
    (cache, output.hidden.iter().map(|layer| layer.squeeze_dim(0)).collect())
}

/// Drives a drafter as the engine does, but keeps it in hand: after every round its cache must be a fresh prefill's.
fn follow<D: Drafter>(
    target: &LlamaTarget,
    drafter: &mut D,
    poison: &dyn Fn(&mut D),
    check: &mut dyn FnMut(&D, &[Vec<u32>]),
) {
    let capture = drafter.capture();
    let mut texts: Vec<Vec<u32>> = vec![vec![5], vec![9, 8, 1, 30, 2], vec![0, 0, 3]];
    let mut next = noise::keyed_stream(2, 2);
    let features = |tokens: &[u32], from: usize| -> Vec<Tensor> {
        let (_, hidden) = prefilled(target, &tokens[..tokens.len() - 1], &capture);
        let rest = (tokens.len() - 1 - from) as i64;
        hidden.into_iter().map(|layer| layer.narrow(0, from as i64, rest)).collect()
    };
    texts.iter_mut().for_each(|text| text.push((next() % 64) as u32));
    let join = |drafter: &mut D, texts: &[Vec<u32>]| {
        let rows: Vec<Joining<'_>> =
            texts.iter().map(|tokens| Joining { tokens, features: features(tokens, 0) }).collect();
        drafter.join(&rows).unwrap();
    };
    join(drafter, &texts);
    check(drafter, &texts);
    for round in 0..9 {
        poison(drafter);
        let rows: Vec<Context<'_>> =
            texts.iter().map(|tokens| Context { tokens, depth: 6, key: 0, temperature: 0.0 }).collect();
        let proposals = drafter.propose(&rows).unwrap();
        assert_eq!(drafter.cache_lengths(), texts.iter().map(|text| text.len() as i64 - 1).collect::<Vec<_>>());
        // A path of the tree comes true, and one token more; or nothing does.
        let mut news = Vec::new();
        for (text, proposal) in texts.iter_mut().zip(&proposals) {
            let node = (next() % proposal.tree.len() as u64) as usize;
            let path = proposal.tree.topology().path(node);
            text.extend(path[1..].iter().map(|&node| proposal.tree.tokens()[node]));
            text.push((next() % 64) as u32);
            news.push(path.len());
        }
        if round == 4 {
            drafter.retain(&[2, 0]);
            (texts, news) = (vec![texts[2].clone(), texts[0].clone()], vec![news[2], news[0]]);
        }
        let progress: Vec<Progress<'_>> = texts
            .iter()
            .zip(&news)
            .map(|(tokens, &new)| Progress { tokens, new, features: features(tokens, tokens.len() - 1 - new) })
            .collect();
        drafter.commit(&progress).unwrap();
        check(drafter, &texts);
        if round == 6 {
            let late = vec![vec![1, 2, 3, 4]];
            join(drafter, &late);
            texts.extend(late);
            check(drafter, &texts);
        }
    }
}

const SMALL: DynamicTree = DynamicTree { depth: 4, top_k: 3, nodes: 10, min_probability: 0.0 };

#[test]
fn an_eagle3_cache_is_that_of_a_fresh_prefill() {
    let target = target(2, 1.0, Kind::Double);
    let mut drafter = eagle3(&target, 2, true, SMALL, sampling(1.0));
    let capture = drafter.capture();
    let mut rounds = 0;
    follow(&target, &mut drafter, &|drafter| drafter.rows.as_mut().unwrap().cache.poison(), &mut |drafter, texts| {
        for (row, text) in texts.iter().enumerate() {
            let mut fresh = eagle3(&target, 2, true, SMALL, sampling(1.0));
            let (_, features) = prefilled(&target, &text[..text.len() - 1], &capture);
            fresh.join(&[Joining { tokens: text, features }]).unwrap();
            let fresh = fresh.rows.take().unwrap();
            let running = drafter.rows.as_ref().unwrap();
            assert_eq!(running.cache.lengths()[row], text.len() as i64 - 1);
            let [got, want] = [running.last.get(row as i64), fresh.last.get(0)];
            assert!((got - want).abs().max().double_value(&[]) < 1e-11);
            equals_fresh(&running.cache, row, fresh.cache, &format!("row {row}"));
            rounds += 1;
        }
    });
    assert!(rounds > 20);
}

#[test]
fn a_peagle_cache_is_that_of_a_fresh_prefill() {
    let target = target(2, 1.0, Kind::Double);
    for layers in [1, 2] {
        let mut drafter = peagle(&target, layers, SMALL, sampling(1.0));
        let capture = drafter.capture();
        let mut rounds = 0;
        let poison = |drafter: &mut PeagleDrafter| drafter.rows.as_mut().unwrap().cache.poison();
        follow(&target, &mut drafter, &poison, &mut |drafter, texts| {
            for (row, text) in texts.iter().enumerate() {
                let mut fresh = peagle(&target, layers, SMALL, sampling(1.0));
                let (_, features) = prefilled(&target, &text[..text.len() - 1], &capture);
                fresh.join(&[Joining { tokens: text, features }]).unwrap();
                let fresh = fresh.rows.take().unwrap();
                let running = drafter.rows.as_ref().unwrap();
                assert_eq!(running.cache.lengths()[row], text.len() as i64 - 1);
                let [got, want] = [running.outputs.get(row as i64), fresh.outputs.get(0)];
                assert_eq!(got.size(), [SMALL.depth as i64, 32]);
                assert!((got - want).abs().max().double_value(&[]) < 1e-11);
                equals_fresh(&running.cache, row, fresh.cache, &format!("row {row}"));
                rounds += 1;
            }
        });
        assert!(rounds > 20);
    }
}

#[test]
fn a_model_drafts_cache_is_that_of_a_fresh_prefill() {
    let (target, other) = (target(2, 1.0, Kind::Double), tiny::target(3));
    for tree in [SMALL, DynamicTree::chain(5)] {
        let mut drafter = model(tiny::target(3), &target, tree, sampling(1.0));
        let mut kept = 0;
        follow(
            &target,
            &mut drafter,
            &|drafter| drafter.rows.as_mut().unwrap().cache.poison(),
            &mut |drafter, texts| {
                let running = drafter.rows.as_ref().unwrap();
                for (row, text) in texts.iter().enumerate() {
                    let length = running.cache.lengths()[row];
                    // What was not run yet is run with the next root.
                    assert!(length < text.len() as i64 && length == running.known[row]);
                    kept += i64::from(length + 1 == text.len() as i64);
                    equals_fresh(&running.cache, row, prefilled(&other, text, &[]).0, &format!("row {row}"));
                }
            },
        );
        assert!(kept > 10, "{kept}");
    }
}

/// A prompt of several pieces leaves the same cache as one that is run at once.
#[test]
fn prompts_may_run_in_pieces() {
    let target = target(2, 1.0, Kind::Double);
    let tokens: Vec<u32> = (0..23).map(|place| place * 7 % 64).collect();
    let mut whole = eagle3(&target, 2, true, SMALL, sampling(1.0));
    let mut pieces = eagle3(&target, 2, true, SMALL, sampling(1.0));
    pieces.passes = Passes::of(10, 4);
    let (_, features) = prefilled(&target, &tokens[..22], &whole.capture());
    for drafter in [&mut whole, &mut pieces] {
        let features = features.iter().map(Tensor::shallow_clone).collect();
        drafter.join(&[Joining { tokens: &tokens, features }]).unwrap();
    }
    let (whole, pieces) = (whole.rows.unwrap(), pieces.rows.unwrap());
    assert!((&whole.last - &pieces.last).abs().max().double_value(&[]) < 1e-11);
    equals_fresh(&pieces.cache, 0, whole.cache, "eagle3");
    let [mut whole, mut pieces] = [0, 1].map(|_| peagle(&target, 2, SMALL, sampling(1.0)));
    pieces.passes = Passes::of(10, 4);
    let (_, features) = prefilled(&target, &tokens[..22], &whole.capture());
    for drafter in [&mut whole, &mut pieces] {
        let features = features.iter().map(Tensor::shallow_clone).collect();
        drafter.join(&[Joining { tokens: &tokens, features }]).unwrap();
    }
    let (whole, pieces) = (whole.rows.unwrap(), pieces.rows.unwrap());
    assert!((&whole.outputs - &pieces.outputs).abs().max().double_value(&[]) < 1e-11);
    equals_fresh(&pieces.cache, 0, whole.cache, "peagle");
    let mut pieces = model(tiny::target(3), &target, SMALL, sampling(1.0));
    pieces.passes = Passes::of(10, 4);
    pieces.join(&[Joining { tokens: &tokens, features: Vec::new() }]).unwrap();
    let pieces = pieces.rows.unwrap();
    assert_eq!(pieces.known, [22]);
    equals_fresh(&pieces.cache, 0, prefilled(&tiny::target(3), &tokens, &[]).0, "model");
}

#[test]
fn drafts_of_another_target_are_refused() {
    let target = target(1, 1.0, Kind::Double);
    let mut config: LlamaConfig = target.config().clone();
    config.vocab_size = 65;
    let larger = LlamaTarget::build(config, &mut |_, shape| Ok(Tensor::zeros(shape, (Kind::Double, Device::Cpu))));
    let drafter = ModelDrafter::new(Box::new(larger.unwrap()), target.info(), SMALL, DraftSampling::Greedy);
    assert!(drafter.err().unwrap().to_string().contains("65 tokens, the target 64"));
    let wrong = DynamicTree { top_k: 0, ..SMALL };
    assert!(ModelDrafter::new(Box::new(tiny::target(1)), target.info(), wrong, DraftSampling::Greedy).is_err());
}

/// A draft that is being trained drafts with the parameters it has, and follows them.
#[test]
fn a_draft_in_training_drafts() {
    use crate::draft::eagle3::{Eagle3, Eagle3Config};
    use crate::draft::{DraftContext, DraftModel};
    let target = target(1, 1.0, Kind::Double);
    let map = VocabMap::new((0..40).collect(), 64).unwrap();
    let config = Eagle3Config {
        capture: Some(vec![0, 1, 2]),
        draft_vocab_size: Some(40),
        lm_head: HeadStart::Target,
        ..Eagle3Config::default()
    };
    let context = DraftContext {
        target: target.info().clone(),
        embedding: target.embedding(),
        head: target.head(),
        vocabulary: Some(&map),
        weights: None,
        kind: Kind::Double,
        device: Device::Cpu,
        seed: 1,
        chunk_bytes: 1 << 20,
    };
    let draft = Eagle3::new(config, &context).unwrap();
    let parts = Eagle3Parts::of_training(&draft).unwrap().unwrap();
    assert_eq!(parts.vocabulary, Some(map.clone()));
    let drafter = Eagle3Drafter::new(parts, &target, SMALL, DraftSampling::Greedy).unwrap();
    let plain = texts(&decode(&target, Box::new(Plain), options(Policy::Keyed { seed: SEED }, 0.0, 1)));
    let decoded = decode(&target, Box::new(drafter), options(Policy::Keyed { seed: SEED }, 0.0, 3));
    assert_eq!(texts(&decoded), plain);
    assert!(draft.parameters().iter().all(|parameter| !parameter.value.grad().defined()));
}
