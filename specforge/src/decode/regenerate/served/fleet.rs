//! The servers of a run: which answer, what they serve, and how they are asked.

use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::address::Address;
use super::chat::{self, Answer, Turn};
use crate::error::{Error, Result, foreign};
use crate::serving::{Fleet, Http, Retries, Trouble, patiently};

/// Longest answer. It repeats the prompt's ids.
const MOST_BYTES: u64 = 1 << 28;
const MODELS: &str = "/v1/models";

/// Servers that answer turns.
pub(super) struct Servers {
    pub(super) list: Vec<Server>,
    /// What all of them call the model.
    pub(super) model: String,
}

pub(super) struct Server {
    pub(super) address: Address,
    http: Http,
}

impl Server {
    /// `key` is the environment variable of its key, and what stands there.
    pub(super) fn new(address: Address, key: (&str, Option<&str>), timeout: Duration, in_flight: usize) -> Self {
        let http = Http::new(&address.url, key, timeout, in_flight);
        Self { address, http }
    }

    /// The models it serves.
    fn models(&self) -> Result<Vec<String>, Trouble> {
        let models = self.http.get(MODELS)?;
        let list = models.get("data").and_then(Value::as_array);
        let list = list.ok_or_else(|| Trouble::answer(format!("{MODELS}: the answer has no `data`")))?;
        Ok(list.iter().filter_map(|model| model.get("id")?.as_str().map(str::to_owned)).collect())
    }
}

impl Fleet for Servers {
    type Question = Turn;
    type Answer = Answer;

    fn servers(&self) -> usize {
        self.list.len()
    }

    fn ask(&self, server: usize, turn: &Turn) -> Result<Answer, Trouble> {
        let Server { address, http } = &self.list[server];
        chat::read(&http.post(chat::PATH, &turn.question(address.dialect, &self.model)?, MOST_BYTES)?)
    }
}

impl Servers {
    /// Asks every server what it serves. One must answer; of those that do not, the second value says why. `model` is what
    /// is wanted, where that was said.
    pub(super) fn open(list: Vec<Server>, model: Option<&str>, retries: Retries) -> Result<(Self, Vec<String>)> {
        // Where the model is named, a server need not say what it serves: what it answers will tell.
        let asked = patiently(retries, || {
            let asked = ask_all(&list);
            let refuses = |answer: &&Result<_, Trouble>| {
                model.is_none() && matches!(answer, Err(Trouble::Refused(_) | Trouble::Final(_)))
            };
            let is_silent = |answer: &Result<_, Trouble>| matches!(answer, Err(Trouble::Passing { .. }));
            let silent = asked.first().filter(|_| asked.iter().all(is_silent));
            match asked.iter().find(refuses).or(silent) {
                Some(Err(trouble)) => Err(trouble.clone()),
                _ => Ok(asked),
            }
        });
        let asked = asked.map_err(|(times, trouble)| {
            let times = if times > 1 { format!(" (asked {times} times)") } else { String::new() };
            Error::Failed(format!("--from: {}{times}", trouble.problem()))
        })?;
        let mut chosen = model.map(str::to_owned);
        let mut notes = Vec::new();
        for (Server { address, .. }, answer) in list.iter().zip(asked) {
            let served = match answer {
                Ok(served) if served.is_empty() => continue,
                Ok(served) => served,
                // It serves and does not say what.
                Err(Trouble::Refused(_) | Trouble::Final(_)) => continue,
                Err(trouble) => {
                    notes.push(format!("{}; the others go on without it until it answers", trouble.problem()));
                    continue;
                }
            };
            let names = served.iter().map(|name| format!("`{}`", foreign::name(name))).collect::<Vec<_>>().join(", ");
            match (&chosen, served.as_slice()) {
                (Some(name), served) if served.contains(name) => {}
                (Some(name), _) if model.is_some() => {
                    let problem = format!("{address}: serves {names} and not `{}`", foreign::name(name));
                    return Err(Error::Usage(format!("--model: {problem}")));
                }
                (Some(name), _) => {
                    return Err(Error::Usage(format!(
                        "--from: {address} serves {names}, another serves `{}`: answers of one file are one model's; start them \
                         under one name, or name servers of one",
                        foreign::name(name)
                    )));
                }
                (None, [one]) => chosen = Some(one.clone()),
                (None, _) => {
                    return Err(Error::Usage(format!("--model: {address} serves {names}; say which of them answers")));
                }
            }
        }
        match chosen {
            Some(model) => Ok((Self { list, model }, notes)),
            None => Err(Error::Usage("--model: no server says what it serves; name the model".to_owned())),
        }
    }
}

/// What each server says, all asked at once.
fn ask_all(list: &[Server]) -> Vec<Result<Vec<String>, Trouble>> {
    let gone = || Err(Trouble::answer("asking ended early"));
    thread::scope(|scope| {
        let asked: Vec<_> = list
            .iter()
            .map(|server| {
                scope.spawn(|| server.models().map_err(|trouble| trouble.after(&format!("{}: ", server.address))))
            })
            .collect();
        asked.into_iter().map(|thread| thread.join().unwrap_or_else(|_| gone())).collect()
    })
}
