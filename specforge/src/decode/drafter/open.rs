//! From what a user names to a drafter: an export, a checkpoint, a smaller model, or prompt lookup, and its tree.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;

use super::{
    DraftSampling, Drafter, DynamicTree, Eagle3Drafter, Eagle3Parts, MedusaDrafter, MedusaHeads, ModelDrafter, Plain,
    PromptLookup, choices,
};
use crate::checkpoint;
use crate::data::ChatTokenizer;
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::medusa::MedusaConfig;
use crate::draft::{self, DraftModel, vocabulary};
use crate::error::{Error, Result};
use crate::export;
use crate::models::{self, TargetModel};
use crate::strict;

/// A drafter, and what it is called.
pub struct Opened<'a> {
    /// The drafter.
    pub drafter: Box<dyn Drafter + 'a>,
    /// `none`, `prompt-lookup`, `model`, or the algorithm of a trained draft.
    pub method: String,
    /// Its tree, as it was understood.
    pub tree: String,
    /// Folder it was read from.
    pub folder: Option<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Name of prompt lookup, where a folder could stand.
pub const PROMPT_LOOKUP: &str = "prompt-lookup";

/// The target, and where it was read from.
type Target<'a, 'p> = (&'a dyn TargetModel, &'p Path);

/// Opens what `draft` names with the tree that `tree` describes; a draft's own default where that is not given.
pub fn open<'a>(
    draft: Option<&str>,
    tree: Option<&str>,
    target: Target<'a, '_>,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    match draft {
        None => match tree {
            None => Ok(opened(Box::new(Plain), "none", "none".to_owned())),
            Some(tree) => Err(Error::Usage(format!("--tree {tree}: there is no --draft to guess with"))),
        },
        Some(PROMPT_LOOKUP) => {
            let lookup = lookup(tree.unwrap_or_default())?;
            let PromptLookup { longest_match, depth, nodes } = lookup;
            let tree = format!("depth={depth},nodes={nodes},match={longest_match}");
            Ok(opened(Box::new(lookup), PROMPT_LOOKUP, tree))
        }
        Some(folder) => {
            let folder = Path::new(folder);
            let opened = from_folder(folder, tree, target, sampling)?;
            Ok(Opened { folder: Some(folder.to_path_buf()), ..opened })
        }
    }
}

/// The drafter of a draft in training, with its values of this moment.
pub fn of_training<'a>(
    draft: &dyn DraftModel,
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let parameters = draft.parameters().iter().map(|parameter| (parameter.name.clone(), parameter.value.detach()));
    let tensors: Vec<(String, Tensor)> = parameters.chain(draft.buffers()).collect();
    trained(&draft.description(), &tensors, tree, target, sampling)
}

fn from_folder<'a>(
    folder: &Path,
    tree: Option<&str>,
    (target, target_path): Target<'a, '_>,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let config_path = folder.join("config.json");
    if !folder.is_dir() {
        return Err(Error::bad_file(folder, "is not a folder")
            .with_hint(format!("name an exported draft, a run's output folder, a model folder, or {PROMPT_LOOKUP}")));
    }
    let not_a_checkpoint = match checkpoint::find(folder) {
        Ok(found) => {
            return trained(&found.manifest.draft, &found.tensors()?, tree, target, sampling)
                .map_err(|error| of_checkpoint(&found.path, error));
        }
        Err(error) => error,
    };
    if !config_path.exists() {
        return Err(not_a_checkpoint);
    }
    let text = std::fs::read(&config_path).map_err(Error::io("read", &config_path))?;
    let config: Value = strict::from_json(&text)
        .map_err(|problem| Error::bad_file(&config_path, format!("not valid JSON: {problem}")))?;
    // A run's own folder holds a config.json too: that of the run.
    if config.get("train").is_some() {
        return Err(not_a_checkpoint);
    }
    let formats = |list: &[export::Format]| list.iter().any(|format| (format.recognise)(&config));
    if formats(&[export::medusa::ORIGINAL, export::medusa::VLLM]) {
        return medusa(MedusaHeads::read(folder, target)?, tree, sampling);
    }
    if formats(&[export::eagle3::RAW, export::eagle3::SPECULATORS]) {
        let mut imported = export::eagle3::read(folder, Some(target.info().num_layers()))?;
        let mut notes = imported.warnings.clone();
        if let Some(own) = imported.embedding.take()
            && export::eagle3::is_other_embedding(&own, &target.embedding().table)?
        {
            notes.push("the draft has an embedding that is not the target's: the draft's own is used".to_owned());
            imported.embedding = Some(own);
        }
        let opened =
            eagle3(Eagle3Parts::from(imported), tree, target, sampling).map_err(|error| of_folder(folder, error))?;
        return Ok(Opened { notes, ..opened });
    }
    let model = models::load_target(folder, target.kind(), target.device())?;
    let tokenizers = [ChatTokenizer::load(target_path, None)?, ChatTokenizer::load(folder, None)?];
    ModelDrafter::check_tokenizers(&tokenizers[0], &tokenizers[1]).map_err(|error| of_folder(folder, error))?;
    let (tree, text) = dynamic(tree)?;
    let drafter = ModelDrafter::new(model, target.info(), tree, sampling).map_err(|error| of_folder(folder, error))?;
    Ok(opened(Box::new(drafter), "model", text))
}

