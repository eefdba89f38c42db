//! The node's configuration: one TOML file, read once, checked once, typed from then on.
//!
//! Every key is optional and every default is right for one machine. What a file may hold is the
//! `raw` structs; what the rest of the program sees is [`Config`], whose fields cannot be wrong.
//! `pantala.example.toml` documents every key and a test keeps it complete.

mod check;
mod document;
mod error;
mod rate;
mod raw;
mod size;
mod snapshotter;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pantala_quic::DriverChoice;
use url::Url;

pub use document::known_keys;
pub use error::ConfigError;
pub use size::{ByteSize, StoreLimit};
pub use snapshotter::Snapshotter;

/// Read where no `--config` is given; it need not exist.
pub const DEFAULT_PATH: &str = "/etc/pantala/pantala.toml";

/// Everything a node is told from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where blobs, keys and cluster state live.
    pub data_dir: PathBuf,
    /// The HTTP side that container clients pull through.
    pub mirror: Mirror,
    /// The registries that may be mirrored, by the host that clients know them by.
    pub registries: BTreeMap<String, Registry>,
    /// Metrics, health and status.
    pub admin: Admin,
    /// The side that other nodes fetch pieces from.
    pub peer: Peer,
    /// How paths are measured, and what may be sent.
    pub meter: Meter,
    /// Which control this node follows.
    pub control: Control,
    /// Blobs on disk.
    pub store: Store,
    /// How registries are asked.
    pub source: Source,
    /// The snapshotter for containerd; off where absent.
    pub snapshotter: Option<Snapshotter>,
    /// Images mounted before their data has arrived.
    pub lazy: Lazy,
    /// Where this node stands, for the choice of near parents.
    pub labels: Labels,
    /// What is logged, and how.
    pub log: Log,
}

/// `[mirror]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Address of the HTTP server.
    pub listen: SocketAddr,
    /// The registry meant by requests that name none: a host, with a port where it is not 443.
    pub default_registry: String,
    /// Whether registries outside the configuration are served too.
    pub allow_any_upstream: bool,
    /// A request that has had no byte for so long ends in a 5xx.
    pub first_byte_timeout: Duration,
    /// How long a registry's yes is good for the same credential and repository.
    pub authorization_ttl: Duration,
    /// How long past that a yes still counts while the registry cannot be reached.
    pub authorization_stale: Duration,
    /// Connections served at the same time.
    pub connections_max: usize,
    /// Serve TLS with these; plain HTTP where absent.
    pub tls: Option<TlsFiles>,
}

/// A certificate chain and its key, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// `[registries."HOST"]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// Where the registry really is; no path.
    pub url: Url,
    /// A CA to trust for it, beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Address of the HTTP server.
    pub listen: SocketAddr,
}

/// `[peer]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// UDP address of the QUIC endpoint.
    pub listen: SocketAddr,
    /// The address given to other nodes; found out where absent.
    pub advertise: Option<SocketAddr>,
    /// What is to move the packets.
    pub driver: DriverChoice,
    /// Threads that move them; 0 for one a core.
    pub threads: usize,
    /// Bytes a second that this node can send; found out where absent.
    pub uplink_bytes_per_s: Option<u64>,
    /// Whether this node is here to serve others.
    pub seed: bool,
}

/// `[meter]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meter {
    /// Whether programs are loaded into the kernel.
    pub kernel: MeterKernel,
    /// The interfaces that are the machine's way out; found out where empty.
    pub interfaces: Vec<String>,
    /// Whether to leave the interfaces to others that send.
    pub yields: bool,
    /// Bytes a second that may be sent whatever others send.
    pub floor_bytes_per_s: u64,
    /// Bytes a second that are never exceeded.
    pub ceiling_bytes_per_s: Option<u64>,
    /// The same for each peer.
    pub peer_ceiling_bytes_per_s: Option<u64>,
}

/// Whether programs are loaded into the kernel to count and steer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeterKernel {
    /// Where the kernel and the rights allow it.
    Auto,
    /// Never.
    Off,
    /// The node does not start without.
    Required,
}

/// `[control]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Address of the embedded control; unused where `join` is given.
    pub listen: SocketAddr,
    /// `HOST:PORT` of the control to follow; the embedded one where absent.
    pub join: Option<String>,
    /// File with the token that the first join needs.
    pub token_file: Option<PathBuf>,
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// The most disk that blobs may take.
    pub limit: StoreLimit,
    /// Eviction goes on until no more than this part of the limit is in use.
    pub low_watermark_percent: u8,
}

/// `[source]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Time for name resolution, TCP and TLS together.
    pub connect_timeout: Duration,
    /// From the request to the head of the answer.
    pub first_byte_timeout: Duration,
    /// The longest silence within a body.
    pub stall_timeout: Duration,
    /// Tries after the first that failed.
    pub retries_max: u32,
    /// Requests to one host at the same time.
    pub connections_per_host_max: usize,
}

/// `[lazy]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lazy {
    /// Whether what nobody has touched is fetched too.
    pub background_fill: bool,
    /// How long a read may wait for its bytes before it fails.
    pub fill_timeout: Duration,
    /// The supervisor's program; beside this one where absent.
    pub supervisor: Option<PathBuf>,
}

/// `[labels]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Name of the machine.
    pub host: String,
    /// Name of the rack; empty where unknown.
    pub rack: String,
    /// Name of the zone or data centre; empty where unknown.
    pub zone: String,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A `tracing` filter such as `info,pantala_source=debug`.
    pub filter: String,
    /// One line of text or one JSON object an event.
    pub format: LogFormat,
}

/// How an event is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Config {
    /// Reads `file`, or [`DEFAULT_PATH`] where none is given and that exists, or nothing.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = match file {
            Some(path) => path,
            None if Path::new(DEFAULT_PATH).exists() => Path::new(DEFAULT_PATH),
            None => return Self::parse("", DEFAULT_PATH),
        };
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|cause| ConfigError::Read {
            file: name.clone(),
            cause,
        })?;
        Self::parse(&text, &name)
    }

    /// Reads `text`; errors call it `file`.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let document = document::Document::parse(text, file)?;
        document.refuse_unknown_keys()?;
        let raw: raw::Raw = document.deserialize()?;
        raw.check(&document)
    }

    /// Where the registry that clients call `host` really is; nothing where the configuration does
    /// not name it.
    pub fn registry_url(&self, host: &str) -> Option<Url> {
        if let Some(registry) = self.registries.get(host) {
            return Some(registry.url.clone());
        }
        (host == self.mirror.default_registry).then(|| public_url(host))?
    }
}

/// The address of a registry that is known by its host alone. Docker Hub's registry has another
/// name than the one in image references.
pub(crate) fn public_url(host: &str) -> Option<Url> {
    let host = match host {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    };
    Url::parse(&format!("https://{host}")).ok()
}

/// Where a node keeps its data if it is not told.
pub fn default_data_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/pantala");
    }
    let from_env = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    from_env("XDG_DATA_HOME")
        .or_else(|| from_env("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(std::env::temp_dir)
        .join("pantala")
}

#[cfg(test)]
mod tests;
