//! Connections: who is let in, how long headers may take, and how the last ones end.

use std::net::TcpListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::board::Board;
use super::house::Limits;
use crate::error::{Error, Result};
use crate::stop::Stop;

/// How long the headers of a request may take, and so how long a connection may be silent.
const HEADERS: Duration = Duration::from_secs(30);
/// How often it is looked whether a signal came.
const LOOK: Duration = Duration::from_millis(50);
/// How long answers that were cut short may take to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves until a signal comes or the desk is gone, and then until answers have ended or their time is over.
pub fn serve(listener: TcpListener, router: Router, limits: Limits, board: &Board, stop: &Stop) -> Result<()> {
    let failed = |error: std::io::Error| Error::Failed(format!("cannot serve: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // Prompts are rendered and encoded there, of many clients at once only so many.
        .max_blocking_threads(2)
        .build()
        .map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let served = runtime.block_on(connections(listener, router, limits, board, stop)).map_err(failed);
    runtime.shutdown_timeout(LAST_WORDS);
    served
}

async fn connections(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    board: &Board,
    stop: &Stop,
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS);
    let mut stopped = pin!(async {
        while stop.asked() == 0 && !board.is_ending() {
            sleep(LOOK).await;
        }
    });
    loop {
        let arrival = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(std::io::Error::other)?;
            listener.accept().await.map(|(stream, _)| (stream, place))
        };
        let (stream, place) = tokio::select! {
            () = &mut stopped => break,
            arrival = arrival => match arrival {
                Ok(arrival) => arrival,
                // Too many open files, say: others may end meanwhile.
                Err(_) => {
                    sleep(LOOK).await;
                    continue;
                }
            },
        };
        // Pieces of a stream are small, and are wanted at once.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // What goes wrong on a connection is its client's business.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    board.end();
    let mut closing = pin!(graceful.shutdown());
    if timeout(limits.drain, &mut closing).await.is_err() {
        board.cut();
        let _ = timeout(LAST_WORDS, closing).await;
    }
    Ok(())
}
