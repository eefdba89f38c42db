//! A disk in memory that fails and crashes as disks do.
//!
//! Faults modelled:
//! - an operation fails with "no space" or "input/output error", before it does anything or, for a
//!   write, after a part of it;
//! - from a chosen operation on, everything fails: the machine has crashed. What was written and not
//!   synced then survives or not, write by write and sector by sector, in any order; so do the
//!   creation and removal of names in directories that were not synced;
//! - a sync fails: what it should have made durable never will be, and may vanish from the page
//!   cache at once;
//! - bytes rot on the disk;
//! - a file cannot be mapped, or its pages not be read in.
//!
//! It also watches over what is lent: a write to bytes that somebody reads where they lie, and a copy put
//! in their place that is not the same, end the test.
//!
//! Not modelled: a disk that lies about a sync that it says has worked.

mod mapping;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use pantala_store::{FileSystem, LentBytes, LockError, MappedData, MappedFile, StoreFile};
use pantala_wire::ByteRange;

use super::Rng;
use mapping::{SimData, SimMap, span};

const SECTOR: usize = 512;

#[derive(Clone)]
enum Name {
    Dir,
    File(usize),
}

#[derive(Default)]
struct Inode {
    /// What reads see.
    cache: Vec<u8>,
    /// What a crash leaves.
    disk: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
}

/// Bytes lent by a mapping.
struct Loan {
    inode: usize,
    map: usize,
    range: Range<usize>,
    /// What its reader sees.
    bytes: Vec<u8>,
}

/// What is in both ranges; empty, and inside `b`, where nothing is.
fn both(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.clamp(b.start, b.end);
    start..a.end.clamp(start, b.end)
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    !both(a, b).is_empty()
}

struct World {
    rng: Rng,
    names: BTreeMap<PathBuf, Name>,
    durable_names: BTreeMap<PathBuf, Name>,
    inodes: Vec<Inode>,
    loans: BTreeMap<usize, Loan>,
    /// Of each mapping, where it shows copies.
    detached: Vec<Vec<Range<usize>>>,
    loan_count: usize,
    operations: u64,
    crash_at: Option<u64>,
    /// Per 10,000 operations.
    fault_rate: u64,
    fail_syncs: bool,
    full: bool,
    capacity: Option<u64>,
    locked: bool,
}

/// The disk; clones share it.
#[derive(Clone)]
pub(crate) struct SimFs(Arc<Mutex<World>>);

