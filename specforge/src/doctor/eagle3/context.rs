//! The context length: engines size the draft's rotary tables by its config.json, and one fails past their end.

use serde_json::Value;

use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;

const KEY: &str = "max_position_embeddings";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let target = case.target.model.info().max_position_embeddings;
    let Some(length) = own.values.get(KEY).and_then(Value::as_i64) else {
        found.fault(format!("`{KEY}` is missing: engines take 2048"), format!("write the target's, {target}"));
        return Ok(());
    };
    if length < target {
        found.fault(
            format!("`{KEY}` is {length}, the target reads {target}: engines size rotary tables by it and fail past their end"),
            format!("write {target} into config.json; the length that was trained is another matter"),
        );
    } else {
        let trained = own.trained.as_ref().map(|shape| shape.max_position_embeddings);
        let trained = trained.map_or(String::new(), |trained| format!("; its own training went up to {trained}"));
        found.ok(format!("{length} tokens, the target reads {target}{trained}"));
    }
    Ok(())
}
