//! Integration tests.

mod goldens;
