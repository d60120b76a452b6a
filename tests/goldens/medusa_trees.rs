//! Medusa's static trees against the buffers that FasterDecoding/Medusa `e2a5d20` makes of them, and the candidates it
//! fills in.
//!
//! `{tree}.choices` lists paths padded with -1; `{tree}.tree_indices` points into the flat list of the root and each
//! depth's ten best tokens; `{tree}.retrieve_indices` lists paths to the leaves, padded with -1.

use std::collections::BTreeMap;
use std::path::Path;

use specforge::tree::ChoiceTree;
use tch::Tensor;

use super::Golden;

/// Guesses kept for each depth.
const TOP_K: usize = 10;

/// Checks every tree of a tensor file and returns how many there were.
pub fn check_buffers(golden: &Golden) -> Result<usize, String> {
    let names: Vec<String> =
        golden.names_after("").filter_map(|name| name.strip_suffix(".choices")).map(str::to_owned).collect();
    for name in &names {
        check_tree(golden, name).map_err(|problem| format!("tree {name}: {problem}"))?;
    }
    Ok(names.len())
}

fn check_tree(golden: &Golden, name: &str) -> Result<(), String> {
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
        return Ok(());
    }
    let root = golden.tensor(&format!("c.{name}.base_logits"))?.flatten(0, -1).argmax(0, false).int64_value(&[]);
    let heads = golden.tensor(&format!("c.{name}.medusa_logits"))?; // [K, 1, 1, V]
    let best: Tensor = heads.topk(TOP_K as i64, -1, true, true).1.flatten(0, -1); // [K * 10]
    let token = |node: usize| match topology.depths()[node] {
        0 => root,
        depth => best.int64_value(&[(tree.ranks()[node] + TOP_K * (depth - 1)) as i64]),
    };
    match golden.integers(&format!("c.{name}.tree"))? == nodes.map(token).collect::<Vec<_>>() {
        true => Ok(()),
        false => Err("candidates differ".to_owned()),
    }
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
    for (name, choices) in &trees {
        let tree = ChoiceTree::from_choices(choices).map_err(|error| format!("{name}: {error}"))?;
        let key = format!("{name}.choices");
        if let Some(golden) = golden.as_ref().filter(|golden| golden.has(&key)) {
            let mut want = rows(golden, &key)?;
            let mut got = choices.clone();
            want.sort();
            got.sort();
            if want != got {
                return Err(format!("{name}: the tensor file has another tree"));
            }
            compared += 1;
        }
        if tree.topology().len() != choices.len() + 1 {
            return Err(format!("{name}: expected {} nodes, got {}", choices.len() + 1, tree.topology().len()));
        }
    }
    Ok(format!("{} trees, {compared} equal to those of medusa.safetensors", trees.len()))
}
