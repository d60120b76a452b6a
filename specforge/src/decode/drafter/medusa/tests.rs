use tch::{Device, Kind};

use super::heads_for_tests::{
    VOCABULARY, assert_follow_the_target, blocks, forgetful, good, good_tensors, random_shared, target,
};
use super::*;
use crate::decode::drafter::{Plain, choices};
use crate::decode::engine::{Decoded, Engine, EngineOptions};
use crate::decode::event::Silent;
use crate::decode::policy::Policy;
use crate::decode::tiny;
use crate::decode::{Finish, Request};
use crate::draft::medusa::{HeadProjection, MedusaConfig};
use crate::export;
use crate::models::TargetModel;
use crate::models::llama::LlamaTarget;
use crate::nn::{Processors, noise};
use crate::vocab::VocabMap;

const KEYED: Policy = Policy::Keyed { seed: 3 };

fn options(temperature: f64, policy: Policy, max_rows: usize) -> EngineOptions {
    EngineOptions { processors: Processors::at_temperature(temperature), policy, stop_tokens: vec![7], max_rows }
}

/// Prompts of one to three tokens, much shorter than the trees, and a few longer ones.
fn requests() -> Vec<Request> {
    let mut next = noise::keyed_stream(5, 2);
    let mut request = |tag: u64| {
        let length = if tag < 6 { 1 + tag % 3 } else { 4 + 3 * tag };
        let prompt = (0..length).map(|_| (next() % VOCABULARY as u64) as u32).collect();
        Request { tag, prompt, max_new_tokens: 10 + next() as usize % 25, key: tag * 1000 }
    };
    (0..8).map(&mut request).collect()
}

fn decode<'a>(target: &'a LlamaTarget, drafter: Box<dyn Drafter + 'a>, options: EngineOptions) -> Vec<Decoded> {
    let mut engine = Engine::new(target, drafter, options).unwrap();
    requests().into_iter().for_each(|request| engine.submit(request).unwrap());
    engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect()
}

fn texts(decoded: &[Decoded]) -> Vec<(Vec<u32>, Finish)> {
    decoded.iter().map(|decoded| (decoded.tokens.clone(), decoded.finish)).collect()
}

/// Tokens of a round.
fn tau(decoded: &[Decoded]) -> f64 {
    let rounds = || decoded.iter().flat_map(|one| &one.rounds);
    rounds().map(|round| round.tokens).sum::<usize>() as f64 / rounds().count() as f64
}

fn sampling(options: &EngineOptions) -> DraftSampling {
    DraftSampling::for_policy(options.policy, options.processors.temperature)
}

/// Requests of several temperatures in one batch: each is guessed at, and answered, as it is alone with a draft for its own.
#[test]
fn every_request_is_guessed_at_with_its_own_temperature() {
    let target = target();
    let tree = choices::parse(&choices::names().unwrap()[0]).unwrap();
    let temperature = |request: &Request| [0.0, 1.0, 0.5][request.tag as usize % 3];
    let drafter = |sampling| Box::new(MedusaDrafter::new(good(&target, 3, 0.3), &tree, sampling));
    let any = DraftSampling::for_any_request(KEYED, 9.0);
    let mut engine = Engine::new(&target, drafter(any), options(9.0, KEYED, 5)).unwrap();
    for request in requests() {
        let processors = Processors::at_temperature(temperature(&request));
        engine.submit_with(request, processors).unwrap();
    }
    let mixed = engine.run(&mut Silent).unwrap();
    for (request, mixed) in requests().into_iter().zip(mixed) {
        let options = options(temperature(&request), KEYED, 1);
        let mut alone = Engine::new(&target, drafter(sampling(&options)), options).unwrap();
        alone.submit(request).unwrap();
        let want = alone.run(&mut Silent).unwrap().remove(0).decoded.unwrap();
        assert_eq!(mixed.decoded.unwrap(), want);
    }
}

