//! The file that is served, the file that is written, and the proof that both hold the same.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use pantala_store::{Blob, Store, StoreConfig};
use pantala_wire::{BlobDigest, ByteRange};
use parking_lot::Mutex;

/// Buffer of everything that only reads or writes through.
const BUFFER_BYTES: usize = 1 << 20;
/// Pieces on their way at once are bounded by the streams; more than these are freed, not kept.
const POOL_MAX: usize = 64;
/// Slices of one vectored write (the kernel's `UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

/// What a server serves, from the page cache.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    bytes: u64,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// A file that is read into buffers, as programs on other stacks do.
    File(Arc<File>, Arc<Mutex<Vec<Vec<u8>>>>),
    /// A blob in Pantala's store, whose bytes are lent where they lie, as the node does.
    Blob(Blob),
}

/// A buffer that goes back to where it came from.
struct Pooled {
    bytes: Vec<u8>,
    pool: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let mut pool = self.pool.lock();
        if pool.len() < POOL_MAX {
            pool.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self {
            bytes: file.metadata()?.len(),
            place: Place::File(Arc::new(file), Arc::default()),
        })
    }

    /// The file's bytes, in a store of this process's own beside it. It goes where the file goes: with
    /// the harness's scratch directory.
    pub(crate) fn stored(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let bytes = file.metadata()?.len();
        let dir = path.with_extension(format!("store-{}", std::process::id()));
        let store = Store::open(StoreConfig::new(dir, 2 * bytes))?;
        let blob = store.create(&BlobDigest::new([7; 32]), bytes)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut offset = 0;
        while offset < bytes {
            let length = (bytes - offset).min(BUFFER_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..length], offset)?;
            blob.write_groups(offset, &buffer[..length])?;
            offset += length as u64;
        }
        Ok(Self {
            bytes,
            place: Place::Blob(blob),
        })
    }

    /// `length` bytes from `offset`.
    pub(crate) fn piece(&self, offset: u64, length: usize) -> Result<Bytes> {
        ensure!(
            offset
                .checked_add(length as u64)
                .is_some_and(|end| end <= self.bytes),
            "asked for {length} bytes at {offset} of {}",
            self.bytes
        );
        match &self.place {
            Place::File(file, pool) => {
                let mut bytes = pool.lock().pop().unwrap_or_default();
                bytes.resize(length, 0);
                file.read_exact_at(&mut bytes, offset)?;
                let pool = pool.clone();
                Ok(Bytes::from_owner(Pooled { bytes, pool }))
            }
            Place::Blob(blob) => {
                let range = ByteRange::new(offset, offset + length as u64).context("no bytes")?;
                blob.slice(range)?.context("stored and not readable")
            }
        }
    }

    /// Reads everything once, so that it lies in the page cache.
    pub(crate) fn warm(&self) -> Result<()> {
        let mut offset = 0;
        while offset < self.bytes {
            let length = (self.bytes - offset).min(BUFFER_BYTES as u64);
            self.piece(offset, length as usize)?;
            offset += length;
        }
        Ok(())
    }
}

/// What a client writes to.
#[derive(Debug, Clone)]
pub(crate) struct Sink {
    file: Arc<File>,
    discards: bool,
}

impl Sink {
    /// Opens a file that exists and is `bytes` long.
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .open(path)
            .with_context(|| format!("opening {}", path.display()))?;
        ensure!(
            file.metadata()?.len() >= bytes,
            "{} is shorter than {bytes} bytes",
            path.display()
        );
        Ok(Self {
            file: Arc::new(file),
            discards: false,
        })
    }

    /// From now on it throws away what it is given, so that a transfer is measured without the cost
    /// of a file, which is the same for all.
    pub(crate) fn discard(&mut self) {
        self.discards = true;
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.discards {
            return Ok(());
        }
        Ok(self.file.write_all_at(bytes, offset)?)
    }

    /// Writes `slices` behind each other from `offset`, without joining them.
    pub(crate) fn write_slices(&self, mut offset: u64, slices: &[impl AsRef<[u8]>]) -> Result<()> {
        if self.discards {
            return Ok(());
        }
        for group in slices.chunks(SLICES_MAX) {
            let mut parts: Vec<IoSlice<'_>> = group
                .iter()
                .map(|slice| IoSlice::new(slice.as_ref()))
                .collect();
            let mut rest = &mut parts[..];
            while !rest.is_empty() {
                let written = rustix::io::pwritev(&*self.file, rest, offset)?;
                ensure!(written > 0, "nothing could be written at {offset}");
                offset += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
        }
        Ok(())
    }
}

/// A file that no compression and no mistake in the order survives.
pub(crate) fn write_noise(path: &Path, bytes: u64) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    write_with(path, bytes, |buffer| {
        for word in buffer.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    })
}

/// Keeps the file's blocks and pages and makes its content worthless.
pub(crate) fn write_blank(path: &Path, bytes: u64) -> Result<()> {
    write_with(path, bytes, |_| {})
}

fn write_with(path: &Path, bytes: u64, mut fill: impl FnMut(&mut [u8])) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("creating {}", path.display()))?;
    if file.metadata()?.len() != bytes {
        rustix::fs::ftruncate(&file, bytes)?;
    }
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut missing = bytes;
    while missing > 0 {
        fill(&mut buffer);
        let length = missing.min(BUFFER_BYTES as u64);
        file.write_all(&buffer[..length as usize])?;
        missing -= length;
    }
    Ok(())
}

/// Fails where the files differ, and says where.
pub(crate) fn compare(one: &Path, other: &Path) -> Result<()> {
    let (mut left, mut right) = (File::open(one)?, File::open(other)?);
    let bytes = left.metadata()?.len();
    ensure!(
        right.metadata()?.len() == bytes,
        "{} and {} differ in length",
        one.display(),
        other.display()
    );
    let (mut a, mut b) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(BUFFER_BYTES as u64) as usize;
        left.read_exact(&mut a[..length])?;
        right.read_exact(&mut b[..length])?;
        if let Some(at) = (0..length).find(|&at| a[at] != b[at]).filter(|_| a != b) {
            bail!(
                "{} and {} differ from byte {}",
                one.display(),
                other.display(),
                offset + at as u64
            );
        }
        offset += length as u64;
    }
    Ok(())
}
