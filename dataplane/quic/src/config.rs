//! What an endpoint is told at its start, and the arithmetic that bounds its memory.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

/// Who this node is: its certificate, the key to it, and the authority that it and its peers trust.
#[derive(Clone)]
pub struct NodeIdentity {
    /// This node's certificate (its subject key is an Ed25519 key), then any intermediate ones, in DER.
    pub certificate_chain_der: Vec<Vec<u8>>,
    /// The private key of the first certificate, PKCS#8 in DER.
    pub key_pkcs8_der: Vec<u8>,
    /// The cluster's certificate authority, in DER.
    pub ca_certificate_der: Vec<u8>,
}

impl fmt::Debug for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeIdentity")
            .field("certificates", &self.certificate_chain_der.len())
            .finish_non_exhaustive()
    }
}

/// What [`crate::Endpoint::bind`] needs.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Address and port of the UDP socket; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Who this node is.
    pub identity: NodeIdentity,
    /// What it may use.
    pub limits: Limits,
    /// What is to move its packets.
    pub driver: DriverChoice,
}

/// What is to move an endpoint's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriverChoice {
    /// io_uring where the kernel allows it, else tokio.
    #[default]
    Auto,
    /// Own threads, each with an io_uring; binding fails where the kernel does not allow it.
    Ring,
    /// quinn on tokio's sockets.
    Tokio,
}

/// What moves an endpoint's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// Own threads, each with an io_uring.
    Ring {
        /// How many.
        threads: usize,
    },
    /// quinn on tokio's sockets.
    Tokio,
}

/// Which driver an endpoint got, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverReport {
    /// Which.
    pub kind: DriverKind,
    /// Why, for an operator.
    pub why: String,
}

/// Bounds of an endpoint.
///
/// Memory in the worst case, with the defaults:
///
/// - received and not yet read: `receive_budget_bytes`, shared by all connections, and up to 1.5 times as
///   much again where small packets pin larger receive buffers: 2.5 x 32 MiB = 80 MiB;
/// - sent and not yet acknowledged: `send_budget_bytes`, shared by all connections: 32 MiB;
/// - batches on their way to and from the socket: 32 receive buffers of 70 KiB, one send buffer of 90 KiB
///   a connection, one merged batch of 155 KiB: 2.4 MiB and 22 MiB at 256 connections (0.3 MiB at 3);
/// - handshakes: `handshakes_max` connections and 1 MiB of early packets.
///
/// The first figure holds where streams are read as they arrive. What stays unread pins the receive
/// buffer of up to 64 KiB in which it came, together with other streams' bytes: a reader that has lost
/// interest stops its stream.
///
/// A node that serves three peers and receives from three more stays near 32 + 32 + 4 MiB, because a
/// window fills only where one side is slower than the other.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once, both directions. One per pair of nodes is the rule.
    pub connections_max: usize,
    /// Connections at once with one node: one each way, and as many again while old ones die.
    pub connections_per_node_max: usize,
    /// Handshakes that peers may have under way at once; more are refused, and above half of it a peer
    /// must first prove that it owns its address.
    pub handshakes_max: usize,
    /// Time in which a connection must be established and admitted.
    pub handshake_timeout: Duration,
    /// Bidirectional streams that a peer may have open at once on a connection: its requests in flight.
    pub streams_per_connection_max: u32,
    /// Bytes that a peer may send on one stream before they are read: a piece and its head, twice, so
    /// that a stream never waits for window updates. Four streams that nobody reads stop a connection.
    pub stream_receive_window_bytes: u32,
    /// Most bytes that a peer may send on a connection before they are read.
    pub connection_receive_window_bytes: u64,
    /// Most bytes sent on a connection and not yet acknowledged: bandwidth times round trip.
    pub connection_send_window_bytes: u64,
    /// Receive windows of all connections together: with many connections each gets its share.
    pub receive_budget_bytes: u64,
    /// Send windows of all connections together.
    pub send_budget_bytes: u64,
    /// Silence after which a connection is given up.
    pub idle_timeout: Duration,
    /// Silence after which a sign of life is sent; at most a third of `idle_timeout`, so that one lost
    /// packet costs no connection.
    pub keep_alive: Duration,
    /// Largest UDP payload to look for on a path: the search ends there or at the route's MTU, and
    /// loopback takes what one call takes.
    pub udp_payload_max_bytes: u16,
    /// Threads with a ring of their own; 0 for one a core, at most eight. The tokio driver has none.
    pub threads: usize,
    /// Size asked for each of the socket's kernel buffers; the kernel may give less.
    pub socket_buffer_bytes: usize,
}

