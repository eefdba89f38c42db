//! The port: TLS, and who gets how much of it.
//!
//! Whoever has no certificate may only join: such connections are few and short. What is no TLS at
//! all ends with its handshake, whose number and time are bounded too.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pantala_wire::NodeId;
use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::ServerError;
use crate::authority::Authority;
use crate::x509;

/// Handshakes at a time: a whole cluster that reconnects gets through in a moment, a flood does not
/// take the memory.
const HANDSHAKES_MAX: usize = 512;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections without a certificate at a time.
const JOINERS_MAX: usize = 64;
/// How long a connection without a certificate lasts: one join takes milliseconds.
const JOINER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that wait to be taken over by the gRPC server.
const ACCEPTED_MAX: usize = 64;
/// How long to wait when the system gives no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerInfo {
    /// By its client certificate; `None` without one.
    pub(super) node: Option<NodeId>,
    pub(super) address: SocketAddr,
}

/// A connection after its handshake.
pub(super) struct Connection {
    tls: TlsStream<TcpStream>,
    peer: PeerInfo,
    /// Ends a connection that has no certificate.
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

pub(super) fn acceptor(authority: &Authority) -> Result<TlsAcceptor, ServerError> {
    let failed = |error: &dyn std::fmt::Display| ServerError::Tls(error.to_string());
    let (certificate, key) = authority.issue_control()?;
    let mut roots = RootCertStore::empty();
    roots
        .add(authority.ca_certificate_der().clone())
        .map_err(|error| failed(&error))?;
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| failed(&error))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            builder
                .with_client_cert_verifier(verifier)
                .with_single_cert(vec![certificate], key)
        })
        .map_err(|error| failed(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Takes connections from `listener` until `stopped`.
pub(super) fn listen(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    nodes_max: usize,
    mut stopped: watch::Receiver<bool>,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (accepted, receiver) = mpsc::channel(ACCEPTED_MAX);
    let admission = Arc::new(Admission {
        acceptor,
        joiners: Arc::new(Semaphore::new(JOINERS_MAX)),
        // A node that reconnects has two connections for a moment.
        members: Arc::new(Semaphore::new(2 * nodes_max)),
    });
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = listener.accept() => next,
                _ = stopped.wait_for(|stop| *stop) => return,
            };
            let (stream, address) = match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                tracing::debug!(%address, "too many handshakes at once");
                continue;
            };
            let admission = admission.clone();
            let accepted = accepted.clone();
            tokio::spawn(async move {
                let connection = admission.admit(stream, address).await;
                drop(permit);
                match connection {
                    // The server that would take it has gone.
                    Ok(connection) => drop(accepted.send(Ok(connection)).await),
                    Err(error) => tracing::debug!(%address, %error, "no TLS connection"),
                }
            });
        }
    });
    receiver
}

struct Admission {
    acceptor: TlsAcceptor,
    joiners: Arc<Semaphore>,
    members: Arc<Semaphore>,
}

impl Admission {
    async fn admit(&self, stream: TcpStream, address: SocketAddr) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        let tls = timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(stream))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let node = tls
            .get_ref()
            .1
            .peer_certificates()
            .and_then(<[_]>::first)
            .and_then(|certificate| x509::node_of(certificate));
        let places = if node.is_some() {
            &self.members
        } else {
            &self.joiners
        };
        let permit = places
            .clone()
            .try_acquire_owned()
            .map_err(|_| io::Error::other("too many connections"))?;
        Ok(Connection {
            tls,
            peer: PeerInfo { node, address },
            deadline: node.is_none().then(|| Box::pin(sleep(JOINER_TIMEOUT))),
            _permit: permit,
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
