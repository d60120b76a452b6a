//! Medusa's static trees against the buffers that FasterDecoding/Medusa `e2a5d20` makes of them, and the candidates it
//! fills in.
//!
//! `{tree}.choices` lists paths padded with -1; `{tree}.tree_indices` points into the flat list of the root and each
//! depth's ten best tokens; `{tree}.retrieve_indices` lists paths to the leaves, padded with -1. `v.{tree}.{n}` holds the
//! target's logits over the nodes and what the reference accepts, greedily and by its typical acceptance: the path to a
//! leaf, and how many of its guesses.

use std::collections::BTreeMap;
use std::path::Path;

use specforge::decode::drafter::choices;
use specforge::decode::policy::{Limits, Policy, Proposal, Rows, Verdict, verify};
use specforge::nn::Processors;
use specforge::nn::processors::argmax;
use specforge::tree::{ChoiceTree, TokenTree};
use tch::{Kind, Tensor};

use super::Golden;

/// Guesses kept for each depth.
const TOP_K: usize = 10;

/// Checks every tree of a tensor file, and returns how many there were and how many verifications with them.
pub fn check_buffers(golden: &Golden) -> Result<(usize, usize), String> {
    let names: Vec<String> =
        golden.names_after("").filter_map(|name| name.strip_suffix(".choices")).map(str::to_owned).collect();
    let mut verifications = 0;
    for name in &names {
        verifications += check_tree(golden, name).map_err(|problem| format!("tree {name}: {problem}"))?;
    }
    Ok((names.len(), verifications))
}

/// Returns how many verifications there were.
fn check_tree(golden: &Golden, name: &str) -> Result<usize, String> {
    let choices = rows(golden, &format!("{name}.choices"))?;
    let tree = ChoiceTree::from_choices(&choices).map_err(|error| error.to_string())?;
    let topology = tree.topology();
    let nodes = 0..topology.len();
    let equal = |what: &str, got: Vec<i64>| match golden.integers(&format!("{name}.{what}"))? == got {
        true => Ok(()),
        false => Err(format!("{what} differ")),
    };
    equal("medusa_position_ids", topology.depths().iter().map(|&depth| depth as i64).collect())?;
    let flat = |node: usize| match topology.depths()[node] {
        0 => 0,
        depth => (tree.ranks()[node] + TOP_K * (depth - 1) + 1) as i64,
    };
    equal("tree_indices", nodes.clone().map(flat).collect())?;
    equal("medusa_attn_mask", topology.visible().into_iter().map(i64::from).collect())?;
    let paths: Vec<Vec<usize>> = topology.leaves().into_iter().map(|leaf| topology.path(leaf)).collect();
    if rows(golden, &format!("{name}.retrieve_indices"))? != paths {
        return Err("retrieve_indices differ".to_owned());
    }
    // Candidates of one step, where the file has them.
    if !golden.has(&format!("c.{name}.tree")) {
        return Ok(0);
    }
    let root = golden.tensor(&format!("c.{name}.base_logits"))?.flatten(0, -1).argmax(0, false).int64_value(&[]);
    let heads = golden.tensor(&format!("c.{name}.medusa_logits"))?; // [K, 1, 1, V]
    let best: Tensor = heads.topk(TOP_K as i64, -1, true, true).1.flatten(0, -1); // [K * 10]
    let token = |node: usize| match topology.depths()[node] {
        0 => root,
        depth => best.int64_value(&[(tree.ranks()[node] + TOP_K * (depth - 1)) as i64]),
    };
    let tokens: Vec<i64> = nodes.map(token).collect();
    if golden.integers(&format!("c.{name}.tree"))? != tokens {
        return Err("candidates differ".to_owned());
    }
    let mut cases = 0;
    while golden.has(&format!("v.{name}.{cases}.tree_logits")) {
        check_verification(golden, (name, cases), &tree, &tokens, &paths)
            .map_err(|problem| format!("verification {cases}: {problem}"))?;
        cases += 1;
    }
    Ok(cases)
}

/// The target's rows over the nodes, processed.
struct Given(Vec<Vec<f64>>);

impl Rows for Given {
    fn row(&mut self, path: &[usize]) -> specforge::error::Result<Vec<f64>> {
        Ok(self.0[path[path.len() - 1]].clone())
    }

    fn greedy(&mut self, path: &[usize]) -> specforge::error::Result<u32> {
        Ok(argmax(&self.row(path)?) as u32)
    }
}

