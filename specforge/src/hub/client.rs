//! Requests to a hub: again where that may help, and errors that say what to do.

use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::name::{Kind, Name, is_commit};
use super::settings::Settings;
use crate::error::{Error, Result, foreign};
use crate::progress;
use crate::retry_after;

/// How often something is tried that brings nothing.
pub(super) const ATTEMPTS: u32 = 5;
/// The first pause between two attempts, which doubles, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A server that asks for a longer pause is not waited for.
const LONGEST_ASKED: Duration = Duration::from_secs(600);
/// Longest list of files, and longest error.
const MOST_WORDS: u64 = 64 << 20;
const MOST_REDIRECTS: usize = 10;

/// Why a request brought nothing.
pub(super) enum Trouble {
    /// It may succeed the next time.
    Passing {
        /// What happened.
        problem: String,
        /// How long the server asks to be left alone.
        pause: Option<Duration>,
        /// Whether there was an answer at all.
        answered: bool,
    },
    /// It will not.
    Final(Error),
    /// What came is not what was announced.
    Damaged(Error),
}

impl Trouble {
    /// Something that may pass.
    pub(super) fn passing(problem: impl Into<String>) -> Self {
        Trouble::Passing { problem: problem.into(), pause: None, answered: true }
    }

    /// The error after the last attempt.
    pub(super) fn last(self, name: &Name) -> Error {
        match self {
            Trouble::Final(error) | Trouble::Damaged(error) => error,
            Trouble::Passing { problem, answered, .. } => {
                let hint = match answered {
                    true => "try again later: what has come already is kept",
                    false => {
                        "look at the connection and at HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what the cache holds and asks \
                         nobody"
                    }
                };
                Error::hub(name, problem).with_hint(hint)
            }
        }
    }

    /// Waits before the next attempt, of which `failures` brought nothing so far. Gives itself back where there is none.
    pub(super) fn wait(self, failures: u32, attempts: u32) -> Result<(), Self> {
        let Trouble::Passing { problem, pause, .. } = &self else { return Err(self) };
        let own = LONGEST_PAUSE.min(FIRST_PAUSE * 2u32.saturating_pow(failures.saturating_sub(1)));
        let pause = pause.map_or(own, |asked| asked.max(Duration::from_millis(10)));
        if failures >= attempts || pause > LONGEST_ASKED {
            return Err(self);
        }
        progress::say(&format!("hub: {problem}; trying again in {:.1} s", pause.as_secs_f64()));
        sleep(pause);
        Ok(())
    }
}

/// What a server says about a file before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Name of the content.
    pub(super) etag: String,
    /// Its length in bytes, where the server says it.
    pub(super) size: Option<u64>,
    /// The commit that the file is of, where the server says it.
    pub(super) commit: Option<String>,
}

/// What a server says about a repository.
#[derive(Debug)]
pub(super) struct Listing {
    /// The commit that the revision means now.
    pub(super) commit: String,
    /// Its files.
    pub(super) files: Vec<String>,
}

/// A client of one hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    name: &'a Name,
}

impl<'a> Client<'a> {
    /// A client that asks for what `name` means.
    pub(super) fn new(settings: &'a Settings, name: &'a Name) -> Self {
        let config = Agent::config_builder()
            .timeout_connect(Some(settings.silence))
            .timeout_recv_response(Some(settings.silence))
            .timeout_per_read(Some(settings.silence))
            .http_status_as_error(false)
            // Redirects are followed here: the token is for the hub, and not for whoever keeps its files.
            .max_redirects(0)
            .user_agent(concat!("specforge/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), settings, name }
    }

    /// Address of a file at a revision.
    pub(super) fn file_url(&self, revision: &str, file: &str) -> String {
        let Settings { endpoint, .. } = self.settings;
        let prefix = match self.name.kind {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        };
        format!("{endpoint}/{prefix}{}/resolve/{}/{}", self.name.repo, escaped(revision, false), escaped(file, true))
    }

    /// The files of the revision, and the commit it means. `attempts` is how often this is tried.
    pub(super) fn listing(&self, attempts: u32) -> Result<Listing, Trouble> {
        let Settings { endpoint, .. } = self.settings;
        let kind = match self.name.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        let url = format!("{endpoint}/api/{kind}/{}/revision/{}", self.name.repo, escaped(self.name.revision(), false));
        let value = self.again(attempts, || {
            let mut response = self.get(&url, None, None)?;
            let read = response.body_mut().with_config().limit(MOST_WORDS).read_to_vec();
            let text = read.map_err(|error| broken(&error))?;
            serde_json::from_slice::<Value>(&text)
                .map_err(|error| Trouble::passing(format!("the answer about the repository is not JSON: {error}")))
        })?;
        let files = value["siblings"].as_array().into_iter().flatten();
        let files = files.filter_map(|file| Some(file["rfilename"].as_str()?.to_owned())).collect();
        match value["sha"].as_str().filter(|commit| is_commit(commit)) {
            Some(commit) => Ok(Listing { commit: commit.to_owned(), files }),
            None => Err(self.refuse("the server does not say which commit this is".to_owned(), NO_HUB)),
        }
    }

    /// What the server says about a file.
    pub(super) fn metadata(&self, revision: &str, file: &str) -> Result<Metadata, Trouble> {
        let url = self.file_url(revision, file);
        self.again(ATTEMPTS, || {
            let response = self.head(&url, file)?;
            let header = |name: &str| text_of(response.headers(), name);
            let etag = header("x-linked-etag").or_else(|| header("etag")).map(|etag| bare(&etag));
            let Some(etag) = etag.filter(|etag| is_etag(etag)) else {
                return Err(self.refuse(format!("the server does not say what `{file}` is called (ETag)"), NO_HUB));
            };
            let direct = || header("content-length").filter(|_| response.status().is_success());
            let size = header("x-linked-size").or_else(direct).and_then(|size| size.trim().parse().ok());
            let commit = header("x-repo-commit").filter(|commit| is_commit(commit));
            Ok(Metadata { etag, size, commit })
        })
    }

    /// Asks for a file from a byte on, wherever the hub keeps it.
    pub(super) fn get(&self, url: &str, file: Option<&str>, from: Option<u64>) -> Result<Response<Body>, Trouble> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if let Some(authorization) = self.authorization(&url) {
                request = request.header("Authorization", authorization);
            }
            if let Some(from) = from.filter(|&from| from > 0) {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| broken(&error))?;
            match redirect(&url, &response) {
                Some(next) => url = next,
                None if response.status().is_success() => return Ok(response),
                None => return Err(self.refused(response, file)),
            }
        }
        Err(Trouble::passing(format!("more than {MOST_REDIRECTS} redirects")))
    }

