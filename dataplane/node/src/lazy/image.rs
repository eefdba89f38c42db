//! Which EROFS images and data an image consists of, by its manifest.

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_lazy::format::FormatError;
use pantala_lazy::format::manifest::{ErofsLayer, ImageKind, LayerBlob, choose, classify};
use pantala_source::{Source, SourceError};
use pantala_wire::BlobDigest;
use pantala_wire::layout::BLOB_SIZE_MAX;
use pantala_wire::name::ManifestReference;
use sha2::{Digest as _, Sha256};

use super::record::{BlobName, LayerName};
use crate::engine::SourceAccess;

/// Layers that overlayfs stacks.
const LAYERS_MAX: usize = 128;
/// Devices of one EROFS image; the kernel's option string is a page.
const DEVICES_MAX: usize = 16;
/// Registries refuse larger manifests themselves (the distribution specification suggests 4 MiB).
const MANIFEST_BYTES_MAX: u64 = 8 << 20;
/// The kind of an index.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Kinds of manifest that are understood.
const ACCEPTED: [&str; 2] = ["application/vnd.oci.image.manifest.v1+json", INDEX];

/// An image that cannot be mounted lazily.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry does not give it.
    #[error("the registry does not give the manifest: {0}")]
    Source(#[from] SourceError),
    /// It answered, but not with the manifest.
    #[error("{host} answers {status} to the request for the manifest")]
    Refused {
        /// Who.
        host: String,
        /// With what.
        status: StatusCode,
    },
    /// It is not what it is called.
    #[error("the manifest's digest is {got}, not {wanted}")]
    Digest {
        /// What came.
        got: BlobDigest,
        /// What was asked for.
        wanted: BlobDigest,
    },
    /// It cannot be read, or is of a kind that cannot be mounted.
    #[error("the manifest: {0}")]
    Format(#[from] FormatError),
    /// It names what cannot be.
    #[error("the manifest names {0}")]
    Bounds(String),
    /// None of its platforms is this one.
    #[error("the image does not exist for linux/{0}")]
    Platform(&'static str),
    /// It is of a kind that the node does not mount.
    #[error(
        "{0}, which the node does not mount: make an image of EROFS layers of it with `pantala convert`"
    )]
    NotLazy(&'static str),
}

/// The architecture of this machine in the words of images.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn is_index(body: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(body)
        .is_ok_and(|document| document["manifests"].is_array())
}

fn layers(manifest: &[u8]) -> Result<Vec<LayerName>, ImageError> {
    let layers = match classify(manifest)? {
        ImageKind::Erofs(layers) if layers.iter().any(|layer| layer.holds_data) => {
            return Err(ImageError::NotLazy(
                "the image's EROFS layers hold their own data",
            ));
        }
        ImageKind::Erofs(layers) => layers,
        ImageKind::Oci(_) => return Err(ImageError::NotLazy("the image's layers are archives")),
        ImageKind::Nydus { .. } => return Err(ImageError::NotLazy("it is a nydus image")),
    };
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        let count = layers.len();
        return Err(ImageError::Bounds(format!("{count} layers to mount")));
    }
    layers.iter().map(layer_name).collect()
}

fn layer_name(layer: &ErofsLayer) -> Result<LayerName, ImageError> {
    if layer.devices.len() > DEVICES_MAX {
        let count = layer.devices.len();
        return Err(ImageError::Bounds(format!("{count} devices of one layer")));
    }
    Ok(LayerName {
        metadata: blob_name(&layer.image)?,
        devices: layer
            .devices
            .iter()
            .map(blob_name)
            .collect::<Result<_, _>>()?,
    })
}

fn blob_name(blob: &LayerBlob) -> Result<BlobName, ImageError> {
    if blob.size == 0 || blob.size > BLOB_SIZE_MAX {
        return Err(ImageError::Bounds(format!("a blob of {} bytes", blob.size)));
    }
    Ok(BlobName {
        digest: blob.digest,
        size_bytes: blob.size,
    })
}

