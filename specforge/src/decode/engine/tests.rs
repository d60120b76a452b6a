use std::collections::HashMap;

use super::super::drafter::{Context, Joining, Plain, Progress, PromptLookup, last};
use super::super::event::{Committed, Silent};
use super::super::tiny;
use super::*;
use crate::data::Finish;
use crate::nn::noise::keyed_stream;
use crate::tree::TokenTree;
use tch::{Device, Kind};

/// Guesses what it was told the target will choose, right or wrong as the dice fall, in a tree of a given shape.
struct Oracle {
    answers: HashMap<Vec<u32>, Vec<u32>>,
    shape: Vec<usize>,
    dice: Box<dyn FnMut() -> u64>,
    vocabulary: u64,
}

impl Drafter for Oracle {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let propose = |row: &Context<'_>| {
            let (prompt, answer) =
                self.answers.iter().find(|(prompt, _)| row.tokens.starts_with(prompt)).expect("an unknown prompt");
            let done = row.tokens.len() - prompt.len();
            let mut tree = TokenTree::root(last(row.tokens));
            for &parent in &self.shape {
                let parent = parent.min(tree.len() - 1);
                let depth = tree.topology().depths()[parent];
                let right = answer.get(done + depth).copied();
                let guess = match (self.dice)() % 3 {
                    0 => ((self.dice)() % self.vocabulary) as u32,
                    _ => right.unwrap_or(0),
                };
                let guess =
                    if tree.child(parent, guess).is_some() { ((self.dice)() % self.vocabulary) as u32 } else { guess };
                tree.push(parent, guess);
            }
            let scores = vec![0.0; tree.len()];
            Proposal::picked(tree, scores)
        };
        Ok(rows.iter().map(propose).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        assert!(rows.iter().all(|row| row.new >= 1 && row.features.is_empty()));
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}
}

/// Parents of the guesses of a tree with `nodes` nodes, the root included.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut shapes = Vec::new();
    for nodes in [1usize, 2, 3, 12, 16, 17, 31, 32, 33, 63, 64, 65, 128] {
        let guesses = 1..nodes;
        shapes.push((format!("chain of {nodes}"), guesses.clone().map(|node| node - 1).collect()));
        shapes.push((format!("binary of {nodes}"), guesses.clone().map(|node| (node - 1) / 2).collect()));
        let mut dice = keyed_stream(nodes as u64, 4);
        shapes.push((format!("random of {nodes}"), guesses.map(|node| (dice() % node as u64) as usize).collect()));
    }
    shapes
}

fn requests(count: u64) -> Vec<Request> {
    let mut next = keyed_stream(5, 1);
    let mut request = |tag: u64| {
        // The shortest prompts are much shorter than the trees.
        let length = 1 + (tag + next() % 3) * (tag % 4);
        let prompt = (0..length).map(|_| (next() % 64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 12 + next() as usize % 25, key: tag * 1000 }
    };
    (0..count).map(&mut request).collect()
}

fn options(temperature: f64, max_rows: usize) -> EngineOptions {
    let processors = Processors::at_temperature(temperature);
    EngineOptions { processors, policy: Policy::Keyed { seed: 3 }, stop_tokens: vec![7, 8], max_rows }
}

fn decode<'a>(target: &'a dyn TargetModel, drafter: Box<dyn Drafter + 'a>, options: EngineOptions) -> Vec<Decoded> {
    let mut engine = Engine::new(target, drafter, options).unwrap();
    requests(9).into_iter().for_each(|request| engine.submit(request).unwrap());
    engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect()
}

fn texts(decoded: &[Decoded]) -> Vec<(Vec<u32>, Finish)> {
    decoded.iter().map(|decoded| (decoded.tokens.clone(), decoded.finish)).collect()
}

