//! Measurements of what exists: speed of targets, acceptance of drafts, what a GPU makes of both.

pub mod acceptance;
pub mod bench;
pub mod bench_train;
pub mod calibration;
pub mod gpu_check;
<<<<<<< HEAD
pub mod pictures;
=======
pub mod infilling;
>>>>>>> diffusion
