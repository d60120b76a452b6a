//! Why two decodes of images differ: every committed scale is recorded, two records are aligned by image, scale and position,
//! and a teacher-forced pass over what was committed says which of them is wrong.
//!
//! - `file` is the format and its reader, `recorder` its writer.
//! - `finding` names what can be wrong; `structure` finds it inside one trace, `judge` asks the target, `compare` aligns two and
//!   says it in words.

pub mod compare;
pub mod file;
pub mod finding;
pub mod judge;
pub mod recorder;
pub mod structure;

pub use compare::{ScaleComparison, compare, text};
pub use file::{ScaleHeader, ScaleTrace};
pub use finding::{ScaleFinding, ScaleKind};
pub use judge::ScaleJudge;
pub use recorder::ScaleRecorder;

#[cfg(test)]
mod tests;
