//! A device whose bytes come from a file next door, late or never.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pantala_lazy::{Device, FillError};
use pantala_wire::{ByteRange, Priority};

/// Bytes that arrive together.
const GROUP_BYTES: u64 = 64 << 10;

/// A sparse file that fills from another.
pub struct LateDevice {
    path: PathBuf,
    file: File,
    origin: File,
    size_bytes: u64,
    present: Mutex<HashSet<u64>>,
    /// How long the origin takes to answer.
    pub delay: Duration,
    /// While set, the origin has nothing.
    pub origin_is_down: AtomicBool,
    /// Groups that were fetched.
    pub fetched: AtomicU64,
    /// Fills that came with a fault's urgency.
    pub urgent: AtomicU64,
}

impl LateDevice {
    /// A device of `origin`'s bytes at `path`, none of which are there yet.
    pub fn new(path: &Path, origin: &Path, delay: Duration) -> io::Result<Self> {
        let origin = File::open(origin)?;
        let size_bytes = origin.metadata()?.len();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len(size_bytes)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            origin,
            size_bytes,
            present: Mutex::default(),
            delay,
            origin_is_down: AtomicBool::new(false),
            fetched: AtomicU64::new(0),
            urgent: AtomicU64::new(0),
        })
    }

    fn groups(&self) -> u64 {
        self.size_bytes.div_ceil(GROUP_BYTES)
    }

    fn present(&self) -> std::sync::MutexGuard<'_, HashSet<u64>> {
        self.present.lock().expect("nothing panics under it")
    }

    fn fetch(&self, group: u64) -> io::Result<()> {
        let first = group * GROUP_BYTES;
        let len = GROUP_BYTES.min(self.size_bytes - first);
        let mut bytes = vec![0; len as usize];
        self.origin.read_exact_at(&mut bytes, first)?;
        self.file.write_all_at(&bytes, first)?;
        self.present().insert(group);
        self.fetched.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Device for LateDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn is_complete(&self) -> bool {
        self.present().len() as u64 == self.groups()
    }

    fn fill(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<(), FillError>> {
        async move {
            if range.end() > self.size_bytes {
                return Err(FillError::OutOfRange {
                    first: range.start(),
                    count: range.len(),
                    size_bytes: self.size_bytes,
                });
            }
            if urgency == Priority::Fault {
                self.urgent.fetch_add(1, Ordering::Relaxed);
            }
            for group in range.start() / GROUP_BYTES..range.end().div_ceil(GROUP_BYTES) {
                if self.present().contains(&group) {
                    continue;
                }
                tokio::time::sleep(self.delay).await;
                if self.origin_is_down.load(Ordering::Relaxed) {
                    return Err(FillError::Unavailable {
                        what: format!("group {group}"),
                        why: "the test's origin is down".into(),
                    });
                }
                self.fetch(group).map_err(|error| FillError::Disk {
                    what: self.path.display().to_string(),
                    why: error.to_string(),
                })?;
            }
            Ok(())
        }
        .boxed()
    }
}
