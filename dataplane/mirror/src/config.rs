//! The mirror's configuration: validated values, each with its default and the reason for it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::policy::Policy;

/// Certificate and key of the optional TLS side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with the certificate chain, the server's own first.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
}

/// Everything that can be set. [`MirrorConfig::new`] gives the defaults.
#[derive(Debug, Clone)]
pub struct MirrorConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// TLS, where wanted.
    pub tls: Option<TlsFiles>,
    /// Which upstreams are served.
    pub policy: Policy,
    /// From a request's head to its reply's head, the first byte of a blob included; below the
    /// 5 s after which nydusd gives up.
    pub first_byte_timeout: Duration,
    /// How long the registry's word on a caller's right is good for.
    pub authorization_ttl: Duration,
    /// How old that word may be where the registry cannot be asked.
    pub authorization_stale: Duration,
    /// Verdicts remembered; each takes about 100 bytes.
    pub verdicts_max: usize,
    /// Bytes of manifests kept in memory.
    pub manifest_cache_bytes: usize,
    /// Connections at once; further ones are turned away with 503.
    pub connections_max: usize,
    /// Requests at once, tunnels aside; further ones get 503.
    pub requests_max: usize,
    /// Tunnels at once; further ones get 503.
    pub tunnels_max: usize,
    /// How long a connection may take for the (next) request's head: the bound on idle
    /// keep-alive connections and on heads that trickle in. Above the 90 s after which Go's
    /// client, and so containerd, drops an idle connection itself.
    pub request_head_timeout: Duration,
    /// How long a client may leave a reply unread before its connection is cut.
    pub client_stall_timeout: Duration,
    /// How long a tunnel may take to connect.
    pub tunnel_connect_timeout: Duration,
    /// How long a tunnel may carry nothing (it ends between this and twice this).
    pub tunnel_idle_timeout: Duration,
    /// How long requests in flight may go on after shutdown has begun.
    pub drain_timeout: Duration,
}

impl MirrorConfig {
    /// The defaults, for this address and policy.
    pub const fn new(listen: SocketAddr, policy: Policy) -> Self {
        Self {
            listen,
            tls: None,
            policy,
            first_byte_timeout: Duration::from_millis(4000),
            authorization_ttl: Duration::from_secs(60),
            authorization_stale: Duration::from_secs(3600),
            verdicts_max: 65_536,
            manifest_cache_bytes: 64 << 20,
            connections_max: 2048,
            requests_max: 1024,
            tunnels_max: 256,
            request_head_timeout: Duration::from_secs(120),
            client_stall_timeout: Duration::from_secs(300),
            tunnel_connect_timeout: Duration::from_secs(4),
            tunnel_idle_timeout: Duration::from_secs(300),
            drain_timeout: Duration::from_secs(10),
        }
    }
}