#[test]
fn every_tree_gives_what_plain_decoding_gives() {
    let target = target();
    let mut trees = choices::names().unwrap();
    trees.extend([1, 2, 3, 4].map(|length| format!("chain:{length}")));
    for temperature in [0.0, 1.0] {
        let plain = texts(&decode(&target, Box::new(Plain), options(temperature, KEYED, 1)));
        assert!(plain.iter().any(|(tokens, _)| tokens.contains(&0)), "token 0 is never the answer");
        assert!(plain.iter().any(|(_, finish)| *finish == Finish::Stop), "nothing stops");
        for name in &trees {
            let tree = choices::parse(name).unwrap();
            for rows in [1, 5] {
                for right in [true, false] {
                    let heads = if right { good(&target, 4, 0.3) } else { random_shared(&target, 4) };
                    let options = options(temperature, KEYED, rows);
                    let drafter = MedusaDrafter::new(heads, &tree, sampling(&options));
                    assert_eq!(drafter.warning(), None);
                    let decoded = decode(&target, Box::new(drafter), options);
                    let what = format!("{name}, temperature {temperature}, {rows} rows, good heads: {right}");
                    assert_eq!(texts(&decoded), plain, "{what}");
                    assert!(!right || tau(&decoded) > 1.1, "{what}: {} tokens a round", tau(&decoded));
                }
            }
        }
    }
}

#[test]
fn a_peaky_target_is_followed_to_the_depth_of_the_tree() {
    // Layers that say nothing: the text counts up, and heads know it, token 0 after 63 included.
    let target = tiny::target_with(6, &|name, tensor| {
        if name.contains("o_proj") || name.contains("down_proj") { tensor * 0.0 } else { tensor }
    });
    let counting = target.embedding().table.roll([1i64], [0i64]) * 6.0;
    let target = tiny::target_with(6, &|name, tensor| match name {
        "lm_head.weight" => counting.shallow_clone(),
        name if name.contains("o_proj") || name.contains("down_proj") => tensor * 0.0,
        _ => tensor,
    });
    let plain = decode(&target, Box::new(Plain), options(0.0, KEYED, 4));
    let heads = good(&target, 4, 0.0);
    let drafter = MedusaDrafter::new(heads, &ChoiceTree::chain(4), DraftSampling::Greedy);
    let decoded = decode(&target, Box::new(drafter), options(0.0, KEYED, 4));
    assert_eq!(texts(&decoded), texts(&plain));
    assert!(plain.iter().any(|one| one.tokens.windows(2).any(|pair| pair == [63, 0])), "token 0 is never the answer");
    let whole = decoded.iter().flat_map(|one| &one.rounds).filter(|round| round.depth == 4);
    assert!(whole.clone().count() > 10);
    assert!(whole.clone().filter(|round| round.accepted == 4).count() * 10 > whole.count() * 8);
}

/// Heads that know what it says, up to some noise.
fn knowing(target: &LlamaTarget, noise: f64) -> MedusaHeads {
    let mut tensors = blocks(2, 1, 0.0);
    for head in 0..2 {
        let random = noise::normal(&[VOCABULARY, 32], noise, 15, head).to_kind(Kind::Double);
        tensors.push((format!("{head}.1.weight"), &target.head().weight + random));
    }
    let config = MedusaConfig { num_heads: 2, ..MedusaConfig::default() };
    MedusaHeads::new(&config, &tensors, None, target).unwrap()
}

#[test]
fn the_targets_noise_finds_what_the_target_will_choose() {
    let target = forgetful::target();
    let share_with = |sampling, rows| {
        let drafter = MedusaDrafter::new(knowing(&target, 0.0), &ChoiceTree::chain(2), sampling);
        let decoded = decode(&target, Box::new(drafter), options(1.3, KEYED, rows));
        // A round that ends with the text has no place for every guess.
        let rounds = || decoded.iter().flat_map(|one| &one.rounds).filter(|round| round.depth > 0);
        rounds().filter(|round| round.accepted == round.depth.min(round.tokens)).count() as f64
            / rounds().count() as f64
    };
    // Heads that have the target's distribution and its noise are always right; a rank, a position or a key that is off
    // by one leaves chance alone.
    let keyed = |seed| DraftSampling::Keyed { temperature: 1.3, seed };
    assert_eq!([share_with(keyed(3), 1), share_with(keyed(3), 5)], [1.0, 1.0]);
    assert!(share_with(keyed(4), 1) < 0.2 && share_with(DraftSampling::Greedy, 1) < 0.5);
}