/// Asks the registry, in the caller's name, what the image consists of: whoever may not read it gets no
/// further.
///
/// # Errors
/// [`ImageError`].
pub async fn resolve(
    source: &Source,
    access: &SourceAccess,
    reference: &ManifestReference,
) -> Result<Vec<LayerName>, ImageError> {
    let body = fetch(source, access, reference).await?;
    if !is_index(&body) {
        return layers(&body);
    }
    let chosen = choose(&body, "linux", architecture())?;
    let chosen = chosen.ok_or(ImageError::Platform(architecture()))?;
    layers(&fetch(source, access, &ManifestReference::Digest(chosen)).await?)
}

async fn fetch(
    source: &Source,
    access: &SourceAccess,
    reference: &ManifestReference,
) -> Result<bytes::Bytes, ImageError> {
    let mut headers = HeaderMap::new();
    for kind in ACCEPTED {
        headers.append(ACCEPT, HeaderValue::from_static(kind));
    }
    let path = format!("/v2/{}/manifests/{reference}", access.repository);
    let exchange = source.exchange(
        Method::GET,
        &access.upstream,
        &path,
        headers,
        &access.credential,
    );
    let reply = exchange.await?;
    if reply.status != StatusCode::OK {
        let host = reply.host().to_owned();
        let status = reply.status;
        return Err(ImageError::Refused { host, status });
    }
    let body = reply.bytes(MANIFEST_BYTES_MAX).await?;
    let got = BlobDigest::new(Sha256::digest(&body).into());
    match reference {
        ManifestReference::Digest(wanted) if *wanted != got => Err(ImageError::Digest {
            got,
            wanted: *wanted,
        }),
        _ => Ok(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pantala_lazy::format::manifest::{EROFS_DATA, EROFS_DEVICES, EROFS_METADATA};

    fn name(byte: u8) -> String {
        BlobDigest::new([byte; 32]).to_string()
    }

    fn manifest(layers: &serde_json::Value) -> Vec<u8> {
        serde_json::json!({"schemaVersion": 2, "layers": layers})
            .to_string()
            .into_bytes()
    }

    #[test]
    fn metadata_layers_name_their_devices_in_order() {
        let data =
            |byte| serde_json::json!({"mediaType": EROFS_DATA, "digest": name(byte), "size": 10});
        let devices = format!("{},{}", name(3), name(2));
        let body = manifest(&serde_json::json!([
            data(2),
            {"mediaType": EROFS_METADATA, "digest": name(1), "size": 5,
             "annotations": {EROFS_DEVICES: devices}},
            data(3),
            {"mediaType": EROFS_METADATA, "digest": name(4), "size": 5},
        ]));
        let layers = layers(&body).unwrap();
        let digests: Vec<_> = layers[0].devices.iter().map(|b| b.digest).collect();
        assert_eq!(
            digests,
            [BlobDigest::new([3; 32]), BlobDigest::new([2; 32])]
        );
        assert!(layers.len() == 2 && layers[1].devices.is_empty());
    }

    #[test]
    fn what_cannot_be_mounted_says_why() {
        let error = |body: &[u8]| layers(body).unwrap_err().to_string();
        let tar = serde_json::json!([{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": name(1), "size": 5}]);
        assert!(error(&manifest(&tar)).contains("pantala convert"));
        let lost = serde_json::json!([{"mediaType": EROFS_METADATA, "digest": name(1), "size": 5,
            "annotations": {EROFS_DEVICES: name(9)}}]);
        assert!(error(&manifest(&lost)).contains("none of its layers"));
        let empty =
            serde_json::json!([{"mediaType": EROFS_METADATA, "digest": name(1), "size": 0}]);
        assert!(error(&manifest(&empty)).contains("0 bytes"));
        assert!(!is_index(b"{}") && error(b"{}").contains("manifest"));
    }
}
