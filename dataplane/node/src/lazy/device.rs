//! A stored blob as a device of a lazy mount: its file is the backing file.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use pantala_lazy::{Device, FillError};
use pantala_store::{Blob, StoreError};
use pantala_wire::{ByteRange, Priority};
use parking_lot::Mutex;

use crate::engine::{FillFailed, Filled, Shared, SourceAccess};
use crate::metrics::OutcomeLabel;

/// How many reads waited, and what for.
#[derive(Debug, Default)]
pub struct Counts {
    faults: AtomicU64,
    local_bytes: AtomicU64,
    remote_bytes: AtomicU64,
    failed: AtomicU64,
}

/// [`Counts`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct FaultTotals {
    /// Fills that somebody waited for.
    pub faults: u64,
    /// Of these, bytes that were on the disk.
    pub local_bytes: u64,
    /// Bytes that had to come from peers or the registry.
    pub remote_bytes: u64,
    /// Fills that failed: their readers got EIO.
    pub failed: u64,
}

/// A blob that is mounted. While this lives, it is not evicted.
pub struct BlobDevice {
    shared: Arc<Shared>,
    blob: Blob,
    /// Opened with the blob, before anything was marked.
    file: File,
    /// How it is read from the source; of the last mount that named one.
    access: Mutex<Option<SourceAccess>>,
    fill_timeout: Duration,
    counts: Counts,
}

impl BlobDevice {
    /// Of an open blob.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn new(
        shared: Arc<Shared>,
        blob: Blob,
        access: Option<SourceAccess>,
        fill_timeout: Duration,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            file: blob.data_descriptor()?,
            shared,
            blob,
            access: Mutex::new(access),
            fill_timeout,
            counts: Counts::default(),
        })
    }

    /// Another mount of it showed how it may be read.
    pub fn set_access(&self, access: SourceAccess) {
        *self.access.lock() = Some(access);
    }

    /// The blob.
    pub fn blob(&self) -> &Blob {
        &self.blob
    }

    /// What its readers waited for.
    pub fn totals(&self) -> FaultTotals {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        FaultTotals {
            faults: of(&self.counts.faults),
            local_bytes: of(&self.counts.local_bytes),
            remote_bytes: of(&self.counts.remote_bytes),
            failed: of(&self.counts.failed),
        }
    }

    fn what(&self, range: ByteRange) -> String {
        format!("{} {range:?}", self.blob.digest())
    }

    fn error(&self, range: ByteRange, error: &FillFailed) -> FillError {
        let (what, why) = (self.what(range), error.to_string());
        match error {
            FillFailed::Failed(_) | FillFailed::Interrupted => FillError::Unavailable { what, why },
            FillFailed::Corrupt(_) | FillFailed::Replaced => FillError::Corrupt { what, why },
            FillFailed::Store(_) => FillError::Disk { what, why },
        }
    }

    async fn try_fill(&self, range: ByteRange, urgency: Priority) -> Result<Filled, FillError> {
        if range.end() > self.size_bytes() {
            return Err(FillError::OutOfRange {
                first: range.start(),
                count: range.len(),
                size_bytes: self.size_bytes(),
            });
        }
        let access = self.access.lock().clone();
        let fill = self.shared.fill(&self.blob, range, urgency, access);
        match tokio::time::timeout(self.fill_timeout, fill).await {
            Ok(Ok(filled)) => Ok(filled),
            Ok(Err(error)) => Err(self.error(range, &error)),
            Err(_) => Err(FillError::Unavailable {
                what: self.what(range),
                why: format!("nothing came within {:?}", self.fill_timeout),
            }),
        }
    }

    fn count(&self, range: ByteRange, outcome: &Result<Filled, FillError>, since: Instant) {
        let counts = &self.counts;
        counts.faults.fetch_add(1, Ordering::Relaxed);
        let label = match outcome {
            Ok(Filled::Local) => {
                counts.local_bytes.fetch_add(range.len(), Ordering::Relaxed);
                "local"
            }
            Ok(Filled::Remote) => {
                counts
                    .remote_bytes
                    .fetch_add(range.len(), Ordering::Relaxed);
                "remote"
            }
            Err(_) => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                "failed"
            }
        };
        let metrics = &self.shared.metrics;
        let label = OutcomeLabel { outcome: label };
        metrics.lazy_fills.get_or_create(&label).inc();
        metrics.lazy_fill.observe(since.elapsed().as_secs_f64());
    }
}

impl Device for BlobDevice {
    fn size_bytes(&self) -> u64 {
        self.blob.layout().blob_size()
    }

    fn path(&self) -> &Path {
        self.blob.data_path()
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn is_complete(&self) -> bool {
        self.blob.is_complete()
    }

    fn fill(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<(), FillError>> {
        Box::pin(async move {
            let since = Instant::now();
            let outcome = self.try_fill(range, urgency).await;
            if urgency == Priority::Fault {
                self.count(range, &outcome, since);
            }
            outcome.map(drop)
        })
    }
}
