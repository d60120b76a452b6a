//! Why a request is not answered, in the shape that OpenAI's API gives its errors.

use serde_json::{Value, json};

/// A request that is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// What was wrong, with expected and got. Never a path of this machine.
    pub message: String,
    /// The field that is at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds to wait before asking again.
    pub retry_after: Option<u64>,
}

impl Refusal {
    fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400: a field of the request cannot be used. The message begins with its name.
    pub fn field(name: &str, problem: impl std::fmt::Display) -> Self {
        Self { param: Some(name.to_owned()), ..Self::new(400, format!("`{name}`: {problem}")) }
    }

    /// 400: the whole request cannot be used.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(400, message)
    }

    /// 400: what is asked for is longer than may be.
    pub fn too_long(name: &str, problem: impl std::fmt::Display) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::field(name, problem) }
    }

    /// 401: no key, or another one.
    pub fn unauthorised() -> Self {
        let message = "the request has no valid key: expected the header `Authorization: Bearer KEY`";
        Self { code: Some("invalid_api_key"), ..Self::new(401, message) }
    }

    /// 404: another model.
    pub fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("`model`: there is no model `{asked}` here; the one served is `{served}`");
        Self { param: Some("model".to_owned()), code: Some("model_not_found"), ..Self::new(404, message) }
    }

    /// 404: nothing is served at this path.
    pub fn no_path() -> Self {
        Self::new(404, "nothing is served at this path")
    }

    /// 405: another method.
    pub fn no_method() -> Self {
        Self::new(405, "this path takes another method")
    }

    /// 408: the body did not come.
    pub fn too_slow(seconds: u64) -> Self {
        Self::new(408, format!("the body did not arrive within {seconds} seconds"))
    }

    /// 413: the body is too large.
    pub fn too_large(limit: usize) -> Self {
        Self::new(413, format!("the body is larger than {limit} bytes"))
    }

    /// 415: no JSON.
    pub fn not_json() -> Self {
        Self::new(415, "expected the header `Content-Type: application/json`")
    }

    /// 429: too many requests wait.
    pub fn full(limit: usize, seconds: u64) -> Self {
        let message = format!("{limit} answers wait already, and no more may; ask again later");
        Self { code: Some("queue_full"), retry_after: Some(seconds), ..Self::new(429, message) }
    }

    /// 500: the request was in order. What happened is for the server's own log, since it may name files.
    pub fn failed() -> Self {
        Self::new(500, "the server could not answer this request; its log says why")
    }

    /// 503: the server ends.
    pub fn ending() -> Self {
        Self { code: Some("shutting_down"), ..Self::new(503, "the server is shutting down") }
    }

    /// OpenAI's word for the kind of error.
    fn kind(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_named_in_words_and_for_programs() {
        let body = Refusal::field("top_p", "expected above 0 and at most 1, got 2").body();
        let want = json!({"error": {
            "message": "`top_p`: expected above 0 and at most 1, got 2",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": null,
        }});
        assert_eq!(body, want);
        let kinds = [Refusal::unauthorised(), Refusal::full(3, 1), Refusal::failed()].map(|refusal| refusal.kind());
        assert_eq!(kinds, ["authentication_error", "rate_limit_error", "server_error"]);
    }
}
