//! Integration tests: one binary, so that libtorch is linked once.

// A test that fails is what unwrapping is for; clippy knows that of the test functions, not of their helpers.
#![allow(clippy::unwrap_used)]

mod anchors;
mod bad_input;
mod block_configuration;
mod block_exports;
mod block_imports;
mod block_runs;
mod cli;
mod cloud;
mod configuration;
mod data_parallel;
mod decoding;
mod diffusion;
mod doctor;
mod draft_contract;
mod eagle3;
mod eagle3_exports;
mod eagle3_imports;
mod eagle3_runs;
mod exports;
mod families;
mod family_runs;
mod fixture;
mod gguf_drafts;
mod gguf_targets;
mod goldens;
mod gpu_check;
mod http_server;
#[cfg(feature = "hub")]
mod hub;
mod images;
mod launch;
mod layers;
mod looking;
mod medusa;
mod narrow_gradients;
mod parallel;
mod peagle_exports;
mod peagle_runs;
mod plugin_runs;
mod plugins;
mod processes;
mod quantised_targets;
mod regeneration;
mod rehearsal;
mod resume;
mod serve;
mod served_regeneration;
mod shared_data;
mod sharing;
mod signals;
mod small_drafts;
mod smollm2_decoding;
mod stopping;
mod store;
mod target_rules;
mod tracing;
mod training;
mod tree;
mod tuning;
mod vocab;
mod vqvae_files;
mod windowed;
mod windowed_runs;
