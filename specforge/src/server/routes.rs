//! The paths that are served, from a request to its reply.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::mpsc::TrySendError;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use super::ask::{Ask, Interface};
use super::house::House;
use super::job::{Counts, Event, Job, What};
use super::refusal::Refusal;
use super::reply::{Reply, Whole};

/// How long a body may take.
const BODY: Duration = Duration::from_secs(30);
/// A stream that has nothing to say says so, so that nobody in between takes it for dead.
const SILENCE: Duration = Duration::from_secs(15);
/// What a client is told to wait where the queue is full, in seconds.
const PAUSE: u64 = 1;

/// Everything that is served.
pub fn router(house: Arc<House>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(|| async { Refusal::no_path() })
        .method_not_allowed_fallback(|| async { Refusal::no_method() })
        .layer(middleware::from_fn_with_state(Arc::clone(&house), gate))
        .with_state(house)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = in_json(&self.body());
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == 401 {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

fn in_json(value: &Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Lets in who shows a key, and counts who is refused anything. Health is everybody's to ask.
async fn gate(State(house): State<Arc<House>>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let is_open = request.uri().path() == "/health";
    let response = match is_open || house.keys.admit(shown) {
        true => next.run(request).await,
        false => Refusal::unauthorised().into_response(),
    };
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        house.board.refused(status.as_u16());
    }
    response
}

async fn health(State(house): State<Arc<House>>) -> Result<Response, Refusal> {
    match house.board.is_ending() {
        true => Err(Refusal::ending()),
        false => Ok(in_json(&json!({"status": "ok"}))),
    }
}

async fn metrics(State(house): State<Arc<House>>) -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], house.board.metrics()).into_response()
}

fn card(house: &House) -> Value {
    json!({
        "id": house.model,
        "object": "model",
        "created": house.created,
        "owned_by": "specforge",
        "max_model_len": house.context,
    })
}

async fn models(State(house): State<Arc<House>>) -> Response {
    in_json(&json!({"object": "list", "data": [card(&house)]}))
}

async fn model(State(house): State<Arc<House>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    match name == house.model {
        true => Ok(in_json(&card(&house))),
        false => Err(Refusal::no_model(&name, &house.model)),
    }
}

async fn chat(State(house): State<Arc<House>>, request: Request) -> Result<Response, Refusal> {
    answer(house, Interface::Chat, request).await
}

async fn text(State(house): State<Arc<House>>, request: Request) -> Result<Response, Refusal> {
    answer(house, Interface::Text, request).await
}