#[test]
fn every_tree_gives_what_plain_decoding_gives() {
    let target = tiny::target(1);
    for temperature in [0.0, 1.0] {
        let plain = texts(&decode(&target, Box::new(Plain), options(temperature, 1)));
        assert!(plain.iter().any(|(_, finish)| *finish == Finish::Stop));
        assert!(plain.iter().any(|(_, finish)| *finish == Finish::Length));
        let answers: HashMap<_, _> = requests(9)
            .into_iter()
            .map(|request| request.prompt)
            .zip(plain.iter().map(|(tokens, _)| tokens.clone()))
            .collect();
        for (name, shape) in shapes() {
            for rows in [1, 5] {
                let dice = Box::new(keyed_stream(shape.len() as u64, 6));
                let oracle = Oracle { answers: answers.clone(), shape: shape.clone(), dice, vocabulary: 64 };
                let decoded = decode(&target, Box::new(oracle), options(temperature, rows));
                assert_eq!(texts(&decoded), plain, "{name}, temperature {temperature}, {rows} rows");
                let accepted: usize = decoded.iter().flat_map(|one| &one.rounds).map(|round| round.accepted).sum();
                assert_eq!(accepted > 0, !shape.is_empty(), "{name}");
            }
        }
    }
}

/// After every round the cache holds what a fresh prefill of all but the last token gives, whatever lies behind it.
#[test]
fn caches_equal_a_fresh_prefill_and_what_lies_behind_is_not_read() {
    let target = tiny::target(2);
    let answers: HashMap<_, _> = requests(9)
        .into_iter()
        .map(|request| request.prompt)
        .zip(texts(&decode(&target, Box::new(Plain), options(1.0, 3))).into_iter().map(|(tokens, _)| tokens))
        .collect();
    let (_, shape) = shapes().remove(17);
    let dice = Box::new(keyed_stream(1, 6));
    let oracle = Oracle { answers: answers.clone(), shape, dice, vocabulary: 64 };
    let mut engine = Engine::new(&target, Box::new(oracle), options(1.0, 3)).unwrap();
    requests(9).into_iter().for_each(|request| engine.submit(request).unwrap());
    let mut rounds = 0;
    while engine.pending() > 0 {
        engine.step(&mut Silent).unwrap();
        let Some(cache) = engine.cache.as_mut() else { continue };
        cache.poison();
        for (row, running) in engine.rows.iter().enumerate() {
            let held = running.tokens.len() as i64 - 1;
            assert_eq!(cache.lengths()[row], held);
            let ids: Vec<i64> = running.tokens[..held as usize].iter().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_slice(&ids).unsqueeze(0);
            let positions = Tensor::arange(held, (Kind::Int64, Device::Cpu)).unsqueeze(0);
            let mask = &AttentionMask::Causal;
            let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits: LogitRows::None };
            let mut fresh = target.new_cache(1, held);
            target.forward(&input, Some(&mut fresh)).unwrap();
            fresh.advance(&[held]);
            for layer in 0..cache.layers() {
                for (got, want) in cache.contents(layer, row).iter().zip(fresh.contents(layer, 0)) {
                    assert!((got - want).abs().max().double_value(&[]) < 1e-12);
                }
            }
            rounds += 1;
        }
    }
    assert!(rounds > 20);
}

#[test]
fn prompt_lookup_is_lossless_and_finds_repetitions() {
    // A peaky target repeats itself soon.
    let target = tiny::target_with(4, &|name, tensor| if name == "lm_head.weight" { tensor * 6.0 } else { tensor });
    let lookup = || Box::new(PromptLookup { longest_match: 3, shortest_match: 1, depth: 4, nodes: 10 });
    for temperature in [0.0, 1.0] {
        let plain = decode(&target, Box::new(Plain), options(temperature, 4));
        let decoded = decode(&target, lookup(), options(temperature, 4));
        assert_eq!(texts(&decoded), texts(&plain));
        let rounds = |decoded: &[Decoded]| decoded.iter().map(|one| one.rounds.len()).sum::<usize>();
        assert!(rounds(&decoded) < rounds(&plain), "{} rounds, {} without a draft", rounds(&decoded), rounds(&plain));
    }
}

