//! The cloud over gRPC: tasks that carry messages, and one thread that has the target.
//!
//! The target's thread never waits for the network. What arrives is put into one bounded queue that tasks wait at; what is
//! answered is put into a bounded queue of its connection, and a reader so slow that it is full loses the connection. Its
//! session is parked, and it may take it up again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::messages as wire;
use super::service::{Session, SpecService};
use super::wire as convert;
use crate::cloud::protocol::EdgeMessage;
use crate::cloud::{Cloud, LinkId};
use crate::error::{Error, Result};
use crate::stop::Stop;

/// Messages that wait for the target's thread, of all connections together.
const INBOX: usize = 256;
/// Messages that wait for one reader.
const OUTBOX: usize = 32;
/// Connections at a time.
const MOST_LINKS: usize = 1024;
/// Largest message of an edge's: a prompt of a million tokens fits.
const LARGEST: usize = 8 << 20;
/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(20);

/// Certificates of a cloud.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// PEM file of its own certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// PEM file of the key.
    pub key: PathBuf,
    /// PEM file of the authority that edges' certificates are of; where it is given, an edge without one is not let in.
    pub edges: Option<PathBuf>,
}

/// Where a cloud listens.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The address; port 0 takes a free one.
    pub address: SocketAddr,
    /// Certificates; without them everything travels in the clear, which [`serve`] allows on loopback alone.
    pub tls: Option<ServerTls>,
}

/// What a server did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// Connections that were taken.
    pub links: u64,
    /// Messages that were taken in.
    pub messages: u64,
}

/// What tasks tell the target's thread.
enum Inbound {
    Connected(LinkId, mpsc::Sender<Result<wire::CloudMessage, Status>>),
    Message(LinkId, EdgeMessage),
    Gone(LinkId),
}

/// Reads a file of certificates.
fn pem(path: &PathBuf) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io("read", path))
}

/// Serves a cloud until somebody asks to stop. `ready` is told the address.
pub fn serve(
    cloud: &mut Cloud<'_>,
    options: &ServeOptions,
    stop: &Stop,
    ready: &mut dyn FnMut(SocketAddr),
) -> Result<Served> {
    if options.tls.is_none() && !options.address.ip().is_loopback() {
        return Err(Error::Usage(format!(
            "gRPC on {}: prompts and answers would travel in the clear; give a certificate and its key, or listen on loopback",
            options.address
        )));
    }
    let mut builder = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)));
    if let Some(ServerTls { certificate, key, edges }) = &options.tls {
        let mut tls = ServerTlsConfig::new().identity(Identity::from_pem(pem(certificate)?, pem(key)?));
        if let Some(edges) = edges {
            tls = tls.client_ca_root(Certificate::from_pem(pem(edges)?));
        }
        builder = builder.tls_config(tls).map_err(|error| {
            Error::bad_file(certificate, format!("the certificate and its key cannot be used: {}", whole(&error)))
        })?;
    }
    let runtime =
        Runtime::new().map_err(|error| Error::Failed(format!("cannot start the network's threads: {error}")))?;
    let (inbox, mut arrivals) = mpsc::channel(INBOX);
    let carrier = Carrier { inbox, next: Arc::default(), links: Arc::default() };
    let (end, ended) = oneshot::channel::<()>();
    let incoming = {
        let _inside = runtime.enter();
        TcpIncoming::bind(options.address)
            .map_err(|error| Error::Failed(format!("cannot listen on {}: {error}", options.address)))?
            .with_nodelay(Some(true))
    };
    let address = incoming
        .local_addr()
        .map_err(|error| Error::Failed(format!("cannot say where {} listens: {error}", options.address)))?;
    let service = SpecService::new(carrier, LARGEST);
    let task = runtime.spawn(builder.add_service(service).serve_with_incoming_shutdown(incoming, async {
        let _ = ended.await;
    }));
    ready(address);
    let served = run(cloud, &runtime, &mut arrivals, stop);
    // Who still waits is told by the end of its connection; sessions end with the process.
    drop(end);
    arrivals.close();
    drop(arrivals);
    let _ = runtime.block_on(tokio::time::timeout(Duration::from_secs(2), task));
    runtime.shutdown_background();
    Ok(served)
}

