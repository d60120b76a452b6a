//! What must hold of every target, whatever its layers do: caches, batches, packs and trees change nothing, and decoding with
//! any draft is plain decoding.

use specforge::decode::drafter::{self, DraftSampling, Drafter, DynamicTree, ModelDrafter, Plain, PromptLookup};
use specforge::decode::event::Silent;
use specforge::decode::{Engine, EngineOptions, Policy, Request};
use specforge::draft::{self, DraftContext, DraftModel};
use specforge::models::{ForwardInput, LogitRows, TargetModel};
use specforge::nn::{AttentionMask, KvCache, Processors, TreeMask, noise};
use tch::Tensor;

use crate::small_drafts;

/// Tokens of the targets that these rules are shown on.
pub const VOCABULARY: i64 = 60;

/// Tokens of the vocabulary.
pub fn tokens(count: usize, seed: u64) -> Vec<i64> {
    let mut next = noise::keyed_stream(seed, 9);
    (0..count).map(|_| (next() % VOCABULARY as u64) as i64).collect()
}

/// Logits of every token, `[B, T, V]`.
fn logits(
    target: &dyn TargetModel,
    ids: &[Vec<i64>],
    positions: &[Vec<i64>],
    mask: &AttentionMask,
    cache: Option<&mut KvCache>,
) -> Tensor {
    let shape = [ids.len() as i64, ids[0].len() as i64];
    let (ids, positions) =
        (Tensor::from_slice(&ids.concat()).view(shape), Tensor::from_slice(&positions.concat()).view(shape));
    let input = ForwardInput { ids: &ids, positions: &positions, mask, capture: &[], logits: LogitRows::All };
    target.forward(&input, cache).unwrap().logits.unwrap().view([shape[0], shape[1], VOCABULARY])
}

/// Logits of a text, `[T, V]`.
pub fn alone(target: &dyn TargetModel, text: &[i64]) -> Tensor {
    logits(target, &[text.to_vec()], &[(0..text.len() as i64).collect()], &AttentionMask::Causal, None).get(0)
}

/// Refuses tensors of float64 that differ.
#[track_caller]
pub fn near(got: &Tensor, want: &Tensor) {
    assert_eq!(got.size(), want.size());
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference < 1e-11, "differs by {difference:e}"); // NaN fails as well
}

/// A pack equals its documents alone.
pub fn a_pack_equals_its_documents_alone(target: &dyn TargetModel) {
    let documents = [tokens(9, 1), tokens(1, 2), tokens(3, 3), tokens(14, 4)];
    let want: Vec<Tensor> = documents.iter().map(|document| alone(target, document)).collect();
    let mask = AttentionMask::Documents(documents.iter().map(|document| document.len() as i64).collect());
    let positions = documents.iter().flat_map(|document| 0..document.len() as i64).collect();
    let got = logits(target, &[documents.concat()], &[positions], &mask, None).get(0);
    near(&got, &Tensor::cat(&want, 0));
}

/// Cached pieces of rows of different lengths equal the texts alone.
pub fn cached_pieces_equal_the_texts_alone(target: &dyn TargetModel) {
    let texts = [tokens(19, 1), tokens(15, 2), tokens(13, 3)];
    let want: Vec<Tensor> = texts.iter().map(|text| alone(target, text)).collect();
    let known = [9usize, 5, 3];
    let padded: Vec<Vec<i64>> =
        texts.iter().zip(known).map(|(text, known)| [&text[..known], &vec![0; 9 - known]].concat()).collect();
    let mut cache = target.new_cache(3, 4);
    let _ = logits(target, &padded, &vec![(0..9).collect(); 3], &AttentionMask::Causal, Some(&mut cache));
    cache.advance(&known.map(|known| known as i64));
    for count in [1, 3, 1, 5] {
        let starts = cache.lengths().to_vec();
        let new = |(text, &start): (&Vec<i64>, &i64)| text[start as usize..][..count].to_vec();
        let ids: Vec<Vec<i64>> = texts.iter().zip(&starts).map(new).collect();
        let positions: Vec<Vec<i64>> = starts.iter().map(|&start| (start..start + count as i64).collect()).collect();
        let got = logits(target, &ids, &positions, &AttentionMask::Causal, Some(&mut cache));
        for (row, &start) in starts.iter().enumerate() {
            near(&got.get(row as i64), &want[row].narrow(0, start, count as i64));
        }
        cache.advance(&[count as i64; 3]);
    }
}

