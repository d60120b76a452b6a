//! The `specforge` command with what `mod.rs` lists: whole runs of it, in as many processes as they take.

// What is added cannot be refused; and tests use more of it than this program.
#![allow(clippy::unwrap_used, dead_code)]

use std::path::Path;
use std::process::ExitCode;

use specforge::cloud::grpc::{ServeOptions, ServerTls, serve};
use specforge::cloud::{Cloud, CloudSettings};
use specforge::data::ChatTokenizer;
use specforge::models;
use specforge::stop::Stop;

#[path = "mod.rs"]
mod plugins;

fn main() -> ExitCode {
    plugins::register();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve-grpc", target, address] => serve_grpc(target, address, None),
        ["serve-grpc", target, address, certificate, key] => serve_grpc(target, address, Some((certificate, key))),
        _ => specforge::cli::main(),
    }
}

/// A cloud in a process of its own, which may be killed: says where it listens, and serves until then.
fn serve_grpc(target: &str, address: &str, tls: Option<(&str, &str)>) -> ExitCode {
    let model = models::load_target(Path::new(target), tch::Kind::Float, tch::Device::Cpu).unwrap();
    let tokenizer = ChatTokenizer::load(Path::new(target), None).unwrap();
    let mut cloud = Cloud::start(model.as_ref(), &tokenizer, CloudSettings::default());
    let tls = tls.map(|(certificate, key)| ServerTls { certificate: certificate.into(), key: key.into(), edges: None });
    let options = ServeOptions { address: address.parse().unwrap(), tls };
    serve(&mut cloud, &options, &Stop::default(), &mut |address| println!("{address}")).unwrap();
    ExitCode::SUCCESS
}
