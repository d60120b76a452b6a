//! Integration tests: one binary, so that libtorch is linked once.

mod goldens;
mod layers;