/// Trees behind texts of different lengths, longer and shorter than the window, nodes side by side at one position.
pub fn every_node_of_a_tree_equals_its_path(target: &dyn TargetModel) {
    let texts = [tokens(9, 1), tokens(2, 2)];
    let padded = [texts[0].clone(), [&texts[1][..], &[0; 7]].concat()];
    let mut cache = target.new_cache(2, 4);
    let _ = logits(target, &padded, &vec![(0..9).collect(); 2], &AttentionMask::Causal, Some(&mut cache));
    cache.advance(&[9, 2]);
    let parents = [0usize, 0, 0, 1, 2, 4, 5, 5];
    let path = |node: usize| {
        let mut path: Vec<usize> = std::iter::successors(Some(node), |&at| (at != 0).then(|| parents[at])).collect();
        path.reverse();
        path
    };
    let nodes = tokens(8, 5);
    let table: Vec<bool> = (0..8).flat_map(|node| (0..8).map(move |other| path(node).contains(&other))).collect();
    let seen = Tensor::from_slice(&[table.clone(), table].concat()).view([2, 8, 8]);
    let positions = [9i64, 2].map(|base| (0..8).map(|node| base + path(node).len() as i64 - 1).collect::<Vec<i64>>());
    let mask = AttentionMask::Tree(TreeMask { base: vec![9, 2], seen });
    let got = logits(target, &[nodes.clone(), nodes.clone()], &positions, &mask, Some(&mut cache));
    for (row, text) in texts.iter().enumerate() {
        for node in 0..8 {
            let line: Vec<i64> = text.iter().copied().chain(path(node).into_iter().map(|at| nodes[at])).collect();
            near(&got.get(row as i64).get(node as i64), &alone(target, &line).get(-1));
        }
    }
    // What came true is what a fresh pass leaves, and the text goes on from there.
    cache.keep(&[path(6).into_iter().map(|node| node as i64).collect(), vec![0]]);
    let lines = [(0, path(6)), (1, vec![0])].map(|(row, path): (usize, Vec<usize>)| {
        texts[row].iter().copied().chain(path.into_iter().map(|node| nodes[node])).collect::<Vec<i64>>()
    });
    let positions: Vec<Vec<i64>> = lines.iter().map(|line| vec![line.len() as i64]).collect();
    let got = logits(target, &[vec![7], vec![8]], &positions, &AttentionMask::Causal, Some(&mut cache));
    for (row, (line, next)) in lines.iter().zip([7, 8]).enumerate() {
        near(&got.get(row as i64).get(0), &alone(target, &[&line[..], &[next]].concat()).get(-1));
    }
}

/// How many texts are decoded, and how many tokens of each.
#[derive(Clone, Copy)]
struct Texts(u64, usize);

fn decode<'a>(
    target: &'a dyn TargetModel,
    drafter: Box<dyn Drafter + 'a>,
    temperature: f64,
    max_rows: usize,
    Texts(count, max_new_tokens): Texts,
) -> (Vec<Vec<u32>>, usize) {
    let options = EngineOptions {
        processors: Processors::at_temperature(temperature),
        policy: Policy::Keyed { seed: 11 },
        stop_tokens: vec![5],
        max_rows,
    };
    let mut engine = Engine::new(target, drafter, options).unwrap();
    for tag in 0..count {
        let prompt = tokens(1 + 3 * tag as usize, 20 + tag).into_iter().map(|token| token as u32).collect();
        engine.submit(Request { tag, prompt, max_new_tokens, key: tag }).unwrap();
    }
    let decoded: Vec<_> = engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect();
    let accepted = decoded.iter().flat_map(|one| &one.rounds).map(|round| round.accepted).sum();
    (decoded.into_iter().map(|one| one.tokens).collect(), accepted)
}

