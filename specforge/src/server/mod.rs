//! A server of one target, with its draft, that clients of OpenAI's API can talk to.
//!
//! Two threads. `desk` decodes: the engine, both caches and everything else of libtorch are its own. `listen` and `routes`
//! speak HTTP; they read what is asked (`ask`, `fields`), hand it to the desk through a queue with an end (`job`), and tell
//! the answer as it comes (`reply`). `board` has the numbers that both see, `refusal` why something is not answered, `keys`
//! who is let in, `memory` what the target's cache takes. `answer` makes text of tokens, and `stops` finds where it ends.
//!
//! What a request gets depends on the request alone: its tokens are those of `specforge generate` with the same prompt,
//! seed and sampling, whoever else is served and whichever draft guesses (`decode::engine` says how far that goes).

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use serde::Serialize;

use crate::data::ChatTokenizer;
use crate::decode::Engine;
use crate::error::{Error, Result};
use crate::models::TargetModel;
use crate::progress;
use crate::stop::{Answer, Stop};
use board::Board;
use desk::{Desk, Rules};
use house::House;
use memory::Cost;

mod answer;
mod ask;
mod board;
mod desk;
mod fields;
mod house;
mod job;
mod keys;
mod listen;
mod memory;
mod refusal;
mod reply;
mod routes;
mod stops;

pub use house::{Defaults, Limits};
pub use keys::Keys;

/// How a target is served.
pub struct ServeOptions {
    /// What the target is called.
    pub model: String,
    /// What a request gets that does not say it.
    pub defaults: Defaults,
    /// Limits of what a client may ask for.
    pub limits: Limits,
    /// Who is let in.
    pub keys: Keys,
    /// Answers that are decoded together; as many as the engine has rows.
    pub rows: usize,
    /// Answers that may wait.
    pub queue: usize,
    /// Bytes that the target's cache may take.
    pub cache_limit: u64,
    /// The seed that the engine adds to every request's own.
    pub engine_seed: u64,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

/// What a server did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Served {
    /// Answers that came to their end.
    pub answers: u64,
    /// Answers whose clients went away.
    pub cancelled: u64,
    /// Answers that could not be made.
    pub failed: u64,
    /// Tokens generated.
    pub tokens: u64,
}

/// Tells the other thread that there is no desk any more, also where this one panics.
struct Leaving(Arc<Board>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Serves `target` by way of an engine that decodes with it, until `stop` is asked or decoding fails.
pub fn serve(
    engine: Engine<'_>,
    (target, tokenizer): (&dyn TargetModel, Arc<ChatTokenizer>),
    listener: TcpListener,
    options: ServeOptions,
    stop: &Arc<Stop>,
) -> Result<Served> {
    let ServeOptions { model, defaults, limits, keys, rows, queue, cache_limit, engine_seed, stop_tokens } = options;
    let cost = Cost::of(target);
    let board = Arc::new(Board::new(queue, cache_limit));
    let (jobs, arriving) = sync_channel(queue);
    let context = target.info().max_position_embeddings as usize;
    let vocabulary = target.info().vocab_size as usize;
    let address = listener.local_addr().map_err(|error| Error::Failed(format!("cannot serve: {error}")))?;
    let name = model.clone();
    let house = House {
        tokenizer: Arc::clone(&tokenizer),
        model,
        context,
        vocabulary,
        defaults,
        limits,
        cost,
        keys,
        board: Arc::clone(&board),
        jobs,
        created: routes::now(),
    };
    let talk = {
        let (board, stop) = (Arc::clone(&board), Arc::clone(stop));
        // The house goes with the last connection, and with it the way to the desk.
        let router = routes::router(Arc::new(house));
        move || listen::serve(listener, router, limits, &board, &stop)
    };
    let listening = thread::Builder::new().name("http".to_owned()).spawn(talk);
    let listening = listening.map_err(|error| Error::Failed(format!("cannot start a thread: {error}")))?;
    stop.set_answer(Answer::Finish("stopping: no request is taken any more, and answers under way are finished"));
    progress::say(&format!("serving {name} on http://{address}"));
    let leaving = Leaving(Arc::clone(&board));
    let decoded = Desk::new(engine, &tokenizer, arriving, &board, Rules { rows, cost, engine_seed, stop_tokens }).run();
    drop(leaving);
    let listened = listening.join().unwrap_or_else(|_| Err(Error::Failed("the HTTP thread failed".to_owned())));
    decoded.and(listened)?;
    let numbers = board.numbers();
    Ok(Served {
        answers: numbers.stopped + numbers.cut,
        cancelled: numbers.cancelled,
        failed: numbers.failed,
        tokens: numbers.counts.tokens,
    })
}
