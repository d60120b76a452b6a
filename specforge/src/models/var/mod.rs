//! VAR: a transformer that predicts an image scale by scale, all tokens of a scale at once.
//!
//! The input of a scale is the picture that the scales before it add up to, so a scale never sees its own tokens, and keys and
//! values of a scale do not depend on the tokens that are chosen for it. What turns tokens into that picture is the image
//! tokenizer's quantiser (`models/vqvae`).
//!
//! Paper: "Visual Autoregressive Modeling", arXiv 2404.02905. Reference: FoundationVision/VAR @78b9539.
//!
//! Shapes beside those of `nn`: `C` width, `L` tokens of an image, `F` tokens of its first scale, `Z` channels of a codebook
//! entry, `p` side of a scale.

pub mod block;
pub mod cache;
pub mod config;
pub mod load;
pub mod model;
pub mod training;

pub use block::BlockSteps;
pub use cache::ScaleCache;
pub use config::VarConfig;
pub use load::{LoadedVar, config_of, load_var, var_of};
pub use model::{Conditions, ScaleInput, Var};

#[cfg(test)]
pub(crate) mod tiny;
