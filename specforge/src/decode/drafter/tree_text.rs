//! Trees of drafters that guess one token after the other, as users write them.

use super::{DynamicTree, PromptLookup};
use crate::error::{Error, Result};

/// Tree of a draft that guesses one token after the other, where nothing else is asked for: with its root, as many nodes
/// as a pass takes at nearly the price of one.
pub const DEFAULT: &str = "dynamic:depth=3,top_k=4,nodes=7";

/// The same, for the keys that a text leaves out.
const DEFAULT_TREE: DynamicTree = DynamicTree { depth: 3, top_k: 4, nodes: 7, min_probability: 0.0 };

/// Reads `chain:N` or `dynamic:depth=D,top_k=K,nodes=N[,min_probability=P]`, and says how it was understood.
pub fn dynamic(text: &str) -> Result<(DynamicTree, String)> {
    let mut tree = DEFAULT_TREE;
    let expected = "chain:N or dynamic:depth=D,top_k=K,nodes=N[,min_probability=P]";
    match text.split_once(':') {
        Some(("chain", length)) => {
            let length = length.parse().map_err(|_| unknown(text, expected))?;
            tree = DynamicTree::chain(length);
        }
        Some(("dynamic", keys)) => {
            for (key, value) in pairs(keys) {
                let whole = || value.parse().map_err(|_| unknown(text, expected));
                match key {
                    "depth" => tree.depth = whole()?,
                    "top_k" => tree.top_k = whole()?,
                    "nodes" => tree.nodes = whole()?,
                    "min_probability" => tree.min_probability = value.parse().map_err(|_| unknown(text, expected))?,
                    _ => return Err(unknown(text, expected)),
                }
            }
        }
        _ => return Err(unknown(text, expected)),
    }
    tree.check()?;
    let DynamicTree { depth, top_k, nodes, min_probability } = tree;
    let text = match top_k {
        1 if nodes == depth && min_probability == 0.0 => format!("chain:{depth}"),
        _ if min_probability == 0.0 => format!("dynamic:depth={depth},top_k={top_k},nodes={nodes}"),
        _ => format!("dynamic:depth={depth},top_k={top_k},nodes={nodes},min_probability={min_probability}"),
    };
    Ok((tree, text))
}

/// Reads `depth=D,nodes=N,match=M` or `chain:N`, each with a default.
pub(super) fn lookup(text: &str) -> Result<PromptLookup> {
    let mut lookup = PromptLookup { longest_match: 3, shortest_match: 1, depth: 5, nodes: 10 };
    let expected = "depth=D,nodes=N,match=M or chain:N, numbers from 1 to 4096";
    if let Some(length) = text.strip_prefix("chain:") {
        let length = lookup_size(length).ok_or_else(|| unknown(text, expected))?;
        return Ok(PromptLookup { depth: length, nodes: length, ..lookup });
    }
    for (key, value) in pairs(text) {
        let value = lookup_size(value).ok_or_else(|| unknown(text, expected))?;
        match key {
            "depth" => lookup.depth = value,
            "nodes" => lookup.nodes = value,
            "match" => lookup.longest_match = value,
            _ => return Err(unknown(text, expected)),
        }
    }
    Ok(lookup)
}

/// Cuts `+lookup` or `+lookup:KEYS` off the end of a tree's text: the tree, and the keys where a lookup is asked for.
pub fn split_lookup(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once("+lookup") {
        Some((tree, "")) => (tree, Some("")),
        Some((tree, keys)) if keys.starts_with(':') => (tree, Some(&keys[1..])),
        _ => (text, None),
    }
}

/// A lookup beside a draft, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookupBeside {
    /// What looks guesses up.
    pub lookup: PromptLookup,
    /// Length of a match from which the draft is not asked.
    pub alone: usize,
    /// Most guesses of both together.
    pub most: Option<usize>,
}