/// One verification under both policies of the reference, and once more where its mistake would show.
fn check_verification(
    golden: &Golden,
    (name, case): (&str, usize),
    tree: &ChoiceTree,
    tokens: &[i64],
    paths: &[Vec<usize>],
) -> Result<(), String> {
    let mut filled = TokenTree::root(tokens[0] as u32);
    for (node, &parent) in tree.topology().parents().iter().enumerate().skip(1) {
        if filled.push(parent, tokens[node] as u32) != node {
            return Err("two siblings guess the same token".to_owned());
        }
    }
    let logits = golden.tensor(&format!("v.{name}.{case}.tree_logits"))?.to_kind(Kind::Double); // [N, V]
    let row = |node: usize| Vec::<f64>::try_from(logits.get(node as i64)).map_err(|error| error.to_string());
    let rows = (0..filled.len()).map(row).collect::<Result<Vec<_>, _>>()?;
    let decide = |policy: Policy, temperature: f64, rows: &[Vec<f64>]| -> Result<Verdict, String> {
        let processors = Processors::at_temperature(temperature);
        let mut rows = rows.to_vec();
        rows.iter_mut().for_each(|row| processors.apply(row, []));
        let proposal = Proposal::picked(filled.clone(), vec![0.0; filled.len()]);
        let limits = Limits { tokens: usize::MAX, stop: &[] };
        verify(policy, processors.is_greedy(), &proposal, (9, 0), limits, &mut Given(rows))
            .map_err(|error| error.to_string())
    };
    let typical = Policy::Typical { epsilon: 0.09, alpha: 0.3 };
    for (key, policy, temperature) in [("greedy", Policy::Keyed { seed: 0 }, 0.0), ("typical_T0.7", typical, 0.7)] {
        let verdict = decide(policy, temperature, &rows)?;
        let want = golden.integers(&format!("v.{name}.{case}.{key}"))?;
        let (leaf, accepted) = (&paths[want[0] as usize], want[1] as usize);
        // The reference pads short paths with token 0 and accepts the padding where the target chooses token 0. A path
        // has no guess there for us: what it accepts behind the end of a path is its mistake, and no part of ours.
        let real = accepted.min(leaf.len() - 1);
        if verdict.path != leaf[..=real] {
            return Err(format!("{key}: expected nodes {:?}, got {:?}", &leaf[..=real], verdict.path));
        }
        let told: Vec<u32> = leaf[1..=real].iter().map(|&node| tokens[node] as u32).collect();
        if verdict.tokens[..real] != told || verdict.tokens.len() != real + 1 {
            return Err(format!("{key}: expected tokens {told:?} and one more, got {:?}", verdict.tokens));
        }
    }
    // Token 0 everywhere behind the first guess of the shortest path: its padding would be accepted to the full depth.
    let short = paths.iter().min_by_key(|path| path.len()).ok_or("no path")?;
    let mut rows = rows;
    for (at, &node) in short.iter().enumerate() {
        let chosen = short.get(at + 1).map_or(0, |&next| tokens[next] as usize);
        rows[node][chosen] = 1e3;
    }
    for (policy, temperature) in [(Policy::Keyed { seed: 0 }, 0.0), (typical, 0.7)] {
        let verdict = decide(policy, temperature, &rows)?;
        if verdict.path != *short || verdict.tokens.last() != Some(&0) {
            return Err(format!("padding is accepted: expected nodes {short:?}, got {:?}", verdict.path));
        }
    }
    Ok(())
}

/// Rows of an integer matrix without their -1.
fn rows(golden: &Golden, name: &str) -> Result<Vec<Vec<usize>>, String> {
    let width = golden.tensor(name)?.size()[1] as usize;
    let values = golden.integers(name)?;
    Ok(values
        .chunks(width)
        .map(|row| row.iter().filter(|&&value| value >= 0).map(|&value| value as usize).collect())
        .collect())
}

/// Checks the file of shipped trees: each is a tree, and equals the one of the tensor file beside it.
pub fn check_choices(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let trees: BTreeMap<String, Vec<Vec<usize>>> = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    if trees.is_empty() {
        return Err("holds no tree".to_owned());
    }
    let beside = path.with_file_name("medusa.safetensors");
    let golden = if beside.is_file() { Some(Golden::open(&beside)?) } else { None };
    let mut compared = 0;
    for (name, paths) in &trees {
        let tree = ChoiceTree::from_choices(paths).map_err(|error| format!("{name}: {error}"))?;
        let key = format!("{name}.choices");
        if let Some(golden) = golden.as_ref().filter(|golden| golden.has(&key)) {
            let mut want = rows(golden, &key)?;
            let mut got = paths.clone();
            want.sort();
            got.sort();
            if want != got {
                return Err(format!("{name}: the tensor file has another tree"));
            }
            compared += 1;
        }
        // The trees that can be asked for by name are these; the tiny one is none of the reference's own.
        if name != "tiny6" && choices::parse(name).map_err(|error| error.to_string())? != tree {
            return Err(format!("{name}: another tree goes by this name here"));
        }
        if tree.topology().len() != paths.len() + 1 {
            return Err(format!("{name}: expected {} nodes, got {}", paths.len() + 1, tree.topology().len()));
        }
    }
    Ok(format!("{} trees, {compared} equal to those of medusa.safetensors", trees.len()))
}