fn failed(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl World {
    /// Counts an operation, and fails where it is to fail.
    fn step(&mut self) -> io::Result<()> {
        self.operations += 1;
        if self.crash_at.is_some_and(|at| self.operations > at) {
            return Err(failed(EIO));
        }
        if self.fault_rate > 0 && self.rng.below(10_000) < self.fault_rate {
            return Err(failed(EIO));
        }
        Ok(())
    }

    fn is_crashed(&self) -> bool {
        self.crash_at.is_some_and(|at| self.operations > at)
    }

    /// Ends the test where somebody reads what is about to change.
    fn check_readers(&self, inode: usize, range: &Range<usize>) {
        for loan in self.loans.values().filter(|loan| loan.inode == inode) {
            let mut at = loan.range.start.max(range.start);
            let end = loan.range.end.min(range.end);
            // Detached ranges do not overlap: each leads on to the next.
            while at < end {
                let detached = self.detached[loan.map].iter().find(|d| d.contains(&at));
                at = detached
                    .unwrap_or_else(|| panic!("byte {at} was written to under its reader"))
                    .end;
            }
        }
    }

    /// The disk has changed bytes behind everybody's back: whoever reads them where they lie sees it.
    fn show_readers(&mut self, inode: usize) {
        for loan in self.loans.values_mut().filter(|loan| loan.inode == inode) {
            let start = loan.range.start;
            let mut shown = self.inodes[inode].cache[loan.range.clone()].to_vec();
            for copied in &self.detached[loan.map] {
                let same = both(copied, &loan.range);
                let same = same.start - start..same.end - start;
                shown[same.clone()].copy_from_slice(&loan.bytes[same]);
            }
            loan.bytes = shown;
        }
    }

    fn used(&self) -> u64 {
        let files = self.names.values().map(|name| match name {
            Name::Dir => 0,
            Name::File(inode) => self.inodes[*inode].cache.len() as u64,
        });
        files.sum()
    }
}

impl SimFs {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(World {
            rng: Rng(seed ^ 0x5117),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            inodes: Vec::new(),
            loans: BTreeMap::new(),
            detached: Vec::new(),
            loan_count: 0,
            operations: 0,
            crash_at: None,
            fault_rate: 0,
            fail_syncs: false,
            full: false,
            capacity: None,
            locked: false,
        })))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The machine will crash after so many more operations.
    pub(crate) fn crash_in(&self, operations: u64) {
        let mut world = self.world();
        world.crash_at = Some(world.operations + operations);
    }
    pub(crate) fn is_crashed(&self) -> bool {
        self.world().is_crashed()
    }
    /// So many of 10,000 operations fail.
    pub(crate) fn set_fault_rate(&self, rate: u64) {
        self.world().fault_rate = rate;
    }
    /// Every sync fails and its bytes vanish from the cache, or works again.
    pub(crate) fn set_fail_syncs(&self, fail: bool) {
        self.world().fail_syncs = fail;
    }
    /// Every write and allocation fails with "no space", or works again.
    pub(crate) fn set_full(&self, full: bool) {
        self.world().full = full;
    }
    /// Bytes of files that the disk can hold.
    pub(crate) fn set_capacity(&self, bytes: u64) {
        self.world().capacity = Some(bytes);
    }
    /// Paths of all files.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let world = self.world();
        let files = world.names.iter();
        files
            .filter(|(_, name)| matches!(name, Name::File(_)))
            .map(|(path, _)| path.clone())
            .collect()
    }

    /// Flips some bits of a file, on the disk and in the cache.
    pub(crate) fn rot(&self, path: &Path, rng: &mut Rng) {
        let mut world = self.world();
        let Some(Name::File(number)) = world.names.get(path).cloned() else {
            return;
        };
        let inode = &mut world.inodes[number];
        for _ in 0..=rng.below(3) {
            if inode.cache.is_empty() {
                return;
            }
            let at = rng.below(inode.cache.len() as u64) as usize;
            let bit = 1 << rng.below(8);
            inode.cache[at] ^= bit;
            inode.disk[at] ^= bit;
        }
        world.show_readers(number);
    }

    /// Ends the crash: what reads see is what the disk kept. Everything that has the files open
    /// must be gone.
    pub(crate) fn restart(&self) {
        let mut world = self.world();
        world.crash_at = None;
        world.fault_rate = 0;
        world.full = false;
        assert!(!world.locked, "the store outlived the crash");
        let World {
            rng,
            names,
            durable_names,
            inodes,
            ..
        } = &mut *world;
        let paths: BTreeSet<PathBuf> = names.keys().chain(durable_names.keys()).cloned().collect();
        let mut left: BTreeMap<PathBuf, Name> = BTreeMap::new();
        for path in paths {
            // A name that was not synced is there or not; each by itself.
            let chosen = match (names.get(&path), durable_names.get(&path)) {
                (Some(Name::File(new)), Some(Name::File(old))) if new == old => {
                    Some(Name::File(*new))
                }
                (Some(Name::Dir), Some(Name::Dir)) => Some(Name::Dir),
                (new, old) => if rng.chance(50) { new } else { old }.cloned(),
            };
            let parent_left = path.parent().is_none_or(|parent| {
                parent.as_os_str().is_empty()
                    || parent == Path::new("/")
                    || left.contains_key(parent)
            });
            if let Some(name) = chosen.filter(|_| parent_left) {
                left.insert(path, name);
            }
        }
        for inode in inodes.iter_mut() {
            for (offset, bytes) in std::mem::take(&mut inode.pending) {
                for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                    let at = offset + index * SECTOR;
                    if rng.chance(50) && at + sector.len() <= inode.disk.len() {
                        // A sector is torn now and then, too.
                        let len = if rng.chance(5) {
                            rng.below(sector.len() as u64 + 1) as usize
                        } else {
                            sector.len()
                        };
                        inode.disk[at..at + len].copy_from_slice(&sector[..len]);
                    }
                }
            }
            inode.cache = inode.disk.clone();
        }
        *names = left.clone();
        *durable_names = left;
    }
}

