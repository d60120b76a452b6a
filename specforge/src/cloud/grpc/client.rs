//! An edge's way to a cloud over gRPC.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::messages as wire;
use super::server::whole;
use super::service;
use super::wire as convert;
use crate::cloud::protocol::EdgeMessage;
use crate::cloud::transport::{Link, Received};
use crate::error::{Error, Result};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Messages that wait for the network.
const OUTBOX: usize = 16;
/// Largest message of a cloud's: the features of a long prompt come in one.
const LARGEST: usize = 1 << 30;

/// Where a cloud is.
#[derive(Debug, Clone)]
pub struct Place {
    /// `https://HOST:PORT`, or `http://` for loopback.
    pub address: String,
    /// PEM file of the authority that the cloud's certificate is of.
    pub authority: Option<PathBuf>,
    /// PEM files of the edge's own certificate and its key, where the cloud asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A connection to a cloud, one at a time.
pub struct GrpcLink {
    runtime: Runtime,
    endpoint: Endpoint,
    start: Instant,
    stream: Option<(mpsc::Sender<wire::EdgeMessage>, Streaming<wire::CloudMessage>)>,
}

fn pem(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io("read", path))
}

/// Whether the host of `http://HOST:PORT` is this machine.
fn is_loopback(address: &str) -> bool {
    let host = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or(host);
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl GrpcLink {
    /// A way to a cloud; nothing is connected yet.
    pub fn new(place: &Place) -> Result<Self> {
        let Place { address, authority, identity } = place;
        let wrong = |problem: &str| Error::Usage(format!("--cloud {address}: {problem}"));
        let is_secret = match address.split_once("://") {
            Some(("https", _)) => true,
            Some(("http", _)) if is_loopback(address) => false,
            Some(("http", _)) => {
                return Err(wrong(
                    "over http only a cloud on this machine is asked: prompts would travel in the clear",
                ));
            }
            _ => return Err(wrong("expected https://HOST:PORT, or http://HOST:PORT on this machine")),
        };
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|error| wrong(&whole(&error)))?;
        let mut endpoint = endpoint
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true);
        if is_secret {
            let Some(authority) = authority else {
                return Err(wrong("name the authority of its certificate, a PEM file, with --cloud-ca"));
            };
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem(authority)?));
            if let Some((certificate, key)) = identity {
                tls = tls.identity(Identity::from_pem(pem(certificate)?, pem(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(|error| {
                Error::bad_file(
                    authority,
                    format!("cannot be used as the authority of a certificate: {}", whole(&error)),
                )
            })?;
        } else if authority.is_some() || identity.is_some() {
            return Err(wrong("there are certificates and no https"));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Error::Failed(format!("cannot start the network's thread: {error}")))?;
        Ok(Self { runtime, endpoint, start: Instant::now(), stream: None })
    }
}

impl Link for GrpcLink {
    fn connect(&mut self) -> Result<(), String> {
        self.stream = None;
        let endpoint = self.endpoint.clone();
        let opening = async {
            let channel: Channel = endpoint.connect().await.map_err(|error| whole(&error))?;
            let (outbox, messages) = mpsc::channel(OUTBOX);
            let answers = service::open(channel, ReceiverStream::new(messages), LARGEST).await;
            Ok::<_, String>((outbox, answers.map_err(|status| said(&status))?))
        };
        // The timer is made inside the runtime that it belongs to.
        let opened = self.runtime.block_on(async { timeout(2 * CONNECT, opening).await });
        self.stream = Some(opened.map_err(|_| "there was no answer in time".to_owned())??);
        Ok(())
    }

    fn send(&mut self, message: EdgeMessage) -> Result<(), String> {
        let Some((outbox, _)) = &self.stream else { return Err("there is no connection".to_owned()) };
        outbox.blocking_send(convert::write_edge(message)).map_err(|_| "the connection is gone".to_owned())
    }

    fn receive(&mut self, patience: Duration) -> Received {
        let Some((_, answers)) = &mut self.stream else {
            return Received::Closed("there is no connection".to_owned());
        };
        let received = match self.runtime.block_on(async { timeout(patience, answers.message()).await }) {
            Err(_) => Received::Nothing,
            Ok(Ok(Some(message))) => match convert::read_cloud(message) {
                Ok(message) => Received::Message(message),
                Err(problem) => Received::Closed(format!("the cloud's message cannot be read: {problem}")),
            },
            Ok(Ok(None)) => Received::Closed("the cloud closed the connection".to_owned()),
            Ok(Err(status)) => Received::Closed(said(&status)),
        };
        if matches!(received, Received::Closed(_)) {
            self.stream = None;
        }
        received
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

fn said(status: &tonic::Status) -> String {
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(address: &str, authority: Option<&str>) -> String {
        let place = Place { address: address.to_owned(), authority: authority.map(PathBuf::from), identity: None };
        GrpcLink::new(&place).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn only_this_machine_is_asked_in_the_clear() {
        for address in ["http://127.0.0.1:8", "http://localhost:80/", "http://[::1]:9"] {
            assert_eq!(refused(address, None), "");
        }
        assert!(refused("http://10.0.0.1:80", None).contains("in the clear"));
        assert!(refused("http://127.0.0.1.example.org:80", None).contains("in the clear"));
        assert!(refused("10.0.0.1:80", None).contains("expected https"));
        assert!(refused("https://10.0.0.1:80", None).contains("--cloud-ca"));
        assert!(refused("https://10.0.0.1:80", Some("/no/such/file.pem")).contains("cannot read"));
        assert!(refused("http://127.0.0.1:8", Some("/no/such/file.pem")).contains("no https"));
    }

    #[test]
    fn a_cloud_that_is_not_there_is_an_answer_in_words() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let place = Place { address: format!("http://{free}"), authority: None, identity: None };
        let mut link = GrpcLink::new(&place).unwrap();
        assert!(link.connect().unwrap_err().contains("refused"));
        assert!(link.send(EdgeMessage::Close(crate::cloud::protocol::Address::default())).is_err());
        assert!(matches!(link.receive(Duration::from_millis(1)), Received::Closed(_)));
    }
}
