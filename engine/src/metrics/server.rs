//! The HTTP server: few connections at a time, two pages.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use pegaflow_shm::node::NodeReader;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

use super::exposition::{CONTENT_TYPE, metrics_text};
use super::health::{Health, Phase};

/// Connections served at a time; the next ones wait.
pub const MAX_HTTP_CONNECTIONS: usize = 32;
/// A connection that moves no byte for this long is closed, so that idle ones cannot use up the
/// places.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The pages cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The port is taken.
    #[error(
        "--http {address}: the port is in use by another process: choose another one, or say \
         --http off"
    )]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// Another failure.
    #[error("--http {address}: {source}: give an address of this host, or say --http off")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The error.
        source: io::Error,
    },
}

/// A bound server.
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
}

#[derive(Clone)]
struct Pages {
    node: NodeReader,
    health: Arc<Health>,
}

impl HttpServer {
    /// Binds; connections wait until [`Self::serve`].
    ///
    /// # Errors
    /// The address is taken or not of this host.
    pub async fn bind(address: SocketAddr) -> Result<HttpServer, HttpError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => HttpError::InUse { address },
                _ => HttpError::Bind { address, source },
            })?;
        let bound = listener
            .local_addr()
            .map_err(|source| HttpError::Bind { address, source })?;
        Ok(HttpServer {
            listener,
            address: bound,
        })
    }

    /// The address really bound: port 0 has become a free one.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the future is dropped.
    pub async fn serve(self, node: NodeReader, health: Arc<Health>) {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/health", get(health_page))
            .fallback(not_found)
            .with_state(Pages { node, health });
        let places = Arc::new(Semaphore::new(MAX_HTTP_CONNECTIONS));
        let listener = Bounded {
            listener: self.listener,
            places,
        };
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the HTTP pages are gone");
        }
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    match metrics_text(&pages.node) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn health_page(State(pages): State<Pages>) -> Response {
    let report = pages.health.report();
    let code = match report.status {
        Phase::Ok => StatusCode::OK,
        Phase::Starting | Phase::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    match serde_json::to_string(&report) {
        Ok(text) => (code, [(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn not_found() -> Response {
    let text =
        "pegaflowd has two pages:\n/metrics  numbers for Prometheus\n/health   is it serving?\n";
    (StatusCode::NOT_FOUND, text).into_response()
}

struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let Ok(place) = self.places.clone().acquire_owned().await else {
                // The semaphore is never closed.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let idle = Box::pin(tokio::time::sleep(IDLE_LIMIT));
                    return (
                        Connection {
                            stream,
                            idle,
                            _place: place,
                        },
                        address,
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "an HTTP connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that gives up when nothing moves.
struct Connection {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        moved: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if moved.is_ready() {
            self.idle.as_mut().reset(Instant::now() + IDLE_LIMIT);
            return moved;
        }
        match self.idle.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let moved = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.watch(context, moved)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, moved)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
