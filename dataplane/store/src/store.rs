//! The store: its directory, its lock, its limit, and the opening of blobs.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use pantala_wire::{BlobDigest, PieceLayout};
use rustix::io::Errno;

use crate::blob::{Blob, Inner};
use crate::error::StoreError;
use crate::file::{Files, Found, Unusable, allocated_bytes};
use crate::fs::{FileSystem, LockError, OsFileSystem};
use crate::meta::Header;
use crate::place::{Place, blobs_dir};
use crate::registry::{Entry, Registry, Room, Slot};
use crate::state::State;

/// How often a full disk is answered by evicting and trying again. Each time frees at least what is
/// needed; more often than this, others fill the disk faster than the store empties it.
const DISK_FULL_RETRIES_MAX: u32 = 3;

/// Where a store is and how large it may grow.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Its directory; created where absent.
    pub dir: PathBuf,
    /// Bytes that all blobs and their metadata may take on the disk, preallocated ones included.
    pub limit_bytes: u64,
    /// Once the limit is reached, blobs are evicted until this share of it is in use: 1 to 100.
    pub low_watermark_percent: u8,
}

impl StoreConfig {
    /// Share of the limit that eviction falls back to: room for some blobs, so that not every new
    /// one has to wait for an eviction.
    pub const LOW_WATERMARK_PERCENT_DEFAULT: u8 = 90;

    /// A store in `dir` of at most `limit_bytes`.
    pub fn new(dir: impl Into<PathBuf>, limit_bytes: u64) -> Self {
        Self {
            dir: dir.into(),
            limit_bytes,
            low_watermark_percent: Self::LOW_WATERMARK_PERCENT_DEFAULT,
        }
    }

    fn low_bytes(&self) -> u64 {
        let share = u128::from(self.limit_bytes) * u128::from(self.low_watermark_percent) / 100;
        share as u64
    }
}

/// What the store knows of a blob without opening it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobSummary {
    /// The blob.
    pub digest: BlobDigest,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it is all there and its sha256 has been verified.
    pub complete: bool,
    /// How many pieces are held.
    pub held_pieces: u32,
    /// Orders blobs by their last use: the smaller was used longer ago. Not a time.
    pub last_access: u64,
}

/// All blobs of a node. Clones share one store.
#[derive(Clone)]
pub struct Store(Arc<StoreInner>);

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.0.config).finish()
    }
}

pub(crate) struct StoreInner {
    config: StoreConfig,
    pub(crate) fs: Arc<dyn FileSystem>,
    registry: Mutex<Registry>,
    /// A slot has changed, or bytes were freed.
    changed: Condvar,
    _lock: Box<dyn Send + Sync>,
}

type Reg<'a> = MutexGuard<'a, Registry>;

impl Store {
    /// Opens the store in `config.dir`: takes its lock, finds its blobs, drops those that are
    /// damaged, and evicts what is over the limit.
    ///
    /// # Errors
    /// [`StoreError::Locked`] where another process has it, [`StoreError::Config`], or
    /// [`StoreError::Io`] where the directory cannot be used.
    pub fn open(config: StoreConfig) -> Result<Self, StoreError> {
        Self::open_on(config, Arc::new(OsFileSystem))
    }

