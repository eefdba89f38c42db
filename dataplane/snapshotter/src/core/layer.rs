//! What a layer is, from its labels.
//!
//! containerd hands a layer's annotations that begin with `containerd.io/snapshot/` on as labels of
//! its snapshot, and the chain ID that it shall be committed under as `containerd.io/snapshot.ref`. CRI
//! adds which image and which layer it is. That is all a snapshotter learns of a layer before its
//! bytes are fetched.

pub use pantala_lazy::format::manifest::{
    EROFS_DEVICES, EROFS_IS_DATA as EROFS_DATA, EROFS_IS_METADATA as EROFS_METADATA,
};
use pantala_wire::BlobDigest;
use pantala_wire::name::ImageReference;
use serde::{Deserialize, Serialize};

use super::snapshot::{Labels, Snapshot};

/// The chain ID that the snapshot will be committed under: set while an image is unpacked only.
pub const REF: &str = "containerd.io/snapshot.ref";
/// On a layer that is a nydus blob: `true`.
pub const NYDUS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// On a layer that holds a nydus bootstrap: `true`.
pub const NYDUS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// The image that CRI is pulling.
pub const CRI_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// Where nydus' tools put the bootstrap within its layer.
pub const NYDUS_BOOTSTRAP_FILE: &str = "image/image.boot";

/// Devices of one image: their digests must fit into one label of 4,096 bytes.
pub const DEVICES_MAX: usize = 50;

/// Why labels make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// A label that must be one or more digests is not.
    #[error(
        "the label {label} is no list of at most {DEVICES_MAX} digests: convert the image again"
    )]
    Digests {
        /// Which label.
        label: &'static str,
    },
    /// Labels that exclude each other.
    #[error("the layer is said to be {0} and {1} at once: convert the image again")]
    Contradiction(&'static str, &'static str),
}

/// What a layer holds, and so what is done for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Files, which containerd unpacks into the snapshot.
    Files,
    /// The bytes of another layer's device: nothing is unpacked and nothing mounted.
    Data,
    /// An EROFS image without its data: mounted, never downloaded by containerd.
    Erofs {
        /// The image with all metadata.
        metadata: BlobDigest,
        /// Its devices, in their order.
        devices: Vec<BlobDigest>,
    },
    /// A nydus bootstrap, which containerd unpacks; what it describes is mounted.
    Nydus,
}

/// Where an image's blobs are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// The registry's host, as in image names; without its port where containerd's content store was
    /// asked, which keeps none.
    pub registry: String,
    /// The repository.
    pub repository: String,
}

