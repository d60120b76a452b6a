//! Serving engines as others ask them: questions go over HTTP to whichever server has room, and are asked again where
//! something went wrong that may pass.
//!
//! `http` carries one request. [`Pool`] shares questions among servers: a bounded number is on its way to each, a server in
//! trouble is left alone for a while, and every question comes back once, with its answer or with the reason why there is none.
//! What is asked, and what an answer means, is a [`Fleet`]'s business.

use std::time::Duration;

mod http;
mod pool;

pub use http::{Http, json, url};
pub use pool::{Cause, Failure, Fleet, Outcome, Pool, patiently};

/// How often something is asked, and how long is waited in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// How often one question is asked.
    pub attempts: u32,
    /// Wait before the second attempt. Each later one waits twice as long, up to [`Retries::longest_pause`], and a random
    /// part less, so that many do not come back at once.
    pub first_pause: Duration,
    /// See [`Retries::first_pause`]. Where a server says itself how long it wants to be left alone, that counts.
    pub longest_pause: Duration,
}

/// Why a server gave no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The next attempt may go well.
    Passing {
        /// What happened.
        problem: String,
        /// How long the server asks to be left alone.
        pause: Option<Duration>,
        /// Who is in trouble.
        whose: Whose,
    },
    /// It is the question that is wrong.
    Final(String),
    /// The server refuses every question: it knows no such key, model or path.
    Refused(String),
}

/// Who is in trouble, as far as an answer shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// This one question: other questions may be asked meanwhile.
    Question,
    /// The server.
    Server,
    /// Nobody: the server has too much to do, and no question is to blame.
    Nobody,
}

impl Trouble {
    /// An answer that is not what it should be. Asked again it may be: some engines leave out what they have in their cache.
    pub fn answer(problem: impl Into<String>) -> Self {
        Trouble::Passing { problem: problem.into(), pause: None, whose: Whose::Question }
    }

    /// The same with these words before what happened.
    pub fn after(self, words: &str) -> Self {
        let said = |problem: String| format!("{words}{problem}");
        match self {
            Trouble::Passing { problem, pause, whose } => Trouble::Passing { problem: said(problem), pause, whose },
            Trouble::Final(problem) => Trouble::Final(said(problem)),
            Trouble::Refused(problem) => Trouble::Refused(said(problem)),
        }
    }

    /// What happened, in words.
    pub fn problem(&self) -> &str {
        match self {
            Trouble::Passing { problem, .. } | Trouble::Final(problem) | Trouble::Refused(problem) => problem,
        }
    }
}
