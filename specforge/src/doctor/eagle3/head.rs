//! The vocabulary projection: the draft's own, declared so that no engine puts the target's in its place.

use serde_json::Value;
use tch::{Device, Tensor};

use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;

/// Name of the projection.
pub const HEAD: &str = "lm_head.weight";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let tied = own.values.get("tie_word_embeddings") == Some(&Value::Bool(true));
    let Some(head) = case.folder.tensors.get(HEAD) else {
        let how = if tied { ", and `tie_word_embeddings` is true" } else { "" };
        found.fault(
            format!(
                "there is no `{HEAD}`{how}: engines take the target's projection, the draft was trained with its own"
            ),
            "export the checkpoint again",
        );
        return Ok(());
    };
    if tied {
        found.fault(
            format!(
                "`tie_word_embeddings` is true: engines put the embedding in the place of `{HEAD}`, which was trained"
            ),
            "write false into config.json",
        );
    }
    if own.values.get("draft_vocab_size").is_none_or(Value::is_null) {
        found.fault(
            format!(
                "`draft_vocab_size` is missing: sglang then takes the target's projection and passes over `{HEAD}`"
            ),
            "write the number of rows of the projection into config.json",
        );
    }
    if is_the_targets(case, head)? {
        let trained = case.origin.as_ref().and_then(|origin| origin.tensor(HEAD));
        let text = format!("`{HEAD}` holds the target's own rows");
        match trained {
            Some(trained) if !head.equal(&trained.f_to_kind(head.kind())?) => found.fault(
                format!("{text}; what was trained is something else"),
                "export the checkpoint again: a tool wrote the target's projection over it",
            ),
            _ => found.warning(text, "either it was never trained, or a tool wrote the target's projection over it"),
        }
    }
    if found.is_sound() {
        found.ok(format!("its own, {:?}, not tied", head.size()));
    }
    Ok(())
}

/// Whether a projection is that of the target, as far as its element type tells.
fn is_the_targets(case: &Case<'_>, head: &Tensor) -> Result<bool> {
    let theirs = case.target.model.head();
    let own = case.eagle3.as_ref().and_then(|own| own.imported.as_ref().ok());
    let ids = match own.and_then(|own| own.vocabulary.as_ref()) {
        Some(map) if Some(&map.target_size()) == theirs.weight.size().first() => {
            Some(Tensor::from_slice(map.target_ids()))
        }
        Some(_) => return Ok(false),
        None if head.size() == theirs.weight.size() => None,
        None => return Ok(false),
    };
    let weight = match ids {
        Some(ids) => theirs.weight.f_index_select(0, &ids.to_device(theirs.device()))?,
        None => theirs.weight.shallow_clone(),
    };
    if weight.size() != head.size() {
        return Ok(false);
    }
    Ok(weight.f_to_device(Device::Cpu)?.f_to_kind(head.kind())?.equal(head))
}
