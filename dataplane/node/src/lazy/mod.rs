//! Images mounted before their data has arrived.
//!
//! [`Lazy`] owns a node's lazy mounts: it asks the registry what an image consists of and whether the
//! caller may have it, fetches the metadata, and mounts; the data devices are blobs of the store, fetched
//! when they are touched ([`device`]). What it writes down ([`record`]) lets the next daemon take the
//! mounts up ([`adopt`]); credentials are not written down, the supervisor's process keeps them. A mount
//! outlives the daemon: it is taken down by [`Lazy::unmount`] only, or when it was found poisoned.

pub mod adopt;
pub mod device;
pub mod image;

pub mod operator;
pub mod record;
mod snapshots;
mod summary;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use pantala_lazy::backend::fanotify::{FanotifyBackend, FanotifyConfig};
use pantala_lazy::backend::{erofs, mountinfo};
use pantala_lazy::faults::Limits;
use pantala_lazy::{Backend, Device, MountError, MountSpec};
use pantala_source::{Credential, SourceError, Upstream};
use pantala_store::{Blob, StoreError};
use pantala_wire::name::{ImageReference, NameError};
use pantala_wire::{BlobDigest, ByteRange, Priority};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::engine::{ReadError, ReadRequest, Shared, SourceAccess, TaskState};
use device::BlobDevice;
use image::ImageError;
use record::{BlobName, LayerName, Record, Records};
pub(crate) use snapshots::SnapshotLayers;
pub use summary::MountSummary;

/// What lazy mounts are told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Their directory: records, the supervisor's socket, the layers of images with several.
    pub dir: PathBuf,
    /// The supervisor's program.
    pub supervisor: PathBuf,
    /// Fetch what nobody has touched, too.
    pub background_fill: bool,
    /// How long a read may wait for its bytes before it fails.
    pub fill_timeout: Duration,
    /// Registries by the host that image names have.
    pub registries: HashMap<String, String>,
}

impl Settings {
    fn fanotify(&self) -> FanotifyConfig {
        let mut limits = Limits::default();
        if !self.background_fill {
            limits.background_bytes = 0;
        }
        FanotifyConfig {
            dir: self.dir.join("supervisor"),
            supervisor: self.supervisor.clone(),
            limits,
        }
    }

    fn records(&self) -> Records {
        Records::new(self.dir.join("mounts"))
    }
}

/// Why an image was not mounted, or not unmounted.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// Its name is none.
    #[error("{0:?} is no image reference: {1}")]
    Name(String, NameError),
    /// Its registry cannot be asked.
    #[error("the registry of {0} cannot be asked: {1}")]
    Upstream(String, String),
    /// The directory cannot be mounted on.
    #[error("{0} is not an absolute path to a directory without links in it")]
    Directory(PathBuf),
    /// Something of ours is there, or about to be.
    #[error("{0} is a lazy mount already: unmount it first")]
    Taken(PathBuf),
    /// Nothing of ours is there.
    #[error("nothing is mounted lazily on {0}")]
    Unknown(PathBuf),
    /// The image cannot be mounted, or not by this caller.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registry does not give a blob of it to this caller.
    #[error("the registry does not give {0}: {1}")]
    Blob(BlobDigest, SourceError),
    /// The registry contradicts itself.
    #[error("the registry's {digest} has {got} bytes, and {named} in the manifest")]
    Size {
        /// The blob.
        digest: BlobDigest,
        /// What the registry says of it.
        got: u64,
        /// What the manifest says.
        named: u64,
    },
    /// Its metadata cannot be fetched.
    #[error("the metadata {0} cannot be fetched: {1}")]
    Metadata(BlobDigest, String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The kernel or the supervisor said no.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// What must be written down could not be.
    #[error("{0} cannot be used: {1}")]
    Disk(PathBuf, std::io::Error),
}

impl From<ReadError> for LazyError {
    fn from(error: ReadError) -> Self {
        Self::Upstream("the metadata".into(), error.to_string())
    }
}

/// One layer that is mounted.
struct MountedLayer {
    at: PathBuf,
    devices: Vec<Arc<BlobDevice>>,
    _metadata: Blob,
}

/// A mount that is there, or was found poisoned and has no layers.
struct Mounted {
    record: Record,
    layers: Vec<MountedLayer>,
}

/// A node's lazy mounts.
pub struct Lazy {
    settings: Settings,
    shared: Arc<Shared>,
    backend: OnceCell<Arc<FanotifyBackend>>,
    devices: Mutex<HashMap<BlobDigest, Weak<BlobDevice>>>,
    mounts: Mutex<BTreeMap<PathBuf, Mounted>>,
    /// Directories at which a mount or an unmount is under way.
    changing: Mutex<HashSet<PathBuf>>,
}

