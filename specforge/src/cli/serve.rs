//! `specforge serve`

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::decoding::{DecodingArgs, Models};
use super::serve_edges::{self, EdgesArgs};
use super::{Output, hub, note, numbers};
use crate::decode::Engine;
use crate::error::{Error, Result};
use crate::server::{self, Defaults, Keys, Limits, ServeOptions};
use crate::stop::Stop;

/// What a request does not say is as the flags for decoding say: temperature, top-k, top-p, repetition penalty, most new
/// tokens, seed. Without --seed every sampled request has a seed of its own, which its answer tells.
#[derive(Debug, Clone, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    decoding: DecodingArgs,
    /// Where to listen. Port 0 is any that is free. Beyond this machine, keys are needed.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8000")]
    http: String,
    /// File with one key a line; requests must show one of them as `Authorization: Bearer KEY`.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let everybody in who can reach the address, also from other machines.
    #[arg(long, conflicts_with = "api_key_file")]
    without_keys: bool,
    /// What the model is called; without it as the target's folder is, or as on the hub.
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Answers that are decoded together.
    #[arg(long, default_value_t = 8, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    rows: usize,
    /// Answers that may wait; requests beyond are answered 429.
    #[arg(long, default_value_t = 64, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    queue: usize,
    /// Most that the target's cache may take: bytes, or a number with KiB, MiB or GiB.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = numbers::bytes)]
    cache_memory: u64,
    /// Most that answers leave for prompts that begin with the same tokens, such as the next turn of a chat; 0 keeps nothing.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = numbers::bytes)]
    prefix_memory: u64,
    /// Largest body of a request.
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = numbers::bytes)]
    body_limit: u64,
    /// Most tokens of a prompt; without it as many as the context has room for.
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    prompt_limit: Option<usize>,
    /// Most tokens that a request may ask for; without it as many as the context has room for.
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    answer_limit: Option<usize>,
    /// Connections at once; further ones wait.
    #[arg(long, default_value_t = 256, allow_hyphen_values = true, value_parser = numbers::at_least(1usize))]
    connections: usize,
    /// Seconds that answers under way are given once the server was asked to stop; then they are cut.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, allow_hyphen_values = true, value_parser = numbers::at_least(0u64))]
    drain: u64,
    #[command(flatten)]
    edges: EdgesArgs,
}

pub(super) fn run(args: &ServeArgs, stop: &Arc<Stop>, output: &Output) -> Result<()> {
    let args = &mut args.clone();
    if args.edges.is_asked() {
        hub::fetch(args.decoding.places(), None)?;
        return serve_edges::run(&args.edges, &args.decoding, stop, output);
    }
    let model = name_of(args)?;
    let keys = args.api_key_file.as_deref().map(Keys::read).transpose()?.unwrap_or_default();
    // Before the weights are loaded, which may take minutes.
    let listener = listen(args)?;
    hub::fetch(args.decoding.places(), None)?;
    let args = &*args;
    let models = args.decoding.models()?;
    let opened = args.decoding.draft_for_any_request(&models)?;
    opened.notes.iter().for_each(|line| note(format!("warning: {line}")));
    if !args.decoding.policy()?.is_lossless() {
        note("warning: this policy is lossy: answers depend on the draft");
    }
    let engine_options = args.decoding.engine(&models, args.rows)?;
    let Models { target, tokenizer, .. } = &models;
    let context = target.info().max_position_embeddings as usize;
    let limits = Limits {
        body: usize::try_from(args.body_limit).unwrap_or(usize::MAX),
        prompt: args.prompt_limit.unwrap_or(context),
        answer: args.answer_limit.unwrap_or(context).min(context),
        connections: args.connections.min(1 << 20),
        drain: Duration::from_secs(args.drain),
    };
    let (processors, max_tokens) = (args.decoding.processors()?, args.decoding.max_new_tokens);
    let options = ServeOptions {
        model,
        defaults: Defaults { processors, max_tokens, seed: args.decoding.seed() },
        limits,
        keys,
        rows: args.rows,
        queue: args.queue,
        cache_limit: args.cache_memory,
        engine_seed: args.decoding.seed().unwrap_or(0),
        stop_tokens: engine_options.stop_tokens.clone(),
    };
    let engine = Engine::new(target.as_ref(), opened.drafter, engine_options)?;
    let mut engine = engine.keeping_prefixes(args.prefix_memory);
    if let Some(budget) = args.decoding.budget()? {
        engine = engine.with_budget(budget)?;
    }
    let served = server::serve(engine, (target.as_ref(), Arc::clone(tokenizer)), listener, options, stop)?;
    output.result(&served, || {
        let server::Served { answers, cancelled, failed, tokens } = served;
        format!("{answers} answers with {tokens} tokens, {cancelled} cancelled, {failed} failed")
    });
    Ok(())
}

/// What the model is called: nobody outside learns where it lies.
fn name_of(args: &ServeArgs) -> Result<String> {
    if let Some(name) = &args.model_name {
        return Ok(name.clone());
    }
    let target = &args.decoding.target;
    if crate::hub::remote_model(target)?.is_some() {
        let text = target.to_string_lossy();
        return Ok(text.split('@').next().unwrap_or_default().to_owned());
    }
    let path = target.canonicalize().unwrap_or_else(|_| target.clone());
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    Ok(name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned()))
}

/// Listens where it was asked to, beyond this machine only where it is said who is let in.
fn listen(args: &ServeArgs) -> Result<TcpListener> {
    let text = &args.http;
    let refuse = |problem: &dyn std::fmt::Display| {
        Error::Usage(format!("--http {text}: {problem}; expected an address and a port, such as 127.0.0.1:8000"))
    };
    let addresses: Vec<SocketAddr> = text.to_socket_addrs().map_err(|error| refuse(&error))?.collect();
    let is_far = |address: &SocketAddr| !address.ip().is_loopback();
    if addresses.iter().any(is_far) && args.api_key_file.is_none() && !args.without_keys {
        return Err(Error::Usage(format!(
            "--http {text}: other machines could use this server; give --api-key-file, or --without-keys if that is wanted"
        )));
    }
    TcpListener::bind(addresses.as_slice()).map_err(|error| Error::io("listen on", Path::new(text))(error))
}
