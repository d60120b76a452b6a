//! What holds of the built-in family holds of one that differs in everything its shapes allow: `plugins/windowed.rs`.

use specforge::decode::drafter::{self, DraftSampling, Drafter, DynamicTree, ModelDrafter, Plain, PromptLookup};
use specforge::decode::event::Silent;
use specforge::decode::{Engine, EngineOptions, Policy, Request};
use specforge::draft::{self, DraftContext, DraftModel};
use specforge::models::{self, ForwardInput, LayerKind, LogitRows, TargetModel};
use specforge::nn::{AttentionMask, KvCache, Processors, TreeMask, noise};
use tch::{Device, Kind, Tensor};

use crate::plugins::windowed::{self, model};
use crate::{fixture, plugins, small_drafts};

const VOCABULARY: i64 = 60;

fn tokens(count: usize, seed: u64) -> Vec<i64> {
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
fn alone(target: &dyn TargetModel, text: &[i64]) -> Tensor {
    logits(target, &[text.to_vec()], &[(0..text.len() as i64).collect()], &AttentionMask::Causal, None).get(0)
}

#[track_caller]
fn near(got: &Tensor, want: &Tensor) {
    assert_eq!(got.size(), want.size());
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference < 1e-11, "differs by {difference:e}"); // NaN fails as well
}

#[test]
fn the_window_and_everything_else_matter() {
    let target = model(VOCABULARY, Kind::Double);
    let text = tokens(12, 1);
    let want = alone(target.as_ref(), &text);
    assert!(want.abs().max().double_value(&[]) < 9.0);
    // A layer without a window still sees the first token from the last.
    let mut other = text.clone();
    other[0] = (other[0] + 1) % VOCABULARY;
    assert!((alone(target.as_ref(), &other) - &want).get(11).abs().max().double_value(&[]) > 1e-9);
}

#[test]
fn a_pack_equals_its_documents_alone() {
    let target = model(VOCABULARY, Kind::Double);
    let documents = [tokens(9, 1), tokens(1, 2), tokens(3, 3), tokens(14, 4)];
    let want: Vec<Tensor> = documents.iter().map(|document| alone(target.as_ref(), document)).collect();
    let mask = AttentionMask::Documents(documents.iter().map(|document| document.len() as i64).collect());
    let positions = documents.iter().flat_map(|document| 0..document.len() as i64).collect();
    let got = logits(target.as_ref(), &[documents.concat()], &[positions], &mask, None).get(0);
    near(&got, &Tensor::cat(&want, 0));
}

#[test]
fn cached_pieces_of_ragged_rows_equal_the_texts_alone() {
    let target = model(VOCABULARY, Kind::Double);
    let texts = [tokens(19, 1), tokens(15, 2), tokens(13, 3)];
    let want: Vec<Tensor> = texts.iter().map(|text| alone(target.as_ref(), text)).collect();
    let known = [9usize, 5, 3];
    let padded: Vec<Vec<i64>> =
        texts.iter().zip(known).map(|(text, known)| [&text[..known], &vec![0; 9 - known]].concat()).collect();
    let mut cache = target.new_cache(3, 4);
    let _ = logits(target.as_ref(), &padded, &vec![(0..9).collect(); 3], &AttentionMask::Causal, Some(&mut cache));
    cache.advance(&known.map(|known| known as i64));
    for count in [1, 3, 1, 5] {
        let starts = cache.lengths().to_vec();
        let new = |(text, &start): (&Vec<i64>, &i64)| text[start as usize..][..count].to_vec();
        let ids: Vec<Vec<i64>> = texts.iter().zip(&starts).map(new).collect();
        let positions: Vec<Vec<i64>> = starts.iter().map(|&start| (start..start + count as i64).collect()).collect();
        let got = logits(target.as_ref(), &ids, &positions, &AttentionMask::Causal, Some(&mut cache));
        for (row, &start) in starts.iter().enumerate() {
            near(&got.get(row as i64), &want[row].narrow(0, start, count as i64));
        }
        cache.advance(&[count as i64; 3]);
    }
}

/// Trees behind texts of different lengths, longer and shorter than the window, nodes side by side at one position.
#[test]
fn every_node_of_a_tree_equals_its_path() {
    let target = model(VOCABULARY, Kind::Double);
    let texts = [tokens(9, 1), tokens(2, 2)];
    let padded = [texts[0].clone(), [&texts[1][..], &[0; 7]].concat()];
    let mut cache = target.new_cache(2, 4);
    let _ = logits(target.as_ref(), &padded, &vec![(0..9).collect(); 2], &AttentionMask::Causal, Some(&mut cache));
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
    let got = logits(target.as_ref(), &[nodes.clone(), nodes.clone()], &positions, &mask, Some(&mut cache));
    for (row, text) in texts.iter().enumerate() {
        for node in 0..8 {
            let line: Vec<i64> = text.iter().copied().chain(path(node).into_iter().map(|at| nodes[at])).collect();
            near(&got.get(row as i64).get(node as i64), &alone(target.as_ref(), &line).get(-1));
        }
    }
    // What came true is what a fresh pass leaves, and the text goes on from there.
    cache.keep(&[path(6).into_iter().map(|node| node as i64).collect(), vec![0]]);
    let lines = [(0, path(6)), (1, vec![0])].map(|(row, path): (usize, Vec<usize>)| {
        texts[row].iter().copied().chain(path.into_iter().map(|node| nodes[node])).collect::<Vec<i64>>()
    });
    let positions: Vec<Vec<i64>> = lines.iter().map(|line| vec![line.len() as i64]).collect();
    let got = logits(target.as_ref(), &[vec![7], vec![8]], &positions, &AttentionMask::Causal, Some(&mut cache));
    for (row, (line, next)) in lines.iter().zip([7, 8]).enumerate() {
        near(&got.get(row as i64).get(0), &alone(target.as_ref(), &[&line[..], &[next]].concat()).get(-1));
    }
}