    /// Asks about a file. Whoever keeps it elsewhere is not asked: the hub knows more.
    fn head(&self, url: &str, file: &str) -> Result<Response<Body>, Trouble> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let mut request = self.agent.head(&url).header("Accept-Encoding", "identity");
            if let Some(authorization) = self.authorization(&url) {
                request = request.header("Authorization", authorization);
            }
            let response = request.call().map_err(|error| broken(&error))?;
            let is_relative = |response: &Response<Body>| {
                text_of(response.headers(), "location").is_some_and(|to| to.starts_with('/'))
            };
            match redirect(&url, &response) {
                Some(next) if is_relative(&response) => url = next,
                Some(_) => return Ok(response),
                None if response.status().is_success() => return Ok(response),
                None => return Err(self.refused(response, Some(file))),
            }
        }
        Err(Trouble::passing(format!("more than {MOST_REDIRECTS} redirects")))
    }

    /// The token, for the hub itself alone.
    fn authorization(&self, url: &str) -> Option<String> {
        let token = self.settings.token.as_ref()?;
        (origin(url)? == origin(&self.settings.endpoint)?).then(|| format!("Bearer {token}"))
    }

    /// Tries something until it succeeds, fails for good, or has brought nothing too often.
    fn again<T>(&self, attempts: u32, mut body: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
        let mut failures = 0;
        loop {
            match body() {
                Ok(value) => return Ok(value),
                Err(trouble) => {
                    failures += 1;
                    trouble.wait(failures, attempts)?;
                }
            }
        }
    }

    /// A refusal for good.
    fn refuse(&self, problem: String, hint: &str) -> Trouble {
        Trouble::Final(Error::hub(self.name, problem).with_hint(hint))
    }

    /// Content that is not what was announced.
    pub(super) fn damaged(&self, problem: String) -> Trouble {
        let hint =
            "nothing of it was kept: try again; if it stays like this, the server or something on the way is at fault";
        Trouble::Damaged(Error::hub(self.name, problem).with_hint(hint))
    }

    /// What an answer other than success means.
    fn refused(&self, mut response: Response<Body>, file: Option<&str>) -> Trouble {
        let status = response.status().as_u16();
        let header = |name: &str| text_of(response.headers(), name);
        let (code, message) = (header("x-error-code").unwrap_or_default(), header("x-error-message"));
        let pause = pause_of(response.headers());
        let body = response.body_mut().with_config().limit(4096).read_to_string().unwrap_or_default();
        let message = message.or_else(|| {
            let value: Value = serde_json::from_str(&body).ok()?;
            Some(value["error"].as_str()?.to_owned())
        });
        let words = message.map_or_else(String::new, |message| format!(": {}", foreign::name(message.trim())));
        let (revision, has_token) = (self.name.revision(), self.settings.token.is_some());
        let what = file.map_or_else(|| format!("revision `{revision}`"), |file| format!("file `{file}`"));
        match (status, code.as_str()) {
            (_, "GatedRepo") => self.refuse(
                format!("HTTP {status}: access has to be granted{words}"),
                "ask for access on the page of the repository, and set HF_TOKEN to a token of that account",
            ),
            (404, "RevisionNotFound") => self.refuse(
                format!("has no revision `{revision}` (HTTP 404{words})"),
                "look at the branches, tags and commits of the repository; without @REVISION it is `main`",
            ),
            (404, "EntryNotFound") => self.refuse(
                format!("has no {what} at revision `{revision}` (HTTP 404{words})"),
                "look at the files of the repository",
            ),
            (401, _) if !has_token => self.refuse(
                format!("HTTP 401: there is no such repository, or it is not public{words}"),
                "compare the name with the hub's, or set HF_TOKEN to a token that may read it; a folder of your own is \
                 written as ./FOLDER",
            ),
            (401, _) => self.refuse(
                format!("HTTP 401: the token was refused{words}"),
                "set HF_TOKEN to a token that is valid and may read this repository",
            ),
            (403, _) => self.refuse(
                format!("HTTP 403: reading it is not allowed{words}"),
                "set HF_TOKEN to a token of an account that has access, and whose rights include reading it",
            ),
            (404, _) => self.refuse(
                format!("HTTP 404: there is no such repository, or it has no {what}{words}"),
                "compare name and revision with the hub's; a folder of your own is written as ./FOLDER",
            ),
            (429, _) => {
                let problem = match pause {
                    Some(pause) => format!("HTTP 429: too many requests; asked to wait {} s", pause.as_secs()),
                    None => "HTTP 429: too many requests".to_owned(),
                };
                Trouble::Passing { problem: format!("{problem}{words}"), pause, answered: true }
            }
            (408 | 425 | 500..=599, _) => Trouble::Passing {
                problem: format!("HTTP {status}: the hub has a fault of its own{words}"),
                pause,
                answered: true,
            },
            _ => self.refuse(format!("HTTP {status}: an unexpected answer{words}"), NO_HUB),
        }
    }
}