async fn answer(house: Arc<House>, interface: Interface, request: Request) -> Result<Response, Refusal> {
    let arrived = Instant::now();
    let body = body(&house, request).await?;
    if house.board.is_ending() {
        return Err(Refusal::ending());
    }
    let full = || Refusal::full(house.board.queue(), PAUSE);
    // Said before the work of reading a prompt that nobody will answer.
    if house.board.waiting() >= house.board.queue() {
        return Err(full());
    }
    let reader = Arc::clone(&house);
    let ask = tokio::task::spawn_blocking(move || Ask::read(interface, &body, &reader));
    let ask = ask.await.map_err(|_| Refusal::failed())??;
    if !house.board.take_places(ask.answers()) {
        return Err(full());
    }
    let events = submit(&house, &ask, arrived)?;
    let id = RandomState::new().build_hasher().finish();
    let reply = Reply::new(&ask, id, now(), &house.model);
    let prompt_tokens = ask.prompts.iter().map(Vec::len).sum();
    let telling = Telling { house, events, left: ask.answers(), prompt_tokens, counts: Counts::default() };
    match ask.stream {
        true => Ok(stream(telling, reply)),
        false => whole(telling, Whole::new(reply, ask.answers())).await,
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Reads a body that is no larger and comes no slower than it may. A browser does not send JSON to a stranger's server
/// without asking it first, so that it must be called JSON keeps pages from using a server on their reader's machine.
async fn body(house: &House, request: Request) -> Result<Bytes, Refusal> {
    let limit = house.limits.body;
    check_headers(request.headers(), limit)?;
    match timeout(BODY, to_bytes(request.into_body(), limit)).await {
        Ok(Ok(body)) => Ok(body),
        // Of a client that went away nobody reads this.
        Ok(Err(_)) => Err(Refusal::too_large(limit)),
        Err(_) => Err(Refusal::too_slow(BODY.as_secs())),
    }
}

fn check_headers(headers: &HeaderMap, limit: usize) -> Result<(), Refusal> {
    let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let is_json = |text: &str| text.split(';').next().is_some_and(|kind| kind.trim() == "application/json");
    let length: Option<usize> = header(CONTENT_LENGTH).and_then(|text| text.parse().ok());
    if length.is_some_and(|length| length > limit) {
        return Err(Refusal::too_large(limit));
    }
    if !header(CONTENT_TYPE).is_some_and(is_json) {
        return Err(Refusal::not_json());
    }
    Ok(())
}

/// Hands all answers of a request to the desk. Their places in the queue are taken.
fn submit(house: &House, ask: &Ask, arrived: Instant) -> Result<UnboundedReceiver<Event>, Refusal> {
    let (sender, events) = unbounded_channel();
    for choice in 0..ask.answers() {
        let (prompt, number) = (choice / ask.choices, choice % ask.choices);
        let job = Job {
            choice,
            prompt: ask.prompts[prompt].clone(),
            max_tokens: ask.max_tokens[prompt],
            processors: ask.processors,
            seed: ask.seed.wrapping_add(number as u64),
            stop: ask.stop.clone(),
            logprobs: ask.logprobs,
            arrived,
            events: sender.clone(),
        };
        if let Err(problem) = house.jobs.try_send(job) {
            // The desk gives back the places of those it has.
            house.board.give_places(ask.answers() - choice);
            return Err(match problem {
                TrySendError::Full(_) => Refusal::full(house.board.queue(), PAUSE),
                TrySendError::Disconnected(_) => Refusal::ending(),
            });
        }
    }
    Ok(events)
}

/// A request that is being answered.
struct Telling {
    house: Arc<House>,
    events: UnboundedReceiver<Event>,
    /// Answers that have not ended.
    left: usize,
    prompt_tokens: usize,
    counts: Counts,
}

impl Telling {
    /// What happens next, until all answers have ended. Without a desk no answer comes any more.
    async fn next(&mut self) -> Option<Event> {
        if self.left == 0 {
            return None;
        }
        let lost = || match self.house.board.is_ending() {
            true => Refusal::ending(),
            false => Refusal::failed(),
        };
        let event = self.events.recv().await.unwrap_or_else(|| Event { choice: 0, what: What::Failed(lost()) });
        match &event.what {
            What::Piece(_) => {}
            What::End(end) => {
                self.left -= 1;
                self.counts += end.counts;
            }
            What::Failed(_) => self.left = 0,
        }
        Some(event)
    }
}

async fn whole(mut telling: Telling, mut whole: Whole) -> Result<Response, Refusal> {
    while let Some(Event { choice, what }) = telling.next().await {
        match what {
            What::Piece(piece) => whole.add(choice, piece),
            What::End(end) => whole.end(choice, end),
            What::Failed(refusal) => return Err(refusal),
        }
    }
    Ok(in_json(&whole.value(telling.prompt_tokens)))
}

/// One event of a stream of events, as HTML's standard has them.
fn event(data: &Value) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}

fn stream(telling: Telling, reply: Reply) -> Response {
    let openings: VecDeque<Bytes> =
        (0..telling.left).filter_map(|choice| reply.opening(choice)).map(|value| event(&value)).collect();
    let pieces = futures_util::stream::unfold((telling, reply, openings, false), async |mut state| {
        let (telling, reply, ready, is_over) = &mut state;
        loop {
            if let Some(bytes) = ready.pop_front() {
                return Some((Ok::<_, Infallible>(bytes), state));
            }
            if *is_over {
                return None;
            }
            match timeout(SILENCE, telling.next()).await {
                Err(_) => ready.push_back(Bytes::from_static(b": waiting\n\n")),
                Ok(Some(Event { choice, what: What::Piece(piece) })) => {
                    ready.push_back(event(&reply.piece(choice, &piece)))
                }
                Ok(Some(Event { choice, what: What::End(end) })) => ready.push_back(event(&reply.ending(choice, &end))),
                Ok(Some(Event { what: What::Failed(refusal), .. })) => {
                    telling.house.board.refused(refusal.status);
                    ready.push_back(event(&refusal.body()));
                    *is_over = true;
                }
                Ok(None) => {
                    ready.extend(reply.last(telling.prompt_tokens, telling.counts).map(|value| event(&value)));
                    ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    *is_over = true;
                }
            }
        }
    });
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    (headers, Body::from_stream(pieces)).into_response()
}
