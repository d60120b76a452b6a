//! Integration tests.
mod goldens;
