//! Tuning of drafts whose guesses and costs are known.

use super::probe::Answer;
use super::*;
use crate::decode::drafter::medusa::heads_for_tests as test_heads;
use crate::decode::drafter::{self, DraftSampling, MedusaDrafter, ModelDrafter, choices, open, tree_text};
use crate::decode::event::Silent;
use crate::decode::{Decoded, Drafter, Engine, Policy, Request, tiny};
use crate::models::llama::LlamaTarget;
use crate::nn::Processors;

fn options(temperature: f64) -> TuneOptions {
    let engine = EngineOptions {
        processors: Processors::at_temperature(temperature),
        policy: Policy::Keyed { seed: 5 },
        stop_tokens: vec![7],
        max_rows: 1,
    };
    let (batches, top_k) = (vec![1, 3], vec![1, 3]);
    TuneOptions { engine, max_new_tokens: 24, batches, max_depth: 3, max_nodes: 12, top_k, repeat: 1 }
}

fn some_prompts(count: u64) -> Vec<Prompt> {
    let prompt = |key: u64| Prompt { id: key.to_string(), tokens: vec![key as u32 + 9, 3, key as u32], key };
    (0..count).map(prompt).collect()
}

/// Everything that is tried on paper.
fn guessed<'a>(target: &'a LlamaTarget, prompts: &[Prompt], options: &TuneOptions, open: Open<'_, 'a>) -> Guessed {
    let timing = Timing { target, prompts, options: &options.engine, rows: &[1], repeat: 1 };
    let mut silent = |_: &'static str, _: u64, _: u64| {};
    let draft = Vec::new();
    let default = Draft::of(open(None).unwrap());
    // The draft may borrow the target for longer than the measurement.
    Measuring { target, prompts, options, timing, open, progress: &mut silent, draft }.guesses(&default).unwrap()
}

fn decode(
    target: &LlamaTarget,
    drafter: Box<dyn Drafter + '_>,
    prompts: &[Prompt],
    options: &TuneOptions,
) -> Vec<Decoded> {
    let mut engine = Engine::new(target, drafter, options.engine.clone()).unwrap();
    for (tag, Prompt { tokens, key, .. }) in (0..).zip(prompts) {
        let max_new_tokens = options.max_new_tokens;
        engine.submit(Request { tag, prompt: tokens.clone(), max_new_tokens, key: *key }).unwrap();
    }
    engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect()
}

/// The rounds on paper are those of decoding with the tree, one by one.
fn assert_as_decoded(candidate: &Candidate, decoded: &[Decoded]) {
    for (outcomes, decoded) in candidate.outcomes.iter().zip(decoded) {
        let mut place = 0;
        for (number, round) in decoded.rounds.iter().enumerate() {
            let Outcome { depth, nodes, accepted, .. } = outcomes[place];
            let expected = (usize::from(nodes) - 1, usize::from(depth), usize::from(accepted));
            let got = (round.guesses, round.depth, round.accepted);
            assert_eq!(got, expected, "{}, round {number} at {place}", candidate.tree);
            place += round.tokens;
        }
        assert_eq!(place, outcomes.len(), "{}", candidate.tree);
    }
}

fn opened<'a>(drafter: impl Drafter + 'a, tree: String, trees: Trees) -> Opened<'a> {
    Opened { drafter: Box::new(drafter), method: "model".to_owned(), tree, trees, folder: None, notes: Vec::new() }
}

#[test]
fn trees_of_a_draft_s_probabilities_are_foreseen_round_by_round() {
    let target = tiny::target(1);
    let prompts = some_prompts(2);
    for temperature in [0.0, 1.0] {
        let options = options(temperature);
        let sampling = DraftSampling::for_policy(options.engine.policy, temperature);
        let open = |tree: Option<&str>| {
            let (tree, text) = tree_text::dynamic(tree.unwrap_or(tree_text::DEFAULT))?;
            let draft = tiny::target_with(1, &|_, tensor| &tensor + (&tensor * 30.0).sin() * 0.05);
            Ok(opened(ModelDrafter::new(Box::new(draft), target.info(), tree, sampling)?, text, Trees::Dynamic))
        };
        let guessed = guessed(&target, &prompts, &options, &open);
        assert!(guessed.candidates.iter().any(Candidate::is_chain), "{}", guessed.candidates.len());
        assert!(guessed.candidates.len() > 12, "{}", guessed.candidates.len());
        let mut accepted = 0;
        for candidate in &guessed.candidates {
            let drafter = open(Some(&candidate.tree)).unwrap().drafter;
            let decoded = decode(&target, drafter, &prompts, &options);
            accepted += decoded.iter().flat_map(|decoded| &decoded.rounds).map(|round| round.accepted).sum::<usize>();
            assert_as_decoded(candidate, &decoded);
        }
        assert!(accepted > 5, "the draft is never right: nothing was tried");
    }
}