#[test]
fn drawn_guesses_keep_the_targets_distribution() {
    let target = forgetful::target();
    let policy = Policy::Maximal { seed: 11 };
    let tree = ChoiceTree::from_choices(&[vec![0], vec![1], vec![0, 0]]).unwrap();
    let options = EngineOptions { stop_tokens: Vec::new(), ..options(1.0, policy, 64) };
    assert!(policy.is_lossless());
    let drafter = MedusaDrafter::new(knowing(&target, 0.1), &tree, sampling(&options));
    let mut engine = Engine::new(&target, Box::new(drafter), options).unwrap();
    for tag in 0..400 {
        engine.submit(Request { tag, prompt: vec![5, 9], max_new_tokens: 10, key: 7 * tag }).unwrap();
    }
    let left = engine.run(&mut Silent).unwrap();
    let decoded: Vec<Decoded> = left.into_iter().map(|left| left.decoded.unwrap()).collect();
    assert!(tau(&decoded) > 1.4, "{} tokens a round", tau(&decoded));
    assert_follow_the_target(&target, &decoded, "medusa");
}

#[test]
fn typical_acceptance_is_lossy_and_stops_at_stop_tokens() {
    let target = target();
    let policy = Policy::Typical { epsilon: 0.09, alpha: 0.3 };
    assert!(!policy.is_lossless() && KEYED.is_lossless());
    let tree = choices::parse("vicuna_7b_stage2").unwrap();
    let drafter = MedusaDrafter::new(good(&target, 4, 0.3), &tree, DraftSampling::Greedy);
    let decoded = decode(&target, Box::new(drafter), options(1.0, policy, 3));
    let plain = decode(&target, Box::new(Plain), options(0.0, KEYED, 3));
    assert_ne!(texts(&decoded), texts(&plain), "nothing was lost: the test shows nothing");
    let mut inside = 0;
    for (one, request) in decoded.iter().zip(requests()) {
        let stop = one.tokens.iter().position(|&token| token == 7);
        assert_eq!(one.finish == Finish::Stop, stop.is_some());
        assert!(stop.is_none_or(|at| at + 1 == one.tokens.len()), "{:?} goes on behind its end", one.tokens);
        assert!(one.tokens.len() <= request.max_new_tokens);
        assert_eq!(one.rounds.iter().map(|round| round.tokens).sum::<usize>() + 1, one.tokens.len());
        let accepted_whole = |last: &crate::decode::engine::RoundOutcome| last.accepted == last.tokens;
        inside += usize::from(one.finish == Finish::Stop && one.rounds.last().is_some_and(accepted_whole));
    }
    assert!(inside > 0, "no stop token was a guess");
}

#[test]
fn a_tree_deeper_than_the_heads_is_cut_and_says_so() {
    let target = target();
    let tree = ChoiceTree::from_choices(&[vec![0], vec![1], vec![0, 0], vec![0, 0, 0]]).unwrap();
    let drafter = MedusaDrafter::new(good(&target, 2, 0.3), &tree, DraftSampling::Greedy);
    let warning = drafter.warning().unwrap();
    assert_eq!(warning, "the tree is 3 deep and there are 2 heads: 1 of its 4 guesses are left out");
    assert_eq!(drafter.tree().choices(), [vec![0], vec![1], vec![0, 0]]);
    assert!(MedusaDrafter::new(good(&target, 3, 0.3), &tree, DraftSampling::Greedy).warning().is_none());
}

/// One row of hidden states, and what a drafter proposes behind the tokens 4 5.
fn proposal(heads: MedusaHeads, tree: &ChoiceTree, sampling: DraftSampling, depth: usize) -> Proposal {
    let mut drafter = MedusaDrafter::new(heads, tree, sampling);
    let features = noise::normal(&[3, 32], 1.0, 1, 1).to_kind(Kind::Double);
    drafter.join(&[Joining { tokens: &[4, 5], features: vec![features] }]).unwrap();
    drafter.propose(&[Context { tokens: &[4, 5], depth, key: 0, temperature: 0.0 }]).unwrap().remove(0)
}