/// Reads `depth=D,nodes=N,match=M,least=L,alone=A,most=G`, each with a default but the last.
pub fn lookup_beside(keys: &str) -> Result<LookupBeside> {
    let mut lookup = PromptLookup { longest_match: 8, shortest_match: 2, depth: 6, nodes: 6 };
    let (mut alone, mut most) = (4, None);
    let wrong = || {
        let expected = "depth=D,nodes=N,match=M,least=L,alone=A,most=G behind `+lookup:`, numbers from 1 to 4096";
        unknown(keys, expected)
    };
    for (key, value) in pairs(keys) {
        let value = lookup_size(value).ok_or_else(wrong)?;
        match key {
            "depth" => lookup.depth = value,
            "nodes" => lookup.nodes = value,
            "match" => lookup.longest_match = value,
            "least" => lookup.shortest_match = value,
            "alone" => alone = value,
            "most" => most = Some(value),
            _ => return Err(wrong()),
        }
    }
    if lookup.shortest_match > lookup.longest_match {
        let (least, most) = (lookup.shortest_match, lookup.longest_match);
        return Err(Error::Usage(format!(
            "--tree: expected `least` up to `match`, got least={least} and match={most}"
        )));
    }
    if let Some(most) = most.filter(|&most| most < lookup.nodes) {
        let nodes = lookup.nodes;
        return Err(Error::Usage(format!(
            "--tree: expected `nodes`, the lookup's guesses, up to `most`, those of both, got nodes={nodes} and most={most}"
        )));
    }
    Ok(LookupBeside { lookup, alone, most })
}

impl LookupBeside {
    /// All keys, as they are read.
    pub fn keys(&self) -> String {
        let PromptLookup { longest_match, shortest_match, depth, nodes } = self.lookup;
        let alone = self.alone;
        let keys = format!("depth={depth},nodes={nodes},match={longest_match},least={shortest_match},alone={alone}");
        self.most.map_or(keys.clone(), |most| format!("{keys},most={most}"))
    }
}

/// As many as a dynamic tree may have.
fn lookup_size(text: &str) -> Option<usize> {
    text.parse().ok().filter(|size| (1..=4096).contains(size))
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(',').filter(|part| !part.is_empty()).map(|part| part.split_once('=').unwrap_or((part, "")))
}

fn unknown(text: &str, expected: &str) -> Error {
    Error::Usage(format!("--tree: expected {expected}, got `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_read_and_said_again() {
        for (text, want) in [
            ("chain:4", "chain:4"),
            ("dynamic:depth=3,top_k=2,nodes=5", "dynamic:depth=3,top_k=2,nodes=5"),
            ("dynamic:nodes=9", "dynamic:depth=3,top_k=4,nodes=9"),
            ("dynamic:depth=2,top_k=1,nodes=2", "chain:2"),
            ("dynamic:min_probability=0.1", "dynamic:depth=3,top_k=4,nodes=7,min_probability=0.1"),
        ] {
            assert_eq!(dynamic(text).unwrap().1, want);
        }
        assert_eq!(dynamic("dynamic:").unwrap().1, DEFAULT);
        assert_eq!(dynamic(DEFAULT).unwrap().1, DEFAULT);
        for wrong in ["", "chain", "chain:", "chain:-1", "chain:0", "tree:3", "dynamic:depth", "dynamic:width=3"] {
            assert!(dynamic(wrong).is_err(), "{wrong}");
        }
        let lookup = |text: &str| lookup(text).map(|lookup| (lookup.longest_match, lookup.depth, lookup.nodes));
        assert_eq!(lookup("").unwrap(), (3, 5, 10));
        assert_eq!(lookup("chain:4").unwrap(), (3, 4, 4));
        assert_eq!(lookup("match=2,depth=8,nodes=20").unwrap(), (2, 8, 20));
        assert!(lookup("depth=0").is_err() && lookup("dynamic:depth=2").is_err());
        assert_eq!(split_lookup("chain:4"), ("chain:4", None));
        assert_eq!(split_lookup("+lookup"), ("", Some("")));
        assert_eq!(split_lookup("a+lookup.json+lookup:depth=2"), ("a+lookup.json", Some("depth=2")));
        assert_eq!(split_lookup("a+lookup.json"), ("a+lookup.json", None));
        let beside = PromptLookup { longest_match: 8, shortest_match: 3, depth: 6, nodes: 9 };
        let asked = lookup_beside("least=3,nodes=9,alone=7").unwrap();
        assert_eq!(asked, LookupBeside { lookup: beside, alone: 7, most: None });
        let limited = lookup_beside("most=15").unwrap();
        assert_eq!(limited.most, Some(15));
        for one in [asked, limited] {
            assert_eq!(lookup_beside(&one.keys()).unwrap(), one);
        }
        for wrong in ["least=9", "depth", "width=3", "nodes=0", "most=5", "most=0", "nodes=8,most=7"] {
            assert!(lookup_beside(wrong).is_err(), "{wrong}");
        }
    }
}
