//! The socket's owner, and how quinn is set up.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TokioRuntime, TransportConfig,
    VarInt,
};

use super::connection::Connection;
use super::errors::{connect_error, connection_error};
use super::{restart, socket};
use crate::config::Limits;
use crate::error::{CloseReason, Error};
use crate::identity::{SERVER_NAME, Tls};

/// Round trip assumed before one is measured: a slow link of one site. quinn's default of a third of a
/// second makes the repeat of a lost first packet, and the first window, slow.
const INITIAL_RTT: Duration = Duration::from_millis(30);
/// Early packets of all handshakes together that are kept until these are accepted.
const INCOMING_BUFFER_TOTAL_BYTES: u64 = 1 << 20;
/// Early packets kept for one handshake: a TLS flight with a short certificate chain.
const INCOMING_BUFFER_BYTES: u64 = 16 << 10;
/// How long a closing endpoint waits until its peers have been told.
const DRAIN_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    quinn: quinn::Endpoint,
    client: ClientConfig,
    local_addr: SocketAddr,
}

impl Endpoint {
    pub(crate) fn bind(listen: SocketAddr, limits: &Limits, tls: Tls) -> io::Result<Self> {
        let client = QuicClientConfig::try_from(tls.client).map_err(io::Error::other)?;
        let server = QuicServerConfig::try_from(tls.server).map_err(io::Error::other)?;

        // The side that connects accepts one unidirectional stream: its admission.
        let mut client = ClientConfig::new(Arc::new(client));
        client.transport_config(Arc::new(transport(limits, 1)));
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server
            .transport_config(Arc::new(transport(limits, 0)))
            .max_incoming(limits.handshakes_max)
            .incoming_buffer_size(INCOMING_BUFFER_BYTES)
            .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL_BYTES);
        let mut endpoint = restart::endpoint_config(&tls.reset_key);
        endpoint
            .max_udp_payload_size(limits.udp_payload_max_bytes)
            .map_err(io::Error::other)?;

        let socket = socket::bind(listen, limits)?;
        let local_addr = quinn::AsyncUdpSocket::local_addr(&*socket)?;
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            endpoint,
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self {
            quinn,
            client,
            local_addr,
        })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Result<Connection, Error> {
        let connecting = self
            .quinn
            .connect_with(self.client.clone(), address, SERVER_NAME)
            .map_err(connect_error)?;
        connecting.await.map(Connection).map_err(connection_error)
    }

    pub(crate) async fn accept(&self) -> Option<Incoming> {
        self.quinn.accept().await.map(Incoming)
    }

    pub(crate) fn close(&self, reason: CloseReason) {
        self.quinn.close(VarInt::from_u32(reason as u32), b"");
    }

    pub(crate) async fn drained(&self) {
        // What is not drained by then ends with its peers' idle timeout.
        let _ = tokio::time::timeout(DRAIN_MAX, self.quinn.wait_idle()).await;
    }
}

fn transport(limits: &Limits, unidirectional_max: u32) -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(limits.udp_payload_max_bytes);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.streams_per_connection_max))
        .max_concurrent_uni_streams(VarInt::from_u32(unidirectional_max))
        .stream_receive_window(VarInt::from_u32(limits.stream_receive_window_bytes))
        .receive_window(
            VarInt::from_u64(limits.connection_receive_window_bytes).unwrap_or(VarInt::MAX),
        )
        .send_window(limits.connection_send_window_bytes)
        // Answers of one priority are finished one after the other: all of them side by side would all
        // be complete only at the end.
        .send_fairness(false)
        .datagram_receive_buffer_size(None)
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery))
        .keep_alive_interval(Some(limits.keep_alive))
        .max_idle_timeout(IdleTimeout::try_from(limits.idle_timeout).ok());
    transport
}

/// A handshake that a peer has begun.
pub(crate) struct Incoming(quinn::Incoming);

impl Incoming {
    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.0.remote_address()
    }

    pub(crate) fn is_address_validated(&self) -> bool {
        self.0.remote_address_validated()
    }

    /// Makes the peer prove that it receives what is sent to its address, and begin again.
    pub(crate) fn validate_address(self) {
        // Fails only for an address that is validated already.
        let _ = self.0.retry();
    }

    pub(crate) fn refuse(self) {
        self.0.refuse();
    }

    pub(crate) async fn establish(self) -> Result<Connection, Error> {
        self.0.await.map(Connection).map_err(connection_error)
    }
}
