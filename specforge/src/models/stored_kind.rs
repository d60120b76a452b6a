//! The element type that a model was published in.

use std::path::Path;

use tch::Kind;

use super::text_model::open_weights;
use crate::error::Result;

/// The floating-point type that most numbers of a model folder are stored in; float32 where none are. Reads headers alone.
pub fn stored_kind(path: &Path) -> Result<Kind> {
    let weights = open_weights(path)?;
    let mut counts = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double].map(|kind| (kind, 0));
    for name in weights.names() {
        let (kind, shape) = (weights.kind(name), weights.shape(name).unwrap_or_default());
        if let Some((_, count)) = counts.iter_mut().find(|(counted, _)| Some(*counted) == kind) {
            *count += shape.iter().product::<i64>();
        }
    }
    // The first of equals, so that an empty folder is one of float32.
    let most = counts.iter().map(|(_, count)| *count).max();
    Ok(counts.into_iter().find(|(_, count)| Some(*count) == most).map_or(Kind::Float, |(kind, _)| kind))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;
    use crate::weights::write_tensors;

    #[test]
    fn most_numbers_decide() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let of = |sizes: &[(Kind, i64)]| {
            let tensor = |(index, &(kind, size)): (usize, &(Kind, i64))| {
                (format!("t{index}"), Tensor::zeros([size], (kind, Device::Cpu)))
            };
            write_tensors(&path, &sizes.iter().enumerate().map(tensor).collect::<Vec<_>>(), &[]).unwrap();
            stored_kind(folder.path()).unwrap()
        };
        assert_eq!(of(&[(Kind::Float, 9), (Kind::BFloat16, 5), (Kind::BFloat16, 5)]), Kind::BFloat16);
        assert_eq!(of(&[(Kind::Half, 6), (Kind::Float, 5), (Kind::Int64, 100)]), Kind::Half);
        assert_eq!(of(&[(Kind::Int64, 100)]), Kind::Float);
        assert!(stored_kind(&folder.path().join("nowhere")).is_err());
    }
}