    /// As [`Self::open`], on another file system than the operating system's.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(config: StoreConfig, fs: Arc<dyn FileSystem>) -> Result<Self, StoreError> {
        if !(1..=100).contains(&config.low_watermark_percent) {
            return Err(StoreError::Config(
                "the low watermark must be 1 to 100 percent",
            ));
        }
        let blobs = blobs_dir(&config.dir);
        fs.create_dirs(&blobs)
            .map_err(|e| StoreError::io("create the directory", &blobs, e))?;
        let lock_path = config.dir.join("lock");
        let lock = fs.lock(&lock_path).map_err(|error| match error {
            LockError::Held { pid } => StoreError::Locked {
                dir: config.dir.clone(),
                pid,
            },
            LockError::Io(e) => StoreError::io("lock", &lock_path, e),
        })?;
        let inner = StoreInner {
            fs,
            registry: Mutex::default(),
            changed: Condvar::new(),
            config,
            _lock: lock,
        };
        inner.find_blobs()?;
        let mut reg = inner.registry.lock();
        if reg.used_bytes() > inner.config.limit_bytes {
            let victims = reg.victims(reg.used_bytes(), inner.config.low_bytes());
            inner.evict(&mut reg, &victims)?;
        }
        drop(reg);
        Ok(Self(Arc::new(inner)))
    }

    /// Opens the blob, or creates it with room for all its bytes, evicting others where needed.
    ///
    /// # Errors
    /// [`StoreError::Full`] and [`StoreError::DiskFull`] where there is no room,
    /// [`StoreError::WrongSize`] where the store knows it with another size and is sure or using it,
    /// [`StoreError::Layout`] above the size handled, [`StoreError::Io`].
    pub fn create(&self, digest: &BlobDigest, size: u64) -> Result<Blob, StoreError> {
        let header = Header::new(*digest, PieceLayout::new(size)?);
        loop {
            if let Some(blob) = self.open_found(digest, Some(size))? {
                return Ok(blob);
            }
            if let Some(blob) = self.create_absent(header)? {
                return Ok(blob);
            }
        }
    }

    /// Opens the blob where the store has it.
    ///
    /// # Errors
    /// [`StoreError::Io`]. A damaged blob is dropped, and absent.
    pub fn open_existing(&self, digest: &BlobDigest) -> Result<Option<Blob>, StoreError> {
        self.open_found(digest, None)
    }

    /// Every blob of the store, in no order.
    pub fn list(&self) -> Vec<BlobSummary> {
        // Closing a blob takes the registry's lock: these must outlive the guard.
        let mut open = Vec::new();
        let reg = self.0.registry.lock();
        let mut summaries: Vec<BlobSummary> = Vec::with_capacity(reg.entries.len());
        for (digest, entry) in &reg.entries {
            match &entry.slot {
                Slot::Removing { .. } => continue,
                Slot::Open(weak) => {
                    open.extend(weak.upgrade().map(|inner| (summaries.len(), inner)))
                }
                Slot::Idle(_) | Slot::Opening => {}
            }
            summaries.push(BlobSummary {
                digest: *digest,
                size: entry.size,
                complete: entry.complete,
                held_pieces: entry.held_count,
                last_access: entry.last_access,
            });
        }
        drop(reg);
        for (index, inner) in &open {
            let state = inner.state.lock();
            summaries[*index].complete = state.complete;
            summaries[*index].held_pieces = state.held.len();
        }
        summaries
    }

    /// Bytes that all blobs take on the disk, preallocated ones included.
    pub fn usage_bytes(&self) -> u64 {
        self.0.registry.lock().used_bytes()
    }

    /// The limit that was configured.
    pub fn limit_bytes(&self) -> u64 {
        self.0.config.limit_bytes
    }

    /// Forgets the blob; true if it was there. Whoever has it open keeps reading and writing what
    /// no longer has a name.
    ///
    /// # Errors
    /// [`StoreError::Io`] where it cannot be unlinked.
    pub fn remove(&self, digest: &BlobDigest) -> Result<bool, StoreError> {
        let mut reg = self.0.registry.lock();
        loop {
            let Some(entry) = reg.entries.get_mut(digest) else {
                return Ok(false);
            };
            let open = match &entry.slot {
                Slot::Opening | Slot::Removing { .. } => {
                    self.0.changed.wait(&mut reg);
                    continue;
                }
                Slot::Open(_) => true,
                Slot::Idle(_) => false,
            };
            let before = std::mem::replace(&mut entry.slot, Slot::Removing { open });
            let result = MutexGuard::unlocked(&mut reg, || self.0.unlink(digest));
            self.0.removed(&mut reg, digest, before, result.is_ok());
            return result.map(|()| true);
        }
    }

    fn open_found(
        &self,
        digest: &BlobDigest,
        size: Option<u64>,
    ) -> Result<Option<Blob>, StoreError> {
        let mut reg = self.0.registry.lock();
        loop {
            let access = reg.next_access();
            let Some(entry) = reg.entries.get_mut(digest) else {
                return Ok(None);
            };
            let right_size = size.is_none_or(|size| size == entry.size);
            let wrong_size = StoreError::WrongSize {
                digest: *digest,
                stored_bytes: entry.size,
                asked_bytes: size.unwrap_or(entry.size),
            };
            match &mut entry.slot {
                Slot::Open(weak) => {
                    if let Some(inner) = weak.upgrade() {
                        entry.last_access = access;
                        drop(reg);
                        return right_size.then(|| Some(Blob(inner))).ok_or(wrong_size);
                    }
                    // Its last user is on the way to say so.
                    self.0.changed.wait(&mut reg);
                }
                Slot::Opening | Slot::Removing { .. } => self.0.changed.wait(&mut reg),
                Slot::Idle(_) if !right_size && entry.complete => return Err(wrong_size),
                Slot::Idle(parked) if right_size => {
                    let parked = parked.take();
                    entry.slot = Slot::Opening;
                    entry.last_access = access;
                    let incarnation = entry.incarnation;
                    let opened = MutexGuard::unlocked(&mut reg, || {
                        let guard = OpeningGuard(&self.0, digest);
                        let opened = self.load(digest, parked, incarnation);
                        std::mem::forget(guard);
                        opened
                    });
                    let unusable = match opened {
                        Ok(inner) => return Ok(Some(self.opened(&mut reg, digest, inner))),
                        Err(unusable) => unusable,
                    };
                    match dropped_because(unusable) {
                        Ok(why) => {
                            tracing::warn!(blob = %digest, why, "a stored blob is damaged; it is dropped and fetched again");
                            self.0.evict(&mut reg, &[*digest])?;
                        }
                        Err(error) => {
                            self.0.give_up(&mut reg, digest);
                            return Err(error);
                        }
                    }
                }
                // Nobody has verified what is there, nor uses it: the newer word counts.
                Slot::Idle(_) => {
                    tracing::warn!(%wrong_size, "an incomplete blob is dropped");
                    self.0.evict(&mut reg, &[*digest])?;
                }
            }
        }
    }

    fn opened(&self, reg: &mut Reg<'_>, digest: &BlobDigest, inner: Arc<Inner>) -> Blob {
        if let Some(entry) = reg.entries.get_mut(digest) {
            entry.slot = Slot::Open(Arc::downgrade(&inner));
        }
        self.0.changed.notify_all();
        Blob(inner)
    }

    fn load(
        &self,
        digest: &BlobDigest,
        parked: Option<Box<State>>,
        incarnation: u64,
    ) -> Result<Arc<Inner>, Unusable> {
        let place = Place::of(&self.0.config.dir, digest);
        let (files, Found { head, mut durable }) = Files::open(self.0.fs.as_ref(), place)?;
        let state = match parked {
            Some(parked) => {
                for piece in durable.clone().iter() {
                    if !parked.held.contains(piece) {
                        durable.remove(piece);
                    }
                }
                *parked
            }
            None => {
                files.check_records(&mut durable);
                let complete = head.sealed && durable.is_full();
                State::new(*head.header.layout(), durable.clone(), complete)
            }
        };
        if head.sealed && !state.complete {
            // It must not count for the pieces that will be fetched now.
            files.write_seal(false)?;
        }
        Ok(Inner::new(
            self.0.clone(),
            files,
            incarnation,
            state,
            durable,
        ))
    }

    /// Creates a blob that the store does not have; `None` where the caller has to look again.
    fn create_absent(&self, header: Header) -> Result<Option<Blob>, StoreError> {
        let needed_bytes = allocated_bytes(&header);
        let limit_bytes = self.0.config.limit_bytes;
        let mut reg = self.0.registry.lock();
        if reg.entries.contains_key(header.digest()) {
            return Ok(None);
        }
        match reg.reserve(needed_bytes, limit_bytes, self.0.config.low_bytes()) {
            Room::Reserved => {}
            Room::Evict(victims) => {
                self.0.evict(&mut reg, &victims)?;
                return Ok(None);
            }
            Room::Wait => {
                self.0.changed.wait(&mut reg);
                return Ok(None);
            }
            Room::Full { pinned_bytes } => {
                return Err(StoreError::Full {
                    needed_bytes,
                    limit_bytes,
                    pinned_bytes,
                });
            }
        }
        let incarnation = reg.next_incarnation();
        let entry = Entry {
            size: header.layout().blob_size(),
            allocated_bytes: needed_bytes,
            complete: false,
            held_count: 0,
            last_access: reg.next_access(),
            slot: Slot::Opening,
            incarnation,
        };
        reg.entries.insert(*header.digest(), entry);
        drop(reg);
        let guard = OpeningGuard(&self.0, header.digest());
        let created = self.create_files(header, needed_bytes);
        std::mem::forget(guard);
        match created {
            Ok(files) => {
                let count = header.layout().piece_count();
                let none = pantala_wire::PieceSet::empty(count);
                let state = State::new(*header.layout(), none.clone(), false);
                let inner = Inner::new(self.0.clone(), files, incarnation, state, none);
                let mut reg = self.0.registry.lock();
                Ok(Some(self.opened(&mut reg, header.digest(), inner)))
            }
            Err(error) => {
                let mut reg = self.0.registry.lock();
                if let Err(error) = self.0.evict(&mut reg, &[*header.digest()]) {
                    tracing::warn!(blob = %header.digest(), %error, "a half-made blob stays until it is opened or evicted");
                }
                Err(error)
            }
        }
    }

    fn create_files(&self, header: Header, needed_bytes: u64) -> Result<Files, StoreError> {
        let fs = self.0.fs.as_ref();
        let place = Place::of(&self.0.config.dir, header.digest());
        let mut retries = 0;
        loop {
            // A removal that failed half-way may have left something.
            place
                .remove(fs)
                .map_err(|e| StoreError::io("remove", &place.dir, e))?;
            match Files::create(fs, place.clone(), header) {
                Err(StoreError::DiskFull { path }) if retries < DISK_FULL_RETRIES_MAX => {
                    retries += 1;
                    let mut reg = self.0.registry.lock();
                    let used = reg.used_bytes();
                    let victims = reg.victims(used, used.saturating_sub(needed_bytes));
                    if victims.is_empty() {
                        return Err(StoreError::DiskFull { path });
                    }
                    tracing::warn!(count = victims.len(), path = %path.display(), "the disk is full below the store's limit; blobs are evicted");
                    self.0.evict(&mut reg, &victims)?;
                }
                other => return other,
            }
        }
    }
}

