//! Block drafters of every head: whatever they guess, in chains and trees, alone and in a batch, the output is the target's
//! own, and what they keep of a text is what a fresh prefill keeps.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::block::{BlockDrafter, BlockParts, OwnTables};
use super::super::medusa::heads_for_tests::{assert_follow_the_target, forgetful};
use super::arrivals::everywhere;
use super::*;
use crate::decode::VerifyBudget;
use crate::decode::verify_budget::{Additive, Limits, StepCosts};
use crate::draft::block::{self, BlockConfig};

/// Tokens that a draft with a vocabulary of its own can name.
fn own_vocabulary() -> VocabMap {
    VocabMap::new((0..64).filter(|token| token % 3 != 1).collect(), 64).unwrap()
}

/// A section of every head, and of what the family may be told, by name.
fn sections() -> BTreeMap<&'static str, Value> {
    let section = |algorithm: &str, more: Value| {
        let mut section = json!({"algorithm": algorithm, "num_layers": 2, "block_size": 6, "mask_token_id": 1,
            "target_layer_ids": [0, -1]});
        let more = more.as_object().unwrap().clone();
        section.as_object_mut().unwrap().extend(more);
        section
    };
    let markov = |kind: &str| json!({"markov_rank": 6, "markov_head_type": kind});
    let selector = json!({"selector_rank": 6, "selector_top_k": 4});
    let lilicorr = json!({"lilicorr_candidate_topk": 5, "lilicorr_hidden_size": 12, "lilicorr_num_layers": 1,
        "lilicorr_num_heads": 2, "lilicorr_factor_dim": 6});
    let domino = json!({"gru_hidden_dim": 10, "emb_dim": 6});
    let xpress = json!({"xpress_rank": 6});
    let conv = json!({"kernel_size": 3, "group_size": 8});
    let own = own_vocabulary().draft_size();
    BTreeMap::from([
        ("dflash", section("dflash", json!({}))),
        (
            "dflash, a window",
            section(
                "dflash",
                json!({"sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"]}),
            ),
        ),
        ("dflash, own vocabulary", section("dflash", json!({"draft_vocab_size": own, "mask_embedding": true}))),
        ("dflash2", section("dflash2", json!({"head": selector, "conv": conv}))),
        ("dspark", section("dspark", json!({"head": markov("vanilla")}))),
        ("dspark, gated", section("dspark", json!({"head": markov("gated"), "draft_vocab_size": own}))),
        ("dspark, rnn", section("dspark", json!({"head": markov("rnn"), "layout": "fill_in"}))),
        ("lilicorr", section("lilicorr", json!({"head": lilicorr}))),
        ("domino", section("domino", json!({"head": domino}))),
        ("domino, fill_in", section("domino", json!({"head": domino, "layout": "fill_in"}))),
        ("xpress", section("xpress", json!({"head": xpress}))),
        ("xpress, shift", section("xpress", json!({"head": xpress, "layout": "shift", "draft_vocab_size": own}))),
    ])
}

/// A drafter whose tensors are made by `tensor` from their place, name and shape.
fn built(
    target: &LlamaTarget,
    section: &Value,
    (tree, sampling): (DynamicTree, DraftSampling),
    tensor: &dyn Fn(u64, &str, &[i64]) -> Tensor,
) -> BlockDrafter {
    let config = BlockConfig::read(section).unwrap();
    let shape = config.shape(target.info()).unwrap();
    let specs = block::tensors(&config, &shape).unwrap();
    let tensors = (0..).zip(specs).map(|(stream, spec)| {
        let value = tensor(stream, &spec.name, &spec.shape);
        (spec.name, value)
    });
    let tensors = tensors.collect();
    let vocabulary = section.get("draft_vocab_size").map(|_| own_vocabulary());
    let parts = BlockParts { config, shape, tensors, vocabulary, own_tables: OwnTables::default() };
    BlockDrafter::new(parts, target, tree, sampling).unwrap()
}

/// A random one.
fn drafter(target: &LlamaTarget, section: &Value, tree: DynamicTree, sampling: DraftSampling) -> BlockDrafter {
    built(target, section, (tree, sampling), &|stream, name, shape| {
        let is_norm = shape.len() == 1 && name.contains("norm");
        noise::normal(shape, 0.2, 31, stream) + if is_norm { 1.0 } else { 0.0 }
    })
}

