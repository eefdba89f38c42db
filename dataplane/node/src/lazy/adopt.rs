//! The start of a daemon whose mounts are there already.
//!
//! Order matters. [`Before::look`] reads the records and, where a supervisor lives, takes from it the
//! descriptors of the marked files: the store must not open those anew ([`Before::file_system`]) and not
//! evict them ([`Before::keep`]). Once the engine is there, [`Before::adopt`] takes up each mount; only
//! then the kernel's events are answered.
//!
//! A mount whose guard is not the one that the record names had a moment without any: its reads may have
//! given zeros, which the kernel may still have in memory. Such a mount is *poisoned*, and is taken out of
//! sight; its record stays until somebody unmounts it. One whose blobs were all complete needed no guard.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pantala_lazy::backend::erofs;
use pantala_lazy::backend::fanotify::{FanotifyBackend, kept_path};
use pantala_lazy::{Backend, MountSpec};
use pantala_source::Credential;
use pantala_store::HandedFileSystem;
use pantala_wire::BlobDigest;

use super::record::Record;
use super::{
    Lazy, LazyError, Mounted, MountedLayer, Settings, access_name, as_devices, is_mounted, record,
};
use crate::engine::{Shared, SourceAccess};

/// What was there before this daemon.
pub struct Before {
    settings: Settings,
    records: Vec<Record>,
    backend: Option<FanotifyBackend>,
    files: HashMap<PathBuf, File>,
    notes: HashMap<String, Vec<u8>>,
}

impl Before {
    /// Looks, and connects to the supervisor if it lives.
    ///
    /// # Errors
    /// Where records are there and cannot be listed, or the supervisor does not answer.
    pub async fn look(settings: Settings) -> Result<Self, LazyError> {
        let records = settings.records().read();
        let records = records.map_err(|error| LazyError::Disk(settings.dir.clone(), error))?;
        let mut before = Self {
            settings,
            records,
            backend: None,
            files: HashMap::new(),
            notes: HashMap::new(),
        };
        let fanotify = before.settings.fanotify();
        if FanotifyBackend::is_supervised(&fanotify.dir) {
            let (backend, kept) = FanotifyBackend::open(fanotify).await?;
            for kept in kept {
                match (kept_path(&kept.name), kept.descriptor) {
                    (Some(path), Some(descriptor)) => {
                        before.files.insert(path.to_owned(), descriptor.into());
                    }
                    _ => drop(before.notes.insert(kept.name, kept.note)),
                }
            }
            before.backend = Some(backend);
        }
        Ok(before)
    }

    /// The files that the store is to use.
    ///
    /// # Errors
    /// Where a descriptor cannot be copied.
    pub fn file_system(&self) -> Result<HandedFileSystem, LazyError> {
        let mut files = Vec::new();
        for (path, file) in &self.files {
            let copy = file.try_clone();
            let copy = copy.map_err(|error| LazyError::Disk(path.clone(), error))?;
            files.push((path.clone(), copy));
        }
        Ok(HandedFileSystem::new(files))
    }

    /// Blobs that are in use.
    pub fn keep(&self) -> Vec<BlobDigest> {
        let blobs = self.records.iter().flat_map(Record::blobs);
        blobs.map(|blob| blob.digest).collect()
    }