impl FileSystem for SimFs {
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        for dir in dir.ancestors() {
            if dir != Path::new("/") && !dir.as_os_str().is_empty() {
                world.names.entry(dir.to_owned()).or_insert(Name::Dir);
            }
        }
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        let mut world = self.world();
        world.step()?;
        if world.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if !world.names.contains_key(path.parent().unwrap()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        world.inodes.push(Inode::default());
        let inode = world.inodes.len() - 1;
        world.names.insert(path.to_owned(), Name::File(inode));
        Ok(Arc::new(SimFile(self.clone(), inode)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StoreFile>> {
        let mut world = self.world();
        world.step()?;
        match world.names.get(path) {
            Some(Name::File(inode)) => Ok(Arc::new(SimFile(self.clone(), *inode))),
            Some(Name::Dir) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let mut world = self.world();
        world.step()?;
        if !matches!(world.names.get(dir), Some(Name::Dir)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let children = world.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(children
            .map(|path| path.file_name().unwrap().to_owned())
            .collect())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        match world.names.remove(path) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        if world.names.keys().any(|path| path.parent() == Some(dir)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        match world.names.remove(dir) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.step()?;
        let World {
            names,
            durable_names,
            ..
        } = &mut *world;
        durable_names.retain(|path, _| path.parent() != Some(dir) || names.contains_key(path));
        for (path, name) in names.iter().filter(|(path, _)| path.parent() == Some(dir)) {
            durable_names.insert(path.clone(), name.clone());
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn Send + Sync>, LockError> {
        let mut world = self.world();
        world.step()?;
        if world.locked {
            return Err(LockError::Held { pid: None });
        }
        world.locked = true;
        // The root of the store was there before the test began.
        let dir = path.parent().unwrap().to_owned();
        for dir in dir.ancestors().filter(|dir| dir.parent().is_some()) {
            world.durable_names.insert(dir.to_owned(), Name::Dir);
        }
        Ok(Box::new(SimLock(self.clone())))
    }
}

struct SimLock(SimFs);

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.world().locked = false;
    }
}

struct SimFile(SimFs, usize);

impl StoreFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        let mut world = self.0.world();
        world.step()?;
        Ok(world.inodes[self.1].cache.len() as u64)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let mut world = self.0.world();
        world.step()?;
        if world.full
            || world
                .capacity
                .is_some_and(|bytes| world.used() + len > bytes)
        {
            return Err(failed(ENOSPC));
        }
        let inode = &mut world.inodes[self.1];
        inode.cache.resize(len as usize, 0);
        // Lengths reach the disk at some time before the crash; a test of their loss cuts files.
        inode.disk.resize(len as usize, 0);
        Ok(())
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut world = self.0.world();
        world.step()?;
        let start = offset as usize;
        let bytes = world.inodes[self.1].cache.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut world = self.0.world();
        let start = offset as usize;
        world.check_readers(self.1, &(start..start + bytes.len()));
        let mut result = world.step();
        if result.is_ok() && world.full {
            result = Err(failed(ENOSPC));
        }
        // A write that fails may have done a part of its work.
        let done = match result {
            Ok(()) => bytes.len(),
            Err(_) => world.rng.below(bytes.len() as u64 + 1) as usize,
        };
        let inode = &mut world.inodes[self.1];
        assert!(
            start + bytes.len() <= inode.cache.len(),
            "a write past the end"
        );
        inode.cache[start..start + done].copy_from_slice(&bytes[..done]);
        inode.pending.push((start, bytes[..done].to_vec()));
        result
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.0.world();
        let mut result = world.step();
        if world.is_crashed() {
            return result;
        }
        let mut vanish = world.rng.chance(50);
        if world.fail_syncs {
            (result, vanish) = (Err(failed(EIO)), true);
        }
        let inode = &mut world.inodes[self.1];
        let pending = std::mem::take(&mut inode.pending);
        if result.is_ok() {
            inode.disk.copy_from_slice(&inode.cache);
        } else if vanish {
            for (start, bytes) in pending {
                let end = start + bytes.len();
                inode.cache[start..end].copy_from_slice(&inode.disk[start..end]);
            }
            world.show_readers(self.1);
        }
        result
    }

    fn map(&self) -> io::Result<Box<dyn MappedFile>> {
        self.0.world().step()?;
        Ok(Box::new(SimMap(self.0.clone(), self.1)))
    }

    fn map_data(&self, range: ByteRange) -> io::Result<Arc<dyn MappedData>> {
        let mut world = self.0.world();
        world.step()?;
        world.detached.push(Vec::new());
        Ok(Arc::new(SimData {
            fs: self.0.clone(),
            inode: self.1,
            map: world.detached.len() - 1,
            mapped: span(range),
        }))
    }
}
