//! What a file may hold, and the defaults. An empty text stands for "not set" throughout, so that
//! every key can be written out with its default.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::document::fields_of;

/// A list of field names.
type Fields = fn() -> &'static [&'static str];

/// Each table of the file with the struct that reads it.
pub(super) const SECTIONS: [(&str, Fields); 13] = [
    ("", fields_of::<Raw>),
    ("mirror", fields_of::<RawMirror>),
    ("registries.*", fields_of::<RawRegistry>),
    ("admin", fields_of::<RawAdmin>),
    ("peer", fields_of::<RawPeer>),
    ("meter", fields_of::<RawMeter>),
    ("control", fields_of::<RawControl>),
    ("store", fields_of::<RawStore>),
    ("source", fields_of::<RawSource>),
    ("snapshotter", fields_of::<RawSnapshotter>),
    ("lazy", fields_of::<RawLazy>),
    ("labels", fields_of::<RawLabels>),
    ("log", fields_of::<RawLog>),
];

/// Whether a field of `parent` is itself a table of [`SECTIONS`].
pub(super) fn is_section(parent: &str, field: &str) -> bool {
    parent.is_empty()
        && SECTIONS
            .iter()
            .any(|(name, _)| name.split('.').next() == Some(field))
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) data_dir: String,
    pub(super) mirror: RawMirror,
    pub(super) registries: BTreeMap<String, RawRegistry>,
    pub(super) admin: RawAdmin,
    pub(super) peer: RawPeer,
    pub(super) meter: RawMeter,
    pub(super) control: RawControl,
    pub(super) store: RawStore,
    pub(super) source: RawSource,
    pub(super) snapshotter: RawSnapshotter,
    pub(super) lazy: RawLazy,
    pub(super) labels: RawLabels,
    pub(super) log: RawLog,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawMirror {
    pub(super) listen: String,
    pub(super) default_registry: String,
    pub(super) allow_any_upstream: bool,
    pub(super) first_byte_timeout_ms: u64,
    pub(super) authorization_ttl_s: u64,
    pub(super) authorization_stale_s: u64,
    pub(super) connections_max: u64,
    pub(super) tls_certificate: String,
    pub(super) tls_key: String,
}

impl Default for RawMirror {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:65001".into(),
            default_registry: "docker.io".into(),
            allow_any_upstream: false,
            // nydusd gives up after 5 s; an answer before that lets it go to the registry.
            first_byte_timeout_ms: 4_000,
            authorization_ttl_s: 60,
            authorization_stale_s: 3_600,
            connections_max: 4_096,
            tls_certificate: String::new(),
            tls_key: String::new(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawRegistry {
    pub(super) url: String,
    pub(super) ca_file: String,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawAdmin {
    pub(super) listen: String,
}

impl Default for RawAdmin {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:65002".into(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawPeer {
    pub(super) listen: String,
    pub(super) advertise: String,
    pub(super) driver: String,
    pub(super) threads: u64,
    pub(super) uplink: String,
    pub(super) seed: bool,
}

impl Default for RawPeer {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:65003".into(),
            advertise: String::new(),
            driver: "auto".into(),
            threads: 0,
            uplink: String::new(),
            seed: false,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawMeter {
    pub(super) kernel: String,
    pub(super) interfaces: Vec<String>,
    #[serde(rename = "yield")]
    pub(super) yields: bool,
    pub(super) floor: String,
    pub(super) ceiling: String,
    pub(super) peer_ceiling: String,
}

impl Default for RawMeter {
    fn default() -> Self {
        Self {
            kernel: "auto".into(),
            interfaces: Vec::new(),
            yields: false,
            // A piece in a second.
            floor: "8 Mbit/s".into(),
            ceiling: String::new(),
            peer_ceiling: String::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawControl {
    pub(super) listen: String,
    pub(super) join: String,
    pub(super) token_file: String,
}

impl Default for RawControl {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:65004".into(),
            join: String::new(),
            token_file: String::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawStore {
    pub(super) limit: String,
    pub(super) low_watermark_percent: u64,
}

impl Default for RawStore {
    fn default() -> Self {
        Self {
            limit: "80%".into(),
            low_watermark_percent: 90,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawSource {
    pub(super) connect_timeout_ms: u64,
    pub(super) first_byte_timeout_ms: u64,
    pub(super) stall_timeout_ms: u64,
    pub(super) retries_max: u64,
    pub(super) connections_per_host_max: u64,
}

impl Default for RawSource {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 3_000,
            first_byte_timeout_ms: 10_000,
            stall_timeout_ms: 10_000,
            retries_max: 4,
            connections_per_host_max: 16,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawSnapshotter {
    pub(super) listen: String,
    pub(super) root: String,
    pub(super) containerd: String,
}

impl Default for RawSnapshotter {
    fn default() -> Self {
        Self {
            listen: String::new(),
            root: String::new(),
            containerd: "/run/containerd/containerd.sock".into(),
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawLazy {
    pub(super) background_fill: bool,
    pub(super) fill_timeout_ms: u64,
    pub(super) supervisor: String,
}

impl Default for RawLazy {
    fn default() -> Self {
        Self {
            background_fill: true,
            // Longer than a source takes to be given up, shorter than a kernel's patience with a task.
            fill_timeout_ms: 60_000,
            supervisor: String::new(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawLabels {
    pub(super) host: String,
    pub(super) rack: String,
    pub(super) zone: String,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawLog {
    pub(super) filter: String,
    pub(super) format: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: "text".into(),
        }
    }
}
