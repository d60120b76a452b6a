//! Starts heads from published ones.

use std::path::Path;

use serde_json::json;
use tch::Tensor;

use super::{Heads, read};
use crate::draft::medusa::MedusaConfig;
use crate::error::{Error, Result};
use crate::export::{Beginning, START_KEY};
use crate::vocab::VocabMap;

/// Copies the values of the heads in a folder into heads in training. Everything that decides what the values mean must be
/// the same in both; the error names what is not, and the key.
pub(super) fn start_from(path: &Path, beginning: &Beginning<'_>) -> Result<Vec<String>> {
    let Beginning { draft, vocabulary, embedding } = *beginning;
    let description = draft.description();
    let own = MedusaConfig::read(&description["draft"])
        .map_err(|problem| Error::config(START_KEY, format!("this draft has no Medusa heads: {problem}")))?;
    let heads = read(path)?;
    let mut wrong = differences(&heads, &own);
    let hidden = description["hidden_size"].as_i64().unwrap_or_default();
    if heads.hidden_size != hidden {
        wrong.push(format!("hidden_size: {} there, {hidden} here (the target's)", heads.hidden_size));
    }
    // A map of all tokens is none.
    let map = |map: Option<&VocabMap>| map.filter(|map| map.draft_size() < map.target_size()).cloned();
    if map(heads.vocabulary.as_ref()) != map(vocabulary) {
        let tokens = |map: Option<&VocabMap>| map.map_or(embedding.size()[0], VocabMap::draft_size);
        let (theirs, ours) = (tokens(heads.vocabulary.as_ref()), tokens(vocabulary));
        let what = if theirs == ours { "of other tokens".to_owned() } else { format!("{theirs} there, {ours} here") };
        wrong.push(format!("vocabulary map: {what} (draft.vocab_map)"));
    }
    if !wrong.is_empty() {
        let problem = format!("{} holds other heads than those configured:\n  {}", path.display(), wrong.join("\n  "));
        return Err(Error::config(START_KEY, problem).with_hint("set these keys"));
    }
    let find = |name: &str| heads.tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
    let _no_grad = tch::no_grad_guard();
    for parameter in draft.parameters() {
        let (name, shape) = (&parameter.name, parameter.value.size());
        let value = find(name).filter(|value| value.size() == shape).ok_or_else(|| {
            let got = find(name).map_or("nothing".to_owned(), |value| format!("{:?}", value.size()));
            Error::bad_file(path, format!("tensor `{name}`: expected shape {shape:?}, got {got}"))
        })?;
        parameter.value.shallow_clone().f_copy_(value)?;
    }
    Ok(Vec::new())
}

/// What two sets of heads do not share, with the keys that set it.
fn differences(theirs: &Heads, ours: &MedusaConfig) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, theirs: String, ours: String| {
        if theirs != ours {
            found.push(format!("{what}: {theirs} there, {ours} here (draft.{what})"));
        }
    };
    compare("num_heads", theirs.config.num_heads.to_string(), ours.num_heads.to_string());
    compare("num_layers", theirs.config.num_layers.to_string(), ours.num_layers.to_string());
    let word = |projection| json!(projection).as_str().unwrap_or_default().to_owned();
    compare("projection", word(theirs.config.projection), word(ours.projection));
    if ours.share_layers && !blocks_are_equal(&theirs.tensors) {
        found.push("share_layers: blocks of their own there, one for all layers here (draft.share_layers)".to_owned());
    }
    found
}

/// Whether every block of a head holds the values of its first.
fn blocks_are_equal(tensors: &[(String, Tensor)]) -> bool {
    let first = |name: &str| {
        let (head, rest) = name.split_once('.')?;
        let (_, part) = rest.split_once(".linear.")?;
        let first = format!("{head}.0.linear.{part}");
        tensors.iter().find(|(other, _)| *other == first).map(|(_, tensor)| tensor)
    };
    tensors.iter().all(|(name, value)| first(name).is_none_or(|first| first.equal(value)))
}