fn decode<'a>(
    target: &'a dyn TargetModel,
    drafter: Box<dyn Drafter + 'a>,
    temperature: f64,
    max_rows: usize,
) -> (Vec<Vec<u32>>, usize) {
    let options = EngineOptions {
        processors: Processors::at_temperature(temperature),
        policy: Policy::Keyed { seed: 11 },
        stop_tokens: vec![5],
        max_rows,
    };
    let mut engine = Engine::new(target, drafter, options).unwrap();
    for tag in 0..4 {
        let prompt = tokens(1 + 3 * tag as usize, 20 + tag).into_iter().map(|token| token as u32).collect();
        engine.submit(Request { tag, prompt, max_new_tokens: 24, key: tag }).unwrap();
    }
    let decoded: Vec<_> = engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect();
    let accepted = decoded.iter().flat_map(|one| &one.rounds).map(|round| round.accepted).sum();
    (decoded.into_iter().map(|one| one.tokens).collect(), accepted)
}

/// A draft in training on this target, as it begins.
fn draft(target: &dyn TargetModel, section: &serde_json::Value) -> Box<dyn DraftModel> {
    let context = DraftContext { seed: 1, ..small_drafts::context(target) };
    (draft::algorithm(section).unwrap().build)(section, &context).unwrap()
}

/// Texts many times the window, with every kind of draft, alone and together: the tokens of plain decoding.
#[test]
fn every_draft_is_lossless() {
    let target = model(VOCABULARY, Kind::Double);
    let target = target.as_ref();
    let eagle3 = draft(target, &serde_json::json!({"algorithm": "eagle3", "capture": [0, 1, 2]}));
    let own = draft(target, &serde_json::json!({"algorithm": "medusa", "num_heads": 3}));
    let shared = draft(target, &serde_json::json!({"algorithm": "medusa", "num_heads": 3, "projection": "shared"}));
    let mut total = 0;
    for temperature in [0.0, 1.0] {
        let sampling = DraftSampling::for_policy(Policy::Keyed { seed: 11 }, temperature);
        let trained = |draft: &dyn DraftModel, tree: &str| {
            drafter::of_training(draft, Some(tree), target, sampling).unwrap().drafter
        };
        let (plain, _) = decode(target, Box::new(Plain), temperature, 1);
        assert_eq!(decode(target, Box::new(Plain), temperature, 3).0, plain);
        assert!(plain.iter().any(|text| text.len() > 12));
        let twin = DynamicTree { depth: 4, top_k: 3, nodes: 12, min_probability: 0.0 };
        let drafters: Vec<(&str, Box<dyn Drafter + '_>)> = vec![
            ("eagle3", trained(eagle3.as_ref(), "dynamic:depth=5,top_k=4,nodes=20")),
            ("medusa", trained(own.as_ref(), "mc_sim_7b_63")),
            ("medusa, shared", trained(shared.as_ref(), "chain:3")),
            (
                "itself",
                Box::new(ModelDrafter::new(model(VOCABULARY, Kind::Double), target.info(), twin, sampling).unwrap()),
            ),
            ("lookup", Box::new(PromptLookup { longest_match: 2, depth: 6, nodes: 9 })),
        ];
        for (name, drafter) in drafters {
            let (got, accepted) = decode(target, drafter, temperature, 3);
            assert_eq!(got, plain, "{name}, temperature {temperature}");
            total += accepted;
        }
    }
    assert!(total > 50, "{total} guesses were right");
}

/// A family that a program adds to the table is loaded, checked and planned with like the one that is built in.
#[test]
fn an_added_family_is_one_like_any_other() {
    plugins::register();
    assert!(models::families().iter().any(|family| family.model_type == windowed::FAMILY.model_type));
    let taken = models::add_family(&windowed::FAMILY).unwrap_err().to_string();
    assert!(taken.contains("`windowed`"), "{taken}");
    let folder = tempfile::tempdir().unwrap();
    windowed::write(folder.path(), VOCABULARY);
    models::check(folder.path()).unwrap();
    let info = models::read_info(folder.path()).unwrap();
    assert_eq!(info.layers, [LayerKind::Window(4), LayerKind::Full, LayerKind::Window(4), LayerKind::Full]);
    let whole = models::load_target(folder.path(), Kind::Double, Device::Cpu).unwrap();
    let tables = models::load_tables(folder.path(), Kind::Double, Device::Cpu).unwrap();
    assert!(*whole.info() == info && tables.info == info);

    // What the tables say is what the model says: the embeddings first, and the head of the last state.
    let ids = Tensor::from_slice(&tokens(10, 1)).unsqueeze(0);
    let positions = Tensor::arange(10, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let (mask, capture) = (AttentionMask::Causal, [4, 0]);
    let input =
        ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture: &capture, logits: LogitRows::All };
    let output = whole.forward(&input, None).unwrap();
    near(&tables.head.logits(&output.hidden[0].squeeze_dim(0)), &output.logits.unwrap());
    near(&tables.embedding.look_up(&ids).unwrap(), &output.hidden[1]);
    let head = models::load_head(folder.path()).unwrap();
    assert_eq!((head.kind(), head.form()), (Kind::Float, info.head));

    let path = folder.path().join("model.safetensors");
    let mut tensors = fixture::tensors_of(&path);
    tensors.retain(|(name, _)| name != "layers.2.sinks");
    specforge::weights::write_tensors(&path, &tensors, &[]).unwrap();
    let missing = models::check(folder.path()).unwrap_err().to_string();
    assert!(missing.contains("layers.2.sinks [6]"), "{missing}");
}
