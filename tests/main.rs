//! Integration tests: one binary, so that libtorch is linked once.

mod bad_input;
mod cli;
mod configuration;
mod exports;
mod fixture;
mod goldens;
mod layers;
mod medusa;
mod resume;
mod training;
