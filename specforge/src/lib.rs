//! specforge trains draft models for speculative decoding.
//!
//! The modules stand in layer order: a module uses only modules above it in this list, and modules on one layer do not
//! see each other. A test reads every `use` line and fails on an arrow that runs the other way.

// L0
pub mod error;
pub mod files;
// L1: mathematics, files and data; no model names
pub mod nn;
pub mod weights;
// L2: targets
pub mod models;
// L7: what the rest is worth
pub mod eval;
