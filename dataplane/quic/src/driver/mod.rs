//! The seam between what the public types promise and how packets travel.
//!
//! A driver is four types, [`Endpoint`], [`Connection`], [`SendStream`] and [`RecvStream`], and the
//! [`Incoming`] handshake. It moves bytes and keeps QUIC's timers; it takes configuration of ours and
//! returns errors of ours; it knows nothing of frames, nodes, admission or budgets. There are two, both
//! around quinn-proto: own threads with an io_uring each ([`ring`]), and quinn on tokio's sockets
//! ([`tokio`]) for where io_uring is forbidden. Each name here is an enum of both, chosen at `bind`.

mod errors;
mod ids;
mod ring;
mod setup;
mod tokio;

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use rustls_pki_types::CertificateDer;

use crate::config::{DriverChoice, DriverKind, DriverReport, Limits, SeeSockets};
use crate::connection::PathStats;
use crate::error::{CloseReason, Error};
use crate::identity::Tls;

/// Calls the method of whichever driver it is.
macro_rules! either {
    ($self:expr, $it:ident => $call:expr) => {
        match $self {
            Self::Ring($it) => $call,
            Self::Tokio($it) => $call,
        }
    };
}

#[derive(Debug, Clone)]
pub(crate) enum Endpoint {
    Ring(ring::Endpoint),
    Tokio(tokio::Endpoint),
}

impl Endpoint {
    /// Binds with the driver that is chosen; `Auto` takes tokio where the ring cannot be had, and the
    /// report says why.
    pub(crate) fn bind(
        choice: DriverChoice,
        listen: SocketAddr,
        limits: &Limits,
        tls: &Tls,
        see: Option<SeeSockets<'_>>,
    ) -> io::Result<(Self, DriverReport)> {
        let setup = setup::Setup::new(limits, tls)?;
        let why = match choice {
            DriverChoice::Tokio => "chosen".to_owned(),
            DriverChoice::Auto | DriverChoice::Ring => match pantala_uring::probe() {
                Ok(()) => {
                    let (endpoint, threads) = ring::Endpoint::bind(listen, limits, setup, see)?;
                    let report = DriverReport {
                        kind: DriverKind::Ring { threads },
                        why: "the kernel has what it needs".into(),
                    };
                    return Ok((Self::Ring(endpoint), report));
                }
                Err(error) if choice == DriverChoice::Ring => {
                    return Err(io::Error::new(io::ErrorKind::Unsupported, error));
                }
                Err(error) => error.to_string(),
            },
        };
        let endpoint = tokio::Endpoint::bind(listen, limits, setup, see)?;
        let report = DriverReport {
            kind: DriverKind::Tokio,
            why,
        };
        Ok((Self::Tokio(endpoint), report))
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        either!(self, it => it.local_addr())
    }

    /// Connects; ready when the handshake is done.
    pub(crate) async fn connect(&self, address: SocketAddr) -> Result<Connection, Error> {
        Ok(match self {
            Self::Ring(it) => Connection::Ring(it.connect(address).await?),
            Self::Tokio(it) => Connection::Tokio(it.connect(address).await?),
        })
    }

    /// The next handshake that a peer has begun; `None` once the endpoint is closed.
    pub(crate) async fn accept(&self) -> Option<Incoming> {
        Some(match self {
            Self::Ring(it) => Incoming::Ring(it.accept().await?),
            Self::Tokio(it) => Incoming::Tokio(it.accept().await?),
        })
    }

    /// Closes all connections and takes no more in.
    pub(crate) fn close(&self, reason: CloseReason) {
        either!(self, it => it.close(reason));
    }

    /// Waits, for a bounded time, until the peers have been told.
    pub(crate) async fn drained(&self) {
        either!(self, it => it.drained().await);
    }
}

/// A handshake that a peer has begun.
pub(crate) enum Incoming {
    Ring(ring::Incoming),
    Tokio(tokio::Incoming),
}

impl Incoming {
    pub(crate) fn remote_addr(&self) -> SocketAddr {
        either!(self, it => it.remote_addr())
    }

    pub(crate) fn is_address_validated(&self) -> bool {
        either!(self, it => it.is_address_validated())
    }

    /// Makes the peer prove that it receives what is sent to its address, and begin again.
    pub(crate) fn validate_address(self) {
        either!(self, it => it.validate_address());
    }

    pub(crate) fn refuse(self) {
        either!(self, it => it.refuse());
    }

