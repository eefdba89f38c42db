//! The listening socket and its connections: accepted, bounded, drained.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::authorize::Gate;
use crate::backend::{Backend, MirrorEvent};
use crate::config::MirrorConfig;
use crate::feed::{self, Feed, Turns};
use crate::manifest_cache::ManifestCache;
use crate::service::{Shared, TAGS_REMEMBERED_MAX, handle};
use crate::stall::StallGuard;
use crate::tls;

/// Largest request head. Bearer tokens of large registries reach 8 KiB; four of those are enough.
const HEAD_BYTES_MAX: usize = 32 << 10;

/// Most header lines in a request: podman sends about 20.
const HEAD_LINES_MAX: usize = 128;

/// A connection whose waiting bytes are fewer takes on more: so at most this and one chunk of a body
/// wait for the socket. A local hit's chunks are no memory of ours but lent from the page cache.
const WRITE_BUFFER_BYTES_MAX: usize = 512 << 10;

/// Longest TLS handshake: a few round trips; longer ones hold a connection for nothing.
const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a failed accept (out of file descriptors, say): long enough not to spin, short
/// enough not to be felt.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What a client gets that comes when the house is full.
const FULL_HOUSE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 102\r\n\r\n{\"errors\":[{\"code\":\"TOOMANYREQUESTS\",\"message\":\"too many connections\",\"detail\":{\"hint\":\"try later\"}}]}";

/// The mirror cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The listening socket.
    #[error(
        "cannot listen on {address}: {source}; choose another mirror.listen, or stop what uses it"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A TLS file.
    #[error("cannot read {}: {source}; mirror.tls_certificate and mirror.tls_key name PEM files", path.display())]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and key.
    #[error("the certificate and key cannot be used for TLS: {0}; check that they belong together")]
    Tls(#[source] rustls::Error),
    /// The system's randomness.
    #[error("the system gives no random bytes, without which callers cannot be told apart safely")]
    Randomness,
}

/// A bound mirror, not yet serving.
pub struct Mirror<B: Backend> {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    connections: Arc<Semaphore>,
    turns: Turns,
    shared: Arc<Shared<B>>,
}

impl<B: Backend> Mirror<B> {
    /// Listens on the configured address. Must be called within a tokio runtime with I/O and time.
    pub async fn bind(config: MirrorConfig, backend: Arc<B>) -> Result<Self, MirrorError> {
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let unbound = |source| MirrorError::Bind {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(unbound)?;
        let address = listener.local_addr().map_err(unbound)?;
        let gate = Gate::new(
            config.verdicts_max,
            config.authorization_ttl,
            config.authorization_stale,
        )
        .ok_or(MirrorError::Randomness)?;
        Ok(Self {
            listener,
            address,
            tls,
            connections: Arc::new(Semaphore::new(config.connections_max)),
            turns: Turns::new(),
            shared: Arc::new(Shared {
                gate: Arc::new(gate),
                manifests: Mutex::new(ManifestCache::new(config.manifest_cache_bytes)),
                tags: Mutex::new(LruCache::new(TAGS_REMEMBERED_MAX)),
                requests: Arc::new(Semaphore::new(config.requests_max)),
                tunnels: Arc::new(Semaphore::new(config.tunnels_max)),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
                next_id: AtomicU64::new(0),
                backend,
                config,
            }),
        })
    }

    /// Where it listens: the configured address, its port filled in where it was 0.
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` resolves, then lets requests in flight end for the configured
    /// time, cuts the rest, and returns.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let drain = CancellationToken::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut shutdown => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, client)) => self.admit(stream, client, &drain),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying on");
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
            }
        }
        drop(self.listener);
        drain.cancel();
        let Shared {
            tasks,
            stop,
            config,
            ..
        } = &*self.shared;
        tasks.close();
        if timeout(config.drain_timeout, tasks.wait()).await.is_err() {
            stop.cancel();
            tasks.wait().await;
        }
    }

    fn admit(&self, stream: TcpStream, client: SocketAddr, drain: &CancellationToken) {
        let backend = &self.shared.backend;
        let Ok(permit) = self.connections.clone().try_acquire_owned() else {
            backend.observe(MirrorEvent::ConnectionRefused);
            // A fresh socket's send buffer is empty: this fits or the client is gone. Never waits.
            if let Err(error) = stream.try_write(FULL_HOUSE) {
                tracing::debug!(%error, "a connection was turned away without a word");
            }
            return;
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection goes without TCP_NODELAY");
        }
        let is_local = stream
            .local_addr()
            .is_ok_and(|own| feed::is_local(client, own));
        if is_local {
            feed::tune(&stream);
        }
        // A turn is waited for outside the guard: that a client's turn has not come is not its fault.
        let guarded = StallGuard::new(stream, self.shared.config.client_stall_timeout);
        let stream = Feed::new(guarded, is_local.then_some(&self.turns));
        let open = Open {
            backend: backend.clone(),
            _permit: permit,
        };
        backend.observe(MirrorEvent::ConnectionOpened);
        let shared = self.shared.clone();
        let drain = drain.clone();
        let tls = self.tls.clone();
        self.shared.tasks.spawn(async move {
            let _open = open;
            let stop = shared.stop.clone();
            let served = async {
                match tls {
                    None => converse(shared, stream, drain).await,
                    Some(tls) => match timeout(TLS_HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => converse(shared, stream, drain).await,
                        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                        Err(_) => tracing::debug!("a TLS handshake took too long"),
                    },
                }
            };
            tokio::select! {
                () = served => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// An open connection, for the bound and the count.
struct Open<B: Backend> {
    backend: Arc<B>,
    _permit: OwnedSemaphorePermit,
}

impl<B: Backend> Drop for Open<B> {
    fn drop(&mut self) {
        self.backend.observe(MirrorEvent::ConnectionClosed);
    }
}

async fn converse<B, S>(shared: Arc<Shared<B>>, stream: S, drain: CancellationToken)
where
    B: Backend,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let head_timeout = shared.config.request_head_timeout;
    let service = service_fn(move |request| handle(shared.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_headers(HEAD_LINES_MAX)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(WRITE_BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
