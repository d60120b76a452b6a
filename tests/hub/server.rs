//! A hub on this machine that behaves as badly as it is told to. It stops when it is dropped.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Something that goes wrong once.
#[derive(Debug, Clone)]
pub enum Fault {
    /// An answer of this status, with these headers, and nothing else.
    Status(u16, &'static [(&'static str, &'static str)]),
    /// The connection ends after so many bytes of the body.
    Drop(usize),
    /// Nothing more comes after so many bytes, until the client goes.
    Stall(usize),
    /// The body comes in pieces of so many bytes, with a pause between them.
    Slow(usize, Duration),
    /// The server announces so many bytes more than there are, and sends as many.
    Longer(usize),
    /// A byte of the body is another one.
    Flip,
    /// Range is not understood: the whole file comes.
    Whole,
}

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    /// Whether it came to the second address, where large files lie.
    pub elsewhere: bool,
}

/// A repository.
#[derive(Debug, Clone)]
pub struct Repo {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Repo {
    /// The files of a folder, and below it, as of a commit that is this digit forty times.
    pub fn of_folder(folder: &Path, digit: char) -> Self {
        let files = super::fixture::contents(folder);
        let files = files.into_iter().map(|(path, content)| (path.to_string_lossy().into_owned(), content));
        Self { commit: digit.to_string().repeat(40), files: files.collect() }
    }
}

#[derive(Default)]
struct State {
    /// By `models/org/name`, the newest commit last.
    repos: BTreeMap<String, Vec<Repo>>,
    /// What a request whose method and path end like this meets next.
    faults: Vec<(String, Fault)>,
    /// Token that every request to the hub must bear.
    token: Option<String>,
    requests: Vec<Request>,
    elsewhere: u16,
}

/// The server.
pub struct Server {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    ports: [u16; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// A hub without repositories.
    pub fn new() -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|index: usize| listeners[index].local_addr().unwrap().port());
        let state = Arc::new(Mutex::new(State { elsewhere: ports[1], ..State::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let serve = |(listener, elsewhere): (TcpListener, bool)| {
            let (state, stop) = (state.clone(), stop.clone());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (state, stop) = (state.clone(), stop.clone());
                    // It ends with its connection, or with the server.
                    thread::spawn(move || stream.map(|stream| answer(stream, elsewhere, &state, &stop)));
                }
            })
        };
        let threads = listeners.into_iter().zip([false, true]).map(serve).collect();
        Self { state, stop, ports, threads }
    }

    /// Value of `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    /// Puts a repository, such as `models/org/name`, or a new commit of it.
    pub fn put(&self, name: &str, repo: Repo) {
        self.state.lock().unwrap().repos.entry(name.to_owned()).or_default().push(repo);
    }

    /// The next request that this fits, `GET .../config.json` by `GET config.json`, goes wrong. Several happen in their order.
    pub fn fail(&self, request: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push((request.to_owned(), fault));
    }

    /// From now on only who has this token is answered.
    pub fn demand_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_owned());
    }

    /// Every request so far, which are forgotten.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for port in self.ports {
            let _ = TcpStream::connect(("127.0.0.1", port));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn read(stream: &TcpStream, elsewhere: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let line = lines.next()?.ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Some(Request { method, path, headers, elsewhere })
}

/// Answers one request, and ends the connection.
fn answer(mut stream: TcpStream, elsewhere: bool, state: &Mutex<State>, stop: &AtomicBool) {
    let Some(request) = read(&stream, elsewhere) else { return };
    let (reply, fault) = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        let fits = |(wanted, _): &(String, Fault)| {
            let (method, path) = wanted.split_once(' ').unwrap();
            request.method == method && request.path.ends_with(path)
        };
        let reply = reply(&state, &request);
        // Where a redirect comes first, what goes wrong is what it leads to.
        let place = state
            .faults
            .iter()
            .position(fits)
            .filter(|&place| matches!(state.faults[place].1, Fault::Status(..)) || !matches!(reply.status, 302));
        (reply, place.map(|place| state.faults.remove(place).1))
    };
    // A client that goes away is one of the things that are tested.
    let _ = send(&mut stream, &request, reply, fault, stop);
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn error(status: u16, code: &str) -> Self {
        let headers = vec![("X-Error-Code".to_owned(), code.to_owned())];
        Self { status, headers, body: json!({"error": code}).to_string().into_bytes() }
    }
}

