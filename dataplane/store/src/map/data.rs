//! A blob's data file, mapped so that its bytes can be read where they lie.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::slice;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use pantala_wire::ByteRange;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, MsyncFlags, ProtFlags};

/// How often an interrupted population is tried again before its bytes are read another way.
const POPULATE_RETRIES_MAX: u32 = 8;

/// Bytes of a mapping, readable as long as this lives.
pub type LentBytes = Box<dyn AsRef<[u8]> + Send + Sync>;

/// A range of a file, mapped for reading. Ranges and offsets are bytes of the file; what lies outside of
/// what is mapped is `UnexpectedEof`.
///
/// A reference to bytes that change is undefined behaviour, and here any write to the file changes
/// them. Whoever lends bytes keeps the file from changing under them: before it writes, it replaces what
/// is lent by a copy ([`Self::detach`]).
pub trait MappedData: Send + Sync {
    /// Reads the pages of `range` into memory, so that touching them does not wait for the disk. What
    /// cannot be read is an error here, where touching it would end the process.
    fn populate(&self, range: ByteRange) -> io::Result<()>;

    /// The bytes of `range`, until what is returned is dropped.
    ///
    /// # Safety
    /// While it lives, the file is neither shortened nor, in `range`, written to, but for what has been
    /// detached.
    unsafe fn lend(self: Arc<Self>, range: ByteRange) -> io::Result<LentBytes>;

    /// Replaces the mapping of the bytes from `offset` by `copy`, at the same addresses: what is written
    /// to the file is no longer seen there. Whole pages, or up to the end of what is mapped. Readers of
    /// the bytes notice nothing.
    ///
    /// # Safety
    /// `copy` is what the mapping shows, and nobody writes to the file there until this returns.
    unsafe fn detach(&self, offset: u64, copy: &[u8]) -> io::Result<()>;

    /// Gives the memory of `range` back. What is not detached stays in the page cache and is mapped
    /// again when it is touched. Whole pages, or up to the end of what is mapped.
    ///
    /// # Safety
    /// Nothing of `range` is lent, and what was detached will not be lent again.
    unsafe fn release(&self, range: ByteRange) -> io::Result<()>;
}

/// A part of a data file, mapped for reading and shared.
///
/// A page that is touched after it has left the page cache, and that the disk cannot read any more, ends
/// the process with SIGBUS; [`MappedData::populate`] makes that a matter of moments, not of hours.
pub(crate) struct DataMap {
    raw: MmapRaw,
    range: ByteRange,
}

impl DataMap {
    pub(crate) fn of(file: &File, range: ByteRange) -> io::Result<Self> {
        let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut options = MmapOptions::new();
        let raw = options
            .offset(range.start())
            .len(len)
            .map_raw_read_only(file)?;
        Ok(Self { raw, range })
    }

    /// Where `range` lies in memory. The pointer is inside the mapping, and so are the bytes after it.
    fn place(&self, range: ByteRange) -> io::Result<(*mut u8, usize)> {
        if range.start() < self.range.start() || range.end() > self.range.end() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // As large as the mapping at most, and so an address.
        let start = (range.start() - self.range.start()) as usize;
        let at = self.raw.as_mut_ptr().wrapping_add(start);
        Ok((at, range.len() as usize))
    }

    /// The pages of `range`, which must be whole but at the mapping's end: address and bytes.
    fn whole_pages(&self, range: ByteRange) -> io::Result<(*mut c_void, usize)> {
        let page_size = rustix::param::page_size();
        let (at, len) = self.place(range)?;
        let to_the_end = range.end() == self.range.end();
        let whole = (at as usize).is_multiple_of(page_size)
            && (to_the_end || len.is_multiple_of(page_size));
        if !whole {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((at.cast(), len.next_multiple_of(page_size)))
    }
}

impl MappedData for DataMap {
    fn populate(&self, range: ByteRange) -> io::Result<()> {
        let (at, len) = self.place(range)?;
        let before = at as usize % rustix::param::page_size();
        let at: *mut c_void = at.wrapping_sub(before).cast();
        let mut retries = 0;
        loop {
            // SAFETY: the range lies inside the mapping, which starts on a page boundary and lives as
            // long as `self`; reading its pages in changes nothing that a program can see.
            let done = unsafe { rustix::mm::madvise(at, len + before, Advice::LinuxPopulateRead) };
            match done {
                Ok(()) => return Ok(()),
                Err(Errno::INTR | Errno::AGAIN) if retries < POPULATE_RETRIES_MAX => retries += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    unsafe fn lend(self: Arc<Self>, range: ByteRange) -> io::Result<LentBytes> {
        let (at, len) = self.place(range)?;
        Ok(Box::new(Lent {
            _map: self,
            at,
            len,
        }))
    }

    unsafe fn detach(&self, offset: u64, copy: &[u8]) -> io::Result<()> {
        let end = offset + copy.len() as u64;
        let range = ByteRange::new(offset, end).ok_or(io::ErrorKind::InvalidInput)?;
        let (target, len) = self.whole_pages(range)?;
        let fresh = Anonymous::new(len)?;
        fresh.fill(copy)?;
        // SAFETY: `target` is whole pages of this mapping, which `fresh` is to take the place of. The
        // kernel does that under its lock of the address space: every access sees the old pages or the
        // new ones, whose bytes are the same (the caller's promise), so no reference to them notices.
        // `fresh` is whole, ours, and not used again.
        let moved =
            unsafe { rustix::mm::mremap_fixed(fresh.at, len, len, MremapFlags::MAYMOVE, target) };
        match moved {
            Ok(_) => {
                std::mem::forget(fresh);
                Ok(())
            }
            Err(error) => {
                abort_on_hole(target, len);
                Err(error.into())
            }
        }
    }

    unsafe fn release(&self, range: ByteRange) -> io::Result<()> {
        let (at, len) = self.whole_pages(range)?;
        // SAFETY: whole pages of this mapping. Those of the file are mapped again when touched; those
        // that were detached become zeros, and the caller promises that nobody will look.
        Ok(unsafe { rustix::mm::madvise(at, len, Advice::LinuxDontNeed) }?)
    }
}

/// The kernel checks all but its own memory before it takes pages away, so that it fails with everything
/// in place. Should it ever not, readers of the hole would crash or read what is mapped there next.
fn abort_on_hole(at: *mut c_void, len: usize) {
    // SAFETY: asks for nothing to be done; pages that are not mapped are an error, not a fault.
    let mapped = unsafe { rustix::mm::msync(at, len, MsyncFlags::ASYNC) };
    if mapped.is_err() {
        tracing::error!("the kernel lost a part of a mapping that is being read; it cannot go on");
        std::process::abort();
    }
}

/// Bytes that [`MappedData::lend`] has lent.
struct Lent {
    _map: Arc<DataMap>,
    at: *mut u8,
    len: usize,
}

// SAFETY: it is a shared reference to bytes that nobody changes while it lives.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `at` and the `len` bytes after it lie inside the mapping (`DataMap::place`), which
        // `_map` keeps. They do not change and stay readable: whoever called `lend` has promised not to
        // write there or to shorten the file, and what is detached keeps its bytes and its address.
        unsafe { slice::from_raw_parts(self.at, self.len) }
    }
}

/// Fresh pages of our own.
struct Anonymous {
    at: *mut c_void,
    len: usize,
}

impl Anonymous {
    /// `len` is a number of whole pages.
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address, so nothing that is mapped is touched.
        let at = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        Ok(Self { at, len })
    }

