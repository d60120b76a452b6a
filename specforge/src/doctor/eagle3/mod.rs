//! What is looked at in EAGLE-3 drafts alone: what their config.json says and what engines make of it.
//!
//! Shape legend: `H` hidden size, `TH` the target's, `V` vocabulary, `DV` the draft's own.

use serde_json::Value;
use tch::Tensor;

use super::folder::{Folder, words};
use super::origin::Origin;
use crate::draft::eagle3::Eagle3Shape;
use crate::draft::eagle3::layers::Network;
use crate::draft::{Parameter, ParameterGroup};
use crate::error::Result;
use crate::export;
use crate::export::eagle3::Imported;
use crate::models::TargetModel;

pub mod context;
pub mod head;
pub mod hypotheses;
pub mod layers;
pub mod logits;
pub mod norms;
pub mod rope;
pub mod tensors;
pub mod vocabulary;

/// An EAGLE-3 draft, as far as its files say it.
#[derive(Debug)]
pub struct Eagle3 {
    /// config.json as engines see it: of the speculators layout, flattened.
    pub values: Value,
    /// The architecture that config.json describes, or why it describes none.
    pub shape: Result<Eagle3Shape, String>,
    /// The draft as this program reads it, or why it does not.
    pub imported: Result<Imported, String>,
    /// The architecture it was trained with, where that is known.
    pub trained: Option<Eagle3Shape>,
}

impl Eagle3 {
    /// What a folder holds, if it is one. The folder's tensors get the names of training.
    pub fn of(folder: &mut Folder, num_target_layers: usize, origin: Option<&Origin>) -> Option<Self> {
        let formats = [export::eagle3::RAW.name, export::eagle3::SPECULATORS.name];
        let named = folder.format.is_some_and(|format| formats.contains(&format));
        let tensors: Vec<(String, Tensor)> = std::mem::take(&mut folder.tensors).into_iter().collect();
        let renamed = |name: &str| export::eagle3::trained_name(name);
        let looks = ["fc.weight", "midlayer.self_attn.q_proj.weight"];
        let looks = looks.iter().all(|want| tensors.iter().any(|(name, _)| renamed(name) == *want));
        if !(named || looks && folder.format.is_none()) {
            folder.tensors = tensors.into_iter().collect();
            return None;
        }
        folder.tensors = tensors.into_iter().map(|(name, tensor)| (renamed(&name), tensor)).collect();
        let read = export::eagle3::read(&folder.path, Some(num_target_layers));
        Some(Self {
            values: flattened(&folder.config),
            shape: export::eagle3::read_shape(&folder.path, Some(num_target_layers)).map_err(|error| words(&error)),
            imported: read.map_err(|error| words(&error)),
            trained: origin.and_then(|origin| Eagle3Shape::from_description(&origin.description).ok()),
        })
    }

    /// The architecture to go by: what was trained, else what config.json says.
    pub fn meant(&self) -> Option<&Eagle3Shape> {
        self.trained.as_ref().or(self.shape.as_ref().ok())
    }
}

/// What engines see of a configuration whose layer has a section of its own.
fn flattened(config: &Value) -> Value {
    let Some(Value::Object(layer)) = config.get("transformer_layer_config") else {
        return config.clone();
    };
    let mut values = layer.clone();
    for (key, value) in config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        values.insert(key.clone(), value.clone());
    }
    Value::Object(values)
}

/// A network of a shape and tensors of these names, beside a target.
pub fn network(shape: &Eagle3Shape, tensors: &[(String, Tensor)], target: &dyn TargetModel) -> Result<Network> {
    let (kind, device) = (target.kind(), target.device());
    let mut parameters = Vec::new();
    for (name, value) in tensors.iter().filter(|(_, value)| value.is_floating_point()) {
        let value = value.detach().f_to_device(device)?.f_to_kind(kind)?;
        parameters.push(Parameter { name: name.clone(), group: ParameterGroup::of_shape(&value.size()), value });
    }
    Network::new(shape, &parameters, &target.embedding().table.f_to_device(device)?.detach(), device)
}
