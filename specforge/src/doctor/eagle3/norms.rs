//! Norms and sizes that config.json decides: flags against the tensors and the training. Trainers and engines give them
//! different defaults.

use crate::doctor::case::Case;
use crate::doctor::finding::Findings;
use crate::draft::eagle3::Eagle3Shape;
use crate::error::Result;

/// See the file's own words.
pub fn look(case: &Case<'_>, found: &mut Findings) -> Result<()> {
    let Some(own) = &case.eagle3 else { return Ok(()) };
    let Ok(shape) = &own.shape else { return Ok(()) };
    let holds = |prefix: &str| case.folder.tensors.keys().any(|name| name.starts_with(prefix));
    for (key, flag, tensor) in
        [("fc_norm", shape.fc_norm, "fc_norm."), ("norm_before_fc", shape.norm_before_fc, "input_norm.")]
    {
        if holds(tensor) != flag {
            let there = if flag { "not there" } else { "there" };
            found.fault(
                format!("`{key}` is {flag}, but the tensors `{tensor}*` are {there}"),
                "write the flag of the training into config.json",
            );
        }
    }
    if let Some(trained) = &own.trained {
        for (key, got, want) in flags(shape, trained).into_iter().filter(|(_, got, want)| got != want) {
            found.fault(format!("`{key}` is {got}: the draft was trained with {want}"), "write it into config.json");
        }
    }
    if found.is_sound() {
        let how = if own.trained.is_some() { "as trained" } else { "as the tensors are" };
        let on: Vec<&str> =
            flags(shape, shape).into_iter().filter(|(_, got, _)| got == "true").map(|(key, ..)| key).collect();
        let on = if on.is_empty() { "no optional norm".to_owned() } else { on.join(", ") };
        found.ok(format!("{on}, {how}"));
    }
    Ok(())
}

/// What the two say of each key.
fn flags(left: &Eagle3Shape, right: &Eagle3Shape) -> Vec<(&'static str, String, String)> {
    let pair = |key: &'static str, of: &dyn Fn(&Eagle3Shape) -> String| (key, of(left), of(right));
    vec![
        pair("fc_norm", &|shape| shape.fc_norm.to_string()),
        pair("norm_before_fc", &|shape| shape.norm_before_fc.to_string()),
        pair("norm_before_residual", &|shape| shape.norm_before_residual.to_string()),
        pair("norm_feedback", &|shape| shape.norm_feedback.to_string()),
        pair("rms_norm_eps", &|shape| shape.layer.rms_norm_eps.to_string()),
        pair("num_attention_heads", &|shape| shape.layer.num_attention_heads.to_string()),
        pair("num_key_value_heads", &|shape| shape.layer.num_key_value_heads.to_string()),
        pair("head_dim", &|shape| shape.layer.head_dim.to_string()),
    ]
}