#[test]
fn a_broken_row_fails_its_request_alone() {
    // Token 5 has an embedding that is no number: requests that meet it fail, the others do not notice.
    let poison = |name: &str, tensor: Tensor| {
        if name == "model.embed_tokens.weight" {
            let _ = tensor.get(5).fill_(f64::NAN);
        }
        tensor
    };
    let (sound, broken) = (tiny::target(1), tiny::target_with(1, &poison));
    let plain = decode(&sound, Box::new(Plain), options(0.0, 1));
    let mut engine = Engine::new(&broken, Box::new(Plain), options(0.0, 4)).unwrap();
    requests(9).into_iter().for_each(|request| engine.submit(request).unwrap());
    let mut failed = 0;
    for (left, plain) in engine.run(&mut Silent).unwrap().into_iter().zip(&plain) {
        let request = &requests(9)[left.tag as usize];
        // The last token is never run.
        let met = request.prompt.contains(&5) || plain.tokens[..plain.tokens.len() - 1].contains(&5);
        match left.decoded {
            Ok(decoded) => assert!(!met && decoded.tokens == plain.tokens),
            Err(error) => {
                assert!(met && error.to_string().contains("not numbers"), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0 && failed < 9, "{failed} failed");
}

/// Keeps the row of every committed token, by request and position.
#[derive(Default)]
struct Rows32(HashMap<(u64, usize), Tensor>);

impl Listener for Rows32 {
    fn wants_rows(&self) -> bool {
        true
    }

    fn committed(&mut self, event: &Committed<'_>) -> Result<()> {
        let row = event.row.expect("rows were asked for").copy();
        assert!(self.0.insert((event.tag, event.position), row).is_none(), "a position was committed twice");
        Ok(())
    }
}

#[test]
fn recorded_logits_are_those_of_plain_decoding() {
    for peaky in [1.0, 4.0] {
        let target = tiny::target_with(3, &|name, tensor| {
            let tensor = if name == "lm_head.weight" { tensor * peaky } else { tensor };
            tensor.to_kind(Kind::Float)
        });
        for temperature in [0.0, 1.0] {
            let decode = |drafter: Box<dyn Drafter>, rows: usize| {
                let mut engine = Engine::new(&target, drafter, options(temperature, rows)).unwrap();
                requests(9).into_iter().for_each(|request| engine.submit(request).unwrap());
                let mut listener = Rows32::default();
                let left = engine.run(&mut listener).unwrap();
                (left.into_iter().map(|left| left.decoded.unwrap().tokens).collect::<Vec<_>>(), listener.0)
            };
            let (plain, want) = decode(Box::new(Plain), 1);
            let prompts = requests(9).into_iter().map(|request| request.prompt);
            let answers: HashMap<_, _> = prompts.zip(plain.clone()).collect();
            for place in [4, 8, 17, 26, 35] {
                let (name, shape) = shapes().remove(place);
                let dice = Box::new(keyed_stream(place as u64, 6));
                let oracle = Oracle { answers: answers.clone(), shape, dice, vocabulary: 64 };
                let (tokens, got) = decode(Box::new(oracle), 4);
                assert_eq!(tokens, plain, "{name}");
                assert_eq!(got.len(), want.len());
                for (place, row) in &got {
                    let most = (row - &want[place]).abs().max().double_value(&[]);
                    // Relative to the largest logit, which peaky targets have at 20 and more.
                    let scale = want[place].abs().max().double_value(&[]).max(1.0);
                    assert!(most <= 1e-5 * scale, "{name}, temperature {temperature}, {place:?}: {most:e}");
                }
            }
        }
    }
}

#[test]
fn processors_act_alike_with_and_without_a_draft() {
    let target = tiny::target(5);
    let sampled = Processors { temperature: 0.8, top_k: 20, top_p: 0.9, repetition_penalty: 1.2 };
    for processors in [Processors { repetition_penalty: 1.5, ..Processors::default() }, sampled] {
        let options = |max_rows| EngineOptions { processors, ..options(0.0, max_rows) };
        let plain = texts(&decode(&target, Box::new(Plain), options(1)));
        let prompts = requests(9).into_iter().map(|request| request.prompt);
        let answers: HashMap<_, _> = prompts.zip(plain.iter().map(|(tokens, _)| tokens.clone())).collect();
        for place in [7, 13, 22, 32] {
            let (name, shape) = shapes().remove(place);
            let dice = Box::new(keyed_stream(place as u64, 6));
            let oracle = Oracle { answers: answers.clone(), shape, dice, vocabulary: 64 };
            assert_eq!(texts(&decode(&target, Box::new(oracle), options(4))), plain, "{name}, {processors:?}");
        }
        // They do something: without them the text is another one.
        let temperature = processors.temperature;
        assert_ne!(texts(&decode(&target, Box::new(Plain), self::options(temperature, 1))), plain);
    }
}

/// In one batch with a draft: greedy requests, sampled ones, and such whose choice depends on the tokens before it.
#[test]
fn requests_with_other_processors_share_a_batch_and_its_trees() {
    let target = tiny::target(5);
    let mixed = [
        Processors::default(),
        Processors::at_temperature(1.0),
        Processors { temperature: 0.8, top_k: 20, top_p: 0.9, repetition_penalty: 1.2 },
        Processors { repetition_penalty: 1.5, ..Processors::default() },
    ];
    let decode = |drafter: Box<dyn Drafter>, rows: usize| {
        let mut engine = Engine::new(&target, drafter, options(0.0, rows)).unwrap();
        for request in requests(9) {
            let processors = mixed[request.tag as usize % mixed.len()];
            engine.submit_with(request, processors).unwrap();
        }
        let left = engine.run(&mut Silent).unwrap();
        texts(&left.into_iter().map(|left| left.decoded.unwrap()).collect::<Vec<_>>())
    };
    let plain = decode(Box::new(Plain), 1);
    let prompts = requests(9).into_iter().map(|request| request.prompt);
    let answers: HashMap<_, _> = prompts.zip(plain.iter().map(|(tokens, _)| tokens.clone())).collect();
    for place in [0, 7, 13, 22, 32] {
        let (name, shape) = shapes().remove(place);
        let dice = Box::new(keyed_stream(place as u64, 6));
        let oracle = Oracle { answers: answers.clone(), shape, dice, vocabulary: 64 };
        assert_eq!(decode(Box::new(oracle), 4), plain, "{name}");
    }
    // They do something.
    assert_ne!(plain, texts(&self::decode(&target, Box::new(Plain), options(0.0, 1))));
}

/// Equal logits: the first of them is the target's, in a tree as in a single row. It is token 0, a token like any other.
#[test]
fn ties_are_decided_alike() {
    let target = tiny::target_with(1, &|name, tensor| if name == "lm_head.weight" { tensor * 0.0 } else { tensor });
    for temperature in [0.0, 1.0] {
        let plain = texts(&decode(&target, Box::new(Plain), options(temperature, 1)));
        assert_eq!(plain.iter().flat_map(|(tokens, _)| tokens).all(|&token| token == 0), temperature == 0.0);
        let prompts = requests(9).into_iter().map(|request| request.prompt);
        let answers: HashMap<_, _> = prompts.zip(plain.iter().map(|(tokens, _)| tokens.clone())).collect();
        for place in [8, 23, 30] {
            let (name, shape) = shapes().remove(place);
            let dice = Box::new(keyed_stream(place as u64, 6));
            let oracle = Oracle { answers: answers.clone(), shape, dice, vocabulary: 64 };
            assert_eq!(texts(&decode(&target, Box::new(oracle), options(temperature, 4))), plain, "{name}");
        }
    }
}
