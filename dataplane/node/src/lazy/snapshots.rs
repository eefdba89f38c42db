//! Lazy layers of containerd's images: what the snapshotter asks for, mounted by the node.
//!
//! containerd keeps its callers' credentials to itself, so the registry is asked in nobody's name: a
//! private image is refused by its registry.

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use pantala_snapshotter::core::ImageSource;
use pantala_snapshotter::{LazyContent, LazyError as Refusal, LazyLayer, LazyLayers};
use pantala_source::Credential;
use pantala_wire::BlobDigest;

use super::record::{BlobName, LayerName};
use super::{Lazy, LazyError, Named, SourceAccess, access_note};

/// The node's lazy mounts, for the snapshotter.
pub(crate) struct SnapshotLayers(Arc<Lazy>);

impl SnapshotLayers {
    /// Over these.
    pub(crate) const fn new(lazy: Arc<Lazy>) -> Self {
        Self(lazy)
    }

    async fn mount_now(&self, layer: LazyLayer) -> Result<(), Refusal> {
        let lazy = &self.0;
        let is_poisoned = lazy
            .mounts
            .lock()
            .get(&layer.at)
            .map(|mounted| mounted.record.poisoned);
        match is_poisoned {
            Some(false) => return Ok(()),
            // It was taken down when it was found; what its record names is mounted anew.
            Some(true) => lazy.unmount(&layer.at).await.map_err(|e| refusal(&e))?,
            None => {}
        }
        let LazyContent::Erofs { metadata, devices } = layer.content else {
            return Err(Refusal::Impossible(
                "the node does not mount nydus images yet: convert it to EROFS layers".into(),
            ));
        };
        let Some(source) = layer.image else {
            return Err(Refusal::Impossible(
                "nobody says which image the layer belongs to: set disable_snapshot_annotations = false for CRI, and snapshotter.containerd to containerd's socket".into(),
            ));
        };
        lazy.mount_layer_of(&source, metadata, devices, &layer.at)
            .await
            .map_err(|error| refusal(&error))
    }

    async fn unmount_now(&self, at: &Path) -> Result<(), Refusal> {
        match self.0.unmount(at).await {
            Ok(()) | Err(LazyError::Unknown(_)) => Ok(()),
            Err(error) => Err(refusal(&error)),
        }
    }
}

/// Whether trying again may help is for a person to see in the text: containerd does not try again.
fn refusal(error: &LazyError) -> Refusal {
    match error {
        LazyError::Name(..) | LazyError::Directory(_) | LazyError::Size { .. } => {
            Refusal::Impossible(error.to_string())
        }
        _ => Refusal::Unavailable(error.to_string()),
    }
}

impl LazyLayers for SnapshotLayers {
    fn mount(&self, layer: LazyLayer) -> BoxFuture<'_, Result<(), Refusal>> {
        Box::pin(self.mount_now(layer))
    }

    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), Refusal>> {
        Box::pin(self.unmount_now(at))
    }
}

impl Lazy {
    /// Mounts one layer, known by its blobs, of an image of `source`.
    async fn mount_layer_of(
        &self,
        source: &ImageSource,
        metadata: BlobDigest,
        devices: Vec<BlobDigest>,
        at: &Path,
    ) -> Result<(), LazyError> {
        super::check_directory(at)?;
        let _changing = self.change(at)?;
        let registry = self.registry_called(&source.registry);
        let image = format!("{registry}/{}", source.repository);
        let credential = Credential::ANONYMOUS;
        let note = access_note(&credential);
        let (_, access, upstream) = self.access(&image, credential)?;
        let mut names = Vec::new();
        for device in devices {
            names.push(self.blob_name(device, &access).await?);
        }
        let layers = vec![LayerName {
            metadata: self.blob_name(metadata, &access).await?,
            devices: names,
        }];
        let named = Named {
            image,
            at: at.to_owned(),
            upstream,
            layers,
        };
        self.mount_named(named, &access, &note).await?;
        Ok(())
    }

    /// The registry's answer says both that the caller may have the blob, and its length.
    async fn blob_name(
        &self,
        digest: BlobDigest,
        access: &SourceAccess,
    ) -> Result<BlobName, LazyError> {
        let probe = self.shared.source.probe_blob(
            &access.upstream,
            &access.repository,
            &digest,
            &access.credential,
        );
        let info = probe
            .await
            .map_err(|error| LazyError::Blob(digest, error))?;
        Ok(BlobName {
            digest,
            size_bytes: info.size,
        })
    }

    /// The host of image names that is meant: containerd's content store keeps no port.
    fn registry_called(&self, host: &str) -> String {
        let registries = &self.settings.registries;
        if registries.contains_key(host) || host.contains(':') {
            return host.to_owned();
        }
        let mut with_port = registries
            .keys()
            .filter(|known| known.rsplit_once(':').is_some_and(|(name, _)| name == host));
        match (with_port.next(), with_port.next()) {
            (Some(only), None) => only.clone(),
            _ => host.to_owned(),
        }
    }
}
