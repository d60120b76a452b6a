//! A drafter as it is written: its kind, its shape, and the keys of its head.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::head::Head;
use super::method::Method;
use crate::draft::block::config::BlockShape;

/// A drafter as a checkpoint describes it.
pub(super) struct Drafter {
    pub(super) method: Method,
    pub(super) shape: BlockShape,
    pub(super) head: Head,
}

/// What a checkpoint's description must have; the rest is training's business.
#[derive(Deserialize)]
struct Words {
    draft: Named,
    shape: BlockShape,
}

#[derive(Deserialize)]
struct Named {
    algorithm: String,
    #[serde(default)]
    head: Map<String, Value>,
}

impl Drafter {
    /// From `DraftModel::description`.
    pub(super) fn described(description: &Value) -> Result<Self, String> {
        let Words { draft, shape } = serde_path_to_error::deserialize(description)
            .map_err(|error| format!("`{}`: {}", error.path(), error.inner()))?;
        let method = Method::named(&draft.algorithm)
            .ok_or_else(|| format!("`draft.algorithm`: expected a block drafter, got {}", draft.algorithm))?;
        let mut head = Head::of_training(method, &draft.head)?;
        let mut shape = shape;
        // A number of the backbone that the selector's section has.
        if let Head::Selector(keys) = &mut head {
            if shape.input_embedding_scale == 1.0 {
                shape.input_embedding_scale = keys.input_embedding_scale;
            }
            keys.input_embedding_scale = shape.input_embedding_scale;
        }
        Ok(Self { method, shape, head })
    }
}