#[test]
fn static_trees_are_foreseen_round_by_round_on_answers_that_chose_them() {
    let target = test_heads::target();
    let heads = || test_heads::good(&target, 3, 0.4);
    let options = options(0.0);
    let open = |tree: Option<&str>| {
        let tree = tree.unwrap_or("chain:3");
        let drafter = MedusaDrafter::new(heads(), &choices::parse(tree)?, DraftSampling::Greedy);
        Ok(opened(drafter, tree.to_owned(), Trees::Static))
    };
    // Chains of several answers; trees of a single one, which has no other half.
    for count in [3, 1] {
        let prompts = some_prompts(count);
        let guessed = guessed(&target, &prompts, &options, &open);
        let own = guessed.candidates.iter().filter(|candidate| candidate.is_chain() || count == 1);
        let mut tried = 0;
        for candidate in own {
            let drafter = open(Some(&candidate.tree)).unwrap().drafter;
            assert_as_decoded(candidate, &decode(&target, drafter, &prompts, &options));
            tried += 1;
        }
        assert!(tried >= 3, "{tried}");
    }
}

#[test]
fn prompt_lookup_is_foreseen_round_by_round() {
    let target = tiny::target(2);
    let (prompts, options) = (some_prompts(3), options(0.0));
    let open = |tree: Option<&str>| {
        open(Some("prompt-lookup"), tree, (&target, std::path::Path::new("")), DraftSampling::Greedy)
    };
    let guessed = guessed(&target, &prompts, &options, &open);
    for candidate in &guessed.candidates {
        let drafter = open(Some(&candidate.tree)).unwrap().drafter;
        assert_as_decoded(candidate, &decode(&target, drafter, &prompts, &options));
    }
}

/// A candidate that accepts `accepted` guesses at every round, of `guesses`.
fn candidate(tree: &str, (top_k, depth, guesses): (usize, usize, usize), accepted: u16) -> Candidate {
    let (nodes, levels) = (guesses as u16 + 1, depth as u16);
    let outcomes = vec![vec![Outcome { levels, depth: levels, nodes, accepted }; 120]; 2];
    Candidate { tree: tree.to_owned(), top_k, depth, guesses, drafted_by: 0, outcomes }
}

fn table(sizes: Vec<usize>, seconds: Vec<f64>) -> Table {
    Table { rows: vec![1], sizes, seconds: vec![seconds] }
}

/// The best of a chain of 1, a chain of 3 and a tree where one more token costs `token` passes and a level `level`.
fn best(token: f64, level: f64) -> Choice {
    let candidates = vec![
        candidate("chain:1", (1, 1, 1), 1),
        candidate("chain:3", (1, 3, 3), 2),
        candidate("dynamic", (4, 3, 12), 3),
    ];
    let answer = Answer { tokens: vec![1; 121], ended: false };
    let guessed = Guessed { answers: vec![answer.clone(), answer], candidates, capture: Vec::new(), notes: Vec::new() };
    let costs = Costs {
        plain: table(vec![1], vec![1.0]),
        verify: table(vec![1, 11], vec![1.0, 1.0 + 10.0 * token]),
        overhead: Table::free(),
        draft: vec![table(vec![1, 2], vec![level, 2.0 * level])],
    };
    predict(&guessed, &costs, 1, 2).best
}

#[test]
fn costs_decide_which_tree_is_the_best() {
    let free = best(0.0, 0.0);
    assert!(free.tree == "dynamic" && (free.speedup - 4.0).abs() < 1e-9, "{free:?}");
    // Tokens cost a quarter of a pass, drafting nothing: 2 / 1.25, 3 / 1.75, 4 / 4.
    let dear = best(0.25, 0.0);
    assert!(dear.tree == "chain:3" && (dear.speedup - 3.0 / 1.75).abs() < 1e-9, "{dear:?}");
    // Levels cost half a pass: 2 / 1.5, 3 / 2.5, 4 / 2.5.
    assert_eq!(best(0.0, 0.5).tree, "dynamic");
    // Both: 2 / 1.75, 3 / 3.25, 4 / 5.5.
    let both = best(0.25, 0.5);
    assert!(both.tree == "chain:1" && (both.speedup - 2.0 / 1.75).abs() < 1e-9, "{both:?}");
    // Nothing pays where a token costs what a pass does and a level too.
    let none = best(1.0, 1.0);
    assert!(none.tree == "chain:1" && none.speedup < 1.0, "{none:?}");
}

