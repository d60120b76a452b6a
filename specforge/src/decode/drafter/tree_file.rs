//! Files that name a tree: what `specforge tune` writes. An object with the tree's text as `tree`, whatever else it holds.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// The tree that a text means: the text itself, or what a file with a `tree` says. A file of another kind is left to
/// whoever reads trees of that kind.
pub fn named(text: &str) -> Result<Cow<'_, str>> {
    let path = Path::new(text);
    if path.extension().is_none_or(|extension| extension != "json") || !path.is_file() {
        return Ok(Cow::Borrowed(text));
    }
    let content = std::fs::read(path).map_err(Error::io("read", path))?;
    let value: Value =
        serde_json::from_slice(&content).map_err(|error| Error::bad_file(path, format!("is not JSON: {error}")))?;
    match value.get("tree") {
        Some(Value::String(tree)) => Ok(Cow::Owned(tree.clone())),
        Some(other) => {
            let problem = format!("`tree`: expected the text of a tree, such as \"chain:3\", got {other}");
            Err(Error::bad_file(path, problem))
        }
        None => Ok(Cow::Borrowed(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_its_tree_and_everything_else_is_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuned.json");
        let text = path.to_str().unwrap();
        assert_eq!(named(text).unwrap(), text);
        std::fs::write(&path, r#"{"tree": "dynamic:depth=2,top_k=4,nodes=6", "other": 1}"#).unwrap();
        assert_eq!(named(text).unwrap(), "dynamic:depth=2,top_k=4,nodes=6");
        std::fs::write(&path, r#"{"choices": [[0]]}"#).unwrap();
        assert_eq!(named(text).unwrap(), text);
        assert_eq!(named("chain:3").unwrap(), "chain:3");
        for (wrong, problem) in [(r#"{"tree": 3}"#, "expected the text of a tree"), ("{", "is not JSON")] {
            std::fs::write(&path, wrong).unwrap();
            let error = named(text).unwrap_err();
            assert!(error.to_string().contains(problem) && error.exit_code() == 2, "{error}");
        }
    }
}