/// A drafter that knows what a forgetful target says, up to `doubt`: its layers and head are silent, and its last norm is
/// the target's.
fn knowing(
    target: &LlamaTarget,
    section: &Value,
    (tree, sampling): (DynamicTree, DraftSampling),
    doubt: f64,
) -> BlockDrafter {
    built(target, section, (tree, sampling), &|stream, name, shape| {
        let random = noise::normal(shape, 1.0, 32, stream).to_kind(Kind::Double);
        match name {
            "norm.weight" => forgetful::last_norm() + random * doubt,
            "mask_embedding" => target.embedding().table.get(1),
            name if name.contains("o_proj") || name.contains("down_proj") => random * 0.0,
            name if name.contains("layers.") || name.contains("norm") => random * 0.0 + 1.0,
            _ => random * doubt,
        }
    })
}

#[test]
fn block_drafts_in_bfloat16_guess_what_their_numbers_guess_in_float64() {
    let tree = DynamicTree { depth: 4, top_k: 4, nodes: 12, min_probability: 0.0 };
    for (name, section) in sections() {
        assert_compact_guesses_are_the_same(name, &|target| {
            Box::new(built(target, &section, (tree, sampling(0.0)), &|stream, name, shape| {
                let is_norm = shape.len() == 1 && name.contains("norm");
                narrow(&(noise::normal(shape, 0.2, 31, stream) + if is_norm { 1.0 } else { 0.0 }))
            }))
        });
    }
}

fn every_tree_of(kind: Kind, trees: &[DynamicTree], share: usize) {
    let mut right = BTreeMap::new();
    for (seed, peak, temperature) in [(1, 1.0, 0.0), (4, 6.0, 1.0)] {
        let target = target(seed, peak, kind);
        let keyed = |rows| options(Policy::Keyed { seed: SEED }, temperature, rows);
        let plain = texts(&decode(&target, Box::new(Plain), keyed(1)));
        for (place, (name, section)) in sections().into_iter().enumerate() {
            for (index, &tree) in trees.iter().enumerate().filter(|(index, _)| (index + place) % share == 0) {
                let rows = if (index + place) % 2 == 0 { 4 } else { 1 };
                let drafter = drafter(&target, &section, tree, sampling(temperature));
                let decoded = decode(&target, Box::new(drafter), keyed(rows));
                assert_eq!(texts(&decoded), plain, "{name}, {tree:?}, {temperature}, {rows} rows");
                *right.entry(name).or_insert(0) += accepted(&decoded);
            }
        }
    }
    assert!(right.values().all(|&count| count > 0), "nothing was right: {right:?}");
}

#[test]
fn every_tree_of_every_head_gives_what_plain_decoding_gives() {
    every_tree_of(Kind::Double, &trees(), 3);
}

#[test]
fn so_in_float32() {
    every_tree_of(Kind::Float, &[trees()[1], trees()[9], trees()[13]], 1);
}

/// A draft that has the target's distribution and knows its noise is always right: a slot, a position or a key that is off
/// by one leaves chance alone.
#[test]
fn the_targets_noise_finds_what_the_target_will_choose() {
    let target = forgetful::target();
    for (name, section) in sections() {
        // Those have tokens that they cannot name, or only a few that they choose from.
        if section.get("draft_vocab_size").is_some() || ["dflash2", "lilicorr"].contains(&name) {
            continue;
        }
        let share = |seed, rows| {
            let sampling = DraftSampling::for_policy(Policy::Keyed { seed }, 1.3);
            let drafter = knowing(&target, &section, (DynamicTree::chain(4), sampling), 0.0);
            let decoded = decode(&target, Box::new(drafter), options(Policy::Keyed { seed: SEED }, 1.3, rows));
            let rounds = || decoded.iter().flat_map(|one| &one.rounds).filter(|round| round.depth > 0);
            let whole = rounds().filter(|round| round.accepted == round.depth.min(round.tokens));
            whole.count() as f64 / rounds().count() as f64
        };
        assert_eq!([share(SEED, 1), share(SEED, 4)], [1.0, 1.0], "{name}");
        assert!(share(SEED + 1, 1) < 0.2, "{name}");
    }
}

