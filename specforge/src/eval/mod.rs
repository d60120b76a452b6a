//! Measurements of what exists: speed of targets, acceptance of drafts.

pub mod bench;