#[test]
fn a_draft_is_measured_chosen_and_put_to_the_test() {
    let target = tiny::target(1);
    let prompts = some_prompts(3);
    let options = options(0.0);
    let open = |tree: Option<&str>| {
        let (tree, beside) = tree_text::split_lookup(tree.unwrap_or(tree_text::DEFAULT));
        let (tree, text) = tree_text::dynamic(tree)?;
        let draft = ModelDrafter::new(Box::new(tiny::target(1)), target.info(), tree, DraftSampling::Greedy)?;
        let Some(keys) = beside else { return Ok(opened(draft, text, Trees::Dynamic)) };
        let asked = tree_text::lookup_beside(keys)?;
        let tree_text::LookupBeside { lookup, alone, most } = asked;
        let both = drafter::WithLookup { draft: Box::new(draft), lookup, alone, most };
        Ok(opened(both, format!("{text}+lookup:{}", asked.keys()), Trees::Dynamic))
    };
    let mut stages = Vec::new();
    let mut progress = |stage: &'static str, done: u64, total: u64| {
        assert!(done <= total, "{stage}: {done} of {total}");
        stages.push(stage);
    };
    let tuned = tune(&target, &prompts, &options, &open, &mut progress).unwrap();
    stages.dedup();
    assert_eq!(
        stages,
        ["answers", "drafting rounds", "answers", "drafting rounds", "verifying rounds", "groups of decoding"]
    );
    // The draft is the target: every guess comes true, and answers are those of plain decoding.
    assert_eq!(tuned.acceptance, [1.0, 1.0, 1.0]);
    assert_eq!(tuned.batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [1, 3]);
    for batch in &tuned.batches {
        let beside = batch.with_lookup.as_ref().unwrap();
        assert!(beside.tree.starts_with(&format!("{}+lookup:", batch.best.tree)), "{}", beside.tree);
        assert_eq!((beside.tested.answers, beside.tested.faults), (batch.tested.answers, 0));
        let (tree, tested) = batch.fastest();
        let speeds = batch.decodes().map(|one| one.speedup).fold(0.0, f64::max);
        assert_eq!((tree == beside.tree, tested.speedup), (beside.tested.speedup > batch.tested.speedup, speeds));
        let Batch { best, tested, .. } = batch;
        assert_eq!((tested.faults, tested.near_ties), (0, 0));
        // Rounds at the end of an answer are shorter, on paper too.
        let (foreseen, got) = (best.tokens_per_round, tested.tokens_per_round);
        assert!((foreseen - got).abs() < 1e-9 && got > 1.5, "{foreseen} and {got}");
        assert!(tested.tokens_per_second > 0.0 && batch.plain_tokens_per_second > 0.0);
        assert_eq!(batch.chains.iter().map(|chain| chain.depth).collect::<Vec<_>>(), [1, 2, 3]);
    }
    let text = report::text("the draft", &tuned);
    assert!(text.contains("verification, ms by tokens") && text.contains("3 requests together: "), "{text}");
}

#[test]
fn what_cannot_be_tuned_is_refused() {
    let target = tiny::target(1);
    let none = |_: Option<&str>| open(None, None, (&target, std::path::Path::new("")), DraftSampling::Greedy);
    let mut silent = |_: &'static str, _: u64, _: u64| {};
    let error = tune(&target, &some_prompts(1), &options(0.0), &none, &mut silent).unwrap_err();
    assert!(error.to_string().contains("without a draft") && error.exit_code() == 2, "{error}");
    let wide = TuneOptions { max_depth: 200, ..options(0.0) };
    let lookup = |tree: Option<&str>| {
        open(Some("prompt-lookup"), tree, (&target, std::path::Path::new("")), DraftSampling::Greedy)
    };
    let long = [Prompt { tokens: vec![1; tiny::CONTEXT - 2], ..some_prompts(1).remove(0) }];
    let error = tune(&target, &long, &wide, &lookup, &mut silent).unwrap_err();
    assert!(error.to_string().contains("no room behind the prompts"), "{error}");
}
