//! Loops of specforge that run over every number of a vocabulary, a parameter or a hidden state.
//!
//! They are a crate of their own because the profile that everything is built with optimises the program lightly, and these
//! fully (`Cargo.toml`). Nothing here is generic over what a caller passes: such code would be compiled, and optimised, with
//! the caller. What the loops mean stands where they are used: `nn::noise`, `nn::processors`, `features::store::float8`,
//! `decode::policy`.

pub mod float8;
pub mod noise;
pub mod rows;
