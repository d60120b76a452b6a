//! Requests that come and go while others run, without a draft.

use std::collections::HashMap;

use tch::{Device, Kind};

use super::super::drafter::Plain;
use super::super::event::Silent;
use super::super::tiny;
use super::*;
use crate::data::Finish;
use crate::nn::noise::keyed_stream;
use crate::nn::sampling::Sampling;

const SEED: u64 = 3;

fn sampled() -> Processors {
    Processors::at_temperature(1.5)
}

fn options(processors: Processors, stop: &[u32], max_rows: usize) -> EngineOptions {
    EngineOptions { processors, policy: Policy::Keyed { seed: SEED }, stop_tokens: stop.to_vec(), max_rows }
}

fn engine<'a>(target: &'a dyn TargetModel, options: EngineOptions) -> Engine<'a> {
    Engine::new(target, Box::new(Plain), options).unwrap()
}

type Answer = (Vec<u32>, Finish);

fn answer(left: Left) -> Answer {
    let decoded = left.decoded.unwrap();
    (decoded.tokens, decoded.finish)
}

/// Prompts of many lengths, tokens drawn from the keyed stream.
fn requests(count: u64, max_new_tokens: usize) -> Vec<Request> {
    let mut next = keyed_stream(5, 1);
    let mut request = |tag| {
        let length = 1 + next() % 40;
        let prompt = (0..length).map(|_| (next() % 64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 1 + next() as usize % max_new_tokens, key: tag * 1000 }
    };
    (0..count).map(&mut request).collect()
}

fn answers(mut engine: Engine<'_>, requests: &[Request]) -> Vec<Answer> {
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    engine.run(&mut Silent).unwrap().into_iter().map(answer).collect()
}

/// No cache, no batch, no engine: the whole sequence again for every token.
fn plain(target: &dyn TargetModel, processors: Processors, stop: &[u32], request: &Request) -> Answer {
    let sampling = Sampling { processors, seed: SEED };
    let mut tokens: Vec<i64> = request.prompt.iter().map(|&id| i64::from(id)).collect();
    let prompt_length = tokens.len();
    loop {
        let ids = Tensor::from_slice(&tokens).unsqueeze(0);
        let positions = Tensor::arange(tokens.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let last = Tensor::from_slice(&[tokens.len() as i64 - 1]);
        let (mask, logits) = (&AttentionMask::Causal, LogitRows::Rows(&last));
        let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits };
        let logits = target.forward(&input, None).unwrap().logits.unwrap();
        let before: Vec<u32> = tokens.iter().map(|&id| id as u32).collect();
        let token = sampling.choose(&logits, &[(request.key, tokens.len() as u64)], |_| vec![before.as_slice()])[0];
        tokens.push(token);
        let new = tokens[prompt_length..].iter().map(|&id| id as u32).collect::<Vec<_>>();
        if stop.contains(&(token as u32)) {
            return (new, Finish::Stop);
        }
        if new.len() == request.max_new_tokens || tokens.len() == tiny::CONTEXT {
            return (new, Finish::Length);
        }
    }
}

#[test]
fn every_batch_gives_each_request_what_it_gets_alone() {
    let target = tiny::target(1);
    let penalised = Processors { repetition_penalty: 1.4, top_k: 9, top_p: 0.8, ..sampled() };
    let penalised_greedy = Processors { repetition_penalty: 1.4, ..Processors::default() };
    for processors in [Processors::default(), sampled(), penalised, penalised_greedy] {
        let (stop, requests) = ([7, 8, 9], requests(24, 40));
        let want: Vec<Answer> = requests.iter().map(|request| plain(&target, processors, &stop, request)).collect();
        assert!(want.iter().any(|(_, finish)| *finish == Finish::Stop));
        assert!(want.iter().any(|(_, finish)| *finish == Finish::Length));
        for max_rows in [1, 2, 5, 24] {
            let got = answers(engine(&target, options(processors, &stop, max_rows)), &requests);
            assert_eq!(got, want, "{max_rows} rows, {processors:?}");
        }
    }
}

#[test]
fn long_prompts_run_in_pieces_and_give_the_same() {
    let target = tiny::target(1);
    let requests = requests(12, 9);
    let whole = answers(engine(&target, options(sampled(), &[], 4)), &requests);
    for (together, piece) in [(16, 5), (30, 7), (1, 1)] {
        let mut pieces = engine(&target, options(sampled(), &[], 4));
        pieces.passes = Passes::of(together, piece);
        assert_eq!(answers(pieces, &requests), whole, "{together} tokens together, pieces of {piece}");
    }
}

/// Rows leave and come in the room that is there: nothing is copied but what moves.
#[test]
fn rows_that_run_stay_where_they_are_while_others_come_and_go() {
    let target = tiny::target(1);
    let request = |tag: u64, max_new_tokens| Request {
        tag,
        prompt: (0..5).map(|id| id + tag as u32).collect(),
        max_new_tokens,
        key: tag,
    };
    let mut engine = engine(&target, options(sampled(), &[], 3));
    let limits = [20, 5, 20, 9, 3, 12, 7];
    (0..).zip(limits).for_each(|(tag, limit)| engine.submit(request(tag, limit)).unwrap());
    let (mut seen, mut rooms) = (0, Vec::new());
    while engine.pending() > 0 {
        for left in engine.step(&mut Silent).unwrap() {
            let tag = left.tag;
            let want = plain(&target, sampled(), &[], &request(tag, limits[tag as usize]));
            assert_eq!(answer(left), want, "request {tag}");
            seen += 1;
        }
        // Prompts and answers fit into what the cache grows to first.
        rooms.extend(engine.cache().map(|cache| cache.contents(0, 0)[0].data_ptr()));
    }
    assert_eq!(seen, limits.len());
    rooms.dedup();
    assert_eq!(rooms.len(), 1, "the first row's keys moved");
}

#[test]
fn seed_and_key_change_a_sample() {
    let target = tiny::target(1);
    let base = Request { tag: 0, prompt: vec![1, 2, 3], max_new_tokens: 30, key: 1 };
    let run = |seed, key| {
        let options = EngineOptions { policy: Policy::Keyed { seed }, ..options(sampled(), &[], 4) };
        answers(engine(&target, options), &[Request { key, ..base.clone() }])
    };
    assert_eq!(run(3, 1), run(3, 1));
    assert_ne!(run(3, 1), run(3, 2));
    assert_ne!(run(3, 1), run(4, 1));
}

#[test]
fn the_end_of_the_context_ends_an_answer() {
    let target = tiny::target(1);
    let prompt: Vec<u32> = (0..tiny::CONTEXT as u32 - 3).map(|id| id % 64).collect();
    let request = Request { tag: 0, prompt, max_new_tokens: 50, key: 0 };
    let (tokens, finish) = &answers(engine(&target, options(Processors::default(), &[], 2)), &[request])[0];
    assert_eq!((tokens.len(), *finish), (3, Finish::Length));
}

#[test]
fn impossible_requests_are_refused() {
    let target = tiny::target(1);
    let mut engine = engine(&target, options(Processors::default(), &[], 2));
    for (prompt, max_new_tokens, message) in [
        (vec![], 5, "empty"),
        (vec![1; tiny::CONTEXT], 5, "no room to answer"),
        (vec![64], 5, "outside the target's vocabulary of 64"),
        (vec![1], 0, "expected at least 1"),
    ] {
        let request = Request { tag: 0, prompt, max_new_tokens, key: 0 };
        for error in [engine.submit(request.clone()).unwrap_err(), engine.submit_first(request).unwrap_err()] {
            assert!(error.to_string().contains(message), "{error}");
        }
    }
    assert_eq!(engine.pending(), 0);
}

#[test]
fn a_target_that_gives_nan_fails_its_requests_and_ends() {
    let broken = |name: &str, tensor: Tensor| if name == "model.norm.weight" { tensor * f64::NAN } else { tensor };
    let target = tiny::target_with(1, &broken);
    for processors in [Processors::default(), sampled()] {
        let mut engine = engine(&target, options(processors, &[], 2));
        requests(5, 9).into_iter().for_each(|request| engine.submit(request).unwrap());
        let left = engine.run(&mut Silent).unwrap();
        assert_eq!(left.len(), 5);
        for left in left {
            assert!(left.decoded.unwrap_err().to_string().contains("not numbers"));
        }
    }
}

#[test]
fn the_batch_stays_full_while_requests_wait_and_follow_ups_come_first() {
    let target = tiny::target(1);
    let mut engine = engine(&target, options(Processors::default(), &[], 3));
    let request = |tag, max_new_tokens| Request { tag, prompt: vec![1, 2], max_new_tokens, key: 0 };
    (0..6).for_each(|tag| engine.submit(request(tag, 3 + tag as usize)).unwrap());
    let mut order = Vec::new();
    while engine.pending() > 0 {
        for left in engine.step(&mut Silent).unwrap() {
            order.push(left.tag);
            if left.tag == 0 {
                engine.submit_first(request(9, 1)).unwrap();
            }
        }
        assert!(engine.waiting() == 0 || engine.running().count() >= 2);
    }
    assert_eq!(order, [0, 9, 1, 2, 3, 4, 5]);
    let done = engine.throughput();
    assert_eq!((done.new_tokens, done.prompt_tokens), (3 + 4 + 5 + 6 + 7 + 8 + 1, 14));
    assert_eq!(done.rounds, done.new_tokens - 7);
    assert!(done.passes < done.rounds && done.tokens_per_second() > 0.0);
}

/// One that fails in the middle leaves as one that ends does.
#[test]
fn a_row_that_breaks_in_the_middle_of_an_answer_leaves_the_others_alone() {
    let poison = |name: &str, tensor: Tensor| {
        if name == "model.embed_tokens.weight" {
            let _ = tensor.get(5).fill_(f64::NAN);
        }
        tensor
    };
    let (sound, broken) = (tiny::target(1), tiny::target_with(1, &poison));
    let requests: Vec<Request> = requests(16, 30).into_iter().filter(|request| !request.prompt.contains(&5)).collect();
    let want: HashMap<u64, Answer> =
        requests.iter().map(|request| (request.tag, plain(&sound, sampled(), &[], request))).collect();
    let mut engine = engine(&broken, options(sampled(), &[], 4));
    requests.into_iter().for_each(|request| engine.submit(request).unwrap());
    let (mut failed, mut whole) = (0, 0);
    for left in engine.run(&mut Silent).unwrap() {
        let want = &want[&left.tag];
        // The last token is never run.
        let meets = want.0[..want.0.len() - 1].contains(&5);
        match left.decoded {
            Ok(decoded) => {
                assert!(!meets, "request {}", left.tag);
                assert_eq!((&decoded.tokens, &decoded.finish), (&want.0, &want.1));
                whole += 1;
            }
            Err(error) => {
                assert!(meets && error.to_string().contains("not numbers"), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0 && whole > 3, "{failed} failed, {whole} did not");
}

/// Each request's own processors act on it and on no other, in one batch.
#[test]
fn requests_with_other_processors_share_a_batch() {
    let target = tiny::target(1);
    let mixed = [
        Processors::default(),
        sampled(),
        Processors { repetition_penalty: 1.4, top_k: 9, top_p: 0.8, ..sampled() },
        Processors { repetition_penalty: 1.4, ..Processors::default() },
        Processors { top_k: 3, ..Processors::at_temperature(0.7) },
    ];
    let (stop, requests) = ([7, 8, 9], requests(20, 40));
    let own = |request: &Request| mixed[request.tag as usize % mixed.len()];
    for max_rows in [1, 3, 20] {
        // What the engine would do by itself is what no request wants.
        let mut engine = engine(&target, options(Processors::at_temperature(9.0), &stop, max_rows));
        requests.iter().for_each(|request| engine.submit_with(request.clone(), own(request)).unwrap());
        let got = engine.run(&mut Silent).unwrap().into_iter().map(answer);
        for (request, got) in requests.iter().zip(got) {
            assert_eq!(got, plain(&target, own(request), &stop, request), "request {}, {max_rows} rows", request.tag);
        }
    }
    let mut engine = engine(&target, options(sampled(), &stop, 2));
    let wrong = engine.submit_with(requests[0].clone(), Processors { top_p: 2.0, ..sampled() }).unwrap_err();
    assert!(wrong.to_string().contains("top_p") && engine.pending() == 0, "{wrong}");
}

/// A request that is cancelled leaves at once, wherever it is, and the others do not notice.
#[test]
fn a_cancelled_request_frees_its_row_and_changes_no_other_answer() {
    let target = tiny::target(1);
    let request = |tag: u64| Request { tag, prompt: vec![1 + tag as u32, 2], max_new_tokens: 20, key: tag };
    let mut engine = engine(&target, options(sampled(), &[], 3));
    (0..6).for_each(|tag| engine.submit(request(tag)).unwrap());
    for _ in 0..4 {
        assert!(engine.step(&mut Silent).unwrap().is_empty());
    }
    // 0, 1 and 2 run, the others wait.
    assert!(engine.cancel(1) && engine.cancel(4) && !engine.cancel(4) && !engine.cancel(77));
    assert_eq!((engine.running().map(|(tag, _)| tag).collect::<Vec<_>>(), engine.waiting()), (vec![0, 2], 2));
    assert_eq!(engine.cache().unwrap().rows(), 2);
    let left = engine.run(&mut Silent).unwrap();
    assert_eq!(left.iter().map(|left| left.tag).collect::<Vec<_>>(), [0, 2, 3, 5]);
    for left in left {
        let want = plain(&target, sampled(), &[], &request(left.tag));
        assert_eq!(answer(left), want);
    }
    // The last one that runs takes the cache along.
    engine.submit(request(9)).unwrap();
    engine.step(&mut Silent).unwrap();
    assert!(engine.cancel(9) && engine.cache().is_none() && engine.pending() == 0);
    assert!(engine.step(&mut Silent).unwrap().is_empty());
}

/// What long requests leave behind is given back, and nothing that is held is lost.
#[test]
fn a_cache_that_shrinks_keeps_what_it_holds() {
    let target = tiny::target(1);
    let request = |tag: u64, length: u32, max_new_tokens| Request {
        tag,
        prompt: (0..length).map(|id| id % 60).collect(),
        max_new_tokens,
        key: tag,
    };
    let mut engine = engine(&target, options(sampled(), &[], 4));
    let requests = [request(0, 3, 40), request(1, 90, 2), request(2, 5, 40), request(3, 80, 2)];
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    let mut left = Vec::new();
    while left.len() < 2 {
        left.extend(engine.step(&mut Silent).unwrap());
    }
    let before = engine.cache().unwrap().bytes();
    engine.shrink_cache();
    let cache = engine.cache().unwrap();
    assert_eq!((cache.room(), cache.capacity()), (2, cache.len()));
    assert!(cache.bytes() * 4 < before, "{} of {before} bytes", cache.bytes());
    engine.shrink_cache();
    left.extend(engine.run(&mut Silent).unwrap());
    for left in left {
        let want = plain(&target, sampled(), &[], &requests[left.tag as usize]);
        assert_eq!(answer(left), want);
    }
}
