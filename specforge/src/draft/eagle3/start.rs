//! A draft that starts from one of the target's own layers (`draft.layer_from`).
//!
//! The first layer is the target's on the side of the feature and blind to the embedding: its queries, keys and values begin
//! with zeros there. What it reads is the last captured state, through an identity beside the usual noise in `fc`. So what
//! the draft says at first is near what the target's layer would, and it learns the rest.
//!
//! Shape legend: `H` hidden size, `C` captured layers.

use tch::Tensor;

use super::Eagle3Shape;
use crate::draft::DraftContext;
use crate::error::{Error, Result};

/// What a tensor of the draft starts from, in the draft's element type; `usual` makes what it would otherwise be.
pub(super) fn value(
    context: &DraftContext<'_>,
    layer: usize,
    (name, shape): (&str, &[i64]),
    usual: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let of_layer = |part: &str, shape: &[i64]| {
        Ok::<_, Error>(context.target_parameter(&format!("model.layers.{layer}.{part}"), shape)?.value)
    };
    if name == "fc.weight" {
        let value = usual()?; // [H, C H]
        let (rows, columns) = (shape[0], shape[1]);
        let mut last = value.narrow(1, columns - rows, rows);
        let _ = last.f_add_(&Tensor::f_eye(rows, (value.kind(), value.device()))?)?;
        return Ok(value);
    }
    let Some(part) = name.strip_prefix(&format!("{}.", Eagle3Shape::layer_prefix(0))) else {
        return usual();
    };
    match part {
        "hidden_norm.weight" => of_layer("input_layernorm.weight", shape),
        "input_layernorm.weight" => usual(),
        "self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => {
            let feature = of_layer(part, &[shape[0], shape[1] / 2])?;
            Ok(Tensor::f_cat(&[&feature.f_zeros_like()?, &feature], 1)?)
        }
        _ => of_layer(part, shape),
    }
}
