//! How many requests one host gets at the same time.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use url::Url;

use crate::error::{Phase, SourceError};
use crate::upstream::host_port;

/// Hosts whose requests are counted. Past it the longest unused one is forgotten, and counted from
/// zero when it comes back.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// What a request does with its turn.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// Reads a long body; may hold its turn for as long as its reader likes.
    Transfer,
    /// Short; never waits behind transfers, or a slow reader of blobs would block manifests.
    Exchange,
}

struct Host {
    transfers: Arc<Semaphore>,
    exchanges: Arc<Semaphore>,
}

/// Turns, per host.
pub(crate) struct Gate {
    transfers_max: usize,
    exchanges_max: usize,
    hosts: Mutex<LruCache<String, Host>>,
}

impl Gate {
    pub(crate) fn new(transfers_max: usize, exchanges_max: usize) -> Self {
        Self {
            transfers_max: transfers_max.max(1),
            exchanges_max: exchanges_max.max(1),
            hosts: Mutex::new(LruCache::new(HOSTS_MAX)),
        }
    }

    /// Waits for a turn with the URL's host. It ends when the permit is dropped.
    pub(crate) async fn turn(
        &self,
        url: &Url,
        kind: Kind,
        patience: Duration,
    ) -> Result<OwnedSemaphorePermit, SourceError> {
        let semaphore = self.semaphore(url, kind);
        match timeout(patience, semaphore.acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            // The semaphores are never closed, so that this is the time-out in either case.
            Ok(Err(_)) | Err(_) => Err(SourceError::TimedOut {
                host: host_port(url),
                phase: Phase::Turn,
                limit: patience,
            }),
        }
    }

    fn semaphore(&self, url: &Url, kind: Kind) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock();
        let host = hosts.get_or_insert_mut(url.origin().ascii_serialization(), || Host {
            transfers: Arc::new(Semaphore::new(self.transfers_max)),
            exchanges: Arc::new(Semaphore::new(self.exchanges_max)),
        });
        Arc::clone(match kind {
            Kind::Transfer => &host.transfers,
            Kind::Exchange => &host.exchanges,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn turns_are_counted_per_host_and_kind_and_come_back() {
        let gate = Gate::new(2, 1);
        let a = Url::parse("http://a/x").unwrap();
        let b = Url::parse("http://b/x").unwrap();
        let first = gate.turn(&a, Kind::Transfer, NOW).await.unwrap();
        let _second = gate.turn(&a, Kind::Transfer, NOW).await.unwrap();
        let error = gate.turn(&a, Kind::Transfer, NOW).await.unwrap_err();
        assert!(matches!(
            error,
            SourceError::TimedOut {
                phase: Phase::Turn,
                ..
            }
        ));
        drop(gate.turn(&a, Kind::Exchange, NOW).await.unwrap());
        drop(gate.turn(&b, Kind::Transfer, NOW).await.unwrap());
        drop(first);
        drop(gate.turn(&a, Kind::Transfer, NOW).await.unwrap());
    }
}
