//! `specforge serve --grpc`: the target for drafts on other machines.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::decoding::{DecodingArgs, Models};
use super::{Output, numbers};
use crate::cloud::grpc::{self, ServeOptions, Served, ServerTls};
use crate::cloud::{Cloud, CloudSettings};
use crate::error::{Error, Result};
use crate::progress;
use crate::stop::{Answer, Stop};

/// What a request decides itself, or HTTP alone has.
const ELSEWHERE: [&str; 23] = [
    "http",
    "api_key_file",
    "without_keys",
    "model_name",
    "rows",
    "queue",
    "cache_memory",
    "prefix_memory",
    "body_limit",
    "prompt_limit",
    "answer_limit",
    "connections",
    "drain",
    "draft",
    "tree",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "policy",
    "verify_budget",
];

#[derive(Debug, Clone, Args)]
pub(super) struct EdgesArgs {
    /// Verify what drafts on other machines guess (`specforge generate --cloud`) at this address, over gRPC, and answer nobody
    /// over HTTP. Port 0 is any that is free. Beyond this machine a certificate is needed.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ELSEWHERE)]
    grpc: Option<String>,
    /// PEM file of this machine's certificate for --grpc.
    #[arg(long, value_name = "FILE", requires_all = ["grpc", "grpc_key"])]
    grpc_cert: Option<PathBuf>,
    /// PEM file of its key.
    #[arg(long, value_name = "FILE", requires_all = ["grpc", "grpc_cert"])]
    grpc_key: Option<PathBuf>,
    /// PEM file of the authority that edges' certificates must be of; without it edges need none.
    #[arg(long, value_name = "FILE", requires_all = ["grpc", "grpc_cert"])]
    grpc_edges: Option<PathBuf>,
    /// Most sessions of edges at a time, those whose connection is lost included.
    #[arg(long, default_value_t = 64, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    grpc_sessions: usize,
    /// Most tokens of all sessions together, each counted with all that it may grow to.
    #[arg(long, value_name = "TOKENS", default_value_t = 1 << 18, allow_hyphen_values = true,
          value_parser = numbers::at_least(1usize))]
    grpc_tokens: usize,
    /// Seconds for which a session is kept whose edge is not heard of.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, allow_hyphen_values = true,
          value_parser = numbers::at_least(1u64))]
    grpc_lease: u64,
}

impl EdgesArgs {
    /// Whether edges are served.
    pub(super) fn is_asked(&self) -> bool {
        self.grpc.is_some()
    }

    /// Where, and with which certificates.
    fn options(&self) -> Result<ServeOptions> {
        let text = self.grpc.as_deref().unwrap_or_default();
        let refuse = |problem: &dyn std::fmt::Display| {
            Error::Usage(format!("--grpc {text}: {problem}; expected an address and a port, such as 127.0.0.1:8500"))
        };
        let mut addresses = text.to_socket_addrs().map_err(|error| refuse(&error))?;
        let address: SocketAddr = addresses.next().ok_or_else(|| refuse(&"stands for no address"))?;
        let tls = self.grpc_cert.clone().zip(self.grpc_key.clone());
        let tls = tls.map(|(certificate, key)| ServerTls { certificate, key, edges: self.grpc_edges.clone() });
        Ok(ServeOptions { address, tls })
    }
}

/// Serves edges until it is asked to stop.
pub(super) fn run(args: &EdgesArgs, decoding: &DecodingArgs, stop: &Stop, output: &Output) -> Result<()> {
    let options = args.options()?;
    let models = decoding.models()?;
    let Models { target, tokenizer, .. } = &models;
    let settings = CloudSettings {
        max_sessions: args.grpc_sessions,
        max_tokens: args.grpc_tokens,
        lease: Duration::from_secs(args.grpc_lease),
        ..CloudSettings::default()
    };
    let mut cloud = Cloud::start(target.as_ref(), tokenizer, settings);
    stop.set_answer(Answer::Finish("stopping: edges go on where another cloud takes them"));
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let mut ready = |address: SocketAddr| progress::say(&format!("verifying for edges on {scheme}://{address}"));
    let Served { links, messages } = grpc::serve(&mut cloud, &options, stop, &mut ready)?;
    let served = serde_json::json!({"connections": links, "messages": messages});
    output.result(&served, || format!("{links} connections, {messages} messages"));
    Ok(())
}
