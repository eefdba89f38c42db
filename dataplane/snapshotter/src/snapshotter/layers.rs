//! Layers that are mounted, not unpacked; and how a snapshot's directories go.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Call, Snapshotter, now_unix_ns};
use crate::core::layer::{NYDUS_BOOTSTRAP_FILE, REF, is_layer};
use crate::core::{Change, Content, ImageSource, Kind, Labels, Mount, Snapshot, Tree, TreeError};
use crate::error::Error;
use crate::lazy::{LazyContent, LazyError, LazyLayer};

impl Snapshotter {
    /// Takes over a layer that containerd need not fetch: commits it and says that it exists. An EROFS
    /// layer is mounted first, so that a pull that succeeds has its metadata.
    pub(super) async fn adopt(
        &self,
        call: &Call,
        target: &str,
        content: Content,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let exists = || Err(Error::Tree(TreeError::AlreadyExists(target.to_owned())));
        let find = |tree: &Tree| tree.iter().any(|s| is_layer(s, target, parent));
        if find(&self.inner.tree.read()) {
            return exists();
        }
        let reserved = self.inner.reserve();
        let id = reserved.id;
        // containerd finds it by its label and parent; the name need only be nobody else's.
        let name = format!("lazy/{id}/{target}");
        let plan = |tree: &Tree, image: Option<ImageSource>| {
            if find(tree) {
                return Err(TreeError::AlreadyExists(target.to_owned()));
            }
            let now = now_unix_ns();
            match tree.plan_create(id, Kind::Active, &name, parent, labels.clone(), now)? {
                Change::Write(snapshot) => Ok(Change::Write(Snapshot {
                    kind: Kind::Committed,
                    image,
                    ..snapshot
                })),
                other => Ok(other),
            }
        };
        plan(&self.inner.tree.read(), None)?;
        let made = async {
            self.blocking(move |inner| inner.directories.create(id, Kind::View, None))
                .await?;
            let mut image = ImageSource::from_labels(&labels);
            if let Content::Erofs { metadata, .. } = &content {
                if image.is_none()
                    && let Some(images) = &self.inner.images
                {
                    image = images.of_layer(call, *metadata).await;
                }
                self.mount(id, &name, content, image.clone()).await?;
            }
            self.change(|tree| plan(tree, image.clone())).await
        };
        if let Err(error) = made.await {
            self.discard(id).await;
            return Err(error);
        }
        tracing::debug!(key, target, name, "lazy layer");
        exists()
    }

    /// The directories under `name`, nearest first, with the lazy ones mounted; `name`'s own are among
    /// them where `itself`.
    pub(super) async fn lowers(
        &self,
        call: &Call,
        name: &str,
        itself: bool,
    ) -> Result<Vec<PathBuf>, Error> {
        let chain: Vec<Snapshot> = {
            let tree = self.inner.tree.read();
            let own = itself.then(|| tree.get(name)).transpose()?;
            own.into_iter()
                .chain(tree.parents(name)?)
                .cloned()
                .collect()
        };
        let mut lowers = Vec::with_capacity(chain.len());
        for layer in chain {
            let id = layer.id;
            match Content::of(&layer.labels)? {
                Content::Files => lowers.push(self.inner.directories.fs(id)),
                Content::Data => {}
                content @ (Content::Erofs { .. } | Content::Nydus) => {
                    let image = self.image_of(call, &layer).await?;
                    lowers.push(self.mount(id, &layer.name, content, image).await?);
                }
            }
        }
        Ok(lowers)
    }

    /// The image that a lazy layer was pulled with; remembered once it is known.
    async fn image_of(&self, call: &Call, layer: &Snapshot) -> Result<Option<ImageSource>, Error> {
        if layer.image.is_some() {
            return Ok(layer.image.clone());
        }
        let mut image = ImageSource::from_labels(&layer.labels);
        if image.is_none()
            && let (Some(images), Some(target)) = (&self.inner.images, layer.labels.get(REF))
        {
            image = images.of_chain(call, target).await;
        }
        if image.is_some() {
            let set = |tree: &Tree| {
                Ok(Change::Write(Snapshot {
                    image: image.clone(),
                    ..tree.get(&layer.name)?.clone()
                }))
            };
            self.change(set).await?;
        }
        Ok(image)
    }

    async fn mount(
        &self,
        id: u64,
        name: &str,
        content: Content,
        image: Option<ImageSource>,
    ) -> Result<PathBuf, Error> {
        let Some(lazy) = self.inner.lazy.clone() else {
            return Err(Error::NoLazyMounts(name.to_owned()));
        };
        let at = self
            .blocking(move |inner| inner.directories.create_lazy(id))
            .await?;
        let content = match content {
            Content::Erofs { metadata, devices } => LazyContent::Erofs { metadata, devices },
            Content::Nydus => LazyContent::Nydus {
                bootstrap: self
                    .blocking(move |inner| inner.directories.file_of(id, NYDUS_BOOTSTRAP_FILE))
                    .await?,
            },
            Content::Files | Content::Data => return Ok(at),
        };
        let turn = self.mounting(id);
        let _turn = turn.lock().await;
        let layer = LazyLayer {
            content,
            image,
            at: at.clone(),
        };
        match lazy.mount(layer).await {
            Ok(()) => Ok(at),
            Err(source) => Err(Error::Lazy {
                name: name.to_owned(),
                source,
            }),
        }
    }

    /// Unmounts and removes the directories of a snapshot that has no record. What fails is logged and
    /// stays for the next cleanup: containerd has been told already that the snapshot is gone.
    pub(super) async fn discard(&self, id: u64) {
        if let Err(error) = self.try_discard(id).await {
            tracing::warn!(id, %error, "a removed snapshot's files stay until the next cleanup");
        }
        self.inner.mounting.lock().remove(&id);
    }

    async fn try_discard(&self, id: u64) -> Result<(), Error> {
        let has_lazy = self
            .blocking(move |inner| Ok(inner.directories.has_lazy(id)))
            .await?;
        if has_lazy && let Some(lazy) = &self.inner.lazy {
            let at = self.inner.directories.lazy(id);
            let turn = self.mounting(id);
            let _turn = turn.lock().await;
            let name = || at.display().to_string();
            lazy.unmount(&at).await.map_err(|source| Error::Lazy {
                name: name(),
                source,
            })?;
        }
        self.blocking(move |inner| inner.directories.remove(id))
            .await
    }

    fn mounting(&self, id: u64) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(self.inner.mounting.lock().entry(id).or_default())
    }
}

impl LazyError {
    /// Whether the same call may succeed later.
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}
