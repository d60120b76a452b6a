//! specforge trains draft models for speculative decoding.
//!
//! The modules stand in layer order: a module uses only modules above it in this list, and modules on one layer do not
//! see each other. A test reads every `use` line and fails on an arrow that runs the other way.

// L0: errors, files, what the terminal and a page show, what libtorch is asked for directly
pub mod cuda_kernels;
pub mod device;
pub mod error;
pub mod files;
pub mod gguf;
pub mod html;
pub mod memory;
pub mod progress;
pub mod retry_after;
pub mod shim;
pub mod stop;
pub mod streams;
pub mod strict;
pub mod table;
pub mod threads;
// L1: mathematics, files and data, files of a hub, processes; no model names
pub mod data;
pub mod dist;
pub mod hub;
pub mod nn;
pub mod serving;
pub mod tree;
pub mod vocab;
pub mod weights;
// L2: targets
pub mod models;
// L3: what a target hands to a draft
pub mod features;
// L4: drafts
pub mod draft;
// L5: what a training run owns between its steps, and what it leaves behind
pub mod checkpoint;
pub mod export;
pub mod optim;
pub mod tracking;
// L6: the training loop; decoding; training of what image models are built on
pub mod decode;
pub mod images;
pub mod train;
// L7: what a target or a draft is worth; why two decodes differ; the processes of a run; clients over HTTP; draft and target
// on two machines
pub mod cloud;
pub mod eval;
pub mod launch;
pub mod server;
pub mod trace;
// L8: the sum of the rooms' own configurations; what is wrong with a draft beside its target
pub mod config;
pub mod doctor;
// L9: what a run will take
pub mod plan;
// L10: the command line
pub mod cli;
