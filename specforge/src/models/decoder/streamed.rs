//! Layers of a model of decoder layers one at a time, see [`crate::models::layerwise`].

use tch::{Device, Tensor};

use super::design::Design;
use super::names::NORM;
use super::rope_of;
use crate::error::{Error, Result};
use crate::models::GetTensor;
use crate::models::parts::{LoadedPart, Part, Passing};
use crate::nn::mask::Masks;
use crate::nn::{DecoderLayer, RmsNorm, Rope};

/// A layer, or the norm behind the last one.
pub(super) fn part(
    design: &Design,
    part: Part,
    device: Device,
    tensor: &mut GetTensor<'_>,
) -> Result<Box<dyn LoadedPart>> {
    let shapes = design.shapes();
    let mut get = |name: &str| {
        let name = (design.spelling.tensor)(name);
        tensor(&name, &shapes[&name])
    };
    Ok(match part {
        Part::Layer(index) => {
            let layer = design.build_layer(index, &mut get)?;
            let rope = layer.rope.map(|rope| rope_of(&design.ropes[rope], device));
            Box::new(OneLayer { layer, rope })
        }
        Part::Norm => Box::new(LastNorm(design.norm(get(NORM)?))),
        Part::Embedding => return Err(Error::Failed("the embedding is no layer".to_owned())),
    })
}

/// A layer with what it shares with the others.
struct OneLayer {
    layer: DecoderLayer,
    rope: Option<Rope>,
}

/// The norm behind the last layer.
struct LastNorm(RmsNorm);

impl LoadedPart for OneLayer {
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let hidden = passing.hidden()?;
        let mut masks = Masks::new(passing.mask, passing.positions);
        let rope = self.rope.as_ref().map(|rope| rope.tables(passing.positions, hidden.kind()));
        Ok(self.layer.forward(hidden, rope.as_ref(), masks.of(self.layer.window), None))
    }
}

impl LoadedPart for LastNorm {
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        Ok(self.0.forward(passing.hidden()?))
    }
}
