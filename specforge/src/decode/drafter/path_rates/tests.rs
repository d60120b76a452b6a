use super::super::medusa::MedusaDrafter;
use super::super::medusa::heads_for_tests as test_heads;
use super::*;
use crate::decode::policy::Policy;
use crate::decode::tiny;
use crate::nn::Processors;
use crate::nn::noise::keyed_stream;
use crate::tree::ChoiceTree;

/// Guesses of two heads at one root.
fn best(first: &[u32], second: &[u32]) -> Best {
    vec![first.to_vec(), second.to_vec()]
}

#[test]
fn paths_are_counted_as_a_whole() {
    let mut rates = PathRates::new(2);
    // Roots 1, 2 and 3 of the answer 1 2 3 4, which ended by itself.
    rates.add(&[1, 2, 3, 4], &[best(&[9, 2], &[3]), best(&[3], &[5, 6, 4]), best(&[4], &[0])], true);
    assert_eq!(rates.positions(), 3);
    // Both heads are right at the first two roots, and never along the same path.
    let hits: Vec<(Vec<usize>, u64)> = rates.hits.clone().into_iter().collect();
    assert_eq!(hits, [(vec![0], 2), (vec![0, 2], 1), (vec![1], 1), (vec![1, 0], 1)]);
    assert_eq!(rates.choose(3), [vec![0], vec![1], vec![0, 2]]);
    assert_eq!(rates.choose(99).len(), 4);
    assert_eq!(rates.expected_tokens(&rates.choose(3)), 1.0 + 4.0 / 3.0);
    let heads = rates.head_rates();
    assert_eq!((heads[0].best, heads[0].within), (2.0 / 3.0, 1.0));
    assert_eq!((heads[1].best, heads[1].within), (1.0 / 3.0, 2.0 / 3.0));
    // From root 1 over 2 and 3 to 4: nothing is left. Without the second depth 2, 3 and 4 take two rounds.
    assert_eq!(rates.replay(&rates.choose(4)), Replay { rounds: 1, tokens: 3 });
    assert_eq!(rates.replay(&[vec![0]]), Replay { rounds: 2, tokens: 3 });
    assert_eq!(rates.replay(&[]), Replay { rounds: 3, tokens: 3 });
}

#[test]
fn what_lies_behind_a_cut_answer_is_not_counted_as_wrong() {
    let guesses = [best(&[2], &[3]), best(&[3], &[4]), best(&[4], &[5])];
    let mut rates = PathRates::new(2);
    rates.add(&[1, 2, 3, 4], &guesses, false);
    assert_eq!((rates.positions(), rates.expected_tokens(&rates.choose(9))), (2, 3.0));
    assert_eq!(rates.head_rates()[1].best, 1.0);
    // An answer of one token has no root.
    rates.add(&[1], &[], true);
    assert_eq!((rates.positions(), rates.answers()), (2, 2));
}

#[test]
fn held_out_trees_do_not_know_the_answers_they_are_tried_on() {
    let mut rates = PathRates::new(1);
    // Even answers need rank 0, odd ones rank 1: a tree of one guess knows only the other half.
    rates.add(&[1, 2, 3], &[vec![vec![2]], vec![vec![3]]], true);
    rates.add(&[1, 2, 3], &[vec![vec![9, 2]], vec![vec![9, 3]]], true);
    assert_eq!(rates.replay_held_out(1), Replay { rounds: 4, tokens: 4 });
    rates.add(&[1, 2, 3], &[vec![vec![9, 2]], vec![vec![9, 3]]], true);
    rates.add(&[1, 2, 3], &[vec![vec![2]], vec![vec![3]]], true);
    assert_eq!(rates.replay_held_out(2), Replay { rounds: 4, tokens: 8 });
}

