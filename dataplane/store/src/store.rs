//! The store: its directory, its lock, its limit, and the opening of blobs.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use pantala_wire::{BlobDigest, PieceLayout};
use rustix::io::Errno;

use crate::blob::Blob;
use crate::error::StoreError;
use crate::file::{Files, Found, Unusable, allocated_bytes};
use crate::fs::{FileSystem, LockError, OsFileSystem};
use crate::map::lend::Lending;
use crate::meta::Header;
use crate::place::{Place, blobs_dir};
use crate::registry::{Entry, Registry, Slot};
use crate::state::State;

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

    pub(crate) fn low_bytes(&self) -> u64 {
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
pub struct Store(pub(crate) Arc<StoreInner>);

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.0.config).finish()
    }
}

pub(crate) struct StoreInner {
    pub(crate) config: StoreConfig,
    pub(crate) fs: Arc<dyn FileSystem>,
    pub(crate) registry: Mutex<Registry>,
    /// A slot has changed, or bytes were freed.
    pub(crate) changed: Condvar,
    _lock: Box<dyn Send + Sync>,
}

pub(crate) type Reg<'a> = MutexGuard<'a, Registry>;

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
        Self::open_keeping(config, fs, &[])
    }

    /// As [`Self::open_on`], but does not evict the blobs `keep`: somebody uses them before this process
    /// has opened them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_keeping(
        config: StoreConfig,
        fs: Arc<dyn FileSystem>,
        keep: &[BlobDigest],
    ) -> Result<Self, StoreError> {
        if !(1..=100).contains(&config.low_watermark_percent) {
            return Err(StoreError::Config(
                "the low watermark must be 1 to 100 percent",
            ));
        }
        let blobs = blobs_dir(&config.dir);
        fs.create_dirs(&blobs)
            .map_err(|e| StoreError::io("create the directory", &blobs, e))?;
        for dir in blobs.ancestors().skip(1).take(2) {
            fs.sync_dir(dir)
                .map_err(|e| StoreError::io("sync the directory", dir, e))?;
        }
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
            let mut victims = reg.victims(reg.used_bytes(), inner.config.low_bytes());
            victims.retain(|digest| !keep.contains(digest));
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

    /// Whether the store has anything of the blob.
    pub fn contains(&self, digest: &BlobDigest) -> bool {
        self.0.registry.lock().entries.contains_key(digest)
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
                    open.extend(weak.upgrade().map(|inner| (summaries.len(), inner)));
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
}

impl StoreInner {
    /// Unlinks `victims`, which nobody has open, and takes them out of the registry.
    pub(crate) fn evict(
        &self,
        reg: &mut Reg<'_>,
        victims: &[BlobDigest],
    ) -> Result<(), StoreError> {
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
    pub(crate) fn give_up(&self, reg: &mut Reg<'_>, digest: &BlobDigest) {
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
        lending: Lending::new(files.header.layout().blob_size()),
    }
}

/// Why an unusable blob is dropped. What says nothing about the blob itself (no rights, no file
/// descriptors left) drops nothing, it is the caller's error.
pub(crate) fn dropped_because(unusable: Unusable) -> Result<String, StoreError> {
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
