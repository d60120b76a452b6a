//! A small HTTP server on loopback that behaves as a test wants.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

/// What becomes of a request.
pub(crate) enum Reply {
    /// An answer: status, further headers, body.
    Answer(u16, Vec<(String, String)>, String),
    /// The connection ends.
    Hangup,
    /// The connection ends in the middle of this body.
    Cut(String),
    /// There is no answer as long as somebody waits.
    Never,
}

impl Reply {
    pub(crate) fn json(value: &Value) -> Self {
        Self::status(200, &[], &value.to_string())
    }

    pub(crate) fn status(status: u16, headers: &[(&str, &str)], body: &str) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Reply::Answer(status, headers, body.to_owned())
    }
}

/// Path and authorization of each request.
type Requests = Arc<Mutex<Vec<(String, Option<String>)>>>;

#[derive(Default)]
struct Counts {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// The server. It ends with the value.
pub(crate) struct Server {
    address: SocketAddr,
    requests: Requests,
    counts: Arc<Counts>,
    ended: Arc<AtomicBool>,
}

impl Server {
    /// Answers with what `reply` makes of path and question.
    pub(crate) fn start(reply: impl Fn(&str, &Value) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            counts: Arc::default(),
            ended: Arc::default(),
        };
        let (reply, requests) = (Arc::new(reply), Arc::clone(&server.requests));
        let (counts, ended) = (Arc::clone(&server.counts), Arc::clone(&server.ended));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (reply, requests, counts) = (Arc::clone(&reply), Arc::clone(&requests), Arc::clone(&counts));
                thread::spawn(move || while serve(stream.as_ref().unwrap(), &*reply, &requests, &counts).is_some() {});
            }
        });
        server
    }

    pub(crate) fn address(&self, engine: &str) -> String {
        format!("{engine}:{}", self.url())
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<(String, Option<String>)> {
        self.requests.lock().unwrap().clone()
    }

    /// Questions (not about the server) that were here at once, at most.
    pub(crate) fn most_at_once(&self) -> usize {
        self.counts.most.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // The listener wakes up, sees that it is over, and closes.
        let _ = TcpStream::connect(self.address);
    }
}

/// One request of a connection; nothing once the connection is over.
fn serve(
    stream: &TcpStream,
    reply: &(dyn Fn(&str, &Value) -> Reply + Send + Sync),
    requests: &Requests,
    counts: &Counts,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&length| length > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut length, mut authorization) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    requests.lock().unwrap().push((path.clone(), authorization));
    let question = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let at_once = counts.now.fetch_add(1, Ordering::SeqCst) + 1;
    counts.most.fetch_max(at_once, Ordering::SeqCst);
    let reply = reply(&path, &question);
    // Counted off before the answer is sent: whoever has it may ask again at once.
    counts.now.fetch_sub(1, Ordering::SeqCst);
    let mut out = stream;
    match reply {
        Reply::Answer(status, headers, body) => {
            let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            let head = format!("HTTP/1.1 {status} Whatever\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
            out.write_all(format!("{head}{body}").as_bytes()).ok()
        }
        Reply::Cut(body) => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            out.write_all(format!("{head}{}", &body[..body.len() / 2]).as_bytes()).ok()?;
            None
        }
        Reply::Hangup => None,
        Reply::Never => {
            // Until the other side has gone.
            let _ = reader.read(&mut [0]);
            None
        }
    }
}
