//! What a node's `/status` says, as far as the rig reads it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A node's own account.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus {
    pub(crate) node: String,
    pub(crate) control: ControlStatus,
    pub(crate) store: StoreStatus,
    pub(crate) peers: Vec<PeerStatus>,
    pub(crate) tasks: Vec<TaskStatus>,
    pub(crate) totals: Totals,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ControlStatus {
    pub(crate) connected: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StoreStatus {
    pub(crate) used_bytes: u64,
    pub(crate) limit_bytes: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PeerStatus {
    pub(crate) node: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TaskStatus {
    pub(crate) digest: String,
    pub(crate) size_bytes: u64,
    pub(crate) state: String,
    pub(crate) held_bytes: u64,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Totals {
    pub(crate) from_registry_bytes: u64,
    pub(crate) from_peer_bytes: u64,
    pub(crate) by_peer: BTreeMap<String, u64>,
    pub(crate) served_to_peers_bytes: u64,
}

impl NodeStatus {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text)
            .with_context(|| format!("/status is not what it should be: {text}"))
    }

    /// The task of the blob `digest`.
    pub(crate) fn task(&self, digest: &str) -> Option<&TaskStatus> {
        self.tasks.iter().find(|task| task.digest == digest)
    }
}
