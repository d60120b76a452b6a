//! The text model inside a folder of several, which sees images or hears as well: its keys are a `text_config`, and its tensors
//! have a prefix. Its files are read as if it lay in a folder of its own; what belongs to the others is not there.

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::weights::WeightsFolder;

/// Prefixes of a text model's tensors, and what stands in their place in a folder of its own.
const PREFIXES: [(&str, &str); 4] = [
    ("language_model.model.", "model."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
];

/// Heads of a text model, beside those that have no prefix.
const HEADS: [&str; 2] = ["language_model.lm_head.", "model.language_model.lm_head."];

/// What stands beside a text model that has no prefix.
const OTHERS: [&str; 3] = ["visual.", "vision_tower.", "multi_modal_projector."];

/// What every text model has.
const SIGN: &str = "embed_tokens.weight";

/// Opens the weights of a Hugging Face folder, those of its text model where it has several.
pub fn open_weights(path: &Path) -> Result<WeightsFolder> {
    let weights = WeightsFolder::open(path)?;
    if weights.contains(&format!("model.{SIGN}")) {
        let is_other = |name: &str| OTHERS.iter().any(|other| name.starts_with(other));
        return Ok(weights.renamed(|name| (!is_other(name)).then(|| name.to_owned())));
    }
    let Some((prefix, own)) = PREFIXES.iter().find(|(prefix, _)| weights.contains(&format!("{prefix}{SIGN}"))) else {
        return Ok(weights);
    };
    Ok(weights.renamed(|name| {
        if let Some(rest) = name.strip_prefix(prefix) {
            return Some(format!("{own}{rest}"));
        }
        let head = HEADS.iter().find_map(|head| name.strip_prefix(head));
        head.or_else(|| name.strip_prefix("lm_head.")).map(|rest| format!("lm_head.{rest}"))
    }))
}

/// Keys of the text model of a configuration that has one.
pub fn keys(values: &Value) -> Option<&Value> {
    values.get("text_config").filter(|text| text.get("model_type").is_some_and(Value::is_string))
}

/// The keys of a text model with what they leave out. How its head is tied stands beside them, where it does, and what is
/// missing follows from its family.
pub fn filled(text: &Value, whole: &Value, defaults: Option<fn() -> Value>) -> Value {
    let mut filled = text.clone();
    if let Some(tied) = whole.get("tie_word_embeddings") {
        filled["tie_word_embeddings"] = tied.clone();
    }
    let defaults = defaults.map(|defaults| defaults());
    for (key, value) in defaults.iter().filter_map(Value::as_object).flatten() {
        if filled.get(key).is_none() {
            filled[key] = value.clone();
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::weights::write_tensors;

    #[test]
    fn tensors_of_the_text_model_alone_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let names = |names: &[&str]| {
            let tensor = |name: &&str| ((*name).to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
            let tensors: Vec<_> = names.iter().map(tensor).collect();
            write_tensors(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
            open_weights(folder.path()).unwrap().names().map(str::to_owned).collect::<Vec<_>>()
        };
        let want = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"];
        for (prefix, head) in [
            ("language_model.model", "language_model.lm_head.weight"),
            ("model.language_model", "lm_head.weight"),
            ("model.text_model", "lm_head.weight"),
        ] {
            let (table, norm) = (format!("{prefix}.embed_tokens.weight"), format!("{prefix}.norm.weight"));
            assert_eq!(names(&[head, &table, &norm, "vision_tower.norm.weight"]), want);
        }
        let bare = names(&["model.embed_tokens.weight", "x.weight", "visual.norm.weight"]);
        assert_eq!(bare, ["model.embed_tokens.weight", "x.weight"]);
    }

    #[test]
    fn what_a_text_model_leaves_out_is_filled_in() {
        let whole = json!({"tie_word_embeddings": true, "text_config":
            {"model_type": "x", "a": 1, "tie_word_embeddings": false}});
        let text = keys(&whole).unwrap();
        let filled = filled(text, &whole, Some(|| json!({"a": 2, "b": 3})));
        assert_eq!(filled, json!({"model_type": "x", "a": 1, "b": 3, "tie_word_embeddings": true}));
        assert!(keys(&json!({"text_config": {}})).is_none() && keys(&json!({})).is_none());
    }
}
