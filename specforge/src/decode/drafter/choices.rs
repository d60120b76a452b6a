//! Static trees by name: those that Medusa ships, chains, and files of paths.
//!
//! A file is a JSON list of paths of ranks, such as `[[0], [1], [0, 0]]`, or an object with such a list as `choices`,
//! which is what `specforge tree` writes. Such a list may stand for itself too. `choices.json` holds the shipped trees and names their source.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::tree::ChoiceTree;

/// The shipped trees.
const SHIPPED: &str = include_str!("choices.json");

/// Most paths of a file: every one is a row of a mask that has a column for each.
const MOST_PATHS: usize = 4096;
/// Largest rank of a file, above every vocabulary.
const LARGEST_RANK: usize = 1 << 24;

/// Longest chain that is plausibly meant.
const LONGEST_CHAIN: usize = 128;

#[derive(Deserialize)]
struct Shipped {
    trees: BTreeMap<String, Vec<Vec<usize>>>,
}

fn shipped() -> Result<BTreeMap<String, Vec<Vec<usize>>>> {
    let read: serde_json::Result<Shipped> = serde_json::from_str(SHIPPED);
    read.map(|shipped| shipped.trees).map_err(|error| Error::Failed(format!("the shipped trees: {error}")))
}

/// Names of the shipped trees.
pub fn names() -> Result<Vec<String>> {
    Ok(shipped()?.into_keys().collect())
}

/// A tree by what a user calls it: a shipped one's name, `chain:N`, a list of paths, or the path of a file.
pub fn parse(text: &str) -> Result<ChoiceTree> {
    if text.starts_with('[') {
        let wrong = |problem: String| Error::Usage(format!("tree `{text}`: {problem}"));
        return read_choices(text).and_then(|choices| tree_of(&choices)).map_err(wrong);
    }
    if let Some(length) = text.strip_prefix("chain:") {
        return match length.parse() {
            Ok(length) if (1..=LONGEST_CHAIN).contains(&length) => Ok(ChoiceTree::chain(length)),
            _ => {
                Err(Error::Usage(format!("tree `{text}`: expected a length from 1 to {LONGEST_CHAIN} behind `chain:`")))
            }
        };
    }
    let mut shipped = shipped()?;
    if let Some(choices) = shipped.remove(text) {
        return ChoiceTree::from_choices(&choices);
    }
    let path = Path::new(text);
    let names_a_file = path.is_file() || text.contains(std::path::MAIN_SEPARATOR) || text.ends_with(".json");
    if names_a_file {
        return read(path);
    }
    let names: Vec<&str> = shipped.keys().map(String::as_str).collect();
    Err(Error::Usage(format!(
        "tree `{text}`: expected chain:N, a JSON file of paths such as [[0],[1],[0,0]], or one of {}",
        names.join(", ")
    )))
}

/// Both forms of a file.
#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Paths(Vec<Vec<usize>>),
    Record { choices: Vec<Vec<usize>> },
}

fn read(path: &Path) -> Result<ChoiceTree> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let wrong = |problem: String| {
        Error::bad_file(path, problem).with_hint("a tree is written as [[0],[1],[0,0]]; `specforge tree` makes one")
    };
    read_choices(&text).and_then(|choices| tree_of(&choices)).map_err(wrong)
}

fn tree_of(choices: &[Vec<usize>]) -> Result<ChoiceTree, String> {
    ChoiceTree::from_choices(choices).map_err(|error| error.to_string())
}

/// The paths of a JSON text.
fn read_choices(text: &str) -> Result<Vec<Vec<usize>>, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    let choices = match serde_json::from_value(value) {
        Ok(File::Paths(choices) | File::Record { choices }) => choices,
        Err(_) => {
            return Err(
                "expected a list of paths, or an object with one as `choices`; a path is a list of ranks from 0"
                    .to_owned(),
            );
        }
    };
    if choices.len() > MOST_PATHS {
        return Err(format!("expected at most {MOST_PATHS} paths, got {}", choices.len()));
    }
    if let Some(rank) = choices.iter().flatten().find(|&&rank| rank > LARGEST_RANK) {
        return Err(format!("expected ranks from 0 to {LARGEST_RANK}, got {rank}"));
    }
    if choices.is_empty() {
        return Err("holds no path: nothing would be guessed".to_owned());
    }
    Ok(choices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_tree_is_a_tree_of_64_nodes() {
        let names = names().unwrap();
        assert_eq!(names.len(), 9);
        for name in names {
            let tree = parse(&name).unwrap();
            assert_eq!(tree.topology().len(), 64, "{name}");
            assert!((3..=4).contains(&tree.topology().depth()), "{name}");
        }
        assert_eq!(parse("chain:5").unwrap(), ChoiceTree::chain(5));
        assert_eq!(parse("[[0], [0, 0]]").unwrap(), ChoiceTree::chain(2));
    }

    #[test]
    fn files_of_both_forms_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tree.json");
        let want = ChoiceTree::from_choices(&[vec![0], vec![1], vec![1, 3]]).unwrap();
        for text in ["[[1,3],[0],[1]]", r#"{"choices": [[0],[1],[1,3]], "positions": 7}"#] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(parse(path.to_str().unwrap()).unwrap(), want);
        }
        for (text, problem) in [
            ("[[0],", "is not JSON"),
            ("[[0],[-1]]", "expected a list of paths"),
            (r#"{"paths": [[0]]}"#, "expected a list of paths"),
            ("[]", "holds no path"),
            ("[[0,1]]", "path [0, 1] has no parent"),
            ("[[0],[0]]", "is there twice"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = parse(path.to_str().unwrap()).unwrap_err();
            assert!(error.to_string().contains(problem) && error.exit_code() == 2, "{error}");
        }
    }

    #[test]
    fn what_is_no_tree_is_answered_with_what_is_possible() {
        let message = parse("mc_sim").unwrap_err().to_string();
        assert!(message.contains("chain:N") && message.contains("mc_sim_7b_63, vicuna_13b_stage1"), "{message}");
        assert!(parse("[[0,1]]").unwrap_err().to_string().contains("[[0,1]]`: draft tree: path [0, 1] has no parent"));
        for text in ["chain:", "chain:0", "chain:-1", "chain:many", "chain:129"] {
            assert!(parse(text).unwrap_err().to_string().contains("from 1 to 128"), "{text}");
        }
        assert!(parse("absent.json").unwrap_err().to_string().starts_with("cannot read absent.json"));
    }
}
