//! Whether the target is the one the draft was trained for: by its content where that was noted, else by name and sizes.

use std::path::Path;

use serde_json::Value;

use super::case::Case;
use super::finding::Findings;
use crate::checkpoint::inputs;
use crate::error::Result;
use crate::files::Digests;
use crate::models::TargetIdentity;

const HINT: &str = "serve the draft beside the target it was trained for, or train one for this target";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    sizes(case, found);
    let noted = |input: inputs::Input| case.origin.as_ref().and_then(|origin| origin.inputs.get(input.name));
    if let Some(weights) = noted(inputs::TARGET_WEIGHTS) {
        let identity = TargetIdentity::read_whole(case.target.path, &Digests::unnoted(), &|_, _| ())?;
        match identity.content.as_ref() == Some(weights) {
            true => found.ok("every number of the target is the one of the training"),
            false => found.fault("the target's weights are others than the draft was trained for", HINT),
        }
        if noted(inputs::TARGET_CONFIG).is_some_and(|config| *config != identity.config) {
            found.warning(
                "the target's config.json was changed since the training",
                "compare it with the one of the training: rotary keys and lengths matter",
            );
        }
        return Ok(());
    }
    named(case, found)
}

/// Width and vocabulary, as far as config.json says them.
fn sizes(case: &Case<'_>, found: &mut Findings) {
    let Some(own) = &case.eagle3 else { return };
    let info = case.target.model.info();
    let number = |key: &str| own.values.get(key).and_then(Value::as_i64);
    let width = number("target_hidden_size").or_else(|| number("hidden_size"));
    for (what, draft, target) in
        [("hidden size", width, info.hidden_size), ("vocabulary", number("vocab_size"), info.vocab_size)]
    {
        if let Some(draft) = draft.filter(|&draft| draft != target) {
            found.fault(format!("{what}: the target has {target}, the draft was made for {draft}"), HINT);
        }
    }
}

/// The target that config.json names, where it is here.
fn named(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let config = &case.folder.config;
    let name =
        config.pointer("/speculators_config/verifier/name_or_path").or_else(|| config.get("base_model_name_or_path"));
    let Some(name) = name.and_then(Value::as_str).filter(|name| !name.is_empty()) else {
        found.ok("nothing says which target the draft was trained for");
        return Ok(());
    };
    let folder = Path::new(name);
    if !folder.join("config.json").is_file() {
        found.ok(format!("was trained for {name}, which is not here to compare"));
        return Ok(());
    }
    let Ok(theirs) = TargetIdentity::read(folder) else {
        found.ok(format!("was trained for {name}, whose files cannot be read here"));
        return Ok(());
    };
    let differences = theirs.differences(&TargetIdentity::read(case.target.path)?);
    match differences.is_empty() {
        true => found.ok(format!("is {name}, as config.json says")),
        false => found
            .fault(format!("was trained for {name}, which differs from this target: {}", differences.join(", ")), HINT),
    }
    Ok(())
}