    pub(crate) async fn establish(self) -> Result<Connection, Error> {
        Ok(match self {
            Self::Ring(it) => Connection::Ring(it.establish().await?),
            Self::Tokio(it) => Connection::Tokio(it.establish().await?),
        })
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Connection {
    Ring(ring::Connection),
    Tokio(tokio::Connection),
}

impl Connection {
    /// The peer's certificates, verified against the authority; its own comes first.
    pub(crate) fn certificates(&self) -> Vec<CertificateDer<'static>> {
        either!(self, it => it.certificates())
    }

    pub(crate) fn remote_addr(&self) -> SocketAddr {
        let mut address = either!(self, it => it.remote_addr());
        // A dual-stack socket shows IPv4 peers as mapped addresses.
        address.set_ip(address.ip().to_canonical());
        address
    }

    /// Tells the peer that it is admitted: the one unidirectional stream of the protocol, empty.
    pub(crate) fn announce_admission(&self) {
        either!(self, it => it.announce_admission());
    }

    /// Waits for [`Self::announce_admission`] of the peer.
    pub(crate) async fn await_admission(&self) -> Result<(), Error> {
        either!(self, it => it.await_admission().await)
    }

    pub(crate) async fn open(&self) -> Result<(SendStream, RecvStream), Error> {
        Ok(match self {
            Self::Ring(it) => pair(it.open().await?),
            Self::Tokio(it) => pair(it.open().await?),
        })
    }

    pub(crate) async fn accept(&self) -> Result<(SendStream, RecvStream), Error> {
        Ok(match self {
            Self::Ring(it) => pair(it.accept().await?),
            Self::Tokio(it) => pair(it.accept().await?),
        })
    }

    pub(crate) fn stats(&self) -> PathStats {
        let stats = either!(self, it => it.stats());
        PathStats {
            rtt: stats.path.rtt,
            cwnd: stats.path.cwnd,
            udp_payload_bytes: stats.path.current_mtu,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_datagrams: stats.udp_tx.datagrams,
            received_datagrams: stats.udp_rx.datagrams,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
        }
    }

    /// Bytes that may be written and not yet acknowledged.
    pub(crate) fn set_send_window(&self, bytes: u64) {
        either!(self, it => it.set_send_window(bytes));
    }

    /// Bytes that the peer may send and that are not yet read.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        either!(self, it => it.set_receive_window(bytes));
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        either!(self, it => it.close(reason));
    }

    pub(crate) async fn closed(&self) -> Error {
        either!(self, it => it.closed().await)
    }

    pub(crate) fn is_closed(&self) -> bool {
        either!(self, it => it.is_closed())
    }
}

fn pair<S: Into<SendStream>, R: Into<RecvStream>>(
    (send, recv): (S, R),
) -> (SendStream, RecvStream) {
    (send.into(), recv.into())
}

#[derive(Debug)]
pub(crate) enum SendStream {
    Ring(ring::SendStream),
    Tokio(tokio::SendStream),
}

impl From<ring::SendStream> for SendStream {
    fn from(stream: ring::SendStream) -> Self {
        Self::Ring(stream)
    }
}

impl From<tokio::SendStream> for SendStream {
    fn from(stream: tokio::SendStream) -> Self {
        Self::Tokio(stream)
    }
}

impl SendStream {
    /// Hands over `bytes`; waits while the send window is full. What has been handed over when it is
    /// abandoned is sent.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        either!(self, it => it.write(bytes).await)
    }

    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        either!(self, it => it.finish())
    }

    pub(crate) fn reset(&mut self) {
        either!(self, it => it.reset());
    }

    /// Streams of a higher rank are sent first.
    pub(crate) fn set_rank(&mut self, rank: i32) {
        either!(self, it => it.set_rank(rank));
    }

    pub(crate) async fn delivered(&mut self) -> Result<(), Error> {
        either!(self, it => it.delivered().await)
    }
}

#[derive(Debug)]
pub(crate) enum RecvStream {
    Ring(ring::RecvStream),
    Tokio(tokio::RecvStream),
}

impl From<ring::RecvStream> for RecvStream {
    fn from(stream: ring::RecvStream) -> Self {
        Self::Ring(stream)
    }
}

impl From<tokio::RecvStream> for RecvStream {
    fn from(stream: tokio::RecvStream) -> Self {
        Self::Tokio(stream)
    }
}

impl RecvStream {
    /// Between one and `max` bytes; `None` at the stream's end.
    pub(crate) async fn read(&mut self, max: usize) -> Result<Option<Bytes>, Error> {
        either!(self, it => it.read(max).await)
    }

    /// `bytes` bytes, or fewer at the stream's end; keeps what it has when it is abandoned.
    pub(crate) async fn read_slices(&mut self, bytes: usize) -> Result<Vec<Bytes>, Error> {
        either!(self, it => it.read_slices(bytes).await)
    }

    pub(crate) fn stop(&mut self) {
        either!(self, it => it.stop());
    }
}
