//! Measurements of what exists: speed of targets, acceptance of drafts, the trees that decode fastest, what a GPU makes of it.

pub mod acceptance;
pub mod bench;
pub mod bench_train;
pub mod calibration;
pub mod gpu_check;
pub mod infilling;
pub mod pictures;
pub mod tune;
