//! Which chunks are safely on the disk, across restarts and crashes.
//!
//! A small file beside the data, always replaced as a whole: 8 bytes of magic, the map's fingerprint (32), the
//! data file's inode number (8), the count of chunks (8), one bit for each, and the BLAKE3 of all before
//! it (32). It is written after the data that it vouches for has reached the disk. Whatever does not
//! fit, vouches for nothing: those chunks are fetched again.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::CHUNKS_MAX;

const MAGIC: &[u8; 8] = b"PNTRAFS1";
const HEAD_LEN: usize = 56;
const SUM_LEN: usize = 32;
/// The record of the most chunks.
const FILE_LEN_MAX: u64 = CHUNKS_MAX as u64 / 8 + (HEAD_LEN + SUM_LEN) as u64;

/// One bit for each chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ChunkBits {
    bytes: Vec<u8>,
    count: usize,
    missing: usize,
}

impl ChunkBits {
    pub(super) fn none(count: usize) -> Self {
        Self {
            bytes: vec![0; count.div_ceil(8)],
            count,
            missing: count,
        }
    }
    pub(super) fn has(&self, index: usize) -> bool {
        self.bytes
            .get(index / 8)
            .is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }
    pub(super) fn set(&mut self, index: usize) {
        if index < self.count && !self.has(index) {
            self.bytes[index / 8] |= 1 << (index % 8);
            self.missing -= 1;
        }
    }
    pub(super) fn missing(&self) -> usize {
        self.missing
    }
}

/// The file of a record.
pub(super) struct Record {
    path: PathBuf,
    fingerprint: [u8; 32],
}

impl Record {
    pub(super) fn new(path: PathBuf, fingerprint: [u8; 32]) -> Self {
        Self { path, fingerprint }
    }

    /// The chunks that are safely in `data`: none where the record is missing, damaged, or another's.
    pub(super) fn read(&self, data: &File, count: usize) -> std::io::Result<ChunkBits> {
        let mut bits = ChunkBits::none(count);
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(bits),
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        file.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes)?;
        let expected = HEAD_LEN + bits.bytes.len() + SUM_LEN;
        let fits = bytes.len() == expected
            && bytes[..HEAD_LEN] == self.head(data, count)?
            && bytes[expected - SUM_LEN..]
                == *blake3::hash(&bytes[..expected - SUM_LEN]).as_bytes();
        if fits {
            let stored = &bytes[HEAD_LEN..expected - SUM_LEN];
            (0..count)
                .filter(|index| stored[index / 8] >> (index % 8) & 1 == 1)
                .for_each(|index| bits.set(index));
        }
        Ok(bits)
    }

    /// Replaces the record. What it vouches for must have reached the disk.
    pub(super) fn write(&self, data: &File, bits: &ChunkBits) -> std::io::Result<()> {
        let mut bytes = self.head(data, bits.count)?;
        bytes.extend_from_slice(&bits.bytes);
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        std::fs::rename(&new, &self.path)?;
        sync_dir(&self.path)
    }

    /// Removes the record: the data file that it spoke of is gone.
    pub(super) fn remove(&self) -> std::io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => sync_dir(&self.path),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn head(&self, data: &File, count: usize) -> std::io::Result<Vec<u8>> {
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&self.fingerprint);
        head.extend_from_slice(&data.metadata()?.ino().to_le_bytes());
        head.extend_from_slice(&(count as u64).to_le_bytes());
        Ok(head)
    }
}

fn sync_dir(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