/// The right to change what is mounted on a directory.
struct Changing<'a>(&'a Lazy, PathBuf);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing.lock().remove(&self.1);
    }
}

/// What a mount is asked for with.
pub struct MountRequest {
    /// The image.
    pub image: String,
    /// The directory.
    pub at: PathBuf,
    /// In whose name the registry is asked.
    pub credential: Credential,
}

/// What is to be mounted where, once the registry has been asked.
struct Named {
    image: String,
    at: PathBuf,
    upstream: String,
    layers: Vec<LayerName>,
}

impl Lazy {
    fn new(settings: Settings, shared: Arc<Shared>) -> Self {
        Self {
            settings,
            shared,
            backend: OnceCell::new(),
            devices: Mutex::default(),
            mounts: Mutex::default(),
            changing: Mutex::default(),
        }
    }

    /// The backend; the first mount starts the supervisor.
    async fn backend(&self) -> Result<&Arc<FanotifyBackend>, MountError> {
        let open = || async {
            let (backend, kept) = FanotifyBackend::open(self.settings.fanotify()).await?;
            for (path, file) in pantala_lazy::backend::fanotify::kept_files(kept) {
                backend.release(&path, &file)?;
            }
            backend.start().await?;
            Ok(Arc::new(backend))
        };
        self.backend.get_or_try_init(open).await
    }

