//! One snapshot: what is known of it beside its files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Mounted read-only; has no changes of its own.
    View,
    /// Mounted writable, until it is committed or removed.
    Active,
    /// Unchangeable: a layer that others stand on.
    Committed,
}

impl Kind {
    /// The name in filters and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Disk that a snapshot takes, without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Blocks in use, in bytes.
    pub size_bytes: u64,
    /// Files and directories; a file with several names counts once.
    pub inodes: u64,
}

/// A snapshot as it is kept: one record on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Names its directory; never changes.
    pub id: u64,
    /// Its key while it is a view or active, then the name that it was committed under.
    pub name: String,
    /// The name of the snapshot that it stands on.
    #[serde(default)]
    pub parent: Option<String>,
    /// View, active or committed.
    pub kind: Kind,
    /// As containerd gave them.
    #[serde(default)]
    pub labels: Labels,
    /// When it was made, or committed: nanoseconds since 1970.
    pub created_unix_ns: u64,
    /// When its labels last changed.
    pub updated_unix_ns: u64,
    /// Counted when it was committed; zero before.
    #[serde(default)]
    pub usage: Usage,
    /// The image that it was pulled with, where it is lazy and that was found out.
    #[serde(default)]
    pub image: Option<super::ImageSource>,
}
