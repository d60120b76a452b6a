//! Hidden states of a target that serving engines run: every model that vLLM or SGLang can run becomes a target.
//!
//! Engines are asked as they are, without a patch, over HTTP: `vllm` and `sglang` say what is asked and read the answer,
//! `documents` asks for every part that a document needs, through [`crate::serving`], which shares the questions among
//! servers and asks again where something went wrong. What comes back goes through [`Recognition`], and from there on is what this program would
//! have computed, up to the last bits.

use std::cell::RefCell;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use self::documents::{Answer, Documents};
use super::{FeatureBatch, FeatureSource, Pending, Recognition};
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::serving::{self, Retries};

mod documents;
mod server;
mod sglang;
mod vllm;

/// Which engine a server runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// vLLM with `extract_hidden_states`: it writes states to a folder that both sides see.
    Vllm,
    /// SGLang with `--enable-return-hidden-states`, which puts final states into the answer, or with
    /// `--enable-return-aux-hidden-states`, which puts the others there. Where both are wanted, so are two servers.
    Sglang,
}

impl Engine {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Vllm => "vllm",
            Engine::Sglang => "sglang",
        }
    }

    /// The environment variable that holds the key of its servers.
    pub fn key_variable(self) -> &'static str {
        match self {
            Engine::Vllm => "VLLM_API_KEY",
            Engine::Sglang => "SGLANG_API_KEY",
        }
    }
}

/// A server: `vllm:http://host:8000`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerAddress {
    /// What runs there.
    pub engine: Engine,
    /// Where, without a slash at the end.
    pub url: String,
}

impl FromStr for ServerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected vllm:URL or sglang:URL, such as vllm:http://127.0.0.1:8000";
        let (engine, url) = match text.split_once(':') {
            Some(("vllm", url)) => (Engine::Vllm, url),
            Some(("sglang", url)) => (Engine::Sglang, url),
            _ => return Err(format!("{expected}, got `{text}`")),
        };
        Ok(Self { engine, url: serving::url(url, expected)? })
    }
}

impl std::fmt::Display for ServerAddress {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}", self.engine.name(), self.url)
    }
}

/// How servers are asked.
#[derive(Debug, Clone)]
pub struct Asking {
    /// Documents that are on their way to one server at once.
    pub in_flight: usize,
    /// How often one document is asked for.
    pub attempts: u32,
    /// How long one answer may take.
    pub timeout: Duration,
    /// Wait before the second attempt. Each later one waits twice as long, up to [`Asking::longest_pause`], and a random
    /// part less, so that many do not come back at once.
    pub first_pause: Duration,
    /// See [`Asking::first_pause`].
    pub longest_pause: Duration,
    /// Where this machine sees the folder that vLLM writes to, where its path is another here.
    pub states_folder: Option<PathBuf>,
}

impl Default for Asking {
    fn default() -> Self {
        Self {
            in_flight: 8,
            attempts: 10,
            timeout: Duration::from_secs(300),
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(30),
            states_folder: None,
        }
    }
}

impl Asking {
    fn retries(&self) -> Retries {
        let Self { attempts, first_pause, longest_pause, .. } = *self;
        Retries { attempts, first_pause, longest_pause }
    }
}

/// A feature source that asks servers.
pub struct ServedFeatures {
    documents: Documents,
    recognition: RefCell<Recognition>,
}

impl ServedFeatures {
    /// Asks these servers; `key` gives the key of an engine's servers, if they have one. Each must answer before anything
    /// else is done.
    pub fn open(
        servers: &[ServerAddress],
        asking: &Asking,
        key: impl Fn(Engine) -> Option<String>,
        recognition: Recognition,
    ) -> Result<Self> {
        let shape = Shape { width: recognition.info().hidden_size, layers: recognition.wanted().len() };
        let documents = Documents::begin(servers, asking, key, shape)?;
        Ok(Self { documents, recognition: RefCell::new(recognition) })
    }

    /// Rows on which the target's head agreed.
    pub fn rows_judged(&self) -> usize {
        self.recognition.borrow().rows_judged()
    }

    /// Waits for the documents of a batch: `[T, H]` for each wanted layer.
    fn wait(
        &self,
        batch: Arc<PackedBatch>,
        answers: Vec<(PackedBatch, Answer)>,
        layers: usize,
    ) -> Result<FeatureBatch> {
        let mut parts: Vec<Vec<Tensor>> = (0..layers).map(|_| Vec::new()).collect();
        for (document, answer) in answers {
            let name = document.documents.first().map_or("", |document| &document.name);
            let (server, states) = answer.wait()?;
            let states = self.recognition.borrow_mut().take(&server, name, &document.ids, states)?;
            parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states));
        }
        let hidden = parts.iter().map(|part| Ok(Tensor::f_cat(part, 0)?)).collect::<Result<_>>()?; // [T, H]
        Ok(FeatureBatch::new(batch, hidden))
    }
}

impl FeatureSource for ServedFeatures {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let ask = |document: PackedBatch| {
            let answer = self.documents.ask(&document);
            (document, answer)
        };
        let answers: Vec<(PackedBatch, Answer)> = batch.each().map(ask).collect();
        let layers = capture.len();
        Pending::later(move || self.wait(batch, answers, layers))
    }

    fn ahead(&self) -> usize {
        self.documents.in_flight()
    }
}

/// What all servers together give of a document.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// `H`
    width: i64,
    /// Number of states, the final one among them.
    layers: usize,
}

/// What one server gives of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All states, the final one last.
    All,
    /// All but the final one.
    Others,
    /// The final one.
    Final,
}

/// An error that names its server.
fn failed(server: &ServerAddress, problem: &str) -> Error {
    Error::Failed(format!("{server}: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_what_is_none_is_refused() {
        let read = |text: &str| text.parse::<ServerAddress>();
        let vllm = read("vllm:http://127.0.0.1:8000/").unwrap();
        assert_eq!((vllm.engine, vllm.url.as_str()), (Engine::Vllm, "http://127.0.0.1:8000"));
        assert_eq!(read("sglang:http://gpu-1:30000").unwrap().to_string(), "sglang:http://gpu-1:30000");
        assert_eq!(read("vllm:https://gpu-1").is_ok(), cfg!(feature = "hub"));
        for (wrong, word) in [
            ("http://127.0.0.1:8000", "expected vllm:URL"),
            ("vllm:127.0.0.1:8000", "expected vllm:URL"),
            ("vllm:http://", "expected vllm:URL"),
            ("tgi:http://a", "expected vllm:URL"),
            ("vllm:https://", "expected vllm:URL"),
            ("vllm:https://me:secret@a", "belong into the environment"),
        ] {
            let problem = read(wrong).unwrap_err();
            assert!(problem.contains(word), "{wrong}: {problem}");
        }
    }
}