    /// Takes up what can be taken up, takes down what is poisoned, and begins to answer.
    ///
    /// # Errors
    /// Where the supervisor does not answer.
    pub async fn adopt(mut self, shared: Arc<Shared>) -> Result<Arc<Lazy>, LazyError> {
        let lazy = Arc::new(Lazy::new(self.settings.clone(), shared));
        let Some(backend) = self.backend.take() else {
            for record in std::mem::take(&mut self.records) {
                self.without_guard(&lazy, record).await?;
            }
            lazy.count();
            return Ok(lazy);
        };
        let backend = Arc::new(backend);
        let guard = record::hex(&backend.instance());
        let (guarded, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.records)
            .into_iter()
            .partition(|record| record.guard == guard && !record.poisoned);
        for record in guarded {
            self.take_up(&lazy, &backend, record).await?;
        }
        // Files that belong to no mount: their daemon died between mark and mount.
        for (path, file) in &self.files {
            let is_used = lazy.devices.lock().values().any(|device| {
                device
                    .upgrade()
                    .is_some_and(|d| d.blob().data_path() == path)
            });
            if !is_used {
                let file = file.try_clone();
                let file = file.map_err(|error| LazyError::Disk(path.clone(), error))?;
                backend.release(path, &file.into())?;
            }
        }
        backend.start().await?;
        if lazy.backend.set(backend).is_err() {
            tracing::debug!("a backend was there already");
        }
        for record in others {
            self.without_guard(&lazy, record).await?;
        }
        lazy.count();
        Ok(lazy)
    }

    async fn take_up(
        &self,
        lazy: &Lazy,
        backend: &FanotifyBackend,
        record: Record,
    ) -> Result<(), LazyError> {
        if !is_mounted(&record.at) {
            return self.gone(lazy, &record);
        }
        match self.layers(lazy, backend, &record).await {
            Ok(layers) => {
                tracing::info!(at = %record.at.display(), image = %record.image, "lazy mount taken up");
                let at = record.at.clone();
                lazy.mounts.lock().insert(at, Mounted { record, layers });
                Ok(())
            }
            Err(error) => {
                // Its reads are refused from now on, as those of a file that nobody adopted.
                tracing::error!(at = %record.at.display(), %error, "a lazy mount cannot be taken up");
                self.poison(lazy, record)
            }
        }
    }

    /// Opens the blobs of a mount, and has its devices watched.
    async fn layers(
        &self,
        lazy: &Lazy,
        backend: &FanotifyBackend,
        record: &Record,
    ) -> Result<Vec<MountedLayer>, LazyError> {
        let access = self.access(record)?;
        let mut layers = Vec::new();
        for (number, name) in record.layers.iter().enumerate() {
            let open = |digest: BlobDigest| {
                let store = lazy.shared.store.clone();
                crate::engine::blocking(move || store.open_existing(&digest))
            };
            let lost = |digest| LazyError::Metadata(digest, "the store has it no more".into());
            let metadata = open(name.metadata.digest).await?;
            let metadata = metadata.ok_or_else(|| lost(name.metadata.digest))?;
            let mut devices = Vec::new();
            for blob in &name.devices {
                // Not created: an empty file is not the one that is mounted.
                let there = open(blob.digest).await?.ok_or_else(|| lost(blob.digest))?;
                devices.push(lazy.device(blob, &access).await?);
                drop(there);
            }
            let at = lazy.layer_dir(record, number);
            backend
                .adopt(MountSpec {
                    metadata: metadata.data_path().to_owned(),
                    devices: as_devices(&devices),
                    at: at.clone(),
                })
                .await?;
            layers.push(MountedLayer {
                at,
                devices,
                _metadata: metadata,
            });
        }
        Ok(layers)
    }

    fn access(&self, record: &Record) -> Result<SourceAccess, LazyError> {
        let unusable = |why: String| LazyError::Upstream(record.image.clone(), why);
        let note = self.notes.get(&access_name(&record.at));
        Ok(SourceAccess {
            upstream: record
                .upstream
                .parse()
                .map_err(|e: pantala_source::UpstreamError| unusable(e.to_string()))?,
            repository: record
                .repository
                .parse()
                .map_err(|e: pantala_wire::name::NameError| unusable(e.to_string()))?,
            credential: note.map_or(Credential::ANONYMOUS, |note| credential(note)),
        })
    }

