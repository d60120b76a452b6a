//! Why two decodes differ: a decode is recorded position by position, two records are aligned, and a forward pass
//! without a cache says which of them is wrong.
//!
//! - `file` is the format and its reader, `recorder` its writer, an engine's listener; `metrics` how rows are compared.
//! - `finding` names what can be wrong; `structure` finds it inside one trace, `compare` and `draft` align two, `judge` asks the target,
//!   `text` is the readable report.
//! - `scales` does the same for images, whose unit is a scale, and `diffusion` for masked diffusion models, whose unit is a pass over
//!   a block. `lines` is what the files of all three have in common.

pub mod compare;
pub mod diffusion;
mod draft;
pub mod file;
pub mod finding;
pub mod judge;
mod lines;
pub mod metrics;
pub mod recorder;
pub mod scales;
pub mod structure;
pub mod text;

pub use compare::{Comparison, Verdict, compare};
pub use file::{Header, ModelName, Settings, Trace};
pub use finding::{Finding, Kind, Side};
pub use judge::Judge;
pub use recorder::Recorder;

#[cfg(test)]
mod tests;
