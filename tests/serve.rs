//! `specforge serve` as its clients meet it: over HTTP on loopback, with a small random model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{Workspace, json_of, output_of, specforge, stderr_of, write_model};
use crate::processes::{PATIENCE, end_of, signal};

/// A server of a small model. It is killed with the value.
struct Server {
    child: Option<Child>,
    address: SocketAddr,
}

impl Server {
    /// Serves the folder `model` of a workspace, on a port that is free.
    fn start(workspace: &Workspace, arguments: &[&str]) -> Self {
        let mut command = specforge(&["serve", "--json", "--http", "127.0.0.1:0", "--device", "cpu", "--target"]);
        let mut child = command.arg(workspace.path("model")).args(arguments).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("the server ended: {seen:#?}")).unwrap();
            if let Some((_, address)) = line.split_once("serving model on http://") {
                break address.parse().unwrap();
            }
            seen.push(line);
        };
        // What it says later must have somewhere to go.
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child: Some(child), address }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The end of a server that was asked to stop: its exit code, and what it says it did.
    fn end(mut self) -> (Option<i32>, Value) {
        let output = end_of(self.child.take().unwrap());
        (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// A request that is not read yet.
    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        stream
    }

    fn post_raw(&self, path: &str, body: &Value) -> TcpStream {
        self.ask("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    /// The answer to a question that is expected to have one.
    fn post(&self, path: &str, body: &Value) -> Value {
        let reply = Reply::read(self.post_raw(path, body));
        assert_eq!(reply.status, 200, "{body}: {}", reply.body);
        reply.json()
    }

    /// The error that a question is answered with.
    fn refused(&self, path: &str, body: &Value) -> (u16, Value) {
        let reply = Reply::read(self.post_raw(path, body));
        (reply.status, reply.json()["error"].clone())
    }

    /// All events of a stream, without the end.
    fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let reply = Reply::read(self.post_raw(path, &body));
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")), "{}", reply.body);
        let mut events: Vec<&str> = reply.body.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", reply.body);
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    fn get(&self, path: &str) -> Reply {
        Reply::read(self.ask("GET", path, &[], ""))
    }

    /// A number among the metrics.
    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("specforge_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    fn wait_for(&self, name: &str, reached: impl Fn(f64) -> bool) {
        let started = Instant::now();
        while !reached(self.metric(name)) {
            assert!(started.elapsed() < PATIENCE, "{name} stays {}", self.metric(name));
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Reply {
    fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {line:?}")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let mut reply = Self { status, headers, body: String::new() };
        if reply.header("transfer-encoding") == Some("chunked") {
            while let Some(piece) = chunk(&mut reader) {
                reply.body.push_str(&piece);
            }
        } else {
            reader.read_to_string(&mut reply.body).unwrap();
        }
        reply
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// One chunk of a body; nothing at its end.
fn chunk(reader: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let length = usize::from_str_radix(line.trim(), 16).ok().filter(|&length| length > 0)?;
    let mut bytes = vec![0; length + 2];
    reader.read_exact(&mut bytes).unwrap();
    bytes.truncate(length);
    Some(String::from_utf8(bytes).unwrap())
}

/// Reads events of a stream until so many have come.
fn read_events(stream: &TcpStream, count: usize) {
    let mut reader = BufReader::new(stream);
    let (mut line, mut seen) = (String::new(), 0);
    while seen < count {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream ended after {seen} events");
        seen += usize::from(line.starts_with("data: {"));
    }
}

/// What the program itself answers to a prompt as it is.
fn generated(model: &Path, prompt: &str, arguments: &[&str]) -> Value {
    let mut command = specforge(&["generate", "--json", "--device", "cpu", "--raw", "--prompt", prompt, "--target"]);
    json_of(command.arg(model).args(arguments))
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A model whose answers may go on for minutes.
fn endless() -> Workspace {
    Workspace::with_model(&json!({"max_position_embeddings": 60_000}))
}

fn long(stream: bool) -> Value {
    json!({"prompt": "the river", "max_tokens": 50_000, "stream": stream})
}

#[test]
fn every_path_answers_and_what_is_no_path_is_said() {
    let workspace = Workspace::new();
    let server = Server::start(&workspace, &["--body-limit", "2000", "--max-new-tokens", "5"]);
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    let models = server.get("/v1/models").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("model")));
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/model").json()["id"], "model");
    let chat = server.post(CHAT, &json!({"model": "model", "messages": [{"role": "user", "content": "the river"}]}));
    assert_eq!((&chat["object"], &chat["model"]), (&json!("chat.completion"), &json!("model")));
    assert_eq!(chat["choices"][0]["message"]["role"], "assistant");
    assert_eq!(chat["usage"]["completion_tokens"], 5);
    let text = server.post(TEXT, &json!({"prompt": "the river", "nobody_knows": {"this": [1]}, "user": "me"}));
    assert_eq!((&text["object"], &text["choices"][0]["finish_reason"]), (&json!("text_completion"), &json!("length")));
    assert_eq!(server.metric("generated_tokens_total"), 10.0);
    for (reply, status) in [
        (server.get("/v1/nothing"), 404),
        (server.get(CHAT), 405),
        (server.get("/v1/models/another"), 404),
        (Reply::read(server.ask("DELETE", "/health", &[], "")), 405),
        (Reply::read(server.ask("POST", TEXT, &[("Content-Type", "text/plain")], "{}")), 415),
        (Reply::read(server.post_raw(TEXT, &json!({"prompt": "a".repeat(3000)}))), 413),
        (Reply::read(server.post_raw(TEXT, &json!({"prompt": "a", "model": "another"}))), 404),
    ] {
        let error = &reply.json()["error"];
        assert!(reply.status == status && error["message"].is_string() && error["type"].is_string(), "{}", reply.body);
    }
    // Nobody learns where anything lies.
    let all = [server.get("/v1/models").body, server.get("/metrics").body, chat.to_string()].concat();
    assert!(!all.contains(workspace.path("").to_str().unwrap()));
}

#[test]
fn what_is_wrong_is_named_by_its_field() {
    let workspace = Workspace::new();
    let server = Server::start(&workspace, &["--queue", "4", "--prompt-limit", "40", "--answer-limit", "50"]);
    let user = || json!([{"role": "user", "content": "the river"}]);
    for (path, key, value, param) in [
        (TEXT, "temperature", json!("hot"), "temperature"),
        (TEXT, "temperature", json!(-1), "temperature"),
        (TEXT, "top_p", json!(0), "top_p"),
        (TEXT, "top_k", json!(1.5), "top_k"),
        (TEXT, "repetition_penalty", json!(0), "repetition_penalty"),
        (TEXT, "seed", json!("a"), "seed"),
        (TEXT, "n", json!(0), "n"),
        (TEXT, "n", json!(5), "n"),
        (TEXT, "max_tokens", json!(0), "max_tokens"),
        (TEXT, "max_tokens", json!(51), "max_tokens"),
        (CHAT, "max_completion_tokens", json!("many"), "max_completion_tokens"),
        (TEXT, "stop", json!([""]), "stop"),
        (TEXT, "stop", json!(3), "stop"),
        (TEXT, "stream", json!("yes"), "stream"),
        (TEXT, "stream_options", json!({"include_usage": true}), "stream_options"),
        (TEXT, "logprobs", json!(true), "logprobs"),
        (TEXT, "logprobs", json!(21), "logprobs"),
        (CHAT, "logprobs", json!(3), "logprobs"),
        (CHAT, "top_logprobs", json!(3), "top_logprobs"),
        (TEXT, "prompt", json!(7), "prompt"),
        (TEXT, "prompt", json!([]), "prompt"),
        (TEXT, "prompt", json!(""), "prompt"),
        (TEXT, "prompt", json!([1, 454]), "prompt"),
        (TEXT, "prompt", json!([1, "a"]), "prompt"),
        (TEXT, "prompt", json!(["a", "b", "c", "d", "e"]), "prompt"),
        (TEXT, "prompt", json!("the river runs ".repeat(30)), "prompt"),
        (TEXT, "echo", json!(true), "echo"),
        (TEXT, "best_of", json!(2), "best_of"),
        (CHAT, "messages", json!("hello"), "messages"),
        (CHAT, "messages", json!([]), "messages"),
        (CHAT, "messages", json!([{"content": "a"}]), "messages"),
        (CHAT, "messages", json!([{"role": "user", "content": 3}]), "messages"),
        (CHAT, "tools", json!([{"type": "function"}]), "tools"),
        (CHAT, "response_format", json!({"type": "json_object"}), "response_format"),
        (CHAT, "logit_bias", json!({"1": 2}), "logit_bias"),
        (CHAT, "presence_penalty", json!(0.5), "presence_penalty"),
        (CHAT, "chat_template_kwargs", json!("a"), "chat_template_kwargs"),
    ] {
        let mut body = if path == CHAT { json!({"messages": user()}) } else { json!({"prompt": "the river"}) };
        body[key] = value;
        let (status, error) = server.refused(path, &body);
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(&format!("`{param}`")), "{error}");
    }
    for body in ["", "[1]", "{\"prompt\": ", "{\"prompt\": \"a\", \"prompt\": \"b\"}", &"[".repeat(500)] {
        let reply = Reply::read(server.ask("POST", TEXT, &[("Content-Type", "application/json")], body));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &Value::Null), "{body}: {}", reply.body);
    }
    // What says no more than what is done in any case is in order, and so is null.
    let harmless = json!({
        "prompt": "the river", "max_tokens": 2, "echo": false, "presence_penalty": 0, "logit_bias": {}, "best_of": 1,
        "temperature": null, "stop": null, "n": 1, "suffix": null, "top_k": -1,
    });
    assert_eq!(server.post(TEXT, &harmless)["usage"]["completion_tokens"], 2);
}

/// Many clients at once, each with its own wishes, get what the program itself says to each of them alone: without a draft,
/// with a smaller model, and with guesses from the text itself.
#[test]
fn answers_at_any_load_are_those_of_generate() {
    let workspace = Workspace::new();
    write_model(&workspace.path("small"), &json!({"num_hidden_layers": 1}));
    let (model, small) = (workspace.path("model"), workspace.path("small"));
    let wishes: [(&str, &[&str], Value); 6] = [
        ("the river runs over", &[], json!({})),
        ("a cold bird", &["--temperature", "1", "--seed", "7"], json!({"temperature": 1, "seed": 7})),
        (
            "seven stones and seven stones and",
            &["--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "123456789"],
            json!({"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 123_456_789}),
        ),
        ("why", &["--repetition-penalty", "1.3"], json!({"repetition_penalty": 1.3})),
        (
            "the river never asks why",
            &["--temperature", "1.4", "--repetition-penalty", "1.2", "--seed", "5"],
            json!({"temperature": 1.4, "repetition_penalty": 1.2, "seed": 5}),
        ),
        ("sings at noon", &["--temperature", "0.5"], json!({"temperature": 0.5, "seed": 0})),
    ];
    let lengths = [60, 9, 40, 25, 33, 50];
    let want: Vec<Value> = wishes
        .iter()
        .zip(lengths)
        .map(|((prompt, flags, _), length)| {
            generated(&model, prompt, &[flags, &["--max-new-tokens", &length.to_string()][..]].concat())
        })
        .collect();
    let drafts: [&[&str]; 3] = [
        &[],
        &["--draft", small.to_str().unwrap(), "--tree", "dynamic:depth=3,top_k=3,nodes=9", "--temperature", "1"],
        &["--draft", "prompt-lookup"],
    ];
    for draft in drafts {
        let server = Server::start(&workspace, &[draft, &["--rows", "3"]].concat());
        let ask = |client: usize| {
            for turn in 0..wishes.len() {
                let which = (client + turn) % wishes.len();
                let (prompt, _, wish) = &wishes[which];
                let mut body = json!({
                    "prompt": prompt, "max_tokens": lengths[which], "return_token_ids": true, "temperature": 0,
                });
                body.as_object_mut().unwrap().extend(wish.as_object().unwrap().clone());
                let answer = server.post(TEXT, &body);
                let (choice, want) = (&answer["choices"][0], &want[which]);
                assert_eq!(choice["token_ids"], want["token_ids"], "{draft:?}, {prompt}");
                assert_eq!((&choice["text"], &choice["finish_reason"]), (&want["text"], &want["finish"]), "{prompt}");
                let usage = &answer["usage"];
                assert_eq!(usage["completion_tokens"], want["summary"]["tokens"], "{usage}");
                assert!(!draft.is_empty() || usage["drafted_tokens"] == 0, "{usage}");
            }
        };
        thread::scope(|scope| {
            (0..4).for_each(|client| drop(scope.spawn(move || ask(client))));
        });
        assert_eq!(server.metric("answers_total{finish=\"failed\"}"), 0.0);
        let accepted = server.metric("accepted_tokens_total");
        assert_eq!(accepted > 0.0, !draft.is_empty(), "{accepted} accepted");
        assert_eq!(server.metric("tau") > 1.0, !draft.is_empty());
        if !draft.is_empty() {
            let tried = server.metric("tried_at_depth_total{depth=\"1\"}");
            let right = server.metric("accepted_at_depth_total{depth=\"1\"}");
            assert!(0.0 < right && right < tried, "{right} of {tried}");
        }
    }
}

/// What a stream says, piece after piece, is what the whole answer says.
/// The same but for the rounding of numbers: who else was served when they were computed is chance.
#[track_caller]
fn assert_near(got: &Value, want: &Value) {
    match (got, want) {
        (Value::Array(got), Value::Array(want)) if got.len() == want.len() => {
            got.iter().zip(want).for_each(|(got, want)| assert_near(got, want));
        }
        (Value::Object(got), Value::Object(want)) if got.len() == want.len() => {
            got.iter().for_each(|(key, got)| assert_near(got, &want[key]));
        }
        (Value::Number(got), Value::Number(want)) => {
            let difference = got.as_f64().unwrap() - want.as_f64().unwrap();
            assert!(difference.abs() < 1e-5, "{got} and {want}");
        }
        (got, want) => assert_eq!(got, want),
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let workspace = Workspace::new();
    let small = workspace.path("small");
    write_model(&small, &json!({"num_hidden_layers": 1}));
    let server = Server::start(&workspace, &["--draft", small.to_str().unwrap(), "--max-new-tokens", "40"]);
    let messages = json!([{"role": "system", "content": "sing"}, {"role": "user", "content": "the river"}]);
    for wish in [
        json!({"temperature": 0}),
        json!({"temperature": 1, "seed": 3, "n": 3, "logprobs": true, "top_logprobs": 2}),
        json!({"temperature": 1.2, "seed": 8, "stop": ["e", "zz"], "logprobs": true}),
    ] {
        let mut body = json!({"messages": messages, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(wish.as_object().unwrap().clone());
        let whole = server.post(CHAT, &body);
        body["stream_options"] = json!({"include_usage": true});
        let events = server.events(CHAT, &body);
        let (usage, events) = events.split_last().unwrap();
        // The prompt was there the second time: all of it but its last token, which is always run.
        let (mut told, mut counted) = (usage["usage"].clone(), whole["usage"].clone());
        let known =
            [&mut counted, &mut told].map(|usage| usage.as_object_mut().unwrap().remove("prompt_tokens_details"));
        let known = known.map(|details| details.unwrap()["cached_tokens"].as_u64().unwrap());
        assert!(known[1] > 0 && known[1] >= known[0], "{known:?}");
        assert_eq!((&told, &usage["choices"]), (&counted, &json!([])));
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let own: Vec<&Value> =
                events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index).collect();
            assert_eq!(own[0]["delta"], json!({"role": "assistant", "content": ""}));
            let text: String = own.iter().filter_map(|piece| piece["delta"]["content"].as_str()).collect();
            assert_eq!(text, choice["message"]["content"], "{wish}");
            let list = |pointer: &str| -> Value {
                own.iter().filter_map(|piece| piece.pointer(pointer)?.as_array().cloned()).flatten().collect()
            };
            assert_eq!(list("/token_ids"), choice["token_ids"]);
            if body["logprobs"] == json!(true) {
                assert_near(&list("/logprobs/content"), &choice["logprobs"]["content"]);
            }
            assert_eq!(own.last().unwrap()["finish_reason"], choice["finish_reason"]);
            assert!(own[..own.len() - 1].iter().all(|piece| piece["finish_reason"].is_null()));
        }
    }
}

#[test]
fn choices_prompts_and_probabilities() {
    let workspace = Workspace::new();
    let model = workspace.path("model");
    let server = Server::start(&workspace, &[]);
    // The answers of one request are those of the seeds that follow each other.
    let body = json!({"prompt": ["a cold bird", "why"], "n": 2, "temperature": 1, "seed": 7, "max_tokens": 12});
    let answer = server.post(TEXT, &body);
    assert_eq!(answer["choices"].as_array().unwrap().len(), 4);
    for (index, prompt, seed) in [(0, "a cold bird", "7"), (1, "a cold bird", "8"), (2, "why", "7"), (3, "why", "8")] {
        let want = generated(&model, prompt, &["--temperature", "1", "--seed", seed, "--max-new-tokens", "12"]);
        assert_eq!((&answer["choices"][index]["text"], &answer["seed"]), (&want["text"], &json!(7)), "{index}");
    }
    // Ids of tokens are as good as their text.
    let text = json!({"prompt": "the river runs", "max_tokens": 9, "return_token_ids": true, "logprobs": 3});
    let by_text = server.post(TEXT, &text);
    let mut ids = text.clone();
    ids["prompt"] = by_text["choices"][0]["prompt_token_ids"].clone();
    assert!(ids["prompt"].as_array().unwrap().len() > 2);
    let by_ids = server.post(TEXT, &ids);
    assert_eq!(by_ids["choices"], by_text["choices"]);
    // The likeliest token is chosen, and its probability is the first of those told.
    let logprobs = &by_text["choices"][0]["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 9);
    let mut length = 0;
    for (place, token) in tokens.iter().enumerate() {
        let own = logprobs["token_logprobs"][place].as_f64().unwrap();
        let top = logprobs["top_logprobs"][place].as_object().unwrap();
        let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert!(own < 0.0 && own == best && top.len() <= 3, "{token}: {own}, {top:?}");
        let offset = logprobs["text_offset"][place].as_u64().unwrap();
        assert!(offset >= length);
        length = offset;
    }
    // Without a seed every request has its own, and says which.
    let seedless = json!({"prompt": "a cold bird", "temperature": 1, "max_tokens": 12});
    let [one, other] = [(); 2].map(|()| server.post(TEXT, &seedless));
    assert_ne!(one["seed"], other["seed"]);
    let mut again = seedless.clone();
    again["seed"] = one["seed"].clone();
    assert_eq!(server.post(TEXT, &again)["choices"], one["choices"]);
}

/// A stop string ends an answer wherever it falls among tokens, with and without a draft.
#[test]
fn an_answer_ends_before_a_stop_string() {
    let workspace = Workspace::new();
    let whole = generated(&workspace.path("model"), "the river runs", &["--max-new-tokens", "40"]);
    let text = whole["text"].as_str().unwrap();
    let letters: Vec<char> = text.chars().collect();
    let server = Server::start(&workspace, &["--draft", "prompt-lookup"]);
    for (from, to) in [(3, 5), (7, 12), (10, 11)] {
        let stop: String = letters[from..to].iter().collect();
        let body = json!({"prompt": "the river runs", "max_tokens": 40, "stop": ["nowhere", stop], "logprobs": 0});
        let answer = server.post(TEXT, &body);
        let choice = &answer["choices"][0];
        assert_eq!((choice["text"].as_str(), &choice["finish_reason"]), (text.split(&stop).next(), &json!("stop")));
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap().len() as u64;
        let counted = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!(tokens <= counted && counted < 40, "{tokens} of {counted}");
    }
}

/// Whoever goes away makes room for whoever waits, whether it is told piece by piece or waits for the whole.
#[test]
fn a_client_that_goes_away_frees_its_row() {
    let workspace = endless();
    let server = Server::start(&workspace, &["--rows", "1"]);
    let short = json!({"prompt": "why", "max_tokens": 3});
    for (cancelled, stream) in [(1.0, true), (2.0, false)] {
        server.wait_for("running", |running| running == 0.0);
        let first = server.post_raw(TEXT, &long(stream));
        if stream {
            read_events(&first, 5);
        }
        server.wait_for("running", |running| running == 1.0);
        let second = server.post_raw(TEXT, &short);
        server.wait_for("waiting", |waiting| waiting == 1.0);
        drop(first);
        assert_eq!(Reply::read(second).json()["usage"]["completion_tokens"], 3);
        assert_eq!(server.metric("answers_total{finish=\"cancelled\"}"), cancelled);
    }
    // One that waits leaves the queue.
    server.wait_for("running", |running| running == 0.0);
    let first = server.post_raw(TEXT, &long(true));
    read_events(&first, 1);
    let second = server.post_raw(TEXT, &short);
    server.wait_for("waiting", |waiting| waiting == 1.0);
    drop(second);
    server.wait_for("waiting", |waiting| waiting == 0.0);
    assert_eq!(server.metric("running"), 1.0);
}

#[test]
fn a_full_queue_is_said_and_those_who_wait_are_served_in_order() {
    let workspace = endless();
    let server = Server::start(&workspace, &["--rows", "1", "--queue", "2"]);
    let first = server.post_raw(TEXT, &long(true));
    read_events(&first, 1);
    let short = |count: usize| json!({"prompt": "why", "max_tokens": count});
    let second = server.post_raw(TEXT, &short(3));
    server.wait_for("waiting", |waiting| waiting == 1.0);
    // Two answers do not fit, one does.
    let (status, error) = server.refused(TEXT, &json!({"prompt": "why", "n": 2}));
    assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
    let third = server.post_raw(TEXT, &short(4));
    server.wait_for("waiting", |waiting| waiting == 2.0);
    let reply = Reply::read(server.post_raw(TEXT, &short(5)));
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
    assert_eq!(server.metric("refused_total{status=\"429\"}"), 2.0);
    drop(first);
    for (stream, count) in [(second, 3), (third, 4)] {
        assert_eq!(Reply::read(stream).json()["usage"]["completion_tokens"], count);
    }
    assert_eq!(server.metric("waiting"), 0.0);
}

#[test]
fn the_cache_stays_within_its_memory() {
    let workspace = endless();
    // 2 layers of 2 heads of 8 numbers, keys and values: 256 bytes a token.
    let limit = 400 << 10;
    let server = Server::start(&workspace, &["--cache-memory", "400KiB", "--rows", "8"]);
    let (status, error) = server.refused(TEXT, &long(false));
    assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("bytes of cache"), "{error}");
    let most = thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (server, count) = (&server, if client % 2 == 0 { 600 } else { 40 });
                scope.spawn(move || {
                    let body = json!({"prompt": "the river", "max_tokens": count, "temperature": 1, "seed": client});
                    server.post(TEXT, &body)
                })
            })
            .collect();
        let mut most = 0.0f64;
        while clients.iter().any(|client| !client.is_finished()) {
            most = most.max(server.metric("cache_bytes"));
        }
        clients.into_iter().for_each(|client| drop(client.join().unwrap()));
        most
    });
    assert!(0.0 < most && most <= f64::from(limit), "{most} of {limit} bytes");
    assert_eq!(server.metric("cache_limit_bytes"), f64::from(limit));
}

#[test]
fn keys_are_asked_for_and_other_machines_need_them() {
    let workspace = Workspace::new();
    let file = workspace.path("keys");
    std::fs::write(&file, "secret-one\nsecret-two\n").unwrap();
    let server = Server::start(&workspace, &["--api-key-file", file.to_str().unwrap()]);
    let ask = |path: &str, key: Option<&str>| {
        let headers: Vec<_> = key.iter().map(|key| ("Authorization", *key)).collect();
        Reply::read(server.ask("GET", path, &headers, ""))
    };
    for key in ["Bearer secret-one", "Bearer secret-two"] {
        assert_eq!(ask("/v1/models", Some(key)).status, 200);
    }
    for key in [None, Some("Bearer secret"), Some("Bearer secret-one2"), Some("secret-one"), Some("Bearer ")] {
        for path in ["/v1/models", "/metrics", "/v1/nothing"] {
            let reply = ask(path, key);
            assert_eq!((reply.status, &reply.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{key:?}");
            assert!(!reply.body.contains("secret"), "{}", reply.body);
        }
    }
    assert_eq!(ask("/health", None).status, 200);
    let model = workspace.path("model");
    let refused = |arguments: &[&str]| {
        let mut command = specforge(&["serve", "--device", "cpu", "--target"]);
        let output = output_of(command.arg(&model).args(arguments));
        (output.status.code(), stderr_of(&output))
    };
    let (code, said) = refused(&["--http", "0.0.0.0:0"]);
    assert!(code == Some(2) && said.contains("--api-key-file"), "{code:?}: {said}");
    let (code, said) = refused(&["--http", "nowhere"]);
    assert!(code == Some(2) && said.contains("expected an address and a port"), "{code:?}: {said}");
    let (code, said) = refused(&["--http", &server.address.to_string()]);
    assert!(code != Some(0) && said.contains("cannot listen on"), "{code:?}: {said}");
    std::fs::write(&file, "\n").unwrap();
    let (code, said) = refused(&["--http", "127.0.0.1:0", "--api-key-file", file.to_str().unwrap()]);
    assert!(code == Some(2) && said.contains("expected one key a line"), "{code:?}: {said}");
}

/// Answers under way come to their end, and nobody new is let in.
#[test]
fn a_server_that_is_asked_to_stop_finishes_its_answers() {
    let workspace = endless();
    let server = Server::start(&workspace, &["--rows", "1"]);
    let body = json!({"prompt": "the river", "max_tokens": 4000, "stream": true});
    let running = server.post_raw(TEXT, &body);
    server.wait_for("running", |running| running == 1.0);
    let waiting = server.post_raw(TEXT, &json!({"prompt": "why", "max_tokens": 3}));
    server.wait_for("waiting", |waiting| waiting == 1.0);
    signal(server.pid(), "TERM");
    let started = Instant::now();
    while TcpStream::connect(server.address).is_ok() {
        assert!(started.elapsed() < PATIENCE, "connections are still taken");
        thread::sleep(Duration::from_millis(10));
    }
    let told = Reply::read(running).body;
    assert!(told.contains("\"finish_reason\":\"length\"") && told.ends_with("data: [DONE]\n\n"), "{told}");
    assert_eq!(Reply::read(waiting).json()["usage"]["completion_tokens"], 3);
    let (code, served) = server.end();
    assert_eq!((code, &served["answers"], &served["tokens"]), (Some(0), &json!(2), &json!(4003)));
}

/// Where the time for that is over, answers are cut and say so.
#[test]
fn a_server_whose_time_is_over_cuts_its_answers() {
    let workspace = endless();
    let server = Server::start(&workspace, &["--rows", "1", "--drain", "0"]);
    let running = server.post_raw(TEXT, &long(true));
    read_events(&running, 2);
    let waiting = server.post_raw(TEXT, &long(false));
    server.wait_for("waiting", |waiting| waiting == 1.0);
    signal(server.pid(), "INT");
    let mut told = String::new();
    BufReader::new(running).read_to_string(&mut told).unwrap();
    assert!(told.contains("\"code\":\"shutting_down\"") && !told.contains("[DONE]"), "{told}");
    let reply = Reply::read(waiting);
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("shutting_down")));
    let (code, served) = server.end();
    assert_eq!((code, &served["answers"], &served["cancelled"]), (Some(0), &json!(0), &json!(2)));
    // One that has nothing to do ends at once.
    let server = Server::start(&workspace, &[]);
    signal(server.pid(), "TERM");
    assert_eq!(server.end().0, Some(0));
}
