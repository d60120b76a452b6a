//! Which layers of the target each engine hands to the draft: two keys of one name hold two conventions, and a draft on the
//! neighbouring layer guesses a little worse or not at all.

use serde_json::Value;

use super::Eagle3;
use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;
use crate::export::eagle3::{default_capture, inputs_of};

const KEY: &str = "eagle_aux_hidden_state_layer_ids";
const HINT: &str = "write the layers' inputs into `eagle_aux_hidden_state_layer_ids`, and one less each into the key of that \
                    name in `eagle_config`; `specforge export` writes both";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let info = case.target.model.info();
    let layers = info.num_layers();
    let (top, nested) = keys(own);
    let trained = own.trained.as_ref().map(|shape| shape.capture.clone());
    let guess = default_capture(layers);
    if top.is_none() && nested.is_none() {
        let taken = guess.as_ref().map_or("none".to_owned(), |guess| format!("{guess:?}"));
        let text =
            format!("config.json names no captured layers: engines take their default, what layers {taken} read");
        match &trained {
            Some(trained) if guess.as_ref() != Some(trained) => {
                found.fault(format!("{text}; the draft was trained on {trained:?}"), HINT);
            }
            _ => found.warning(text, HINT),
        }
        return Ok(());
    }
    let alone = own.values.get("speculators_model_type").is_some();
    let mut engines = vec![("vllm", top.clone().or(nested.clone()).and_then(|ids| positive(&ids)))];
    if !alone {
        engines.push(("sglang", nested.as_ref().map_or(guess, |ids| inputs_of(ids))));
    }
    for (engine, taken) in &engines {
        let Some(taken) = taken else {
            found.fault(format!("{engine} finds no layers in the two keys: {top:?} and {nested:?}"), HINT);
            continue;
        };
        if let Some(trained) = trained.as_ref().filter(|trained| *trained != taken) {
            found.fault(
                format!("{engine} hands over what layers {taken:?} read, the draft was trained on {trained:?}"),
                HINT,
            );
        }
        if let Some(beyond) = taken.iter().find(|&&layer| layer >= layers) {
            let text =
                format!("{engine} is asked for what layer {beyond} reads; the target has layers 0 to {}", layers - 1);
            found.fault(text, HINT);
        }
        let wide = case.folder.tensors.get("fc.weight").map(|tensor| tensor.size());
        if let Some(&[_, wide]) = wide.as_deref()
            && wide != taken.len() as i64 * info.hidden_size
        {
            let text = format!(
                "{engine} hands over {} layers of {}, `fc.weight` reads {wide} values",
                taken.len(),
                info.hidden_size
            );
            found.fault(text, HINT);
        }
    }
    if let [(one, left), (other, right)] = engines.as_slice()
        && left != right
        && trained.is_none()
    {
        let show =
            |layers: &Option<Vec<usize>>| layers.as_ref().map_or("none".to_owned(), |layers| format!("{layers:?}"));
        found.fault(
            format!("the two keys disagree: {one} takes what layers {} read, {other} {}", show(left), show(right)),
            HINT,
        );
    }
    if found.is_sound() {
        let taken = engines[0].1.clone().unwrap_or_default();
        let how = if trained.is_some() { "as trained" } else { "in both keys alike" };
        found.ok(format!("what layers {taken:?} of {layers} read (hidden_states index), {how}"));
    }
    Ok(())
}

/// The key beside `eagle_config` and the one in it, where they hold something.
fn keys(own: &Eagle3) -> (Option<Vec<i64>>, Option<Vec<i64>>) {
    let ids = |value: Option<&Value>| {
        let list = value.and_then(Value::as_array).filter(|list| !list.is_empty())?;
        list.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>()
    };
    let nested = own.values.get("eagle_config").and_then(|section| section.get(KEY));
    (ids(own.values.get(KEY)), ids(nested))
}

fn positive(ids: &[i64]) -> Option<Vec<usize>> {
    ids.iter().map(|&id| usize::try_from(id).ok()).collect()
}