impl StoreInner {
    /// Unlinks `victims`, which nobody has open, and takes them out of the registry.
    fn evict(&self, reg: &mut Reg<'_>, victims: &[BlobDigest]) -> Result<(), StoreError> {
        for digest in victims {
            if let Some(entry) = reg.entries.get_mut(digest) {
                entry.slot = Slot::Removing { open: false };
            }
        }
        let mut failed = Ok(());
        for digest in victims {
            let result = MutexGuard::unlocked(reg, || self.unlink(digest));
            self.removed(reg, digest, Slot::Idle(None), result.is_ok());
            if result.is_err() {
                failed = result;
            }
        }
        failed
    }

    fn unlink(&self, digest: &BlobDigest) -> Result<(), StoreError> {
        let place = Place::of(&self.config.dir, digest);
        place
            .remove(self.fs.as_ref())
            .map_err(|e| StoreError::io("remove", &place.dir, e))?;
        tracing::debug!(blob = %digest, "removed from the store");
        Ok(())
    }

    fn removed(&self, reg: &mut Reg<'_>, digest: &BlobDigest, before: Slot, unlinked: bool) {
        let Some(entry) = reg.entries.get_mut(digest) else {
            return;
        };
        let still_open = matches!(entry.slot, Slot::Removing { open: true });
        match (unlinked, still_open) {
            (true, true) => reg.detach(digest),
            (true, false) => reg.take_out(digest),
            (false, true) => entry.slot = before,
            (false, false) => entry.slot = Slot::Idle(None),
        }
        self.changed.notify_all();
    }

