//! Integration tests: one binary, so that libtorch is linked once.

mod configuration;
mod goldens;
mod layers;
