//! The conversation on `/dev/cachefiles`: messages are read in turn, reads are answered beside each other.
//!
//! The kernel's rules, as seen on 6.12. A READ that nobody completes waits for ever, though its reader can be killed. A
//! READ that is completed while the cache file still has a hole there fails with `EIO`: the kernel looks for the data
//! again and never takes the daemon's word. So every READ is completed, once, whatever comes of its fill: that is how a
//! failed one fails. Closing the cache file's descriptor does not fail it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pantala_wire::ByteRange;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

use super::cache;
use super::protocol::{self, BLOCK_BYTES, MESSAGE_BYTES_MAX, Message, Request};
use super::table::{Read, Table};
use crate::boundary::{REQUESTS, complete_read, take_descriptor, watch};
use crate::device::Device;
use crate::faults::{DeviceId, Limits};
use crate::filler::Filler;

/// Reads of all mounts that are under way at once. The others wait in the kernel, which keeps them for us.
const READS_IN_FLIGHT_MAX: usize = 256;
/// Reads that hold a buffer of [`COPY_BYTES_MAX`] at once.
const COPIES_MAX: usize = 16;
/// A read is filled and written in steps of this much.
const COPY_BYTES_MAX: u64 = 1 << 20;
/// A wait after an error of the device itself, so that an error that stays does not take a core.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

type Descriptor = Arc<OwnedFd>;

/// What is behind a name.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) device: Arc<dyn Device>,
    /// What the filler has for it; `None` for what is wholly local.
    pub(super) id: Option<DeviceId>,
}

/// What serves all mounts of a node.
pub(super) struct Server {
    kernel: AsyncFd<OwnedFd>,
    table: Mutex<Table<Served, Descriptor>>,
    pub(super) filler: Filler,
    copies: Semaphore,
    cache_dir: PathBuf,
}

impl Server {
    /// Must be called in a runtime.
    pub(super) fn new(
        kernel: OwnedFd,
        cache_dir: PathBuf,
        limits: Limits,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            kernel: watch(kernel)?,
            table: Mutex::new(Table::new()),
            filler: Filler::start(limits),
            copies: Semaphore::new(COPIES_MAX),
            cache_dir,
        }))
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table<Served, Descriptor>> {
        // Nothing panics while it is held.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes one command.
    pub(super) fn tell(&self, command: &str) -> io::Result<()> {
        rustix::io::write(self.kernel.get_ref(), command.as_bytes())?;
        Ok(())
    }

    /// Serves for as long as it is polled.
    pub(super) async fn serve(self: Arc<Self>) {
        let in_flight = Arc::new(Semaphore::new(READS_IN_FLIGHT_MAX));
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let Ok(place) = Arc::clone(&in_flight).acquire_owned().await else {
                return;
            };
            let message = match self.next_message(&mut buffer).await {
                Ok(len) => Message::parse(&buffer[..len]),
                Err(error) => {
                    // One message may be at fault (a descriptor too many, say), so the next is tried.
                    tracing::error!(%error, "cannot read from /dev/cachefiles");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let Message { id, object, what } = match message {
                Ok(message) => message,
                Err(error) => {
                    tracing::error!(%error, "the kernel's cachefiles message makes no sense; passed over");
                    continue;
                }
            };
            match what {
                Request::Open { descriptor, key } => self.open(id, object, descriptor, key),
                Request::Close => self.close(object),
                Request::Read { offset, size_bytes } => {
                    let read = self.table().read(object, offset, size_bytes);
                    let server = Arc::clone(&self);
                    tokio::spawn(async move {
                        server.read(id, read).await;
                        drop(place);
                    });
                }
            }
        }
    }

    async fn next_message(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.kernel.ready(REQUESTS).await?;
            // The device never blocks: it says 0 where others would.
            match rustix::io::read(ready.get_inner(), &mut *buffer) {
                Ok(0) => ready.clear_ready(),
                Ok(len) => return Ok(len),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn open(&self, id: u32, object: u32, descriptor: u32, key: Option<Vec<u8>>) {
        let Some(descriptor) = take_descriptor(descriptor) else {
            tracing::error!(id, "the kernel opened a cache file without a descriptor");
            return;
        };
        let name = key.clone().unwrap_or_default();
        let size_bytes = self.table().open(object, key, Arc::new(descriptor));
        if let Err(errno) = size_bytes {
            let name = String::from_utf8_lossy(&name).into_owned();
            tracing::warn!(%name, errno, "the kernel opens a device that is not served here");
        }
        if let Err(error) = self.tell(&protocol::copen(id, size_bytes)) {
            // Whoever mounts has gone away meanwhile.
            tracing::debug!(%error, id, "an opened cache file was not wanted any more");
            self.table().close(object);
        }
    }

    fn close(&self, object: u32) {
        let unused = self.table().close(object);
        if let Some(name) = unused {
            cache::forget_later(self.cache_dir.clone(), name);
        }
    }

    async fn read(&self, id: u32, read: Read<Served, Descriptor>) {
        let (Served { device, id: known }, descriptor, first, end) = match read {
            Read::Serve {
                device,
                descriptor,
                first,
                end,
            } => (device, descriptor, first, end),
            Read::Fail(descriptor) => return drop(Debt { id, descriptor }),
            Read::Lost => {
                tracing::error!(id, "the kernel reads a cache file that it has not opened");
                return;
            }
        };
        let debt = Debt { id, descriptor };
        let mut at = first;
        while at < end {
            let next = end.min(at + COPY_BYTES_MAX);
            let Some(range) = ByteRange::new(at, next) else {
                return;
            };
            if let Some(known) = known
                && !device.is_complete()
                && !self.filler.fill(known, range).await
            {
                return;
            }
            let Ok(_place) = self.copies.acquire().await else {
                return;
            };
            let (from, to) = (Arc::clone(&device), Arc::clone(&debt.descriptor));
            let copied = tokio::task::spawn_blocking(move || copy(from.file(), &to, range)).await;
            if let Err(error) = copied.unwrap_or_else(|error| Err(io::Error::other(error))) {
                tracing::error!(%error, device = %device.path().display(), ?range, "bytes cannot be copied to the cache");
                return;
            }
            at = next;
        }
    }
}

/// The debt of one completion, paid when it is dropped: with the bytes written the read succeeds, without them it fails.
struct Debt {
    id: u32,
    descriptor: Descriptor,
}

impl Drop for Debt {
    fn drop(&mut self) {
        if let Err(error) = complete_read(&self.descriptor, self.id) {
            tracing::debug!(%error, id = self.id, "a read was not wanted any more");
        }
    }
}

/// Copies `range`, which begins with a block and ends with one or with the device; zeros then follow to the block's end.
fn copy(from: &File, to: &OwnedFd, range: ByteRange) -> io::Result<()> {
    let len = range.len() as usize;
    let block = BLOCK_BYTES as usize;
    let whole = len.next_multiple_of(block);
    let mut memory = vec![0; whole + block];
    let skip = memory.as_ptr().align_offset(block);
    let data = &mut memory[skip..skip + whole];
    from.read_exact_at(&mut data[..len], range.start())?;
    let mut written = 0;
    while written < whole {
        let offset = range.start() + written as u64;
        match rustix::io::pwrite(to, &data[written..], offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => written += count,
        }
    }
    Ok(())
}