impl Content {
    /// What a layer with these labels is.
    ///
    /// # Errors
    /// Where labels are malformed or contradict each other.
    pub fn of(labels: &Labels) -> Result<Self, LayerError> {
        let is_true = |label| labels.get(label).is_some_and(|value| value == "true");
        let mut found: Vec<(&'static str, Self)> = Vec::new();
        if let Some(metadata) = labels.get(EROFS_METADATA) {
            let metadata = digest(EROFS_METADATA, metadata)?;
            let devices = match labels.get(EROFS_DEVICES) {
                Some(list) => digests(EROFS_DEVICES, list)?,
                None => Vec::new(),
            };
            found.push(("EROFS metadata", Self::Erofs { metadata, devices }));
        }
        if let Some(data) = labels.get(EROFS_DATA) {
            digest(EROFS_DATA, data)?;
            found.push(("EROFS data", Self::Data));
        }
        if is_true(NYDUS_BLOB) {
            found.push(("a nydus blob", Self::Data));
        }
        if is_true(NYDUS_BOOTSTRAP) {
            found.push(("a nydus bootstrap", Self::Nydus));
        }
        if let [(one, _), (other, _), ..] = found.as_slice() {
            return Err(LayerError::Contradiction(one, other));
        }
        Ok(found.pop().map_or(Self::Files, |(_, content)| content))
    }

    /// Whether containerd can be told that the layer is there before it has fetched it.
    pub const fn needs_no_download(&self) -> bool {
        matches!(self, Self::Data | Self::Erofs { .. })
    }
}

impl ImageSource {
    /// From the image reference that CRI puts into the labels.
    pub fn from_labels(labels: &Labels) -> Option<Self> {
        let image: ImageReference = labels.get(CRI_IMAGE)?.parse().ok()?;
        Some(Self {
            registry: image.registry,
            repository: image.repository.as_str().to_owned(),
        })
    }
}

/// Whether `snapshot` is the committed layer that containerd looks for by `target` over `parent`.
pub fn is_layer(snapshot: &Snapshot, target: &str, parent: Option<&str>) -> bool {
    snapshot.kind == super::Kind::Committed
        && snapshot.parent.as_deref() == parent
        && snapshot
            .labels
            .get(REF)
            .is_some_and(|label| label == target)
}

fn digest(label: &'static str, text: &str) -> Result<BlobDigest, LayerError> {
    text.parse().map_err(|_| LayerError::Digests { label })
}

fn digests(label: &'static str, list: &str) -> Result<Vec<BlobDigest>, LayerError> {
    let digests: Vec<_> = list
        .split(',')
        .map(|text| digest(label, text))
        .collect::<Result<_, _>>()?;
    if digests.len() > DEVICES_MAX {
        return Err(LayerError::Digests { label });
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn sha256(fill: u8) -> String {
        BlobDigest::new([fill; 32]).to_string()
    }

    #[test]
    fn ordinary_layers_have_no_labels_of_ours() {
        for set in [
            labels(&[]),
            labels(&[(REF, &sha256(1)), (NYDUS_BLOB, "false")]),
        ] {
            assert_eq!(Content::of(&set), Ok(Content::Files));
        }
    }

    #[test]
    fn an_erofs_layer_names_itself_and_its_devices() {
        let devices = format!("{},{}", sha256(2), sha256(3));
        let set = labels(&[(EROFS_METADATA, &sha256(1)), (EROFS_DEVICES, &devices)]);
        let content = Content::of(&set).unwrap();
        assert!(content.needs_no_download());
        assert_eq!(
            content,
            Content::Erofs {
                metadata: BlobDigest::new([1; 32]),
                devices: vec![BlobDigest::new([2; 32]), BlobDigest::new([3; 32])],
            }
        );
    }

    #[test]
    fn nydus_blobs_are_skipped_and_bootstraps_are_not() {
        let blob = Content::of(&labels(&[(NYDUS_BLOB, "true")])).unwrap();
        assert_eq!((blob.needs_no_download(), blob), (true, Content::Data));
        let bootstrap = Content::of(&labels(&[(NYDUS_BOOTSTRAP, "true")])).unwrap();
        assert_eq!(
            (bootstrap.needs_no_download(), bootstrap),
            (false, Content::Nydus)
        );
    }

    #[test]
    fn hostile_labels_are_refused() {
        let many = vec![sha256(1); DEVICES_MAX + 1].join(",");
        for set in [
            labels(&[(EROFS_METADATA, "../../etc")]),
            labels(&[(EROFS_DATA, "")]),
            labels(&[(EROFS_METADATA, &sha256(1)), (EROFS_DEVICES, "")]),
            labels(&[(EROFS_METADATA, &sha256(1)), (EROFS_DEVICES, &many)]),
            labels(&[(EROFS_METADATA, &sha256(1)), (NYDUS_BOOTSTRAP, "true")]),
            labels(&[(EROFS_DATA, &sha256(1)), (NYDUS_BLOB, "true")]),
        ] {
            assert!(Content::of(&set).is_err(), "{set:?}");
        }
    }

    #[test]
    fn as_many_devices_as_are_possible_fit_into_a_label() {
        let list = vec![sha256(1); DEVICES_MAX].join(",");
        assert!(EROFS_DEVICES.len() + list.len() <= super::super::tree::LABEL_MAX_BYTES);
    }

    #[test]
    fn cri_says_which_image_it_is() {
        let set = labels(&[(CRI_IMAGE, "r.test:5000/team/app:v1")]);
        let image = ImageSource::from_labels(&set).unwrap();
        assert_eq!(
            (image.registry.as_str(), image.repository.as_str()),
            ("r.test:5000", "team/app")
        );
        assert_eq!(
            ImageSource::from_labels(&labels(&[(CRI_IMAGE, "//")])),
            None
        );
    }
}
