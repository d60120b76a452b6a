//! Whether the token ids in config.json are tokens of the target: an engine looks each of them up in its embedding.

use serde_json::Value;

use super::case::Case;
use super::finding::Findings;
use crate::error::Result;

/// Keys that hold one id or a list.
const KEYS: [&str; 8] = [
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "mask_token_id",
    "pard_token",
    "ptd_token_id",
    "anchor_token_id",
    "noise_token_id",
];

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let rows = case.target.model.info().vocab_size;
    let mut seen = 0;
    for (key, id) in ids("", &case.folder.config) {
        seen += 1;
        if !(0..rows).contains(&id) {
            found.fault(
                format!("`{key}` is {id}: the target's embedding has rows 0 to {}", rows - 1),
                "name a token that the target has; a mask token must be one of its rows",
            );
        }
    }
    let ends = case.target.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.eos_token_ids());
    let own: Vec<i64> = ids("", &case.folder.config)
        .into_iter()
        .filter(|(key, _)| key.ends_with("eos_token_id"))
        .map(|(_, id)| id)
        .collect();
    if !own.is_empty() && !ends.is_empty() && !own.iter().any(|id| ends.iter().any(|end| i64::from(*end) == *id)) {
        found.warning(
            format!("`eos_token_id` is {own:?}, the target's turns end with {ends:?}"),
            "write the target's ids: some engines stop where the draft's config says so",
        );
    }
    if found.is_sound() && seen > 0 {
        found.ok(format!("all {seen} token ids of config.json are tokens of the target"));
    }
    Ok(())
}

/// Every id under one of the keys, at any depth, with its dotted name. Nothing is no id.
fn ids(prefix: &str, value: &Value) -> Vec<(String, i64)> {
    let mut found = Vec::new();
    for (key, value) in value.as_object().into_iter().flatten() {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if !KEYS.contains(&key.as_str()) {
            found.extend(ids(&name, value));
            continue;
        }
        let listed = value.as_array().map_or_else(|| vec![value], |list| list.iter().collect());
        found.extend(listed.into_iter().filter_map(Value::as_i64).map(|id| (name.clone(), id)));
    }
    found
}