#[test]
fn nodes_hold_the_guess_of_their_rank_and_scores_add_up() {
    let target = target();
    let (tensors, config) = (good_tensors(&target, 2, 0.5), MedusaConfig { num_heads: 2, ..MedusaConfig::default() });
    let tree = ChoiceTree::from_choices(&[vec![0], vec![2], vec![2, 0], vec![2, 3]]).unwrap();
    let proposal = proposal(good(&target, 2, 0.5), &tree, DraftSampling::Greedy, 9);
    // The formula of the paper, head by head.
    let state = noise::normal(&[3, 32], 1.0, 1, 1).to_kind(Kind::Double).get(2).unsqueeze(0);
    let get = |name: String| tensors.iter().find(|(other, _)| *other == name).unwrap().1.shallow_clone();
    let ranked: Vec<Vec<(usize, f64)>> = (0..config.num_heads)
        .map(|head| {
            let inner =
                state.matmul(&get(format!("{head}.0.linear.weight")).tr()) + get(format!("{head}.0.linear.bias"));
            let output = &state + inner.sigmoid() * &inner;
            let row = output.matmul(&get(format!("{head}.1.weight")).tr()).log_softmax(-1, Kind::Double);
            let row = Vec::<f64>::try_from(row.squeeze()).unwrap();
            let mut ranked: Vec<(usize, f64)> = row.into_iter().enumerate().collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            ranked
        })
        .collect();
    let path = |first: usize, second: Option<usize>| {
        let (token, score) = ranked[0][first];
        second.map_or((token, score), |second| (ranked[1][second].0, score + ranked[1][second].1))
    };
    let want = [path(0, None), path(2, None), path(2, Some(0)), path(2, Some(3))];
    assert_eq!(proposal.tree.topology().parents(), [0, 0, 0, 2, 2]);
    for (node, (token, score)) in want.into_iter().enumerate() {
        assert_eq!(proposal.tree.tokens()[node + 1] as usize, token);
        assert!((proposal.scores[node + 1] - score).abs() < 1e-9, "node {}", node + 1);
    }
}