    fn change(&self, at: &Path) -> Result<Changing<'_>, LazyError> {
        match self.changing.lock().insert(at.to_owned()) {
            true => Ok(Changing(self, at.to_owned())),
            false => Err(LazyError::Taken(at.to_owned())),
        }
    }

    /// How the image is read, and its name's parts.
    fn access(
        &self,
        image: &str,
        credential: Credential,
    ) -> Result<(ImageReference, SourceAccess, String), LazyError> {
        let reference: ImageReference = image
            .parse()
            .map_err(|e| LazyError::Name(image.to_owned(), e))?;
        let host = &reference.registry;
        let url = match self.settings.registries.get(host) {
            Some(url) => url.clone(),
            None => crate::config::public_url(host)
                .map(String::from)
                .ok_or_else(|| LazyError::Upstream(image.into(), format!("{host} is no host")))?,
        };
        let access = SourceAccess {
            upstream: url
                .parse::<Upstream>()
                .map_err(|e| LazyError::Upstream(image.into(), e.to_string()))?,
            repository: reference.repository.clone(),
            credential,
        };
        Ok((reference, access, url))
    }

    /// Mounts an image. When this returns, every file of it can be read.
    ///
    /// # Errors
    /// [`LazyError`]; nothing is mounted then.
    pub async fn mount(&self, request: MountRequest) -> Result<MountSummary, LazyError> {
        let MountRequest {
            image,
            at,
            credential,
        } = request;
        check_directory(&at)?;
        let _changing = self.change(&at)?;
        if self.mounts.lock().contains_key(&at) {
            return Err(LazyError::Taken(at));
        }
        let note = access_note(&credential);
        let (reference, access, upstream) = self.access(&image, credential)?;
        let source = &self.shared.source;
        let layers = image::resolve(source, &access, &reference.reference).await?;
        self.check_blobs(&layers, &access).await?;
        let named = Named {
            image,
            at,
            upstream,
            layers,
        };
        self.mount_named(named, &access, &note).await
    }

    /// Mounts what the registry has been asked about. Needs the right to change what is there.
    async fn mount_named(
        &self,
        named: Named,
        access: &SourceAccess,
        note: &[u8],
    ) -> Result<MountSummary, LazyError> {
        let Named {
            image,
            at,
            upstream,
            layers,
        } = named;
        let backend = Arc::clone(self.backend().await?);
        let record = Record {
            image,
            at: at.clone(),
            upstream,
            repository: access.repository.to_string(),
            layers,
            guard: record::hex(&backend.instance()),
            poisoned: false,
        };
        let records = self.settings.records();
        let on_disk = |error| LazyError::Disk(self.settings.dir.clone(), error);
        // Before the mount: a daemon that dies in between leaves nothing that nobody knows of.
        records.write(&record).map_err(on_disk)?;
        backend.keep_note(&access_name(&at), note)?;
        match self.mount_layers(&backend, &record, access).await {
            Ok(layers) => {
                let mounted = Mounted { record, layers };
                let summary = mounted.summary();
                self.mounts.lock().insert(at, mounted);
                self.count();
                Ok(summary)
            }
            Err(error) => {
                backend.forget(&access_name(&at))?;
                records.remove(&at).map_err(on_disk)?;
                Err(error)
            }
        }
    }

    /// Each blob is the registry's to give: a manifest may name what its repository does not have.
    async fn check_blobs(
        &self,
        layers: &[LayerName],
        access: &SourceAccess,
    ) -> Result<(), LazyError> {
        let mut blobs: Vec<BlobName> = Vec::new();
        for layer in layers {
            blobs.extend(layer.devices.iter().cloned());
            blobs.push(layer.metadata.clone());
        }
        for blob in blobs {
            let SourceAccess {
                upstream,
                repository,
                credential,
            } = access;
            let source = &self.shared.source;
            let probe = source.probe_blob(upstream, repository, &blob.digest, credential);
            let info = probe
                .await
                .map_err(|error| LazyError::Blob(blob.digest, error))?;
            if info.size != blob.size_bytes {
                return Err(LazyError::Size {
                    digest: blob.digest,
                    got: info.size,
                    named: blob.size_bytes,
                });
            }
        }
        Ok(())
    }

    async fn mount_layers(
        &self,
        backend: &FanotifyBackend,
        record: &Record,
        access: &SourceAccess,
    ) -> Result<Vec<MountedLayer>, LazyError> {
        let mut mounted: Vec<MountedLayer> = Vec::new();
        for (number, name) in record.layers.iter().enumerate() {
            match self
                .mount_layer(backend, record, number, name, access)
                .await
            {
                Ok(layer) => mounted.push(layer),
                Err(error) => {
                    take_down(backend, &mounted).await;
                    return Err(error);
                }
            }
        }
        if mounted.len() > 1 {
            let lower: Vec<&Path> = mounted.iter().map(|layer| layer.at.as_path()).collect();
            if let Err(error) = erofs::mount_overlay(&lower, &record.at) {
                take_down(backend, &mounted).await;
                return Err(error.into());
            }
        }
        Ok(mounted)
    }

    async fn mount_layer(
        &self,
        backend: &FanotifyBackend,
        record: &Record,
        number: usize,
        name: &LayerName,
        access: &SourceAccess,
    ) -> Result<MountedLayer, LazyError> {
        let metadata = self.fetch_metadata(&name.metadata, access).await?;
        let mut devices = Vec::new();
        for blob in &name.devices {
            devices.push(self.device(blob, access).await?);
        }
        let at = self.layer_dir(record, number);
        if at != record.at {
            std::fs::create_dir_all(&at).map_err(|error| LazyError::Disk(at.clone(), error))?;
        }
        backend
            .mount(MountSpec {
                metadata: metadata.data_path().to_owned(),
                devices: as_devices(&devices),
                at: at.clone(),
            })
            .await?;
        Ok(MountedLayer {
            at,
            devices,
            _metadata: metadata,
        })
    }

    /// Where a layer is mounted: in place, if it is the only one.
    fn layer_dir(&self, record: &Record, number: usize) -> PathBuf {
        match record.layers.len() {
            1 => record.at.clone(),
            _ => {
                let dir = self.settings.dir.join("layers").join(record.id());
                dir.join(number.to_string())
            }
        }
    }

    /// The blob as a device; mounts that share a blob share the device.
    async fn device(
        &self,
        name: &BlobName,
        access: &SourceAccess,
    ) -> Result<Arc<BlobDevice>, LazyError> {
        let known = self
            .devices
            .lock()
            .get(&name.digest)
            .and_then(Weak::upgrade);
        if let Some(device) = known {
            device.set_access(access.clone());
            return Ok(device);
        }
        let (shared, blob) = (Arc::clone(&self.shared), name.clone());
        let opened =
            crate::engine::blocking(move || shared.open_blob(&blob.digest, blob.size_bytes));
        let device = BlobDevice::new(
            Arc::clone(&self.shared),
            opened.await?,
            Some(access.clone()),
            self.settings.fill_timeout,
        )?;
        let device = Arc::new(device);
        let mut devices = self.devices.lock();
        devices.retain(|_, device| device.strong_count() > 0);
        // Whoever made it at the same time was first.
        if let Some(known) = devices.get(&name.digest).and_then(Weak::upgrade) {
            return Ok(known);
        }
        devices.insert(name.digest, Arc::downgrade(&device));
        Ok(device)
    }

    /// Metadata is read by the kernel without asking: all of it is there, and right, before the mount.
    async fn fetch_metadata(
        &self,
        name: &BlobName,
        access: &SourceAccess,
    ) -> Result<Blob, LazyError> {
        let failed = |why: String| LazyError::Metadata(name.digest, why);
        let whole =
            ByteRange::new(0, name.size_bytes).ok_or_else(|| failed("it is empty".into()))?;
        let request = ReadRequest {
            range: whole,
            priority: Priority::Client,
            access: Some(access.clone()),
        };
        let mut bytes = self
            .shared
            .read(name.digest, name.size_bytes, request)
            .await?;
        while let Some(chunk) = bytes.next().await {
            chunk.map_err(|error| failed(error.to_string()))?;
        }
        let ended = self
            .shared
            .prefetch(name.digest, name.size_bytes, Some(access.clone()));
        match ended.await? {
            TaskState::Complete => {}
            other => return Err(failed(format!("it is not complete: {other:?}"))),
        }
        let (shared, blob) = (Arc::clone(&self.shared), name.clone());
        let blob = crate::engine::blocking(move || {
            let opened = shared.open_blob(&blob.digest, blob.size_bytes)?;
            opened.verify_range(whole)?;
            Ok::<_, StoreError>(opened)
        })
        .await?;
        match blob.is_complete() {
            true => Ok(blob),
            false => Err(failed("it was dropped meanwhile".into())),
        }
    }

    /// Takes a mount down.
    ///
    /// # Errors
    /// [`LazyError::Unknown`]; [`LazyError::Mount`] where somebody uses it.
    pub async fn unmount(&self, at: &Path) -> Result<(), LazyError> {
        let _changing = self.change(at)?;
        let (id, layers, is_overlay) = {
            let mounts = self.mounts.lock();
            let mounted = mounts
                .get(at)
                .ok_or_else(|| LazyError::Unknown(at.into()))?;
            let dirs: Vec<PathBuf> = mounted.layers.iter().map(|l| l.at.clone()).collect();
            (mounted.record.id(), dirs, mounted.layers.len() > 1)
        };
        if is_overlay && is_mounted(at) {
            let at = at.to_owned();
            crate::engine::blocking(move || erofs::unmount(&at)).await?;
        }
        // A poisoned one has no layers: it was taken down when it was found.
        if !layers.is_empty() {
            let backend = self.backend().await?;
            for layer in layers {
                match backend.unmount(&layer).await {
                    // Taken down by an earlier try, or by hand.
                    Err(MountError::NotMounted(_)) => {}
                    other => other?,
                }
            }
            backend.forget(&access_name(at))?;
        }
        let on_disk = |error| LazyError::Disk(self.settings.dir.clone(), error);
        self.settings.records().remove(at).map_err(on_disk)?;
        if is_overlay {
            let dir = self.settings.dir.join("layers").join(id);
            std::fs::remove_dir_all(&dir).map_err(on_disk)?;
        }
        self.mounts.lock().remove(at);
        self.count();
        Ok(())
    }

    /// All mounts, by their directories.
    pub fn list(&self) -> Vec<MountSummary> {
        self.mounts.lock().values().map(Mounted::summary).collect()
    }

    fn count(&self) {
        let count = self.mounts.lock().len();
        self.shared.metrics.lazy_mounts.set(count as i64);
    }
}