/// Rejection sampling with what each head really drew from.
#[test]
fn drawn_guesses_keep_the_targets_distribution() {
    let target = forgetful::target();
    let policy = Policy::Maximal { seed: 11 };
    let tree = DynamicTree { depth: 3, top_k: 2, nodes: 5, min_probability: 0.0 };
    for (name, section) in sections() {
        let sampling = DraftSampling::for_policy(policy, 1.0);
        let drafter = knowing(&target, &section, (tree, sampling), 0.1);
        let options = EngineOptions { stop_tokens: Vec::new(), ..options(policy, 1.0, 64) };
        let mut engine = Engine::new(&target, Box::new(drafter), options).unwrap();
        for tag in 0..200 {
            engine.submit(Request { tag, prompt: vec![5, 9], max_new_tokens: 10, key: 7 * tag }).unwrap();
        }
        let left = engine.run(&mut Silent).unwrap();
        let decoded: Vec<Decoded> = left.into_iter().map(|left| left.decoded.unwrap()).collect();
        assert!(accepted(&decoded) > 200, "{name}: {} guesses were right", accepted(&decoded));
        assert_follow_the_target(&target, &decoded, name);
    }
}

/// What a draft keeps of a text against a draft that has just seen it.
fn look(section: &Value, target: &LlamaTarget, running: &BlockDrafter, row: usize, tokens: &[u32]) {
    let mut fresh = drafter(target, section, SMALL, sampling(1.0));
    let (_, features) = prefilled(target, &tokens[..tokens.len() - 1], &fresh.capture());
    fresh.join(&[Joining { tokens, features }]).unwrap();
    assert_eq!(running.cache().unwrap().lengths()[row], tokens.len() as i64 - 1);
    let (got, want) = (running.last_seen().unwrap().get(row as i64), fresh.last_seen().unwrap().get(0));
    near([got.shallow_clone(), got], [want.shallow_clone(), want], "the last token that was seen");
    equals_fresh(running.cache().unwrap(), row, fresh.into_cache().unwrap(), &format!("draft, row {row}"));
}

#[test]
fn a_cache_is_that_of_a_fresh_prefill() {
    let target = target(2, 1.0, Kind::Double);
    for name in ["dflash, a window", "dflash2", "dspark, rnn", "lilicorr"] {
        let section = &sections()[name];
        let mut looked = 0;
        follow(
            &target,
            &mut drafter(&target, section, SMALL, sampling(1.0)),
            &|drafter| drafter.poison(),
            &mut |drafter, texts| {
                texts.iter().enumerate().for_each(|(row, text)| look(section, &target, drafter, row, text));
                looked += texts.len();
            },
        );
        assert!(looked > 20, "{name}");
    }
}

#[test]
fn whoever_arrives_and_leaves_each_gets_what_it_gets_alone() {
    let target = target(4, 6.0, Kind::Double);
    for name in ["dflash, a window", "dspark, gated", "lilicorr", "xpress"] {
        let section = &sections()[name];
        let look = |running: &BlockDrafter, row: usize, tokens: &[u32]| look(section, &target, running, row, tokens);
        everywhere(&target, &|sampling| drafter(&target, section, SMALL, sampling), Some(&look));
    }
}

/// A prompt of several pieces leaves what one leaves that is run at once.
#[test]
fn prompts_may_run_in_pieces() {
    let target = target(2, 1.0, Kind::Double);
    let tokens: Vec<u32> = (0..23).map(|place| place * 7 % 64).collect();
    for (_, section) in sections() {
        let mut pieces = drafter(&target, &section, SMALL, sampling(1.0)).with_passes(Passes::of(10, 4));
        let (_, features) = prefilled(&target, &tokens[..22], &pieces.capture());
        pieces.join(&[Joining { tokens: &tokens, features }]).unwrap();
        look(&section, &target, &pieces, 0, &tokens);
    }
}