    /// A mount that nothing guards: good if it needs no guard.
    async fn without_guard(&self, lazy: &Lazy, record: Record) -> Result<(), LazyError> {
        if record.poisoned {
            let at = record.at.clone();
            let layers = Vec::new();
            lazy.mounts.lock().insert(at, Mounted { record, layers });
            return Ok(());
        }
        if !is_mounted(&record.at) {
            return self.gone(lazy, &record);
        }
        let complete: HashMap<BlobDigest, bool> = {
            let store = lazy.shared.store.clone();
            let stored = crate::engine::blocking(move || store.list()).await;
            stored.into_iter().map(|b| (b.digest, b.complete)).collect()
        };
        let needs_none = record
            .blobs()
            .all(|blob| complete.get(&blob.digest) == Some(&true));
        if needs_none {
            let backend = Arc::clone(lazy.backend().await?);
            let mut record = record;
            record.guard = record::hex(&backend.instance());
            return self.take_up(lazy, &backend, record).await;
        }
        self.poison(lazy, record)
    }

    /// Takes a mount out of sight that may have given zeros, and remembers that.
    fn poison(&self, lazy: &Lazy, mut record: Record) -> Result<(), LazyError> {
        tracing::error!(
            at = %record.at.display(),
            image = %record.image,
            "a lazy mount was left without its guard: it may have given zeros in place of data, and is taken down. \
             End what used it, run `pantala umount`, and mount it again"
        );
        let layers = (0..record.layers.len()).map(|number| lazy.layer_dir(&record, number));
        let mut dirs: Vec<PathBuf> = layers.collect();
        if dirs.len() > 1 {
            dirs.insert(0, record.at.clone());
        }
        for dir in dirs.iter().filter(|dir| is_mounted(dir)) {
            erofs::detach(dir)?;
        }
        for blob in record.blobs() {
            drop_cached(&lazy.shared, &blob.digest);
        }
        record.poisoned = true;
        let written = self.settings.records().write(&record);
        written.map_err(|error| LazyError::Disk(self.settings.dir.clone(), error))?;
        let (at, layers) = (record.at.clone(), Vec::new());
        lazy.mounts.lock().insert(at, Mounted { record, layers });
        Ok(())
    }

    /// The machine was started anew, or somebody has unmounted it.
    fn gone(&self, lazy: &Lazy, record: &Record) -> Result<(), LazyError> {
        tracing::info!(at = %record.at.display(), image = %record.image, "a lazy mount is gone");
        for number in 0..record.layers.len() {
            let dir = lazy.layer_dir(record, number);
            if is_mounted(&dir) {
                erofs::detach(&dir)?;
            }
        }
        let removed = self.settings.records().remove(&record.at);
        removed.map_err(|error| LazyError::Disk(self.settings.dir.clone(), error))
    }
}

/// Has the kernel forget what it has in memory of the blob's file. What it does not forget is read again
/// from the file, or is what the file holds: only the mount's own memory may be wrong.
fn drop_cached(shared: &Shared, digest: &BlobDigest) {
    let Ok(Some(blob)) = shared.store.open_existing(digest) else {
        return;
    };
    let dropped = blob
        .data_descriptor()
        .map(|file| rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed));
    if !matches!(dropped, Ok(Ok(()))) {
        tracing::debug!(%digest, ?dropped, "pages of the blob stay in memory");
    }
}

/// The credential of a kept `Authorization` value.
pub(super) fn credential(header: &[u8]) -> Credential {
    let text = std::str::from_utf8(header).unwrap_or_default();
    let login = text.strip_prefix("Basic ").and_then(|encoded| {
        let decoded = STANDARD.decode(encoded.trim()).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (user, password) = decoded.split_once(':')?;
        Some(Credential::login(user, password))
    });
    login.unwrap_or(Credential::ANONYMOUS)
}

/// Where the supervisor's program is, if the configuration does not say: beside this one.
pub fn default_supervisor(own: &Path) -> PathBuf {
    own.with_file_name("pantala-supervisor")
}
