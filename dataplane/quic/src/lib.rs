//! The piece plane: QUIC connections between the nodes of one cluster.
//!
//! An [`Endpoint`] owns one UDP socket, proves this node's identity with its cluster certificate, and
//! yields [`Connection`]s to nodes that proved theirs. Each request is one bidirectional stream with a
//! priority; what is said on it is `pantala_wire`'s business, how bytes and frames travel is this
//! crate's.
//!
//! The public types hold the policy: who is let in ([`Endpoint::shut_out`]), how many connections there
//! may be and how much memory they may take ([`Limits`]). The mechanics (packets, timers, sockets) sit in
//! the private `driver` module, behind four types: own threads with an io_uring each, and quinn on tokio
//! where the kernel forbids that ([`DriverChoice`]).
//!
//! An endpoint shuts down with [`Endpoint::close`], or when it is dropped. A connection ends when it is
//! closed, when its last handle and stream are dropped, or when its peer is silent for
//! [`Limits::idle_timeout`]; everything that waits on it then fails with an [`Error`] that says who is to
//! blame and whether trying again makes sense.

#![forbid(unsafe_code)]

mod admission;
mod config;
mod connection;
mod driver;
mod endpoint;
mod error;
mod identity;
mod link;
mod stream;

pub use config::{
    ConfigError, DriverChoice, DriverKind, DriverReport, EndpointConfig, Limits, NodeIdentity,
    SeeSockets,
};
pub use connection::{Connection, PathStats};
pub use endpoint::Endpoint;
pub use error::{BindError, Blame, CloseReason, Error};
pub use identity::{ALPN, IdentityError, SERVER_NAME};
pub use stream::{RecvStream, SendStream};

/// Whether the ring driver works here, or why not.
///
/// # Errors
/// The reason, for an operator.
pub fn probe_ring() -> Result<(), String> {
    pantala_uring::probe().map_err(|error| error.to_string())
}
