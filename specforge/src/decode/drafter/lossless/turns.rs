//! Turns of conversations: what an answer leaves is where the next one begins, and nothing of it shows.

use super::*;

/// Three turns of two conversations that begin alike, one engine for all; also the prompt tokens that were there already.
fn turns(target: &LlamaTarget, drafter: Box<dyn Drafter>, temperature: f64, memory: u64) -> (Vec<Decoded>, u64) {
    let engine = Engine::new(target, drafter, options(Policy::Keyed { seed: SEED }, temperature, 2)).unwrap();
    let mut engine = engine.keeping_prefixes(memory);
    let mut next = noise::keyed_stream(11, 4);
    let mut said: Vec<Vec<u32>> = vec![(0..18).map(|_| (next() % 64) as u32).collect(); 2];
    let mut all = Vec::new();
    for turn in 0..3u64 {
        for (which, said) in (0..).zip(&mut said) {
            said.extend((0..3).map(|_| (next() % 64) as u32));
            let (tag, prompt) = (2 * turn + which, said.clone());
            engine.submit(Request { tag, prompt, max_new_tokens: 9, key: tag }).unwrap();
        }
        for left in engine.run(&mut Silent).unwrap() {
            let decoded = left.decoded.unwrap();
            said[(left.tag % 2) as usize].extend(&decoded.tokens);
            all.push(decoded);
        }
        // One who goes away in the middle leaves something too.
        engine.submit(Request { tag: 99, prompt: vec![turn as u32; 20], max_new_tokens: 9, key: 0 }).unwrap();
        engine.step(&mut Silent).unwrap();
        engine.cancel(99);
        assert!(engine.prefix_bytes() <= memory);
    }
    (all, engine.throughput().known_tokens)
}

#[test]
fn a_next_turn_begins_where_the_last_one_ended() {
    let target = target(1, 3.0, Kind::Double);
    let plain = || Box::new(Plain) as Box<dyn Drafter>;
    let eagle = || Box::new(eagle3(&target, 1, true, SMALL, DraftSampling::Greedy)) as Box<dyn Drafter>;
    for (name, new) in [("none", &plain as &dyn Fn() -> Box<dyn Drafter>), ("eagle3", &eagle)] {
        for temperature in [0.0, 1.0] {
            let (alone, none) = turns(&target, new(), temperature, 0);
            let (kept, known) = turns(&target, new(), temperature, 1 << 30);
            // Verifications too: the draft knows of the beginning what it knew.
            assert_eq!(kept, alone, "{name}");
            assert_eq!(none, 0);
            // Both second turns and both third ones begin with what is there, and so does one of the first.
            assert!(known > 100, "{name}: {known} tokens were there");
        }
    }
}

#[test]
fn what_does_not_fit_is_run_again() {
    let target = target(1, 3.0, Kind::Double);
    let (alone, _) = turns(&target, Box::new(Plain), 1.0, 0);
    let bytes = target.new_cache(1, 32).bytes();
    let (kept, known) = turns(&target, Box::new(Plain), 1.0, bytes);
    assert_eq!((kept, known > 0), (alone, false), "{known} tokens");
}