#[test]
fn the_chosen_tree_is_the_best_of_all_trees() {
    let mut dice = keyed_stream(1, 1);
    let mut rates = PathRates::new(3);
    for _ in 0..30 {
        let answer: Vec<u32> = (0..12).map(|_| (dice() % 4) as u32).collect();
        let mut guess = || -> Vec<u32> {
            let first = (dice() % 4) as u32;
            vec![first, (first + 1) % 4]
        };
        let guesses: Vec<Best> = (0..11).map(|_| (0..3).map(|_| guess()).collect()).collect();
        rates.add(&answer, &guesses, true);
    }
    // Every set of paths of two ranks and three heads that is a tree.
    let all: Vec<Vec<usize>> = (1..=3usize)
        .flat_map(|length| (0..1usize << length).map(move |bits| (0..length).map(|at| bits >> at & 1).collect()))
        .collect();
    assert_eq!(all.len(), 14);
    let mut best = [0.0f64; 15];
    for set in 0..1u32 << all.len() {
        let paths: Vec<Vec<usize>> = (0..all.len()).filter(|at| set >> at & 1 == 1).map(|at| all[at].clone()).collect();
        if ChoiceTree::from_choices(&paths).is_ok() {
            best[paths.len()] = best[paths.len()].max(rates.expected_tokens(&paths));
        }
    }
    for (nodes, best) in best.iter().enumerate() {
        let choices = rates.choose(nodes);
        assert_eq!(choices.len(), nodes);
        ChoiceTree::from_choices(&choices).expect("a parent was left out");
        assert_eq!(rates.expected_tokens(&choices), *best, "{nodes} guesses");
    }
}

/// The replay of a tree is what the engine does with it, round for round.
#[test]
fn a_replay_is_what_decoding_gives() {
    let target = test_heads::target();
    let prompts: Vec<Vec<u32>> = (0..7u32).map(|row| (0..1 + row % 3).map(|at| 9 * row + at).collect()).collect();
    for temperature in [0.0, 1.0] {
        let options = |max_rows| EngineOptions {
            processors: Processors::at_temperature(temperature),
            policy: Policy::Keyed { seed: 3 },
            stop_tokens: vec![7],
            max_rows,
        };
        let heads = test_heads::good(&target, 3, 0.5);
        let measured = measure(&target, &heads, &prompts, 40, options(3), &mut |_| ()).unwrap();
        assert!(measured.failed.is_empty());
        let alone = measure(&target, &heads, &prompts, 40, options(1), &mut |_| ()).unwrap();
        assert_eq!(measured.rates, alone.rates, "rates depend on the batch");
        let rates = measured.rates;
        for nodes in [1, 4, 16] {
            let choices = rates.choose(nodes);
            let tree = ChoiceTree::from_choices(&choices).unwrap();
            let sampling = DraftSampling::for_policy(options(1).policy, options(1).processors.temperature);
            let drafter = MedusaDrafter::new(test_heads::good(&target, 3, 0.5), &tree, sampling);
            let mut engine = Engine::new(&target, Box::new(drafter), options(4)).unwrap();
            for (index, prompt) in prompts.iter().enumerate() {
                let (tag, key) = (index as u64, index as u64);
                engine.submit(Request { tag, prompt: prompt.clone(), max_new_tokens: 40, key }).unwrap();
            }
            let left = engine.run(&mut Silent).unwrap();
            let rounds: Vec<_> = left.into_iter().flat_map(|left| left.decoded.unwrap().rounds).collect();
            let tokens = rounds.iter().map(|round| round.tokens as u64).sum();
            let replay = rates.replay(&choices);
            assert_eq!(replay, Replay { rounds: rounds.len() as u64, tokens }, "{nodes} guesses");
            assert!(nodes == 1 || replay.tokens_per_round() > 1.15, "{replay:?}");
        }
    }
}

#[test]
fn prompts_without_answer_are_named() {
    let target = test_heads::target();
    let heads = test_heads::good(&target, 2, 0.5);
    let prompts = [vec![1], vec![], vec![1; 2 * tiny::CONTEXT]];
    let options = EngineOptions {
        processors: Processors::default(),
        policy: Policy::Keyed { seed: 0 },
        stop_tokens: Vec::new(),
        max_rows: 2,
    };
    let measured = measure(&target, &heads, &prompts, 5, options, &mut |_| ()).unwrap();
    assert_eq!(measured.failed.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(measured.rates.answers(), 1);
}
