//! Who reads which bytes of a blob's data where they lie, and what that forbids to its writers.
//!
//! The rule that makes references to mapped bytes sound: **no byte of a file changes at an address that
//! is lent.** It holds because
//!
//! 1. bytes are lent while the blob's state is locked and says that they are readable, and are counted,
//!    group by group, under that lock ([`Lender::lend`]);
//! 2. a writer first makes the groups it is about to write unreadable, under the same lock, so that
//!    from then on none of them is lent; only then does it look at the count ([`Lender::detach`]), and
//!    where somebody still reads, it puts a copy in the place of the mapped bytes;
//! 3. a group that was detached is not lent again from this mapping;
//! 4. all writes to a data file go through `Blob::write_in_piece`, which does that, and no two groups
//!    share a page;
//! 5. a file has one lender at a time, which outlives the blob while anything is lent ([`Lending`]), so
//!    that whoever opens the blob again meets the same count.
//!
//! So a writer never waits for a reader, however slow that is, and a reader never sees a byte change.
//! What a detached group costs is a copy of it in memory until its readers are done.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use pantala_wire::{ByteRange, GROUP_SIZE};
use parking_lot::Mutex;

use super::data::{LentBytes, MappedData};
use crate::state::State;

/// Address space that all data files of a store may be mapped into; blobs past it are copied. An eighth
/// of what a process has on the smallest 64-bit machines, and more than most disks hold.
const MAPPED_BYTES_MAX: u64 = 16 << 40;

/// Address space taken, over all blobs of a store.
#[derive(Debug, Default)]
pub(crate) struct AddressSpace(AtomicU64);

/// A part of it, given back when dropped.
struct Reserved(Arc<AddressSpace>, u64);