    /// Writes `bytes` to its start, and protects it from writing.
    fn fill(&self, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len() <= self.len);
        // SAFETY: `len` bytes from `at` are ours alone and writable, and `bytes` cannot overlap them:
        // they have just been mapped.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.cast(), bytes.len());
            rustix::mm::mprotect(self.at, self.len, MprotectFlags::READ)?;
        }
        Ok(())
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: `len` bytes from `at` were mapped by `new` and nobody else has their address.
        if let Err(error) = unsafe { rustix::mm::munmap(self.at, self.len) } {
            tracing::warn!(%error, "memory could not be given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn mapped(len: usize) -> (File, Arc<DataMap>, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|at| (at / 7) as u8).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let map = Arc::new(DataMap::of(&file, range(0, len)).unwrap());
        (file, map, bytes)
    }

    fn range(start: usize, end: usize) -> ByteRange {
        ByteRange::new(start as u64, end as u64).unwrap()
    }

    #[test]
    fn lent_bytes_outlive_the_file_and_stay_when_they_are_detached_and_overwritten() {
        let page = rustix::param::page_size();
        let (file, map, bytes) = mapped(3 * page + 100);
        map.populate(range(5, 3 * page + 100)).unwrap();
        // SAFETY: below, only what has been detached is written to.
        let lend = |from, to| unsafe { Arc::clone(&map).lend(range(from, to)) }.unwrap();
        let (all, some) = (lend(0, 3 * page + 100), lend(page - 3, page + 3));
        // SAFETY: the copies are what is there.
        unsafe { map.detach(page as u64, &bytes[page..2 * page]) }.unwrap();
        // SAFETY: as above.
        unsafe { map.detach(3 * page as u64, &bytes[3 * page..]) }.unwrap();
        file.write_all_at(&vec![0xee; page], page as u64).unwrap();
        file.write_all_at(&[0xee; 100], 3 * page as u64).unwrap();
        drop(file);
        drop(map);
        assert!((*all).as_ref() == bytes);
        assert!((*some).as_ref() == &bytes[page - 3..page + 3]);
    }

    #[test]
    fn what_is_no_whole_page_or_past_the_end_is_refused() {
        let page = rustix::param::page_size();
        let (_file, map, bytes) = mapped(2 * page + 1);
        assert!(map.populate(range(0, 2 * page + 2)).is_err());
        // SAFETY: refused, so that nothing is detached or lent.
        unsafe {
            assert!(map.detach(1, &bytes[1..page]).is_err());
            assert!(map.detach(0, &bytes[..page - 1]).is_err());
            assert!(map.detach(0, &[]).is_err());
            assert!(map.release(range(0, 1)).is_err());
            assert!(Arc::clone(&map).lend(range(0, 2 * page + 2)).is_err());
        }
    }

    #[test]
    fn released_pages_are_mapped_again() {
        let page = rustix::param::page_size();
        let (_file, map, bytes) = mapped(2 * page);
        // SAFETY: nothing is lent or detached.
        unsafe { map.release(range(0, 2 * page)) }.unwrap();
        // SAFETY: nobody writes to the file.
        let lent = unsafe { Arc::clone(&map).lend(range(0, 2 * page)) }.unwrap();
        assert!((*lent).as_ref() == bytes);
    }

    #[test]
    fn a_file_cut_short_is_an_error_and_not_a_signal() {
        let page = rustix::param::page_size();
        let (file, map, _) = mapped(4 * page);
        file.set_len(page as u64).unwrap();
        assert!(map.populate(range(0, 4 * page)).is_err());
        map.populate(range(0, page)).unwrap();
    }
}
