//! gRPC: one bidirectional stream a connection, over tonic, with TLS where both sides have certificates for it.
//!
//! [`serve`] keeps a cloud on the thread that calls it, with the network on threads of its own; [`GrpcLink`] is an edge's way
//! to it. `messages` is `proto/cloud.proto` in Rust, `wire` its meaning.

mod client;
mod messages;
mod server;
mod service;
mod wire;

pub use client::{GrpcLink, Place};
pub use server::{ServeOptions, Served, ServerTls, serve};