fn of_folder(folder: &Path, error: Error) -> Error {
    match error {
        Error::Failed(problem) => Error::bad_file(folder, problem),
        other => other,
    }
}

/// An error over a checkpoint, whose manifest holds a configuration of its own.
fn of_checkpoint(folder: &Path, error: Error) -> Error {
    match error {
        Error::Config { key, problem, hint } if key.starts_with("draft") => {
            let path = folder.join(checkpoint::manifest::MANIFEST_FILE);
            Error::BadFile { path, problem: format!("`{key}`: {problem}"), hint }
        }
        other => of_folder(folder, other),
    }
}

fn opened<'a>(drafter: Box<dyn Drafter + 'a>, method: &str, tree: String) -> Opened<'a> {
    Opened { drafter, method: method.to_owned(), tree, folder: None, notes: Vec::new() }
}

/// The drafter of a checkpoint's description and tensors.
fn trained<'a>(
    description: &Value,
    tensors: &[(String, Tensor)],
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let section = &description["draft"];
    let algorithm = draft::algorithm(section)?.name;
    let vocabulary = vocabulary::from_tensors(tensors)?;
    if algorithm == draft::medusa::ALGORITHM.name {
        let config = MedusaConfig::read(section)?;
        return medusa(MedusaHeads::new(&config, tensors, vocabulary.as_ref(), target)?, tree, sampling);
    }
    if algorithm == draft::eagle3::ALGORITHM.name {
        let shape = Eagle3Shape::from_description(description)
            .map_err(|problem| Error::Failed(format!("the checkpoint is none of an EAGLE-3 draft: {problem}")))?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        return eagle3(Eagle3Parts { shape, tensors, vocabulary, embedding: None }, tree, target, sampling);
    }
    Err(Error::Failed(format!("decoding with drafts of the algorithm `{algorithm}` is not supported")))
}

fn medusa<'a>(heads: MedusaHeads, tree: Option<&str>, sampling: DraftSampling) -> Result<Opened<'a>> {
    let text = tree.map_or_else(|| format!("chain:{}", heads.len()), str::to_owned);
    let drafter = MedusaDrafter::new(heads, &choices::parse(&text)?, sampling);
    let notes = drafter.warning().map(str::to_owned).into_iter().collect();
    Ok(Opened { notes, ..opened(Box::new(drafter), draft::medusa::ALGORITHM.name, text) })
}

fn eagle3<'a>(
    parts: Eagle3Parts,
    tree: Option<&str>,
    target: &'a dyn TargetModel,
    sampling: DraftSampling,
) -> Result<Opened<'a>> {
    let (tree, text) = dynamic(tree)?;
    let drafter = Eagle3Drafter::new(parts, target, tree, sampling)?;
    Ok(opened(Box::new(drafter), draft::eagle3::ALGORITHM.name, text))
}

/// Tree of a draft that guesses one token after the other, where nothing else is asked for: with its root, as many nodes
/// as a pass takes at nearly the price of one.
const DEFAULT_TREE: DynamicTree = DynamicTree { depth: 3, top_k: 4, nodes: 7, min_probability: 0.0 };

/// Reads `chain:N` or `dynamic:depth=D,top_k=K,nodes=N[,min_probability=P]`, and says how it was understood.
fn dynamic(text: Option<&str>) -> Result<(DynamicTree, String)> {
    let text = text.unwrap_or("dynamic:");
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
fn lookup(text: &str) -> Result<PromptLookup> {
    let mut lookup = PromptLookup { longest_match: 3, depth: 5, nodes: 10 };
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
            assert_eq!(dynamic(Some(text)).unwrap().1, want);
        }
        assert_eq!(dynamic(None).unwrap().1, "dynamic:depth=3,top_k=4,nodes=7");
        for wrong in ["", "chain", "chain:", "chain:-1", "chain:0", "tree:3", "dynamic:depth", "dynamic:width=3"] {
            assert!(dynamic(Some(wrong)).is_err(), "{wrong}");
        }
        let lookup = |text: &str| lookup(text).map(|lookup| (lookup.longest_match, lookup.depth, lookup.nodes));
        assert_eq!(lookup("").unwrap(), (3, 5, 10));
        assert_eq!(lookup("chain:4").unwrap(), (3, 4, 4));
        assert_eq!(lookup("match=2,depth=8,nodes=20").unwrap(), (2, 8, 20));
        assert!(lookup("depth=0").is_err() && lookup("dynamic:depth=2").is_err());
    }
}
