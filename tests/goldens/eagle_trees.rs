//! EAGLE's dynamic tree and its greedy verification against SafeAILab/EAGLE `cb7e084` (`topK_genrate`,
//! `evaluate_posterior`).
//!
//! `in.ids1, in.hidden1` are what is committed and its features at the first call, `o1.*` the tree: tokens, mask, depths,
//! paths to the leaves padded with -1. `in.ids2, in.hidden2` are everything committed at the second call, and the features
//! that are new. `v*.*` verify the first tree on given logits. The reference's `depth` counts expansions, its
//! `total_token` the root too.

use std::path::Path;

use serde_json::{Value, json};
use specforge::decode::drafter::{Context, DraftSampling, Drafter, DynamicTree, Eagle3Drafter, Eagle3Parts};
use specforge::decode::drafter::{Joining, Progress};
use specforge::decode::event::Source;
use specforge::decode::policy::{Limits, walk};
use specforge::draft::eagle3::Eagle3Config;
use specforge::models::TargetInfo;
use specforge::tree::TokenTree;
use specforge::vocab::VocabMap;
use tch::{Device, Kind, Tensor};

use super::Golden;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// One file.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let number = |key: &str| golden.text(key)?.parse::<usize>().map_err(text);
    let tree = DynamicTree {
        depth: number("depth")? + 1,
        top_k: number("top_k")?,
        nodes: number("total_token")? - 1,
        min_probability: 0.0,
    };
    let mut drafter = drafter(&golden, tree)?;
    let ids = |name: &str| Ok::<_, String>(golden.integers(name)?.iter().map(|&id| id as u32).collect::<Vec<u32>>());
    let features = |name: &str| Ok::<_, String>(golden.tensor(name)?.squeeze_dim(0).chunk(3, 1));
    let (first, second) = (ids("in.ids1")?, ids("in.ids2")?);

    drafter.join(&[Joining { tokens: &first, features: features("in.hidden1")? }]).map_err(text)?;
    let cold = propose(&mut drafter, &first)?;
    check_tree(&golden, "o1", &cold, &drafter)?;
    let new = second.len() - first.len();
    drafter.commit(&[Progress { tokens: &second, new, features: features("in.hidden2")? }]).map_err(text)?;
    let warm = propose(&mut drafter, &second)?;
    check_tree(&golden, "o2", &warm, &drafter)?;

    let paths = leaf_paths(&cold);
    let tokens = |path: &Vec<usize>| path.iter().map(|&node| i64::from(cold.tokens()[node])).collect();
    equal(&golden, "candidates", padded(paths.iter().map(tokens).collect()))?;
    if golden.has("o1.retrieve_sampling_order") {
        let mut sorted = paths.clone();
        sorted.sort();
        equal(&golden, "o1.retrieve_sampling_order", padded(sorted.into_iter().map(integers).collect()))?;
    }
    let mut verified = 0;
    while golden.has(&format!("v{verified}.tree_logits")) {
        check_verdict(&golden, &format!("v{verified}"), &cold, &paths)?;
        verified += 1;
    }
    Ok(format!("trees of {} and {} nodes, {verified} verifications", cold.len(), warm.len()))
}

/// The draft of a file.
fn drafter(golden: &Golden, tree: DynamicTree) -> Result<Eagle3Drafter, String> {
    let mut config: Value = serde_json::from_str(golden.text("config")?).map_err(text)?;
    config["num_hidden_layers"] = json!(1);
    let embedding = golden.tensor("w.embed_tokens.weight")?;
    let (vocabulary, hidden) = embedding.size2().map_err(text)?;
    let config = Eagle3Config::read(&json!({"algorithm": "eagle3", "config": config})).map_err(text)?;
    let shape = config.shape(&TargetInfo::of(hidden, vocabulary, 8, 128)).map_err(text)?;
    let tensors = shape
        .tensors()
        .into_iter()
        .map(|(name, _)| Ok((name.clone(), golden.tensor(&format!("w.{name}"))?)))
        .collect::<Result<_, String>>()?;
    let ids = golden.integers("w.d2t")?.iter().zip(0..).map(|(offset, draft)| offset + draft).collect();
    let map = VocabMap::new(ids, vocabulary).map_err(text)?;
    let parts = Eagle3Parts { shape, tensors, vocabulary: Some(map), embedding: None };
    Eagle3Drafter::with_embedding(parts, &embedding, (Kind::Float, Device::Cpu), tree, DraftSampling::Greedy)
        .map_err(text)
}

fn propose(drafter: &mut Eagle3Drafter, tokens: &[u32]) -> Result<TokenTree, String> {
    let proposals = drafter.propose(&[Context { tokens, depth: 100, key: 0, temperature: 0.0 }]).map_err(text)?;
    Ok(proposals[0].tree.clone())
}

fn check_tree(golden: &Golden, call: &str, tree: &TokenTree, drafter: &Eagle3Drafter) -> Result<(), String> {
    let topology = tree.topology();
    let name = |what: &str| format!("{call}.{what}");
    equal(golden, &name("draft_tokens"), tree.tokens().iter().map(|&token| i64::from(token)).collect())?;
    equal(golden, &name("tree_mask"), topology.visible().into_iter().map(i64::from).collect())?;
    equal(golden, &name("pos"), integers(topology.depths().to_vec()))?;
    equal(golden, &name("retrieve"), padded(leaf_paths(tree).into_iter().map(integers).collect()))?;
    equal(golden, &name("kv_len"), drafter.cache_lengths())
}

fn check_verdict(golden: &Golden, case: &str, tree: &TokenTree, paths: &[Vec<usize>]) -> Result<(), String> {
    let choices: Tensor = golden.tensor(&format!("{case}.tree_logits"))?.argmax(-1, false);
    let limits = Limits { tokens: usize::MAX, stop: &[] };
    let mut choose = |path: &[usize]| Ok(choices.int64_value(&[path[path.len() - 1] as i64]) as u32);
    let verdict = walk(tree, limits, &mut choose).map_err(text)?;
    let accepted = verdict.sources.iter().filter(|source| **source == Source::Accepted).count() as i64;
    let best = paths.iter().position(|path| path.starts_with(&verdict.path)).ok_or("the path reaches no leaf")?;
    let bonus = verdict.tokens.last().copied().unwrap_or_default();
    // Where nothing is accepted the reference names the first path, which also begins with the root.
    equal(golden, &format!("{case}.best"), vec![best as i64])?;
    equal(golden, &format!("{case}.accept_len"), vec![accepted])?;
    equal(golden, &format!("{case}.select_nodes"), integers(verdict.path))?;
    equal(golden, &format!("{case}.bonus"), vec![i64::from(bonus)])
}

fn equal(golden: &Golden, name: &str, got: Vec<i64>) -> Result<(), String> {
    let want = golden.integers(name)?;
    if got == want { Ok(()) } else { Err(format!("{name}: expected {want:?}, got {got:?}")) }
}

/// Paths from the root to the leaves, in the order of the leaves.
fn leaf_paths(tree: &TokenTree) -> Vec<Vec<usize>> {
    tree.topology().leaves().into_iter().rev().map(|leaf| tree.topology().path(leaf)).collect()
}

fn integers(values: Vec<usize>) -> Vec<i64> {
    values.into_iter().map(|value| value as i64).collect()
}

/// Rows of one length, filled up with -1, one behind the other.
fn padded(rows: Vec<Vec<i64>>) -> Vec<i64> {
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    rows.into_iter().flat_map(|row| row.into_iter().chain(std::iter::repeat(-1)).take(width)).collect()
}
