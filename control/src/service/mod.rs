//! The gRPC shell of the core: listener, sessions, and the one task that owns the core.
//!
//! [`Server::start`] opens the CA, binds and serves; it is embedded in a node or run by
//! `pantala-control`. Every queue is bounded: a node that sends faster than the core takes is slowed
//! down by its own session, one that reads slower than the core answers is disconnected, and the core
//! waits for nobody. [`Server::shutdown`], or dropping the server, ends all sessions; nodes go on
//! alone and reconnect.

mod driver;
mod joins;
mod listener;
mod rpc;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::authority::{Authority, AuthorityError};
use crate::convert::{CONNECTION_WINDOW_SIZE, MESSAGE_SIZE_MAX, STREAM_WINDOW_SIZE};
use crate::core::CoreConfig;
use crate::proto::control_server::ControlServer;
use crate::token::JoinToken;

/// Streams of one connection at a time: its session, a status call, and some to spare.
const STREAMS_PER_CONNECTION_MAX: u32 = 8;
/// Bytes of headers in one request: ours have some hundreds.
const HEADERS_SIZE_MAX: u32 = 16 * 1024;
/// How long open connections may take to end at shutdown before they are cut.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// What a server needs to know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The data directory; the CA and the join token are in its `control` folder.
    pub dir: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// How long a silent node counts as alive.
    pub liveness_timeout: Duration,
    /// Messages that wait for one node before it counts as too slow and is disconnected.
    pub outbound_max: usize,
    /// The times and bounds of the core.
    pub core: CoreConfig,
}

impl ServerConfig {
    /// The configuration with the default times and bounds: silent nodes are dead after 15 s.
    pub fn new(dir: PathBuf, listen: SocketAddr) -> Self {
        Self {
            dir,
            listen,
            liveness_timeout: Duration::from_secs(15),
            outbound_max: 1024,
            core: CoreConfig::default(),
        }
    }
}

/// Control cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The CA cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The address cannot be used.
    #[error("cannot listen on {address}: {cause}; is another control running there?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        cause: std::io::Error,
    },
    /// TLS refuses the certificates.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// A running control.
#[derive(Debug)]
pub struct Server {
    local_addr: SocketAddr,
    token: JoinToken,
    stop: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

impl Server {
    /// Opens the CA, binds, and serves on the current runtime until [`Server::shutdown`] or drop.
    ///
    /// # Errors
    /// [`ServerError`] where the CA or the address cannot be used.
    pub async fn start(config: ServerConfig) -> Result<Self, ServerError> {
        let authority = Arc::new(Authority::open(&config.dir)?);
        let acceptor = listener::acceptor(&authority)?;
        let failed = |cause| ServerError::Listen {
            address: config.listen,
            cause,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let token = authority.join_token().clone();
        let (stop, stopped) = watch::channel(false);

        let nodes_max = config.core.nodes_max;
        let incoming = listener::listen(listener, acceptor, nodes_max, stopped.clone());
        let inputs = driver::start(config.core.clone(), stopped.clone());
        let service = rpc::Service::new(authority, inputs, &config);
        let service = ControlServer::new(service)
            .max_decoding_message_size(MESSAGE_SIZE_MAX)
            .max_encoding_message_size(MESSAGE_SIZE_MAX);
        let mut until = stopped;
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .initial_stream_window_size(STREAM_WINDOW_SIZE)
            .initial_connection_window_size(CONNECTION_WINDOW_SIZE)
            .http2_max_header_list_size(HEADERS_SIZE_MAX)
            .http2_keepalive_interval(Some(config.liveness_timeout / 3))
            .http2_keepalive_timeout(Some(config.liveness_timeout))
            .add_service(service)
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
                // An error means that the server was dropped, which is the same wish.
                until.wait_for(|stop| *stop).await.ok();
            });
        let serving = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "control stopped serving");
            }
        });
        tracing::info!(%local_addr, "control serves");
        Ok(Self {
            local_addr,
            token,
            stop,
            serving,
        })
    }
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
    /// What nodes join with.
    pub fn join_token(&self) -> &JoinToken {
        &self.token
    }
    /// Ends all sessions and stops; the port is free afterwards.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, &mut self.serving)
            .await
            .is_err()
        {
            tracing::warn!("control's connections did not end in time and are cut");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.serving.abort();
    }
}
