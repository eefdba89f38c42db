//! Where the node had the bytes from: its status before and after, compared.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use super::super::http;
use super::super::status::{self, Status};
use super::manifest::BlobName;

/// Bytes of one image by where the node had them from.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Origins {
    /// Read from the registry for this.
    pub(super) registry_bytes: u64,
    /// Given by other nodes for this.
    pub(super) peer_bytes: u64,
    /// Held by the node before.
    pub(super) local_bytes: u64,
}

impl Origins {
    pub(super) fn sum(&self) -> u64 {
        self.registry_bytes
            .saturating_add(self.peer_bytes)
            .saturating_add(self.local_bytes)
    }
}

/// What the node had taken, from registry and peers, for each blob.
#[derive(Debug)]
pub(super) struct Snapshot(BTreeMap<String, (u64, u64)>);

impl Snapshot {
    /// Asks the node whose mirror is `mirror`; nothing where another one answers, or none.
    pub(super) async fn take(admin: SocketAddr, mirror: SocketAddr) -> Option<Self> {
        let body = http::get(admin, "/status").await.ok()?;
        let status = status::parse(&body).ok()?;
        (status.mirror.parse() == Ok(mirror)).then(|| Self::of(&status))
    }

    fn of(status: &Status) -> Self {
        let tasks = status.tasks.iter().map(|task| {
            let taken = (task.from_registry_bytes, task.from_peer_bytes);
            (task.digest.clone(), taken)
        });
        Self(tasks.collect())
    }

    /// What came since `before`; the rest was there.
    pub(super) fn since(&self, before: &Self, blobs: &[BlobName]) -> Origins {
        let mut origins = Origins::default();
        for blob in blobs {
            let name = blob.digest.to_string();
            let (registry, peers) = self.0.get(&name).copied().unwrap_or_default();
            let (had_registry, had_peers) = before.0.get(&name).copied().unwrap_or_default();
            // A task that was forgotten and begun again counts from 0.
            let registry = registry.checked_sub(had_registry).unwrap_or(registry);
            let peers = peers.checked_sub(had_peers).unwrap_or(peers);
            origins.registry_bytes += registry;
            origins.peer_bytes += peers;
            origins.local_bytes += blob.size.saturating_sub(registry.saturating_add(peers));
        }
        origins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_since_counts_and_the_rest_is_local() {
        let blob = |byte: u8, size| BlobName {
            digest: pantala_wire::BlobDigest::new([byte; 32]),
            size,
        };
        let blobs = [blob(1, 100), blob(2, 50), blob(3, 10)];
        let snapshot = |first: (u64, u64)| {
            let names = [blobs[0].digest.to_string(), blobs[1].digest.to_string()];
            Snapshot([(names[0].clone(), first), (names[1].clone(), (50, 0))].into())
        };
        let origins = snapshot((40, 60)).since(&snapshot((10, 0)), &blobs);
        assert_eq!(
            origins,
            Origins {
                registry_bytes: 30,
                peer_bytes: 60,
                local_bytes: 70
            }
        );
        assert_eq!(origins.sum(), 160);
    }
}
