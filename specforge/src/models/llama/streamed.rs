//! A Llama's layers one at a time, see [`crate::models::layerwise`].

use serde_json::Value;
use tch::{Device, Tensor};

use super::{Layer, build_layer, read};
use crate::error::{Error, Result};
use crate::models::GetTensor;
use crate::models::parts::{LoadedPart, Part, Passing};
use crate::nn::mask::Masks;
use crate::nn::{RmsNorm, Rope};

/// A layer, or the norm behind the last one.
pub(super) fn part(
    values: &Value,
    part: Part,
    device: Device,
    tensor: &mut GetTensor<'_>,
) -> Result<Box<dyn LoadedPart>> {
    let config = read(values)?;
    let shapes: std::collections::HashMap<String, Vec<i64>> = config.tensors().into_iter().collect();
    let mut get = |name: String| tensor(&name, &shapes[&name]);
    Ok(match part {
        Part::Layer(index) => {
            let rope = Rope::new(config.info().map_err(Error::Failed)?.template.rope, device);
            Box::new(OneLayer { layer: build_layer(&config, &format!("model.layers.{index}"), &mut get)?, rope })
        }
        Part::Norm => {
            let weight = get("model.norm.weight".to_owned())?;
            Box::new(LastNorm(RmsNorm { weight, epsilon: config.rms_norm_eps }))
        }
        Part::Embedding => return Err(Error::Failed("the embedding is no layer".to_owned())),
    })
}

/// A layer with what it shares with the others.
struct OneLayer {
    layer: Layer,
    rope: Rope,
}

/// The norm behind the last layer.
struct LastNorm(RmsNorm);

impl LoadedPart for OneLayer {
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let hidden = passing.hidden()?;
        let mut masks = Masks::new(passing.mask, passing.positions);
        let rope = self.rope.tables(passing.positions, hidden.kind());
        Ok(self.layer.forward(hidden, &rope, masks.of(None), None))
    }
}

impl LoadedPart for LastNorm {
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        Ok(self.0.forward(passing.hidden()?))
    }
}
