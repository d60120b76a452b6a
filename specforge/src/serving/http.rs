//! Requests to a serving engine: JSON there and back, bounded in time and size.
//!
//! TLS comes with the feature `hub`. Most engines stand in the same network without it, and vLLM's states come through a
//! folder that both sides see.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::{Trouble, Whose};
use crate::error::foreign;
use crate::retry_after;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest answer that says something about a server, and longest error.
const MOST_WORDS: u64 = 1 << 20;

/// The address of a server as it is used here: without a slash or `/v1` at the end. `expected` says what was to be given.
pub fn url(text: &str, expected: &str) -> Result<String, String> {
    let url = text.trim_end_matches('/');
    let url = url.strip_suffix("/v1").unwrap_or(url).trim_end_matches('/');
    if url.starts_with("https://") && !cfg!(feature = "hub") {
        let problem = "https is not spoken by a build without the feature `hub`";
        return Err(format!("{problem}: name the server inside its network, or forward it to this machine"));
    }
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| format!("{expected}, got `{text}`"))?;
    if host.contains('@') {
        return Err("keys and passwords belong into the environment, not into the address".to_owned());
    }
    Ok(url.to_owned())
}

/// A client of one server.
pub struct Http {
    agent: Agent,
    url: String,
    /// `Bearer ...`
    authorization: Option<String>,
    /// The environment variable that holds the key.
    variable: String,
}

impl Http {
    /// A client of the server at `url`. `variable` is where its key stands in the environment, for messages; `key` is what
    /// stands there, if anything does.
    pub fn new(url: &str, (variable, key): (&str, Option<&str>), timeout: Duration, connections: usize) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_connect(Some(CONNECT.min(timeout)))
            .http_status_as_error(false)
            .max_idle_connections(connections)
            .max_idle_connections_per_host(connections)
            // Neither a proxy nor a redirect may see documents that are meant for this server.
            .proxy(None)
            .max_redirects(0)
            .build();
        let authorization = key.map(|key| format!("Bearer {key}"));
        Self { agent: config.into(), url: url.to_owned(), authorization, variable: variable.to_owned() }
    }

    /// What the server says at a path.
    pub fn get(&self, path: &str) -> Result<Value, Trouble> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.read(path, request.call(), MOST_WORDS).and_then(|bytes| json(path, &bytes))
    }

    /// What the server answers to a question, `most` bytes at most.
    pub fn post(&self, path: &str, question: &Value, most: u64) -> Result<Vec<u8>, Trouble> {
        let mut request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.read(path, request.send(question.to_string()), most)
    }

    fn read(
        &self,
        path: &str,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        most: u64,
    ) -> Result<Vec<u8>, Trouble> {
        let broken = |error: ureq::Error| Trouble::Passing {
            problem: format!("{path}: {}", foreign::one_line(&error.to_string())),
            pause: None,
            whose: Whose::Server,
        };
        let mut response = response.map_err(broken)?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let pause = header("retry-after").and_then(|text| retry_after::pause(text, header("date")));
        let limit = if status == 200 { most } else { MOST_WORDS };
        let body = response.body_mut().with_config().limit(limit).read_to_vec();
        if status == 200 {
            return body.map_err(broken);
        }
        let words = self.said(&body.unwrap_or_default());
        let problem = format!("{path}: HTTP {status}{words}");
        let passing = |whose| Trouble::Passing { problem: problem.clone(), pause, whose };
        Err(match status {
            429 => passing(Whose::Nobody),
            408 | 425 | 500..=599 => passing(Whose::Server),
            401 | 403 => Trouble::Refused(match self.authorization {
                Some(_) => format!("{problem}; is the key in {} the server's?", self.variable),
                None => format!("{problem}; the environment variable {} holds no key", self.variable),
            }),
            404 => Trouble::Refused(problem),
            _ => Trouble::Final(problem),
        })
    }

    /// What a server says about an error, for a message. Some repeat the key that they do not know.
    fn said(&self, body: &[u8]) -> String {
        let words = said(body);
        match self.authorization.as_ref().and_then(|bearer| bearer.strip_prefix("Bearer ")) {
            Some(key) if !key.is_empty() => words.replace(key, "***"),
            _ => words,
        }
    }
}

/// A whole answer as JSON.
pub fn json(path: &str, bytes: &[u8]) -> Result<Value, Trouble> {
    serde_json::from_slice(bytes).map_err(|error| Trouble::answer(format!("{path}: the answer is not JSON: {error}")))
}

/// What a server says about an error.
fn said(body: &[u8]) -> String {
    let value: Option<Value> = serde_json::from_slice(body).ok();
    let text = value.as_ref().and_then(|value| {
        let message = value.pointer("/error/message").or_else(|| value.get("message")).or_else(|| value.get("detail"));
        message.and_then(Value::as_str).map(str::to_owned)
    });
    let text = text.unwrap_or_else(|| String::from_utf8_lossy(&body[..body.len().min(400)]).into_owned());
    match text.trim() {
        "" => String::new(),
        text => format!(": {}", foreign::name(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::url;

    #[test]
    fn addresses_are_read_and_what_is_none_is_refused() {
        let read = |text: &str| url(text, "expected a URL");
        for text in
            ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/"]
        {
            assert_eq!(read(text).unwrap(), "http://127.0.0.1:8000");
        }
        assert_eq!(read("http://gate/models/a").unwrap(), "http://gate/models/a");
        for (wrong, word) in [
            ("127.0.0.1:8000", "expected a URL, got `127.0.0.1:8000`"),
            ("http://", "expected a URL"),
            ("https://me:secret@a", "belong into the environment"),
            ("http://me:secret@a", "belong into the environment"),
        ] {
            let problem = read(wrong).unwrap_err();
            assert!(problem.contains(word), "{wrong}: {problem}");
        }
    }
}