impl AddressSpace {
    fn reserve(self: &Arc<Self>, bytes: u64) -> io::Result<Reserved> {
        let fits = |used: u64| {
            used.checked_add(bytes)
                .filter(|sum| *sum <= MAPPED_BYTES_MAX)
        };
        match self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
        {
            Ok(_) => Ok(Reserved(Arc::clone(self), bytes)),
            Err(_) => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.0.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// The lender of one data file, for all who have the blob open, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Lending(Mutex<Weak<Lender>>);

impl Lending {
    /// The lender, if there is one: without it, nothing is lent.
    pub(crate) fn current(&self) -> Option<Arc<Lender>> {
        self.0.lock().upgrade()
    }

    /// The lender, made from what `map` yields where there is none.
    pub(crate) fn get_or_map(
        &self,
        size: u64,
        space: &Arc<AddressSpace>,
        map: impl FnOnce() -> io::Result<Arc<dyn MappedData>>,
    ) -> io::Result<Arc<Lender>> {
        let mut current = self.0.lock();
        if let Some(lender) = current.upgrade() {
            return Ok(lender);
        }
        let reserved = space.reserve(size)?;
        let lender = Arc::new(Lender {
            map: map()?,
            size,
            groups: Mutex::default(),
            _reserved: reserved,
        });
        *current = Arc::downgrade(&lender);
        Ok(lender)
    }
}

#[derive(Default)]
struct Group {
    /// Loans that it is part of.
    loans: u32,
    /// Its place in the mapping shows a copy, and no longer the file.
    detached: bool,
}

/// Lends the bytes of one mapped data file.
pub(crate) struct Lender {
    map: Arc<dyn MappedData>,
    size: u64,
    /// The groups that are lent or detached, by their number in the blob. A leaf among the locks.
    groups: Mutex<HashMap<u64, Group>>,
    _reserved: Reserved,
}

impl std::fmt::Debug for Lender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lender")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// The groups that `range` touches, by their number in the blob.
fn groups_of(range: ByteRange) -> Range<u64> {
    range.start() / GROUP_SIZE..range.end().div_ceil(GROUP_SIZE)
}

impl Lender {
    /// Takes the right to read `range`, which is readable in `state`; `None` where a part of it is
    /// detached and has to be read otherwise. The caller holds the lock of `state`.
    pub(crate) fn lend(self: &Arc<Self>, state: &State, range: ByteRange) -> Option<Loan> {
        if state.readable_to(range.start(), range.end()) < range.end() {
            return None;
        }
        let mut groups = self.groups.lock();
        let is_detached = |group| groups.get(&group).is_some_and(|group| group.detached);
        if groups_of(range).any(is_detached) {
            return None;
        }
        for group in groups_of(range) {
            groups.entry(group).or_default().loans += 1;
        }
        Some(Loan {
            lender: Some(Arc::clone(self)),
            range,
            bytes: None,
        })
    }

    /// Makes the file free to be written in `groups`. The caller has the turn to write them, and they
    /// are not readable. `read` fills a buffer with the file's bytes from an offset on.
    pub(crate) fn detach(
        &self,
        groups: Range<u64>,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut copy = Vec::new();
        for number in groups {
            let is_lent = |group: &Group| group.loans > 0 && !group.detached;
            if !self.groups.lock().get(&number).is_some_and(is_lent) {
                continue;
            }
            let offset = number * GROUP_SIZE;
            copy.resize((self.size - offset).min(GROUP_SIZE) as usize, 0);
            read(&mut copy, offset)?;
            let mut groups = self.groups.lock();
            // Its readers may be done by now, and then nobody may look at it again.
            if let Some(group) = groups.get_mut(&number).filter(|group| is_lent(group)) {
                // SAFETY: `copy` is what the file holds, and the caller alone may write there, and is
                // here.
                unsafe { self.map.detach(offset, &copy) }?;
                group.detached = true;
            }
        }
        Ok(())
    }

    fn give_back(&self, range: ByteRange) {
        let mut groups = self.groups.lock();
        for number in groups_of(range) {
            let Some(group) = groups.get_mut(&number) else {
                continue;
            };
            group.loans -= 1;
            if group.loans > 0 {
                continue;
            }
            if !group.detached {
                groups.remove(&number);
                continue;
            }
            let start = number * GROUP_SIZE;
            let Some(range) = ByteRange::new(start, (start + GROUP_SIZE).min(self.size)) else {
                continue;
            };
            // SAFETY: nobody reads the group any more, and `lend` does not lend what is detached.
            if let Err(error) = unsafe { self.map.release(range) } {
                tracing::debug!(%error, "the memory of a copy is kept until its blob is closed");
            }
        }
    }
}

/// The right to read a range of a file where it lies.
pub(crate) struct Loan {
    /// Always there but while it is dropped.
    lender: Option<Arc<Lender>>,
    range: ByteRange,
    bytes: Option<LentBytes>,
}

impl Loan {
    /// Reads the pages in. What cannot be read is an error.
    pub(crate) fn into_bytes(mut self) -> io::Result<Bytes> {
        let lender = self.lender.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let map = &lender.map;
        map.populate(self.range)?;
        // SAFETY: the range is counted as lent until `self` is dropped, after `bytes`; nobody writes to
        // what is lent without detaching it first (the module's rule), and the store shortens no file.
        self.bytes = Some(unsafe { Arc::clone(map).lend(self.range) }?);
        Ok(Bytes::from_owner(self))
    }
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref().map_or(&[], |bytes| (**bytes).as_ref())
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.bytes = None;
        let Some(lender) = self.lender.take() else {
            return;
        };
        lender.give_back(self.range);
        if Arc::strong_count(&lender) > 1 {
            return;
        }
        // The blob was closed meanwhile, perhaps evicted: the kernel then deletes its bytes when the
        // mapping goes, which can take long, and whoever drops a slice may be serving sockets.
        let name = "pantala-unmap".to_owned();
        if let Err(error) = std::thread::Builder::new()
            .name(name)
            .spawn(move || drop(lender))
        {
            tracing::debug!(%error, "a mapping was dropped where its last reader was");
        }
    }
}