impl State {
    /// A repository at a revision.
    fn at(&self, name: &str, revision: &str) -> Result<&Repo, Reply> {
        let commits = self.repos.get(name).ok_or_else(|| Reply::error(404, "RepoNotFound"))?;
        let found = match revision {
            "main" | "v1" | "refs%2Fpr%2F1" => commits.last(),
            commit => commits.iter().rev().find(|repo| repo.commit == commit),
        };
        found.ok_or_else(|| Reply::error(404, "RevisionNotFound"))
    }
}

fn reply(state: &State, request: &Request) -> Reply {
    let bearer = state.token.as_ref().map(|token| format!("Bearer {token}"));
    if !request.elsewhere && bearer.is_some() && request.headers.get("authorization") != bearer.as_ref() {
        return Reply::error(401, "RepoNotFound");
    }
    let path = request.path.trim_start_matches('/');
    if let Some(about) = path.strip_prefix("api/") {
        let Some((name, revision)) = about.split_once("/revision/") else { return Reply::error(404, "") };
        let repo = match state.at(name, revision) {
            Ok(repo) => repo,
            Err(refusal) => return refusal,
        };
        let siblings: Vec<Value> = repo.files.keys().map(|file| json!({"rfilename": file})).collect();
        let body = json!({"id": name, "sha": repo.commit, "siblings": siblings}).to_string().into_bytes();
        return Reply { status: 200, headers: Vec::new(), body };
    }
    let (repo, file) = match path.split_once("/resolve/") {
        Some((name, rest)) => {
            let name = if name.starts_with("datasets/") { name.to_owned() } else { format!("models/{name}") };
            let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
            (state.at(&name, revision), file)
        }
        None => (Err(Reply::error(404, "RepoNotFound")), ""),
    };
    let repo = match repo {
        Ok(repo) => repo,
        Err(refusal) => return refusal,
    };
    let Some(content) = repo.files.get(file) else { return Reply::error(404, "EntryNotFound") };
    let large = file.ends_with(".safetensors") || file.ends_with(".gguf") || file.ends_with(".parquet");
    let mut headers = vec![("X-Repo-Commit".to_owned(), repo.commit.clone())];
    if large && !request.elsewhere {
        headers.push(("X-Linked-ETag".to_owned(), format!("\"{}\"", etag(content, true))));
        headers.push(("X-Linked-Size".to_owned(), content.len().to_string()));
        headers.push(("Location".to_owned(), format!("http://127.0.0.1:{}{}", state.elsewhere, request.path)));
        return Reply { status: 302, headers, body: Vec::new() };
    }
    headers.push(("ETag".to_owned(), format!("\"{}\"", etag(content, large))));
    Reply { status: 200, headers, body: content.clone() }
}

/// What a hub calls content: SHA-256 of large files, git's own hash of small ones.
pub fn etag(content: &[u8], large: bool) -> String {
    let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    match large {
        true => digits(&Sha256::digest(content)),
        false => {
            digits(&Sha1::new().chain_update(format!("blob {}\0", content.len())).chain_update(content).finalize())
        }
    }
}

fn send(
    stream: &mut TcpStream,
    request: &Request,
    mut reply: Reply,
    fault: Option<Fault>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    if let Some(Fault::Status(status, headers)) = &fault {
        let headers = headers.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        reply = Reply { status: *status, headers, body: Vec::new() };
    }
    let range = request.headers.get("range").filter(|_| !matches!(fault, Some(Fault::Whole)));
    let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    if let (Some(from), 200) = (from, reply.status) {
        let total = reply.body.len();
        reply.status = 206;
        reply.headers.push(("Content-Range".to_owned(), format!("bytes {from}-{}/{total}", total - 1)));
        reply.body.drain(..from.min(total));
    }
    match &fault {
        Some(Fault::Longer(more)) => reply.body.extend(vec![0; *more]),
        Some(Fault::Flip) => reply.body[0] ^= 1,
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} Whatever\r\nConnection: close\r\n", reply.status);
    head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::Drop(bytes)) => stream.write_all(&reply.body[..bytes.min(reply.body.len())]),
        Some(Fault::Stall(bytes)) => {
            stream.write_all(&reply.body[..bytes.min(reply.body.len())])?;
            stream.flush()?;
            stream.set_read_timeout(Some(Duration::from_millis(50)))?;
            while !stop.load(Ordering::SeqCst) {
                match std::io::Read::read(stream, &mut [0]) {
                    Ok(0) => break, // the client went
                    Ok(_) => {}
                    Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        }
        Some(Fault::Slow(piece, pause)) => {
            for piece in reply.body.chunks(piece) {
                stream.write_all(piece)?;
                thread::sleep(pause);
            }
            Ok(())
        }
        _ => stream.write_all(&reply.body),
    }
}