/// What to do about a server that speaks another language.
const NO_HUB: &str = "HF_ENDPOINT must name a hub, or a mirror of one";

/// A request that got no whole answer.
pub(super) fn broken(error: &ureq::Error) -> Trouble {
    let text = foreign::one_line(&error.to_string());
    Trouble::Passing { problem: format!("the hub cannot be reached: {text}"), pause: None, answered: false }
}

fn text_of(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    Some((uri.scheme_str()?.to_ascii_lowercase(), uri.authority()?.as_str().to_ascii_lowercase()))
}

/// Where an answer sends us.
fn redirect(url: &str, response: &Response<Body>) -> Option<String> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let to = text_of(response.headers(), "location")?;
    if to.starts_with("http://") || to.starts_with("https://") {
        return Some(to);
    }
    let (scheme, authority) = origin(url)?;
    match to.strip_prefix("//") {
        Some(rest) => Some(format!("{scheme}://{rest}")),
        None => to.starts_with('/').then(|| format!("{scheme}://{authority}{to}")),
    }
}

/// How long a server asks to be left alone: `Retry-After: 5`, or `RateLimit: "api";r=0;t=5`.
fn pause_of(headers: &HeaderMap) -> Option<Duration> {
    let retry = || retry_after::pause(&text_of(headers, "retry-after")?, text_of(headers, "date").as_deref());
    let limit = || {
        let text = text_of(headers, "ratelimit")?;
        text.split(';').find_map(|part| part.trim().strip_prefix("t=")?.parse().ok()).map(Duration::from_secs)
    };
    retry().or_else(limit)
}

/// An ETag without what says that it is one.
fn bare(etag: &str) -> String {
    etag.trim().trim_start_matches("W/").trim_matches('"').to_owned()
}

/// Whether a name can be that of a file in the cache.
fn is_etag(etag: &str) -> bool {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    (1..=200).contains(&etag.len()) && !etag.starts_with('.') && etag.chars().all(allowed)
}

/// As a part of a URL; slashes stay where they part folders.
fn escaped(text: &str, is_path: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b'/' if is_path => out.push('/'),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_escaped_and_origins_compared() {
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(escaped("a b/c#d.json", true), "a%20b/c%23d.json");
        assert_eq!(origin("https://Hub.example/x"), origin("https://hub.example/y?z"));
        assert_ne!(origin("https://hub.example/"), origin("https://hub.example.evil/"));
        assert_ne!(origin("https://hub.example/"), origin("http://hub.example/"));
        assert_ne!(origin("http://127.0.0.1:1/"), origin("http://127.0.0.1:2/"));
    }

    #[test]
    fn names_of_content_stay_in_their_folder() {
        assert_eq!(bare("W/\"abc\""), "abc");
        assert!(is_etag("0a1b") && is_etag("abc-2"));
        for bad in ["", "../x", "a/b", ".hidden", "a b"] {
            assert!(!is_etag(bad), "{bad}");
        }
    }

    #[test]
    fn pauses_are_read_from_either_header() {
        let headers =
            |name: &'static str, value: &str| HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(pause_of(&headers("retry-after", "7")), Some(Duration::from_secs(7)));
        assert_eq!(pause_of(&headers("ratelimit", "\"api\";r=0;t=55")), Some(Duration::from_secs(55)));
        assert_eq!(pause_of(&HeaderMap::new()), None);
    }
}