/// Guesses, scores and confidences are those of the text, whoever is in the batch and how many guesses others want.
#[test]
fn a_proposal_is_that_of_its_text_alone() {
    let target = target(2, 1.0, Kind::Double);
    let texts: [Vec<u32>; 3] = [vec![5, 2], vec![9, 8, 1, 30, 2, 11, 4, 4, 61], vec![0, 0, 3]];
    for (name, section) in sections() {
        for tree in [DynamicTree::chain(4), SMALL] {
            for depths in [[4, 4, 4], [4, 2, 1]] {
                // All candidates of a block look at each other: with fewer slots these are others.
                if name == "lilicorr" && depths[1] != 4 {
                    continue;
                }
                let proposals = |numbers: &[usize]| {
                    let mut drafter = drafter(&target, &section, tree, DraftSampling::Greedy);
                    let joining = |&number: &usize| {
                        let tokens = &texts[number];
                        let (_, features) = prefilled(&target, &tokens[..tokens.len() - 1], &drafter.capture());
                        Joining { tokens, features }
                    };
                    let rows: Vec<Joining<'_>> = numbers.iter().map(joining).collect();
                    drafter.join(&rows).unwrap();
                    let context = |&number: &usize| Context {
                        tokens: &texts[number],
                        depth: depths[number],
                        key: 0,
                        temperature: 0.0,
                    };
                    drafter.propose(&numbers.iter().map(context).collect::<Vec<_>>()).unwrap()
                };
                for (number, got) in proposals(&[0, 1, 2]).iter().enumerate() {
                    let want = &proposals(&[number])[0];
                    let what = format!("{name}, {tree:?}, {depths:?}, text {number}");
                    assert_eq!(got.tree.tokens(), want.tree.tokens(), "{what}");
                    let off = got.scores.iter().zip(&want.scores).map(|(got, want)| (got - want).abs());
                    assert!(off.fold(0.0, f64::max) < 1e-9, "{what}");
                    assert_eq!(got.confidence.is_some(), name.starts_with("dspark") && tree.top_k == 1, "{what}");
                    let [got, want] = [got, want].map(|one| one.confidence.clone().unwrap_or_default());
                    assert!(
                        got.len() == want.len() && got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-5)
                    );
                }
            }
        }
    }
}

/// Rounds that verify what is worth it by the draft's own confidence.
#[test]
fn budgets_change_no_text() {
    let target = target(4, 6.0, Kind::Double);
    let costs = |share: f64| {
        StepCosts::Additive(Additive {
            bias_seconds: 1.0,
            bs_probes: vec![1],
            alpha_seconds: vec![0.0],
            m_probes: vec![1, 101],
            theta_seconds: vec![0.0, 100.0 * share],
        })
    };
    for temperature in [0.0, 1.0] {
        let keyed = |rows| options(Policy::Keyed { seed: SEED }, temperature, rows);
        let plain = texts(&decode(&target, Box::new(Plain), keyed(1)));
        for name in ["dspark", "dspark, gated", "dspark, rnn"] {
            let mut verified = Vec::new();
            for share in [0.01, 0.3, 50.0] {
                let drafter = drafter(&target, &sections()[name], DynamicTree::chain(4), sampling(temperature));
                let budget = VerifyBudget::new(vec![1.0; 4], costs(share), Limits::default()).unwrap();
                let mut engine = Engine::new(&target, Box::new(drafter), keyed(3)).unwrap();
                engine = engine.with_budget(budget).unwrap();
                requests().into_iter().for_each(|request| engine.submit(request).unwrap());
                let left = engine.run(&mut Silent).unwrap();
                let decoded: Vec<Decoded> = left.into_iter().map(|left| left.decoded.unwrap()).collect();
                assert_eq!(texts(&decoded), plain, "{name}, {temperature}, {share}");
                verified.push(decoded.iter().flat_map(|one| &one.rounds).map(|round| round.depth).sum::<usize>());
            }
            assert!(
                verified[0] >= verified[1] && verified[1] >= verified[2] && verified[0] > verified[2],
                "{verified:?}"
            );
        }
    }
}

/// A draft that is being trained drafts with the parameters it has.
#[test]
fn a_draft_in_training_drafts() {
    use crate::draft::{DraftContext, algorithm};
    let target = target(1, 1.0, Kind::Double);
    let plain = texts(&decode(&target, Box::new(Plain), options(Policy::Keyed { seed: SEED }, 0.0, 1)));
    for (name, section) in sections() {
        let map = section.get("draft_vocab_size").map(|_| own_vocabulary());
        let context = DraftContext {
            target: target.info().clone(),
            embedding: target.embedding(),
            head: target.head(),
            vocabulary: map.as_ref(),
            weights: None,
            kind: Kind::Double,
            device: Device::Cpu,
            seed: 1,
            chunk_bytes: 1 << 20,
        };
        let draft = (algorithm(&section).unwrap().build)(&section, &context).unwrap();
        for (tree, text) in [(None, "chain:"), (Some("dynamic:depth=3,top_k=2,nodes=5"), "dynamic:depth=3")] {
            let opened = of_training(draft.as_ref(), tree, &target, DraftSampling::Greedy).unwrap();
            assert!(opened.tree.starts_with(text) && opened.method == section["algorithm"], "{name}: {}", opened.tree);
            let decoded = decode(&target, opened.drafter, options(Policy::Keyed { seed: SEED }, 0.0, 3));
            assert_eq!(texts(&decoded), plain, "{name}");
        }
    }
}
