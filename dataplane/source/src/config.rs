//! The settings of a [`Source`](crate::Source), with the bounds that it works within.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Why a [`Source`](crate::Source) cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A CA file cannot be read.
    #[error("cannot read the CA file {path}: {reason}")]
    CaUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A CA file has no certificate in it that can be used.
    #[error("no usable CA certificate in {path}: expected PEM with \"BEGIN CERTIFICATE\"{hint}")]
    CaUseless {
        /// The file.
        path: PathBuf,
        /// What else is known.
        hint: String,
    },
    /// The HTTP client or its TLS cannot be set up.
    #[error("cannot set up the HTTP client: {0}")]
    Client(String),
}

/// How origins are talked to.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// PEM files of CAs that are trusted besides the machine's own, for every host.
    pub ca_files: Vec<PathBuf>,
    /// PEM files of CAs that are trusted for one host only: `host` or `host:port` to files.
    pub host_ca_files: BTreeMap<String, Vec<PathBuf>>,
    /// Until a connection is made: resolution, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Until the head of an answer has come, connection included.
    pub first_byte_timeout: Duration,
    /// Until the next bytes of a body have come.
    pub stall_timeout: Duration,
    /// How often one transfer is tried again without getting on.
    pub retries_max: u32,
    /// How long one transfer goes on trying without getting on; bounds every wait.
    pub patience: Duration,
    /// Transfers of blobs that run at the same time, per host.
    pub transfers_per_host_max: usize,
    /// Manifest and other short requests that run at the same time, per host.
    pub exchanges_per_host_max: usize,
    /// Makes the jitter of retries differ between nodes; the same seed gives the same jitter.
    pub jitter_seed: u64,
    /// What is sent as `User-Agent`, where the caller's request has none.
    pub user_agent: String,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            ca_files: Vec::new(),
            host_ca_files: BTreeMap::new(),
            connect_timeout: Duration::from_secs(5),
            // A registry that looks a blob up in an object store answers within a second or two.
            first_byte_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            retries_max: 5,
            patience: Duration::from_secs(60),
            // Enough to fill a fast link with HTTP/1.1, few enough not to be called an attack.
            transfers_per_host_max: 16,
            exchanges_per_host_max: 32,
            jitter_seed: 0,
            user_agent: concat!("pantala/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}
