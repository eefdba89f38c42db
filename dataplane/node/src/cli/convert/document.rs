//! The manifest and configuration of the converted image. Pure; the same input gives the same bytes.

use pantala_lazy::format::manifest::{
    EROFS_DATA, EROFS_DEVICES, EROFS_IS_DATA, EROFS_IS_METADATA, EROFS_METADATA,
};
use pantala_wire::BlobDigest;
use serde_json::{Value, json};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// How archives that can be converted are named, docker's old way and the image specification's.
const ARCHIVES: [&str; 2] = [
    "application/vnd.docker.image.rootfs.",
    "application/vnd.oci.image.layer.",
];

/// A document that cannot be converted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DocumentError {
    #[error("the {0} of the image is malformed")]
    Malformed(&'static str),
    #[error(
        "a layer of the image is no archive but {0:?}: the image was converted already, or is none"
    )]
    Layer(String),
    #[error("the image's configuration names {named} layers, its manifest {there}")]
    Count { named: usize, there: usize },
}

/// A blob of the new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) digest: BlobDigest,
    pub(super) size: u64,
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) metadata: Made,
    /// Nothing where no file of the layer has content.
    pub(super) data: Option<Made>,
}

/// What is to be converted.
#[derive(Debug)]
pub(super) struct Plan {
    manifest: Value,
    config: Value,
    /// The layers, lowest first, each with the digest of its archive.
    pub(super) layers: Vec<(BlobDigest, BlobDigest)>,
}

/// The digest of the configuration that `manifest` names.
pub(super) fn config_digest(manifest: &[u8]) -> Result<BlobDigest, DocumentError> {
    let manifest: Value =
        serde_json::from_slice(manifest).map_err(|_| DocumentError::Malformed("manifest"))?;
    digest(&manifest["config"]["digest"], "manifest")
}

impl Plan {
    pub(super) fn new(manifest: &[u8], config: &[u8]) -> Result<Self, DocumentError> {
        let parse = |bytes, what| {
            serde_json::from_slice::<Value>(bytes).map_err(|_| DocumentError::Malformed(what))
        };
        let (manifest, config) = (
            parse(manifest, "manifest")?,
            parse(config, "configuration")?,
        );
        let layers = manifest["layers"]
            .as_array()
            .ok_or(DocumentError::Malformed("manifest"))?;
        let diffs = config["rootfs"]["diff_ids"]
            .as_array()
            .ok_or(DocumentError::Malformed("configuration"))?;
        if layers.len() != diffs.len() {
            return Err(DocumentError::Count {
                named: diffs.len(),
                there: layers.len(),
            });
        }
        let layers = layers
            .iter()
            .zip(diffs)
            .map(|(layer, diff)| {
                let kind = layer["mediaType"].as_str().unwrap_or("");
                let is_archive =
                    ARCHIVES.iter().any(|prefix| kind.starts_with(prefix)) && kind.contains(".tar");
                if !is_archive {
                    return Err(DocumentError::Layer(kind.chars().take(100).collect()));
                }
                Ok((
                    digest(&layer["digest"], "manifest")?,
                    digest(diff, "configuration")?,
                ))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            manifest,
            config,
            layers,
        })
    }

    /// The new configuration: each layer of the new image has its own digest in it, as nothing is compressed.
    pub(super) fn config(&self, pairs: &[Pair]) -> String {
        let mut config = self.config.clone();
        let blobs = pairs
            .iter()
            .flat_map(|pair| [Some(&pair.metadata), pair.data.as_ref()]);
        config["rootfs"]["diff_ids"] = blobs
            .flatten()
            .map(|made| json!(made.digest.to_string()))
            .collect();
        if let Some(history) = config["history"].as_array() {
            let mut layers = pairs.iter();
            let mut all = Vec::new();
            for entry in history {
                all.push(entry.clone());
                let is_layer = entry["empty_layer"] != json!(true);
                if is_layer && layers.next().is_some_and(|pair| pair.data.is_some()) {
                    all.push(
                        json!({"created": entry["created"], "comment": "data of the layer before"}),
                    );
                }
            }
            config["history"] = all.into();
        }
        config.to_string()
    }

