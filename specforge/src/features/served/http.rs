//! Requests to a serving engine: JSON there and back, bounded in time and size.
//!
//! No TLS: engines stand in the same network, and vLLM's states come through a folder that both sides see.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::Trouble;
use crate::error::foreign;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest answer that says something about a server, and longest error.
const MOST_WORDS: u64 = 1 << 20;

/// A client of one server.
pub(super) struct Http {
    agent: Agent,
    url: String,
    /// `Bearer ...`
    authorization: Option<String>,
}

impl Http {
    /// A client of the server at `url`.
    pub(super) fn new(url: &str, key: Option<&str>, timeout: Duration, connections: usize) -> Self {
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
        Self { agent: config.into(), url: url.to_owned(), authorization }
    }

    /// What the server says at a path.
    pub(super) fn get(&self, path: &str) -> Result<Value, Trouble> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.read(path, request.call(), MOST_WORDS).and_then(|bytes| json(path, &bytes))
    }

    /// What the server answers to a question, `most` bytes at most.
    pub(super) fn post(&self, path: &str, question: &Value, most: u64) -> Result<Vec<u8>, Trouble> {
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
            of_server: true,
        };
        let mut response = response.map_err(broken)?;
        let status = response.status().as_u16();
        let pause = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let limit = if status == 200 { most } else { MOST_WORDS };
        let body = response.body_mut().with_config().limit(limit).read_to_vec();
        if status == 200 {
            return body.map_err(broken);
        }
        let words = said(&body.unwrap_or_default());
        let problem = format!("{path}: HTTP {status}{words}");
        match status {
            408 | 425 | 429 | 500..=599 => {
                Err(Trouble::Passing { problem, pause: pause.map(Duration::from_secs), of_server: true })
            }
            401 | 403 => Err(Trouble::Final(format!("{problem}; is the key in the environment the server's?"))),
            _ => Err(Trouble::Final(problem)),
        }
    }
}

/// A whole answer as JSON.
pub(super) fn json(path: &str, bytes: &[u8]) -> Result<Value, Trouble> {
    serde_json::from_slice(bytes).map_err(|error| Trouble::answer(format!("{path}: the answer is not JSON: {error}")))
}

/// What a server says about an error, for a message.
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