/// A tonic error with what is behind it: its own text is two words.
pub(super) fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut behind = error.source();
    while let Some(source) = behind {
        text = format!("{text}: {source}");
        behind = source.source();
    }
    text
}

/// The target's thread.
fn run(cloud: &mut Cloud<'_>, runtime: &Runtime, arrivals: &mut mpsc::Receiver<Inbound>, stop: &Stop) -> Served {
    let start = Instant::now();
    let (mut links, mut served) = (BTreeMap::new(), Served::default());
    while stop.asked() == 0 {
        // Between two passes everything that has arrived is heard: a cancelled draft is not verified.
        let mut arrived = match cloud.has_work() {
            true => arrivals.try_recv().ok(),
            false => runtime.block_on(async { tokio::time::timeout(TICK, arrivals.recv()).await.ok().flatten() }),
        };
        while let Some(inbound) = arrived {
            match inbound {
                Inbound::Connected(link, outbox) => {
                    served.links += 1;
                    links.insert(link, outbox);
                }
                Inbound::Message(link, message) => {
                    served.messages += 1;
                    if links.contains_key(&link) {
                        cloud.receive(link, message, start.elapsed());
                    }
                }
                Inbound::Gone(link) => {
                    links.remove(&link);
                    cloud.closed(link);
                }
            }
            arrived = arrivals.try_recv().ok();
        }
        cloud.tick(start.elapsed());
        cloud.work(start.elapsed());
        send_answers(cloud, &mut links);
    }
    served
}

fn send_answers(cloud: &mut Cloud<'_>, links: &mut BTreeMap<LinkId, mpsc::Sender<Result<wire::CloudMessage, Status>>>) {
    while let Some((link, message)) = cloud.take() {
        let Some(outbox) = links.get(&link) else { continue };
        if outbox.try_send(Ok(convert::write_cloud(message))).is_err() {
            links.remove(&link);
            cloud.closed(link);
        }
    }
}

/// What takes connections.
#[derive(Clone)]
struct Carrier {
    inbox: mpsc::Sender<Inbound>,
    next: Arc<AtomicU64>,
    links: Arc<AtomicUsize>,
}

/// Counts a connection as long as it is there.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tonic::async_trait]
impl Session for Carrier {
    type Answers = ReceiverStream<Result<wire::CloudMessage, Status>>;

    async fn session(&self, request: Request<Streaming<wire::EdgeMessage>>) -> Result<Response<Self::Answers>, Status> {
        let before = self.links.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&self.links));
        if before >= MOST_LINKS {
            return Err(Status::resource_exhausted("too many connections"));
        }
        let (outbox, answers) = mpsc::channel(OUTBOX);
        let link = LinkId(self.next.fetch_add(1, Ordering::Relaxed));
        let ending = || Status::unavailable("the server is stopping");
        self.inbox.send(Inbound::Connected(link, outbox.clone())).await.map_err(|_| ending())?;
        let inbox = self.inbox.clone();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            let _counted = counted;
            loop {
                let message = tokio::select! {
                    () = outbox.closed() => break, // nobody reads any more
                    message = messages.message() => message,
                };
                let Ok(Some(message)) = message else { break };
                match convert::read_edge(message) {
                    Ok(message) => {
                        if inbox.send(Inbound::Message(link, message)).await.is_err() {
                            break;
                        }
                    }
                    Err(problem) => {
                        let _ = outbox.try_send(Err(Status::invalid_argument(problem)));
                        break;
                    }
                }
            }
            let _ = inbox.send(Inbound::Gone(link)).await;
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
