//! What has been taken from origins, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

/// Sums since start, over all origins.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    retries: AtomicU64,
    received_bytes: AtomicU64,
    discarded_bytes: AtomicU64,
    tokens: AtomicU64,
    transfers: AtomicU64,
}

/// Sums since start, over all origins; for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceTotals {
    /// Requests made, without redirects and token requests.
    pub requests: u64,
    /// Requests that were made again after a failure.
    pub retries: u64,
    /// Bytes of bodies that were wanted.
    pub received_bytes: u64,
    /// Bytes of bodies that came unasked: of origins that ignore ranges.
    pub discarded_bytes: u64,
    /// Tokens fetched.
    pub tokens: u64,
}

impl Counters {
    pub(crate) fn requested(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
    pub(crate) fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }
    pub(crate) fn received(&self, len: u64) {
        self.received_bytes.fetch_add(len, Ordering::Relaxed);
    }
    pub(crate) fn discarded(&self, len: u64) {
        self.discarded_bytes.fetch_add(len, Ordering::Relaxed);
    }
    pub(crate) fn token_fetched(&self) {
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }
    /// A number for a transfer that no other has.
    pub(crate) fn transfer_number(&self) -> u64 {
        self.transfers.fetch_add(1, Ordering::Relaxed)
    }
    pub(crate) fn totals(&self) -> SourceTotals {
        SourceTotals {
            requests: self.requests.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            discarded_bytes: self.discarded_bytes.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
        }
    }
}