#[test]
fn ranks_that_are_not_there_leave_out_what_hangs_on_them() {
    let target = target();
    // Three tokens can be named.
    let map = VocabMap::new(vec![0, 40, 63], VOCABULARY).unwrap();
    let heads = || {
        let ids = Tensor::from_slice(map.target_ids());
        let smaller = |(name, tensor): (String, Tensor)| {
            let tensor = if name.ends_with(".1.weight") { tensor.index_select(0, &ids) } else { tensor };
            (name, tensor)
        };
        let tensors: Vec<_> = good_tensors(&target, 2, 0.5).into_iter().map(smaller).collect();
        let config = MedusaConfig { num_heads: 2, ..MedusaConfig::default() };
        MedusaHeads::new(&config, &tensors, Some(&map), &target).unwrap()
    };
    let tree = ChoiceTree::from_choices(&[vec![2], vec![3], vec![2, 7], vec![2, 0], vec![3, 0]]).unwrap();
    let noisy = DraftSampling::Keyed { temperature: 0.7, seed: 1 };
    for sampling in [DraftSampling::Greedy, noisy] {
        let proposal = proposal(heads(), &tree, sampling, 9);
        assert_eq!(proposal.tree.topology().parents(), [0, 0, 1]);
        assert!(proposal.tree.tokens()[1..].iter().all(|&token| map.draft_id(i64::from(token)).is_some()));
    }
    // Draws come in order, whatever the ranks are called, with the distribution they came from.
    let drawn = proposal(heads(), &tree, DraftSampling::Drawn { temperature: 0.7, seed: 1 }, 9);
    assert_eq!(drawn.tree.topology().parents(), [0, 0, 0, 1, 1, 2]);
    let origin: Vec<f64> = Vec::try_from(&**drawn.drawn_from[0].as_ref().unwrap()).unwrap();
    assert!((origin.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    assert!(origin.iter().enumerate().all(|(token, &share)| (share > 0.0) == map.draft_id(token as i64).is_some()));
    assert!(drawn.drawn_from[3].is_none() && drawn.drawn_from[2].is_some());
    // The engine's limit is the tree's limit.
    let plain = DraftSampling::Greedy;
    assert_eq!(proposal(good(&target, 2, 0.5), &choices::parse("chain:2").unwrap(), plain, 1).tree.len(), 2);
    assert!(proposal(good(&target, 2, 0.5), &choices::parse("chain:2").unwrap(), plain, 0).tree.is_empty());
}

#[test]
fn heads_that_are_no_numbers_guess_nothing() {
    let target = target();
    let broken: Vec<_> =
        good_tensors(&target, 2, 0.5).into_iter().map(|(name, tensor)| (name, tensor * f64::NAN)).collect();
    let config = MedusaConfig { num_heads: 2, ..MedusaConfig::default() };
    for sampling in [DraftSampling::Greedy, DraftSampling::Keyed { temperature: 1.0, seed: 1 }] {
        let heads = MedusaHeads::new(&config, &broken, None, &target).unwrap();
        assert!(proposal(heads, &choices::parse("mc_sim_7b_63").unwrap(), sampling, 9).tree.is_empty());
    }
}

#[test]
fn exported_files_of_every_layout_guess_like_the_tensors_they_were_made_of() {
    let target = target();
    let folder = tempfile::tempdir().unwrap();
    let map = VocabMap::new((0..40).map(|id| id + id / 2).collect(), VOCABULARY).unwrap();
    let tree = choices::parse("mc_sim_7b_63").unwrap();
    // float32 in the files and float64 in the target: rounded before, so that both are the same numbers.
    let rounded = |tensors: Vec<(String, Tensor)>| -> Vec<(String, Tensor)> {
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float))).collect()
    };
    for (format, projection, share_layers, vocabulary) in [
        ("medusa", HeadProjection::Own, false, None),
        ("medusa", HeadProjection::Shared, false, None),
        ("medusa", HeadProjection::Shared, true, None),
        ("medusa-vllm", HeadProjection::Own, false, None),
        ("medusa-vllm", HeadProjection::Own, false, Some(&map)),
    ] {
        let layers = if share_layers { 2 } else { 1 };
        let config =
            MedusaConfig { num_heads: 3, num_layers: layers, projection, share_layers, ..MedusaConfig::default() };
        let mut tensors = blocks(3, 1, 0.2);
        if projection == HeadProjection::Own {
            let own = good_tensors(&target, 3, 0.5).into_iter().filter(|(name, _)| name.ends_with(".1.weight"));
            let ids = vocabulary.map(|map| Tensor::from_slice(map.target_ids()));
            tensors.extend(own.map(|(name, tensor)| match &ids {
                Some(ids) => (name, tensor.index_select(0, ids)),
                None => (name, tensor),
            }));
        }
        let tensors = rounded(tensors);
        let mut stored = tensors.clone_all();
        stored.extend(vocabulary.map(crate::draft::vocabulary::buffers).unwrap_or_default());
        let source = export::Source {
            description: serde_json::json!({"draft": config, "hidden_size": 32, "vocab_size": VOCABULARY}),
            tensors: stored,
            target: folder.path().join("target"),
            target_name: None,
            kind: None,
            q8_0: false,
        };
        let out = folder.path().join("out");
        export::export(&source, format, &out, None).unwrap();
        let trained = MedusaHeads::new(&config, &tensors, vocabulary, &target).unwrap();
        let read = MedusaHeads::read(&out, &target).unwrap();
        let [want, got] = [trained, read].map(|heads| proposal(heads, &tree, DraftSampling::Greedy, 9));
        assert_eq!((got.tree, got.scores), (want.tree, want.scores), "{format} {projection:?} {share_layers}");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// Tensors cannot be cloned by accident; here they are.
trait CloneAll {
    fn clone_all(&self) -> Self;
}

impl CloneAll for Vec<(String, Tensor)> {
    fn clone_all(&self) -> Self {
        self.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }
}

#[test]
fn heads_of_another_target_are_refused() {
    let target = target();
    let config = MedusaConfig { num_heads: 1, ..MedusaConfig::default() };
    let message = |tensors: &[(String, Tensor)], map: Option<&VocabMap>| {
        MedusaHeads::new(&config, tensors, map, &target).unwrap_err().to_string()
    };
    let wide = Tensor::zeros([48, 48], (Kind::Float, Device::Cpu));
    let wrong = message(&[("0.0.linear.weight".to_owned(), wide)], None);
    assert_eq!(wrong, "`0.0.linear.weight`: the target asks for shape [32, 32], got [48, 48]");
    assert_eq!(message(&[], None), "the heads hold no tensor `0.0.linear.weight`");
    let map = VocabMap::new(vec![1], 99).unwrap();
    assert_eq!(message(&[], Some(&map)), "the heads' vocabulary is of a target with 99 tokens; this one has 64");
}
