//! specforge trains draft models for speculative decoding.
//!
//! The modules stand in layer order: a module uses only modules above it in this list, and modules on one layer do not
//! see each other. A test reads every `use` line and fails on an arrow that runs the other way.

// L0
pub mod error;
pub mod files;
pub mod progress;
pub mod shim;
// L1: mathematics, files and data; no model names
pub mod nn;
pub mod weights;
// L2: targets
pub mod models;
// L5: what a training run owns between its steps
pub mod checkpoint;
pub mod optim;
pub mod tracking;
