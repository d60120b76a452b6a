//! Which files of a repository are needed.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::Wanted;
use super::name::is_file;
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Read by an interpreter that runs nothing; what some drafts are published as.
const PICKLED: &str = "pytorch_model.bin";

/// Files that describe a model, besides those whose names begin like [`DESCRIBED_PREFIXES`].
const DESCRIBED: [&str; 8] = [
    CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "specforge.json",
    // That weights are quantised, and how.
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];
const DESCRIBED_PREFIXES: [&str; 2] = ["tokenizer", "chat_template"];

/// Files of a repository that are needed, by their names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Needed {
    /// What describes the model.
    pub(super) described: Vec<String>,
    /// An index, which names further files.
    pub(super) index: Option<String>,
    /// Weights.
    pub(super) weights: Vec<String>,
}

/// Chooses among the files of a repository, or of a part of one. Without what is needed: why it is of no use.
pub(super) fn needed(files: &[String], wanted: Wanted) -> Result<Needed, String> {
    let is_described = |file: &&String| {
        let begins = DESCRIBED_PREFIXES.iter().any(|prefix| file.starts_with(prefix));
        !file.contains('/') && (DESCRIBED.contains(&file.as_str()) || begins)
    };
    let described: Vec<String> = files.iter().filter(is_described).cloned().collect();
    let has = |name: &str| files.iter().any(|file| file == name);
    if !has(CONFIG) {
        return Err(format!("holds no {CONFIG}{}", instead(files)));
    }
    let mut found = Needed { described, index: None, weights: Vec::new() };
    if wanted == Wanted::Description {
        return Ok(found);
    }
    if has(INDEX) {
        found.index = Some(INDEX.to_owned());
    } else if has(SINGLE) {
        found.weights.push(SINGLE.to_owned());
    } else if wanted == Wanted::Draft {
        let is_root = |file: &&String| file.ends_with(".safetensors") && !file.contains('/');
        found.weights.extend(files.iter().filter(is_root).cloned());
        if found.weights.is_empty() && has(PICKLED) {
            found.weights.push(PICKLED.to_owned());
        }
    }
    match found.index.is_none() && found.weights.is_empty() {
        true => Err(format!("holds no weights as safetensors ({SINGLE} or {INDEX}){}", instead(files))),
        false => Ok(found),
    }
}

/// What is there instead, where that can be used.
fn instead(files: &[String]) -> String {
    let packed: Vec<&str> = files.iter().filter(|file| file.ends_with(".gguf")).map(String::as_str).collect();
    match packed.first() {
        Some(first) => format!("; of its {} GGUF files, name one behind the repository, as /{first}", packed.len()),
        None => String::new(),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that an index names.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read(index).map_err(Error::io("read", index))?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|error| Error::bad_file(index, format!("is no index: {error}")))?;
    let mut files: Vec<String> = parsed.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    match files.iter().find(|file| !is_file(file) || !file.ends_with(".safetensors")) {
        Some(bad) => Err(Error::bad_file(index, format!("names `{bad}`, expected safetensors files beside it"))),
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[&str], wanted: Wanted) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        let Needed { described, index, weights } = needed(&files, wanted)?;
        Ok(described.into_iter().chain(index).chain(weights).collect())
    }

    #[test]
    fn only_what_is_needed_is_chosen() {
        let files = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "onnx/model.onnx",
            "onnx/config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "model.gguf",
            "original/consolidated.safetensors",
            "vocab.json",
        ];
        let described =
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        assert_eq!(of(&files, Wanted::Description).unwrap(), described);
        assert_eq!(of(&files, Wanted::Target).unwrap(), [&described[..], &["model.safetensors"]].concat());
        assert_eq!(of(&files, Wanted::Draft).unwrap(), of(&files, Wanted::Target).unwrap());
        let sharded = ["config.json", "model-00001-of-00002.safetensors", INDEX, "consolidated.safetensors"];
        assert_eq!(of(&sharded, Wanted::Target).unwrap(), ["config.json", INDEX]);
    }

    #[test]
    fn drafts_lie_in_other_files_too() {
        let medusa = ["config.json", "medusa_lm_head.safetensors"];
        assert_eq!(of(&medusa, Wanted::Draft).unwrap(), medusa);
        let pickled = ["config.json", "pytorch_model.bin"];
        assert_eq!(of(&pickled, Wanted::Draft).unwrap(), pickled);
        for files in [&medusa[..], &pickled] {
            assert!(of(files, Wanted::Target).unwrap_err().contains("no weights as safetensors"));
        }
        assert!(of(&["README.md"], Wanted::Draft).unwrap_err().contains("no config.json"));
        let problem = of(&["a.q4.gguf", "a.q8.gguf"], Wanted::Target).unwrap_err();
        assert!(problem.contains("2 GGUF files") && problem.contains("/a.q4.gguf"), "{problem}");
    }

    #[test]
    fn an_index_names_files_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(INDEX);
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#);
        assert_eq!(shards(&path).unwrap(), ["1.safetensors", "2.safetensors"]);
        for bad in [r#"{"weight_map": {"a": "../x.safetensors"}}"#, r#"{"weight_map": {"a": "x.bin"}}"#, "[]"] {
            write(bad);
            assert!(shards(&path).is_err(), "{bad}");
        }
    }
}
