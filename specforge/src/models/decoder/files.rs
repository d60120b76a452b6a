//! The files of a model of decoder layers: whether they are its own, and what they say better than config.json.

use tch::{Device, Kind, Tensor};

use super::design::{Design, Sizes};
use crate::error::Result;
use crate::models::rope_keys::RopeDesign;
use crate::nn::{RopeConfig, RopeScaling};
use crate::weights::{WeightsFolder, is_old_buffer};

/// Refuses files whose tensors are not this model's, by their headers alone. A tied head may be there and must fit.
pub fn check(design: &Design, weights: &WeightsFolder) -> Result<()> {
    let tied = design.sizes.tied && !weights.contains(&design.spelling.head());
    let expected = Design { sizes: Sizes { tied, ..design.sizes.clone() }, ..design.clone() }.tensors();
    weights.check_numbers(&expected)?;
    weights.check(&expected, is_old_buffer)
}

/// Whether the head is the embedding by checked files, and what a user should know: a file's head that is not the
/// embedding counts, whatever config.json says of it, as with other readers.
pub fn fit(design: &Design, weights: &WeightsFolder) -> Result<(bool, Vec<String>)> {
    let mut warnings: Vec<String> = other_frequencies(design, weights)?.into_iter().collect();
    let (head, embedding) = (design.spelling.head(), design.spelling.embedding());
    if design.sizes.tied && weights.contains(&head) && !weights.same_content(&head, &embedding)? {
        warnings.push(format!(
            "{}: config.json says that the head is the embedding, but `{head}` holds other numbers: they are used",
            weights.path().display()
        ));
        return Ok((false, warnings));
    }
    Ok((design.sizes.tied, warnings))
}

/// What old rotary buffers say, where that is not what the configuration says, which counts.
fn other_frequencies(design: &Design, weights: &WeightsFolder) -> Result<Option<String>> {
    let [RopeDesign::Plain(rope)] = design.ropes.as_slice() else { return Ok(None) };
    // Before it was decided that they are of no use, they were stored with and without the scaling.
    let plain = RopeConfig { scaling: RopeScaling::Default, ..*rope };
    let known = [*rope, plain].map(|rope| rope.frequencies());
    let mut seen: Option<&[u8]> = None;
    for name in weights.names().filter(|name| is_old_buffer(name)) {
        let bytes = weights.bytes(name);
        if bytes.is_some() && bytes == seen {
            continue;
        }
        seen = bytes;
        let is_short = weights.kind(name).is_some_and(|kind| kind.elt_size_in_bytes() < 4);
        let (share, least) = if is_short { (0.05, 1e-6) } else { (1e-4, 1e-12) };
        let is_known = |values: &Tensor, known: &Tensor| {
            values.size() == known.size() && values.allclose(known, share, least, false)
        };
        let values = weights.load(name, Kind::Float, Device::Cpu);
        if !values.is_ok_and(|values| known.iter().any(|known| is_known(&values, known))) {
            let folder = weights.path().display();
            return Ok(Some(format!(
                "{folder}: `{name}` holds other frequencies than follow from config.json, which counts"
            )));
        }
    }
    Ok(None)
}