/// Smallest share of a budget that a connection can work with: two groups of 64 KiB.
const WINDOW_SHARE_MIN_BYTES: u64 = 128 * 1024;
/// QUIC's smallest maximum of UDP payloads (RFC 9000, section 14).
pub(crate) const UDP_PAYLOAD_MIN_BYTES: u16 = 1200;

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            connections_per_node_max: 4,
            handshakes_max: 64,
            handshake_timeout: Duration::from_secs(5),
            streams_per_connection_max: 256,
            stream_receive_window_bytes: 2 << 20,
            connection_receive_window_bytes: 8 << 20,
            connection_send_window_bytes: 8 << 20,
            receive_budget_bytes: 32 << 20,
            send_budget_bytes: 32 << 20,
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(3),
            udp_payload_max_bytes: 65_000,
            threads: 0,
            socket_buffer_bytes: 4 << 20,
        }
    }
}

/// Limits that cannot work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A number that must not be zero is.
    #[error("{0} must not be zero")]
    Zero(&'static str),
    /// A budget is too small for the number of connections.
    #[error(
        "{name} of {budget} bytes is too small for {connections} connections: each needs \
         {WINDOW_SHARE_MIN_BYTES} bytes; raise it or lower connections_max"
    )]
    Budget {
        /// The budget.
        name: &'static str,
        /// What it is.
        budget: u64,
        /// What it is to be shared by.
        connections: usize,
    },
    /// The signs of life are too rare.
    #[error("keep_alive must be at most a third of idle_timeout")]
    KeepAlive,
    /// The idle timeout cannot be said in QUIC.
    #[error("idle_timeout is too long")]
    IdleTimeout,
    /// Smaller than QUIC allows.
    #[error("udp_payload_max_bytes must be at least {UDP_PAYLOAD_MIN_BYTES}")]
    UdpPayload,
}

/// Longest idle timeout accepted: a day, far above any use and far below what overflows a timer.
const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

impl Limits {
    /// Whether the limits fit together.
    ///
    /// # Errors
    /// [`ConfigError`], naming the first that does not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (name, is_zero) in [
            ("connections_max", self.connections_max == 0),
            (
                "connections_per_node_max",
                self.connections_per_node_max == 0,
            ),
            ("handshakes_max", self.handshakes_max == 0),
            ("handshake_timeout", self.handshake_timeout.is_zero()),
            (
                "streams_per_connection_max",
                self.streams_per_connection_max == 0,
            ),
            (
                "stream_receive_window_bytes",
                self.stream_receive_window_bytes == 0,
            ),
            (
                "connection_receive_window_bytes",
                self.connection_receive_window_bytes == 0,
            ),
            (
                "connection_send_window_bytes",
                self.connection_send_window_bytes == 0,
            ),
            ("idle_timeout", self.idle_timeout.is_zero()),
            ("keep_alive", self.keep_alive.is_zero()),
        ] {
            if is_zero {
                return Err(ConfigError::Zero(name));
            }
        }
        for (name, budget) in [
            ("receive_budget_bytes", self.receive_budget_bytes),
            ("send_budget_bytes", self.send_budget_bytes),
        ] {
            if budget / (self.connections_max as u64) < WINDOW_SHARE_MIN_BYTES {
                return Err(ConfigError::Budget {
                    name,
                    budget,
                    connections: self.connections_max,
                });
            }
        }
        if self.keep_alive > self.idle_timeout / 3 {
            return Err(ConfigError::KeepAlive);
        }
        if self.idle_timeout > IDLE_TIMEOUT_MAX {
            return Err(ConfigError::IdleTimeout);
        }
        if self.udp_payload_max_bytes < UDP_PAYLOAD_MIN_BYTES {
            return Err(ConfigError::UdpPayload);
        }
        Ok(())
    }
}

/// Is shown the sockets of an endpoint when they are bound, before any packet is sent. Several share an address, are in
/// the order of their threads, and may be steered: to the socket whose number is the first byte of a packet's connection
/// ID modulo how many there are. Packets that open a connection may go to any.
pub type SeeSockets<'a> = &'a dyn Fn(&[std::net::UdpSocket]) -> std::io::Result<()>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_fit_together() {
        assert_eq!(Limits::default().validate(), Ok(()));
    }

    #[test]
    fn limits_that_cannot_work_are_named() {
        let with = |change: fn(&mut Limits)| {
            let mut limits = Limits::default();
            change(&mut limits);
            limits.validate()
        };
        assert_eq!(
            with(|l| l.connections_max = 0),
            Err(ConfigError::Zero("connections_max"))
        );
        assert!(matches!(
            with(|l| l.connections_max = 1000),
            Err(ConfigError::Budget {
                connections: 1000,
                ..
            })
        ));
        assert_eq!(
            with(|l| l.keep_alive = Duration::from_secs(4)),
            Err(ConfigError::KeepAlive)
        );
        assert_eq!(
            with(|l| l.udp_payload_max_bytes = 1199),
            Err(ConfigError::UdpPayload)
        );
    }

    #[test]
    fn an_identity_never_prints_its_key() {
        let identity = NodeIdentity {
            certificate_chain_der: vec![vec![1]],
            key_pkcs8_der: vec![222, 173],
            ca_certificate_der: vec![],
        };
        assert!(!format!("{identity:?}").contains("222"));
    }
}
