//! Names of tensors that models of decoder layers share, and how they are asked for.

use tch::Tensor;

use crate::error::Result;
use crate::nn::Linear;

/// Names of tensors with their shapes.
pub type Shapes = Vec<(String, Vec<i64>)>;

/// Gives a tensor by its name.
pub type GetPart<'a> = dyn FnMut(&str) -> Result<Tensor> + 'a;

/// Name of the token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the vocabulary projection, where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";
/// Name of the norm behind the last layer.
pub const NORM: &str = "model.norm.weight";

/// How a family spells what the others call by the names of this file.
#[derive(Debug, Clone, Copy)]
pub struct Spelling {
    /// Its own name of a tensor, from the usual one.
    pub tensor: fn(&str) -> String,
    /// Its key that says whether the head is the embedding.
    pub tied: &'static str,
}

impl Spelling {
    /// That of most families.
    pub const USUAL: Self = Self { tensor: str::to_owned, tied: "tie_word_embeddings" };

    /// The embedding's name.
    pub fn embedding(&self) -> String {
        (self.tensor)(EMBEDDING)
    }

    /// The head's.
    pub fn head(&self) -> String {
        (self.tensor)(HEAD)
    }
}

/// What stands before the names of a layer's tensors.
pub fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// A linear layer of a name.
pub fn linear(name: &str, bias: bool, get: &mut GetPart<'_>) -> Result<Linear> {
    let weight = get(&format!("{name}.weight"))?;
    let bias = if bias { Some(get(&format!("{name}.bias"))?) } else { None };
    Ok(Linear { weight, bias })
}
