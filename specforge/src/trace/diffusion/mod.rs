//! Why two decodes of a masked diffusion model differ: every pass over a block is recorded, two records are aligned by text, block
//! and pass, and passes without a cache say who left the path of the exact decoder.
//!
//! - `placed` is what rows of a text are kept in: they own their positions. `file` is the format and its reader, `recorder` its
//!   writer, a decoder's watcher.
//! - `finding` names what can be wrong; `structure` finds it inside one trace, `judge` asks the model, `compare` aligns two, `text`
//!   is the readable report.

pub mod compare;
pub mod file;
pub mod finding;
pub mod judge;
pub mod placed;
pub mod recorder;
pub mod structure;
mod text;

pub use compare::{DiffusionComparison, compare};
pub use file::{DiffusionHeader, DiffusionTrace};
pub use finding::{DiffusionFinding, DiffusionKind};
pub use judge::{DiffusionJudge, Left};
pub use placed::{OtherPlaces, Placed};
pub use recorder::DiffusionRecorder;
pub use text::text;

#[cfg(test)]
mod tests;