fn as_devices(devices: &[Arc<BlobDevice>]) -> Vec<Arc<dyn Device>> {
    let devices = devices.iter();
    devices.map(|d| Arc::clone(d) as Arc<dyn Device>).collect()
}

async fn take_down(backend: &FanotifyBackend, layers: &[MountedLayer]) {
    for layer in layers {
        if let Err(error) = backend.unmount(&layer.at).await {
            tracing::warn!(at = %layer.at.display(), %error, "a layer stays mounted");
        }
    }
}

/// A directory by its own name: records and the kernel's list must mean the same.
fn check_directory(at: &Path) -> Result<(), LazyError> {
    let is_own_name = at.is_absolute() && at.canonicalize().is_ok_and(|real| real == at);
    match is_own_name && at.is_dir() {
        true => Ok(()),
        false => Err(LazyError::Directory(at.to_owned())),
    }
}

fn is_mounted(at: &Path) -> bool {
    match mountinfo::mounts() {
        Ok(mounts) => mountinfo::mounted_at(&mounts, at).is_some(),
        Err(error) => {
            tracing::warn!(%error, "the kernel does not say what is mounted");
            true
        }
    }
}

/// Under which name the supervisor keeps in whose name the mount on `at` asks the registry.
fn access_name(at: &Path) -> String {
    format!("access:{}", record::id_of(at))
}

/// What it keeps: the login's header, or nothing.
fn access_note(credential: &Credential) -> Vec<u8> {
    let header = credential.basic_authorization();
    header.map_or_else(Vec::new, |header| header.as_bytes().to_vec())
}
