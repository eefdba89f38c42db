//! Which EROFS images and data an image consists of, by its manifest. Pure, but for [`resolve`].

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_source::{Source, SourceError};
use pantala_wire::BlobDigest;
use pantala_wire::layout::BLOB_SIZE_MAX;
use pantala_wire::name::ManifestReference;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::record::{BlobName, LayerName};
use crate::engine::SourceAccess;

/// A layer that is an EROFS image with metadata only.
pub const METADATA_TYPE: &str = "application/vnd.pantala.erofs.metadata.v1";
/// A layer that is a data device, byte for byte.
pub const DATA_TYPE: &str = "application/vnd.pantala.erofs.data.v1";
/// On a metadata layer: the digests of its devices, with commas, in the order of its device table.
pub const DEVICES_ANNOTATION: &str = "pantala.erofs.devices";

/// Layers that overlayfs stacks.
const LAYERS_MAX: usize = 128;
/// Devices of one EROFS image; the kernel's option string is a page.
const DEVICES_MAX: usize = 16;
/// Registries refuse larger manifests themselves (the distribution specification suggests 4 MiB).
const MANIFEST_BYTES_MAX: u64 = 8 << 20;
/// Kinds of manifest that are understood.
const ACCEPTED: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
];

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
    /// It cannot be read.
    #[error("the manifest is malformed: {0}")]
    Malformed(String),
    /// None of its platforms is this one.
    #[error("the image does not exist for linux/{0}")]
    Platform(&'static str),
    /// It has no layer that can be mounted.
    #[error(
        "the image has no layer of type {METADATA_TYPE}: only images that were made for it can be mounted lazily"
    )]
    NotLazy,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    #[serde(default)]
    layers: Vec<Descriptor>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

fn malformed(why: impl Into<String>) -> ImageError {
    ImageError::Malformed(why.into())
}

impl Descriptor {
    fn blob(&self) -> Result<BlobName, ImageError> {
        let digest = self.digest.parse();
        if self.size == 0 || self.size > BLOB_SIZE_MAX {
            return Err(malformed(format!("a blob of {} bytes", self.size)));
        }
        Ok(BlobName {
            digest: digest.map_err(|e: pantala_wire::id::IdError| malformed(e.to_string()))?,
            size_bytes: self.size,
        })
    }
}

/// The architecture of this machine in the words of images.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What a manifest turned out to be.
#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    Layers(Vec<LayerName>),
    /// An index, which names this manifest for this machine.
    Index(BlobDigest),
}

fn parse(body: &[u8]) -> Result<Parsed, ImageError> {
    let manifest: Manifest = serde_json::from_slice(body).map_err(|e| malformed(e.to_string()))?;
    if manifest.schema_version != 2 {
        return Err(malformed(format!("schema {}", manifest.schema_version)));
    }
    if let Some(manifests) = &manifest.manifests {
        let is_own = |descriptor: &&Descriptor| {
            let platform = descriptor.platform.as_ref();
            platform.is_none_or(|p| p.os == "linux" && p.architecture == architecture())
        };
        let own = manifests.iter().find(is_own);
        let own = own.ok_or(ImageError::Platform(architecture()))?;
        return Ok(Parsed::Index(own.blob()?.digest));
    }
    layers(&manifest.layers).map(Parsed::Layers)
}

fn layers(all: &[Descriptor]) -> Result<Vec<LayerName>, ImageError> {
    let data = |digest: &str| {
        let found = all
            .iter()
            .find(|layer| layer.media_type == DATA_TYPE && layer.digest == digest);
        found
            .ok_or_else(|| malformed(format!("no data layer is called {digest:?}")))?
            .blob()
    };
    let mut layers = Vec::new();
    for metadata in all.iter().filter(|l| l.media_type == METADATA_TYPE) {
        let names = metadata.annotations.get(DEVICES_ANNOTATION);
        let names = names.map_or("", String::as_str).split(',').map(str::trim);
        let devices = names
            .filter(|name| !name.is_empty())
            .map(data)
            .collect::<Result<Vec<_>, _>>()?;
        if devices.len() > DEVICES_MAX || layers.len() >= LAYERS_MAX {
            return Err(malformed("more layers or devices than can be mounted"));
        }
        layers.push(LayerName {
            metadata: metadata.blob()?,
            devices,
        });
    }
    match layers.is_empty() {
        true => Err(ImageError::NotLazy),
        false => Ok(layers),
    }
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
    match parse(&fetch(source, access, reference).await?)? {
        Parsed::Layers(layers) => Ok(layers),
        Parsed::Index(digest) => {
            let reference = ManifestReference::Digest(digest);
            match parse(&fetch(source, access, &reference).await?)? {
                Parsed::Layers(layers) => Ok(layers),
                Parsed::Index(_) => Err(malformed("the index names another index")),
            }
        }
    }
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
            |byte| serde_json::json!({"mediaType": DATA_TYPE, "digest": name(byte), "size": 10});
        let devices = format!("{}, {}", name(3), name(2));
        let body = manifest(&serde_json::json!([
            data(2),
            {"mediaType": METADATA_TYPE, "digest": name(1), "size": 5,
             "annotations": {DEVICES_ANNOTATION: devices}},
            data(3),
            {"mediaType": METADATA_TYPE, "digest": name(4), "size": 5},
        ]));
        let Ok(Parsed::Layers(layers)) = parse(&body) else {
            panic!("not parsed");
        };
        let digests: Vec<_> = layers[0].devices.iter().map(|b| b.digest).collect();
        assert_eq!(
            digests,
            [BlobDigest::new([3; 32]), BlobDigest::new([2; 32])]
        );
        assert!(layers.len() == 2 && layers[1].devices.is_empty());
    }

    #[test]
    fn what_cannot_be_mounted_says_why() {
        let error = |body: &[u8]| parse(body).unwrap_err().to_string();
        let tar = serde_json::json!([{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": name(1), "size": 5}]);
        assert!(error(&manifest(&tar)).contains("mounted lazily"));
        let lost = serde_json::json!([{"mediaType": METADATA_TYPE, "digest": name(1), "size": 5,
            "annotations": {DEVICES_ANNOTATION: name(9)}}]);
        assert!(error(&manifest(&lost)).contains("no data layer"));
        let empty = serde_json::json!([{"mediaType": METADATA_TYPE, "digest": name(1), "size": 0}]);
        assert!(error(&manifest(&empty)).contains("0 bytes"));
        assert!(error(b"{}").contains("malformed"));
    }
}
