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
//! 5. each window of a file has one lender at a time, which outlives the blob while anything is lent
//!    ([`Lending`]), so that whoever opens the blob again meets the same count.
//!
//! So a writer never waits for a reader, however slow that is, and a reader never sees a byte change.
//! What a detached group costs is a copy of it in memory until its readers are done.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use pantala_wire::layout::PIECE_SIZE_MAX;
use pantala_wire::{ByteRange, GROUP_SIZE};
use parking_lot::Mutex;

use super::data::{LentBytes, MappedData};
use crate::state::State;

/// Bytes of a file that are mapped at once, from a multiple of them on. No piece is larger, so none lies
/// in two windows. A window is mapped while something of it is lent, and then costs 128 KiB of page
/// tables at most; what it holds in memory is what is lent.
const WINDOW_BYTES: u64 = PIECE_SIZE_MAX;

/// Where `range` is mapped; `None` where it lies in two windows.
fn window_of(range: ByteRange, size: u64) -> Option<ByteRange> {
    let start = range.start() / WINDOW_BYTES * WINDOW_BYTES;
    let window = ByteRange::new(start, (start + WINDOW_BYTES).min(size))?;
    (range.end() <= window.end()).then_some(window)
}

/// The lenders of one data file, for all who have the blob open, one after the other.
#[derive(Debug)]
pub(crate) struct Lending {
    /// Of the blob.
    size: u64,
    /// By where their windows start.
    lenders: Mutex<HashMap<u64, Weak<Lender>>>,
}

impl Lending {
    pub(crate) fn new(size: u64) -> Arc<Self> {
        Arc::new(Self {
            size,
            lenders: Mutex::default(),
        })
    }

    /// The lender of what `range` lies in, made from what `map` yields where there is none; `None`
    /// where no one window holds all of it.
    pub(crate) fn lender(
        &self,
        range: ByteRange,
        map: impl FnOnce(ByteRange) -> io::Result<Arc<dyn MappedData>>,
    ) -> io::Result<Option<Arc<Lender>>> {
        let Some(window) = window_of(range, self.size) else {
            return Ok(None);
        };
        let mut lenders = self.lenders.lock();
        if let Some(lender) = lenders.get(&window.start()).and_then(Weak::upgrade) {
            return Ok(Some(lender));
        }
        let lender = Arc::new(Lender {
            map: map(window)?,
            window,
            groups: Mutex::default(),
            blob_is_open: AtomicBool::new(true),
        });
        lenders.retain(|_, lender| lender.strong_count() > 0);
        lenders.insert(window.start(), Arc::downgrade(&lender));
        Ok(Some(lender))
    }

    /// Makes the file free to be written in `range`: groups of one piece that the caller has the turn to
    /// write, and that are not readable. `read` fills a buffer with the file's bytes from an offset on.
    pub(crate) fn detach(
        &self,
        range: ByteRange,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let window = window_of(range, self.size).ok_or(io::ErrorKind::InvalidInput)?;
        // Without a lender nothing is lent, and none will be that is not readable.
        let lender = self
            .lenders
            .lock()
            .get(&window.start())
            .and_then(Weak::upgrade);
        lender.map_or(Ok(()), |lender| lender.detach(range, read))
    }

    /// Tells the lenders whether somebody has the blob open, and with it its file.
    pub(crate) fn set_open(&self, open: bool) {
        for lender in self.lenders.lock().values().filter_map(Weak::upgrade) {
            lender.blob_is_open.store(open, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Group {
    /// Loans that it is part of.
    loans: u32,
    /// Its place in the mapping shows a copy, and no longer the file.
    detached: bool,
}

/// Lends the bytes of one window of a data file.
pub(crate) struct Lender {
    map: Arc<dyn MappedData>,
    window: ByteRange,
    /// The groups that are lent or detached, by their number in the blob. A leaf among the locks.
    groups: Mutex<HashMap<u64, Group>>,
    /// What decides who unmaps: see [`Loan`]'s drop. Nothing else depends on it.
    blob_is_open: AtomicBool,
}

impl std::fmt::Debug for Lender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lender")
            .field("window", &self.window)
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

    /// See [`Lending::detach`].
    fn detach(
        &self,
        range: ByteRange,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut copy = Vec::new();
        for number in groups_of(range) {
            let is_lent = |group: &Group| group.loans > 0 && !group.detached;
            if !self.groups.lock().get(&number).is_some_and(is_lent) {
                continue;
            }
            let offset = number * GROUP_SIZE;
            copy.resize((self.window.end() - offset).min(GROUP_SIZE) as usize, 0);
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
        // What nobody reads any more, as one run after the other.
        let mut idle: Option<Range<u64>> = None;
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
            }
            match &mut idle {
                Some(run) if run.end == number => run.end += 1,
                _ => {
                    if let Some(run) = idle.replace(number..number + 1) {
                        self.release(run);
                    }
                }
            }
        }
        if let Some(run) = idle {
            self.release(run);
        }
    }

    /// Takes pages out of the process that nobody reads: mapped and idle they would count as its memory.
    /// The lock of the groups is held, so that nobody begins to read.
    fn release(&self, groups: Range<u64>) {
        let (start, end) = (groups.start * GROUP_SIZE, groups.end * GROUP_SIZE);
        let Some(range) = ByteRange::new(start, end.min(self.window.end())) else {
            return;
        };
        // SAFETY: nobody reads these groups any more, and `lend` does not lend what is detached.
        if let Err(error) = unsafe { self.map.release(range) } {
            tracing::debug!(%error, "pages stay mapped until all of their window are idle");
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
        if Arc::strong_count(&lender) > 1 || lender.blob_is_open.load(Ordering::Relaxed) {
            return;
        }
        // The blob was closed meanwhile, perhaps evicted: the kernel then deletes its bytes when the
        // last mapping goes, which can take long, and whoever drops a slice may be serving sockets.
        let name = "pantala-unmap".to_owned();
        if let Err(error) = std::thread::Builder::new()
            .name(name)
            .spawn(move || drop(lender))
        {
            tracing::debug!(%error, "a mapping was dropped where its last reader was");
        }
    }
}
