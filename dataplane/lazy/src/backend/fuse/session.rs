//! One mount's conversation with the kernel: requests are read in turn, reads of devices are answered beside each other.
//!
//! A session ends when its file system is unmounted or aborted. Whatever happens to a read on its way (a fill that
//! fails or panics, a short file, a session that ends), its reader gets an answer: the bytes asked for or an error.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pantala_wire::ByteRange;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

use super::protocol::{self, ProtocolError, Request, Step, errno};
use crate::boundary::{REQUESTS, watch};
use crate::device::Device;
use crate::faults::DeviceId;
use crate::filler::Filler;

/// Reads of one mount that are under way at once. The others wait in the kernel, which keeps them for us. A fault takes
/// about a round trip to a peer, so this many keep a fast network busy with requests of 128 KiB.
const READS_IN_FLIGHT_MAX: u16 = 128;
/// Reads of one mount that hold a buffer of up to [`protocol::READ_BYTES_MAX`] at once: they copy, and more of them than
/// cores would only hold more memory.
const COPIES_MAX: usize = 8;

/// One file.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) device: Arc<dyn Device>,
    /// What the filler has for it.
    pub(super) id: DeviceId,
}

/// What a session serves.
pub(super) struct Session {
    kernel: AsyncFd<OwnedFd>,
    devices: Vec<Served>,
    filler: Filler,
    sizes: Vec<u64>,
    copies: Semaphore,
}

impl Session {
    /// A session over `/dev/fuse`, opened without blocking and already mounted. Must be called in a runtime.
    pub(super) fn new(
        kernel: OwnedFd,
        devices: Vec<Served>,
        filler: Filler,
    ) -> io::Result<Arc<Self>> {
        let sizes = devices
            .iter()
            .map(|served| served.device.size_bytes())
            .collect();
        Ok(Arc::new(Self {
            kernel: watch(kernel)?,
            devices,
            filler,
            sizes,
            copies: Semaphore::new(COPIES_MAX),
        }))
    }

    /// Serves until the file system is gone; an error is the kernel's on the descriptor itself. When it has ended, no
    /// more reads are taken, and those under way are refused by the kernel's closing of the connection.
    pub(super) async fn serve(self: Arc<Self>) -> io::Result<()> {
        let in_flight = Arc::new(Semaphore::new(usize::from(READS_IN_FLIGHT_MAX)));
        let mut buffer = vec![0; protocol::REQUEST_BYTES_MAX];
        loop {
            let place = Arc::clone(&in_flight)
                .acquire_owned()
                .await
                .map_err(io::Error::other)?;
            let Some(len) = self.next_request(&mut buffer).await? else {
                return Ok(());
            };
            let step = match Request::parse(&buffer[..len]) {
                Ok(request) => (
                    request.unique,
                    protocol::decide(&request, &self.sizes, READS_IN_FLIGHT_MAX),
                ),
                Err(error) => {
                    tracing::warn!(%error, "the kernel's FUSE request makes no sense");
                    match error {
                        ProtocolError::NoHead(_) => continue,
                        ProtocolError::Malformed { unique, .. } => (
                            unique,
                            Step::Reply(protocol::refusal(unique, errno::EINVAL)),
                        ),
                    }
                }
            };
            match step {
                (_, Step::Nothing) => {}
                (_, Step::Reply(bytes)) => self.reply(&[IoSlice::new(&bytes)]),
                (
                    unique,
                    Step::Read {
                        device,
                        offset,
                        size_bytes,
                    },
                ) => {
                    let answer = Answer {
                        session: Arc::clone(&self),
                        unique,
                        given: false,
                    };
                    let served = self.devices[device].clone();
                    tokio::spawn(async move {
                        answer.read(served, offset, size_bytes).await;
                        drop(place);
                    });
                }
            }
        }
    }

    /// The next request's length, or `None` when the file system is gone.
    async fn next_request(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let mut ready = self.kernel.ready(REQUESTS).await?;
            let read = ready.try_io(|kernel| Ok(rustix::io::read(kernel.get_ref(), &mut *buffer)?));
            match read {
                Ok(Ok(len)) => return Ok(Some(len)),
                Ok(Err(error)) => match Errno::from_io_error(&error) {
                    Some(Errno::NODEV) => return Ok(None),
                    // The request was taken back while it was read.
                    Some(Errno::NOENT | Errno::INTR) => {}
                    _ => return Err(error),
                },
                Err(_would_block) => {}
            }
        }
    }

    fn reply(&self, parts: &[IoSlice<'_>]) {
        match rustix::io::writev(self.kernel.get_ref(), parts) {
            // Nobody waits for it any more, or the file system is gone.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::warn!(%error, "the kernel refused a FUSE reply"),
        }
    }
}

/// The debt of one answer: given, or paid with `EIO` when it is dropped, so that no reader waits for ever.
struct Answer {
    session: Arc<Session>,
    unique: u64,
    given: bool,
}

impl Answer {
    async fn read(self, served: Served, offset: u64, size_bytes: u32) {
        let Served { device, id } = served;
        let Some(range) = ByteRange::new(offset, offset + u64::from(size_bytes)) else {
            return;
        };
        // A device that is complete has nothing to wait for.
        if !device.is_complete() && !self.session.filler.fill(id, range).await {
            return;
        }
        let session = Arc::clone(&self.session);
        let Ok(_place) = session.copies.acquire().await else {
            return;
        };
        let mut data = vec![0; size_bytes as usize];
        if read_cached(device.file(), &mut data, offset) {
            return self.give(&data);
        }
        let copied = tokio::task::spawn_blocking(move || {
            if let Err(error) = read_exact_at(device.file(), &mut data, offset) {
                tracing::error!(%error, device = %device.path().display(), ?range, "bytes that are present cannot be read");
                return;
            }
            self.give(&data);
        });
        if let Err(error) = copied.await {
            tracing::error!(%error, "a read of a lazy image was not finished");
        }
    }

    fn give(mut self, data: &[u8]) {
        let head = protocol::read_head(self.unique, data.len() as u32);
        self.session
            .reply(&[IoSlice::new(&head), IoSlice::new(data)]);
        self.given = true;
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.given {
            let refusal = protocol::refusal(self.unique, errno::EIO);
            self.session.reply(&[IoSlice::new(&refusal)]);
        }
    }
}

/// Whether all of `data` could be read from the page cache, without waiting for a disk.
fn read_cached(file: &File, data: &mut [u8], offset: u64) -> bool {
    let len = data.len();
    let parts = &mut [IoSliceMut::new(data)];
    rustix::io::preadv2(file.as_fd(), parts, offset, ReadWriteFlags::NOWAIT) == Ok(len)
}

fn read_exact_at(file: &File, data: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, data, offset)
}
