//! Checkpoints: folders that appear whole or not at all, a store that keeps the right ones, and exact resume.
//!
//! ```text
//! checkpoints/
//!   step-00000040/  manifest.json  model.safetensors  optimizer.safetensors
//!   step-00000080/  ...
//!   best.json       which of them is best by the chosen metric
//!   set-aside-1/    what came after a checkpoint that the run went back to
//!   .lock           held by the run that writes here
//! ```

pub mod behind;
pub mod choice;
pub mod inputs;
pub mod manifest;
pub mod retention;
pub mod scan;
pub mod store;

pub use behind::{Saver, Tensors};
pub use choice::Choice;
pub use inputs::{Input, Inputs};
pub use manifest::{Checkpoint, FileDigest, Manifest, Measurements, OpenWindow, Versions, read};
pub use retention::{Direction, RetentionConfig};
pub use scan::{Found, Scan, find, scan};
pub use store::{CheckpointStore, Saved};