    /// A blob that was being opened is left as it is.
    fn give_up(&self, reg: &mut Reg<'_>, digest: &BlobDigest) {
        if let Some(entry) = reg.entries.get_mut(digest) {
            entry.slot = Slot::Idle(None);
        }
        self.changed.notify_all();
    }

    /// The last user of a blob is gone.
    pub(crate) fn close(&self, digest: &BlobDigest, incarnation: u64, state: State) {
        self.registry.lock().close(digest, incarnation, state);
        self.changed.notify_all();
    }

    pub(crate) fn next_access(&self) -> u64 {
        self.registry.lock().next_access()
    }

    fn find_blobs(&self) -> Result<(), StoreError> {
        let root = blobs_dir(&self.config.dir);
        let list = |dir: &std::path::Path| {
            self.fs
                .list(dir)
                .map_err(|e| StoreError::io("list", dir, e))
        };
        let mut reg = self.registry.lock();
        for prefix in list(&root)? {
            let dir = root.join(&prefix);
            // What is no directory is not the store's.
            let Ok(names) = self.fs.list(&dir) else {
                continue;
            };
            for name in names {
                let Some(digest) = name
                    .to_str()
                    .and_then(|hex| format!("sha256:{hex}").parse::<BlobDigest>().ok())
                else {
                    continue;
                };
                let place = Place::of(&self.config.dir, &digest);
                if place.dir.parent() != Some(dir.as_path()) {
                    continue;
                }
                match Files::open(self.fs.as_ref(), place) {
                    Ok((files, found)) => reg.add_found(digest, found_entry(&files, &found)),
                    Err(unusable) => {
                        let why = dropped_because(unusable)?;
                        tracing::warn!(blob = %digest, why, "a stored blob is damaged; it is dropped and fetched again");
                        self.unlink(&digest)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn found_entry(files: &Files, found: &Found) -> Entry {
    Entry {
        size: files.header.layout().blob_size(),
        allocated_bytes: allocated_bytes(&files.header),
        complete: found.head.sealed && found.durable.is_full(),
        held_count: found.durable.len(),
        last_access: found.head.last_access,
        slot: Slot::Idle(None),
        incarnation: 0,
    }
}

/// Why an unusable blob is dropped. What says nothing about the blob itself (no rights, no file
/// descriptors left) drops nothing, it is the caller's error.
fn dropped_because(unusable: Unusable) -> Result<String, StoreError> {
    use std::io::ErrorKind;
    match unusable {
        Unusable::Store(StoreError::Io { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::NotFound
                    | ErrorKind::UnexpectedEof
                    | ErrorKind::IsADirectory
                    | ErrorKind::NotADirectory
            ) || is_damage(&source) =>
        {
            Ok(source.to_string())
        }
        Unusable::Store(error) => Err(error),
        other => Ok(other.to_string()),
    }
}

/// Whether the error says that the disk has lost what was there.
pub(crate) fn is_damage(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::UnexpectedEof
        || [Errno::IO, Errno::BADMSG, Errno::LOOP]
            .contains(&Errno::from_io_error(error).unwrap_or(Errno::OPNOTSUPP))
}

/// Gives up the right to open or create a blob if that panics: others wait for it.
struct OpeningGuard<'a>(&'a StoreInner, &'a BlobDigest);

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        self.0.give_up(&mut self.0.registry.lock(), self.1);
    }
}