    /// The new manifest.
    pub(super) fn manifest(&self, config: &Made, pairs: &[Pair]) -> String {
        let mut layers = Vec::new();
        for pair in pairs {
            let mut metadata = descriptor(EROFS_METADATA, &pair.metadata);
            let own = pair.metadata.digest.to_string();
            metadata["annotations"] = json!({ EROFS_IS_METADATA: own });
            let Some(data) = &pair.data else {
                layers.push(metadata);
                continue;
            };
            let own = data.digest.to_string();
            metadata["annotations"][EROFS_DEVICES] = json!(own);
            let mut device = descriptor(EROFS_DATA, data);
            device["annotations"] = json!({ EROFS_IS_DATA: own });
            layers.extend([metadata, device]);
        }
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, config),
            "layers": layers,
        });
        if self.manifest["annotations"].is_object() {
            manifest["annotations"] = self.manifest["annotations"].clone();
        }
        manifest.to_string()
    }
}

/// How registries name the manifest's kind.
pub(super) const MANIFEST_KIND: &str = OCI_MANIFEST;

fn descriptor(kind: &str, made: &Made) -> Value {
    json!({"mediaType": kind, "digest": made.digest.to_string(), "size": made.size})
}

fn digest(value: &Value, what: &'static str) -> Result<BlobDigest, DocumentError> {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or(DocumentError::Malformed(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pantala_lazy::format::manifest::{ImageKind, classify};

    fn made(byte: u8) -> Made {
        Made {
            digest: BlobDigest::new([byte; 32]),
            size: u64::from(byte),
        }
    }

    fn plan(kind: &str, diffs: usize) -> Result<Plan, DocumentError> {
        let layer = json!({"mediaType": kind, "digest": made(1).digest.to_string(), "size": 1});
        let manifest = json!({"layers": [layer, layer], "annotations": {"a": "b"}});
        let config = json!({
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": vec![made(2).digest.to_string(); diffs]},
            "history": [{"created_by": "one"}, {"created_by": "env", "empty_layer": true}, {"created_by": "two"}],
        });
        Plan::new(
            manifest.to_string().as_bytes(),
            config.to_string().as_bytes(),
        )
    }

    #[test]
    fn the_new_image_is_one_that_is_understood() {
        let plan = plan("application/vnd.oci.image.layer.v1.tar+gzip", 2).unwrap();
        let pairs = [
            Pair {
                metadata: made(3),
                data: Some(made(4)),
            },
            Pair {
                metadata: made(5),
                data: None,
            },
        ];
        let manifest = plan.manifest(&made(9), &pairs);
        let Ok(ImageKind::Erofs(layers)) = classify(manifest.as_bytes()) else {
            panic!("{manifest}");
        };
        assert_eq!(layers.len(), 2);
        assert_eq!(layers[0].devices[0].digest, made(4).digest);
        assert!(layers[1].devices.is_empty() && !layers[1].holds_data);
        let config: Value = serde_json::from_str(&plan.config(&pairs)).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 3);
        assert_eq!(config["history"].as_array().unwrap().len(), 4);
        assert_eq!(config["architecture"], "amd64");
    }

    #[test]
    fn what_is_no_ordinary_image_is_refused() {
        assert!(matches!(
            plan(EROFS_METADATA, 2),
            Err(DocumentError::Layer(_))
        ));
        assert!(matches!(
            plan("application/vnd.docker.image.rootfs.diff.tar.gzip", 1),
            Err(DocumentError::Count { named: 1, there: 2 })
        ));
        assert!(Plan::new(b"{}", b"{}").is_err());
    }
}
