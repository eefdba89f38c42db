//! The one place with unsafe code: mapped files.
//!
//! Metadata changes while it is mapped: no reference to its bytes is ever made, they are copied out
//! by atomic loads, so that a write to the file in the same moment yields old or new bytes and nothing
//! worse. A blob's data ([`data`]) is lent by reference, under rules that [`lend`] keeps.
#![allow(
    unsafe_code,
    reason = "a mapping is memory that the compiler knows nothing about"
)]

pub(crate) mod data;
pub(crate) mod lend;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::fs::MappedFile;

/// Bytes copied by one load.
const WORD_BYTES: usize = size_of::<AtomicU64>();

/// A whole file, mapped for reading. The file must not shrink while it is mapped: touching a page
/// past its end, or one that the disk cannot read, ends the process with SIGBUS. The store's lock
/// keeps others away, and the store itself never shrinks a metadata file.
pub(crate) struct Map {
    raw: MmapRaw,
}

impl Map {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let raw = MmapOptions::new().map_raw_read_only(file)?;
        Ok(Self { raw })
    }
}

impl MappedFile for Map {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        if !offset.is_multiple_of(WORD_BYTES) || !out.len().is_multiple_of(WORD_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let end = offset.checked_add(out.len());
        if end.is_none_or(|end| end > self.raw.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let base = self.raw.as_ptr();
        for (index, word) in out.as_chunks_mut::<WORD_BYTES>().0.iter_mut().enumerate() {
            // SAFETY: `offset + index * 8 + 8 <= offset + out.len() <= raw.len()` was checked above,
            // so the eight bytes lie inside the mapping, which lives as long as `self`. A mapping
            // starts on a page boundary and the distance to it is a multiple of 8, so the pointer
            // is aligned for `AtomicU64`. Nothing in this process reaches these bytes but through
            // atomic loads, and relaxed loads of eight bytes are allowed on read-only memory.
            let value = unsafe {
                let at = base.add(offset + index * WORD_BYTES).cast::<AtomicU64>();
                (*at).load(Ordering::Relaxed)
            };
            *word = value.to_ne_bytes();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_see_the_file_and_stop_at_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        file.write_all(&bytes).unwrap();
        let map = Map::of(&file).unwrap();
        let mut out = [0; 16];
        map.read(8, &mut out).unwrap();
        assert_eq!(out, bytes[8..24]);
        for (offset, len) in [(248, 16), (256, 8), (u64::MAX - 7, 8), (1, 8), (0, 7)] {
            assert!(map.read(offset, &mut vec![0; len]).is_err(), "{offset}");
        }
        map.read(256, &mut []).unwrap();
    }
}
