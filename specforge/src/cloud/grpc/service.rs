//! The one method of the service, for both sides: what a generator would write for `service Spec`.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::http;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::transport::Channel;
use tonic::{IntoStreamingRequest, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{CloudMessage, EdgeMessage};

const PATH: &str = "/specforge.cloud.v1.Spec/Session";

/// Opens a stream over a connection.
pub(super) async fn open(
    channel: Channel,
    messages: impl IntoStreamingRequest<Message = EdgeMessage>,
    largest: usize,
) -> Result<Streaming<CloudMessage>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(largest);
    grpc.ready().await.map_err(|error| Status::unavailable(format!("the connection is not ready: {error}")))?;
    let codec: ProstCodec<EdgeMessage, CloudMessage> = ProstCodec::default();
    let path = http::uri::PathAndQuery::from_static(PATH);
    grpc.streaming(messages.into_streaming_request(), path, codec).await.map(Response::into_inner)
}

/// What answers a stream of an edge's messages.
#[tonic::async_trait]
pub(super) trait Session: Send + Sync + 'static {
    /// The answers.
    type Answers: tokio_stream::Stream<Item = Result<CloudMessage, Status>> + Send + 'static;

    /// Begins to answer.
    async fn session(&self, request: Request<Streaming<EdgeMessage>>) -> Result<Response<Self::Answers>, Status>;
}

/// The service, of whatever answers.
#[derive(Debug)]
pub(super) struct SpecService<S> {
    inner: Arc<S>,
    largest: usize,
}

impl<S> SpecService<S> {
    /// Takes messages of at most so many bytes.
    pub(super) fn new(inner: S, largest: usize) -> Self {
        Self { inner: Arc::new(inner), largest }
    }
}

impl<S> Clone for SpecService<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), largest: self.largest }
    }
}

impl<S> NamedService for SpecService<S> {
    const NAME: &'static str = "specforge.cloud.v1.Spec";
}

/// The method, as tonic calls it.
struct Method<S>(Arc<S>);

impl<S: Session> StreamingService<EdgeMessage> for Method<S> {
    type Response = CloudMessage;
    type ResponseStream = S::Answers;
    type Future = BoxFuture<Response<S::Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<EdgeMessage>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.session(request).await })
    }
}

impl<S: Session> Service<http::Request<Body>> for SpecService<S> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (inner, largest) = (Arc::clone(&self.inner), self.largest);
        Box::pin(async move {
            if request.uri().path() != PATH {
                return Ok(Status::unimplemented("there is no such method").into_http());
            }
            let codec: ProstCodec<CloudMessage, EdgeMessage> = ProstCodec::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(largest);
            Ok(grpc.streaming(Method(inner), request).await)
        })
    }
}