/// A draft in training on this target, as it begins.
pub fn draft(target: &dyn TargetModel, section: &serde_json::Value) -> Box<dyn DraftModel> {
    let context = DraftContext { seed: 1, ..small_drafts::context(target) };
    (draft::algorithm(section).unwrap().build)(section, &context).unwrap()
}

/// Every kind of draft, alone and together: the tokens of plain decoding. `twin` is the same model again.
pub fn every_draft_is_lossless(target: &dyn TargetModel, twin: Box<dyn TargetModel>) {
    let eagle3 = draft(target, &serde_json::json!({"algorithm": "eagle3", "capture": [0, 1, 2]}));
    let own = draft(target, &serde_json::json!({"algorithm": "medusa", "num_heads": 3}));
    let shared = draft(target, &serde_json::json!({"algorithm": "medusa", "num_heads": 3, "projection": "shared"}));
    let (mut twin, texts) = (Some(twin), Texts(4, 24));
    let mut total = 0;
    for temperature in [0.0, 1.0] {
        let sampling = DraftSampling::for_policy(Policy::Keyed { seed: 11 }, temperature);
        let trained = |draft: &dyn DraftModel, tree: &str| {
            drafter::of_training(draft, Some(tree), target, sampling).unwrap().drafter
        };
        let (plain, _) = decode(target, Box::new(Plain), temperature, 1, texts);
        assert_eq!(decode(target, Box::new(Plain), temperature, 3, texts).0, plain);
        assert!(plain.iter().any(|text| text.len() > 12));
        let mut drafters: Vec<(&str, Box<dyn Drafter + '_>)> = vec![
            ("eagle3", trained(eagle3.as_ref(), "dynamic:depth=5,top_k=4,nodes=20")),
            ("medusa", trained(own.as_ref(), "mc_sim_7b_63")),
            ("medusa, shared", trained(shared.as_ref(), "chain:3")),
            ("lookup", Box::new(PromptLookup { longest_match: 2, shortest_match: 1, depth: 6, nodes: 9 })),
        ];
        if let Some(twin) = twin.take() {
            let tree = DynamicTree { depth: 4, top_k: 3, nodes: 12, min_probability: 0.0 };
            drafters.push(("itself", Box::new(ModelDrafter::new(twin, target.info(), tree, sampling).unwrap())));
        }
        for (name, drafter) in drafters {
            let (got, accepted) = decode(target, drafter, temperature, 3, texts);
            assert_eq!(got, plain, "{name}, temperature {temperature}");
            total += accepted;
        }
    }
    assert!(total > 20, "{total} guesses were right");
}

/// The same with less of everything: a few tokens, greedily, with a tree of an EAGLE-3 draft and with a chain of Medusa's.
pub fn greedy_decoding_is_lossless(target: &dyn TargetModel) {
    let texts = Texts(2, 8);
    let sampling = DraftSampling::for_policy(Policy::Keyed { seed: 11 }, 0.0);
    let (plain, _) = decode(target, Box::new(Plain), 0.0, 1, texts);
    let eagle3 = draft(target, &serde_json::json!({"algorithm": "eagle3", "capture": [0, 1, 2]}));
    let medusa = draft(target, &serde_json::json!({"algorithm": "medusa", "num_heads": 2}));
    for (draft, tree) in [(eagle3, "dynamic:depth=3,top_k=3,nodes=8"), (medusa, "chain:2")] {
        let drafter = drafter::of_training(draft.as_ref(), Some(tree), target, sampling).unwrap().drafter;
        assert_eq!(decode(target, drafter, 0.0, 2, texts).0, plain, "{tree}");
    }
    let lookup = PromptLookup { longest_match: 2, shortest_match: 1, depth: 4, nodes: 6 };
    assert_eq!(decode(target, Box::new(lookup), 0.0, 2, texts).0, plain);
}
