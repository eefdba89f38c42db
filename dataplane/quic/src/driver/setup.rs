//! What both drivers tell quinn-proto.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig,
    VarInt,
};

use super::ids::IdKey;
use crate::config::Limits;
use crate::identity::Tls;

/// Round trip assumed before one is measured: a slow link of one site. quinn's default of a third of a
/// second makes the repeat of a lost first packet, and the first window, slow.
const INITIAL_RTT: Duration = Duration::from_millis(30);
/// Early packets of all handshakes together that are kept until these are accepted.
const INCOMING_BUFFER_TOTAL_BYTES: u64 = 1 << 20;
/// Early packets kept for one handshake: a TLS flight with a short certificate chain.
const INCOMING_BUFFER_BYTES: u64 = 16 << 10;
/// How long a closing endpoint waits until its peers have been told.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(1);
/// The one code with which streams are reset and stopped: not wanted any more. Why is said in frames.
pub(super) const CANCELLED: VarInt = VarInt::from_u32(1);
/// Most bytes of one call into the kernel, and so of one datagram: UDP's 65,507, less room for what the
/// kernel adds.
pub(super) const CALL_BYTES_MAX: usize = 65_000;

/// Configurations for an endpoint, and for each of its connections.
#[derive(Clone)]
pub(super) struct Setup {
    limits: Limits,
    client: Arc<QuicClientConfig>,
    server: ServerConfig,
    pub(super) ids: IdKey,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").finish_non_exhaustive()
    }
}

impl Setup {
    pub(super) fn new(limits: &Limits, tls: &Tls) -> io::Result<Self> {
        let client = QuicClientConfig::try_from(tls.client.clone()).map_err(io::Error::other)?;
        let server = QuicServerConfig::try_from(tls.server.clone()).map_err(io::Error::other)?;
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server
            .max_incoming(limits.handshakes_max)
            .incoming_buffer_size(INCOMING_BUFFER_BYTES)
            .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL_BYTES);
        Ok(Self {
            limits: limits.clone(),
            client: Arc::new(client),
            server,
            ids: IdKey::new(&tls.reset_key),
        })
    }

    /// The endpoint's configuration, for thread `thread` of `threads`.
    pub(super) fn endpoint(&self, thread: u8, threads: u8) -> io::Result<EndpointConfig> {
        let mut config = self.ids.endpoint_config(thread, threads);
        config
            .max_udp_payload_size(self.limits.udp_payload_max_bytes)
            .map_err(io::Error::other)?;
        Ok(config)
    }

    /// For a connection to `peer`. The side that connects accepts one unidirectional stream: its
    /// admission.
    pub(super) fn client(&self, peer: SocketAddr) -> ClientConfig {
        let mut config = ClientConfig::new(self.client.clone());
        config.transport_config(Arc::new(self.transport(1, Some(peer))));
        config
    }

    /// For connections of which no peer is known yet.
    pub(super) fn server(&self) -> ServerConfig {
        let mut config = self.server.clone();
        config.transport_config(Arc::new(self.transport(0, None)));
        config
    }

    /// For a connection from `peer`.
    pub(super) fn server_for(&self, peer: SocketAddr) -> ServerConfig {
        let mut config = self.server.clone();
        config.transport_config(Arc::new(self.transport(0, Some(peer))));
        config
    }

    /// The route's MTU is where the search for the path's ends: packets larger than that never leave
    /// this machine, and each such probe costs three lost packets before it is believed.
    fn payload_max(&self, peer: Option<SocketAddr>) -> u16 {
        peer.and_then(pantala_uring::socket::route_payload_bytes)
            .map_or(self.limits.udp_payload_max_bytes, |route| {
                route.min(self.limits.udp_payload_max_bytes)
            })
            .max(crate::config::UDP_PAYLOAD_MIN_BYTES)
    }

    fn transport(&self, unidirectional_max: u32, peer: Option<SocketAddr>) -> TransportConfig {
        let limits = &self.limits;
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.payload_max(peer));
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(VarInt::from_u32(limits.streams_per_connection_max))
            .max_concurrent_uni_streams(VarInt::from_u32(unidirectional_max))
            .stream_receive_window(VarInt::from_u32(limits.stream_receive_window_bytes))
            .receive_window(
                VarInt::from_u64(limits.connection_receive_window_bytes).unwrap_or(VarInt::MAX),
            )
            .send_window(limits.connection_send_window_bytes)
            // Answers of one priority are finished one after the other: all of them side by side would
            // all be complete only at the end.
            .send_fairness(false)
            .datagram_receive_buffer_size(None)
            .initial_rtt(INITIAL_RTT)
            .mtu_discovery_config(Some(discovery))
            .keep_alive_interval(Some(limits.keep_alive))
            .max_idle_timeout(IdleTimeout::try_from(limits.idle_timeout).ok());
        transport
    }
}
