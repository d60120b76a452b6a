//! The rotary embedding: base, scaling and share of each head, as trained and as an engine reads them.

use serde_json::Value;

use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::error::Result;
use crate::models::plain_model;
use crate::nn::RopeConfig;

const HINT: &str =
    "write the rotary keys of the training into config.json: rope_theta, rope_scaling and rope_parameters";

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let theirs = case.target.model.info().draft_template().rope;
    let trained = own.trained.as_ref().map(|shape| shape.layer.rope);
    // A part of each head that turns is another check than the rest: the reader below refuses it.
    let part = partial(&own.values).unwrap_or(1.0);
    match trained {
        Some(_) if part != 1.0 => found.fault(
            format!("`partial_rotary_factor` is {part}: an engine turns that share of each head, in training all of it turned"),
            "remove the key, or train with that share",
        ),
        None if part != partial(&case.target.values).unwrap_or(1.0) => {
            let target = partial(&case.target.values).unwrap_or(1.0);
            found.warning(
                format!("`partial_rotary_factor`: {part} of each head turns in the draft, {target} in the target"),
                "trainers that ignore the key turn all of it: write what was trained",
            );
        }
        _ => {}
    }
    if let (Some(older), Some(newer)) = (number(&own.values, "rope_theta"), inside(&own.values, "rope_theta"))
        && older != newer
    {
        found.fault(
            format!("`rope_theta` is {older}, `rope_parameters.rope_theta` {newer}: readers take one of them"),
            HINT,
        );
    }
    let mut values = own.values.clone();
    without_part(&mut values);
    let rope = match plain_model(&values) {
        Ok(model) => model.layer.rope,
        Err(problem) => {
            found.fault(format!("no rotary embedding follows from config.json: {problem}"), HINT);
            return Ok(());
        }
    };
    match trained {
        Some(trained) => {
            if rope.theta != trained.theta {
                found.fault(format!("base {}: the draft was trained with {}", rope.theta, trained.theta), HINT);
            }
            if rope.scaling != trained.scaling {
                found.fault(
                    format!("scaling {:?}: the draft was trained with {:?}", rope.scaling, trained.scaling),
                    HINT,
                );
            }
        }
        None if !same(&rope, &theirs) => found.warning(
            format!("{}; the target's: {}", show(&rope), show(&theirs)),
            "a draft may have its own, but mostly such keys were dropped on the way: see what the decode below finds",
        ),
        None => {}
    }
    if found.is_sound() {
        let target = if same(&rope, &theirs) { ", as the target's" } else { "; the target's is another" };
        let how = if trained.is_some() { ", as trained" } else { "" };
        found.ok(format!("{}{how}{target}", show(&rope)));
    }
    Ok(())
}

fn same(left: &RopeConfig, right: &RopeConfig) -> bool {
    left.theta == right.theta && left.scaling == right.scaling
}

fn show(rope: &RopeConfig) -> String {
    format!("base {}, {:?}", rope.theta, rope.scaling).to_lowercase()
}

fn number(values: &Value, key: &str) -> Option<f64> {
    values.get(key).and_then(Value::as_f64)
}

/// A key of one of the two rotary sections, the newer first.
fn inside(values: &Value, key: &str) -> Option<f64> {
    ["rope_parameters", "rope_scaling"].iter().find_map(|section| number(values.get(*section)?, key))
}

fn partial(values: &Value) -> Option<f64> {
    number(values, "partial_rotary_factor").or_else(|| inside(values, "partial_rotary_factor"))
}

fn without_part(values: &mut Value) {
    for section in ["rope_parameters", "rope_scaling"] {
        if let Some(keys) = values.get_mut(section).and_then(Value::as_object_mut) {
            keys.shift_remove("partial_rotary_factor");
        }
    }
}
