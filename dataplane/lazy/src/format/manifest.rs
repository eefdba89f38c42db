//! What a manifest says an image is, and which blobs are its devices.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use pantala_wire::BlobDigest;
use serde::Deserialize;

use super::FormatError;

/// Metadata of a layer of a Pantala EROFS image: an EROFS image without data. The name begins as it does
/// because containerd 1.6 takes nothing else for a layer.
pub const EROFS_METADATA: &str = "application/vnd.oci.image.layer.pantala.erofs.metadata.v1";
/// Data of such a layer: a device, byte for byte.
pub const EROFS_DATA: &str = "application/vnd.oci.image.layer.pantala.erofs.data.v1";
/// On a metadata layer: the digests of its devices, comma separated, in the order of its device table.
/// containerd hands annotations that begin so on to snapshotters, as labels.
pub const EROFS_DEVICES: &str = "containerd.io/snapshot/pantala.erofs.devices";
/// On a metadata layer, for snapshotters: its own digest.
pub const EROFS_IS_METADATA: &str = "containerd.io/snapshot/pantala.erofs.metadata";
/// On a data layer, for snapshotters: its own digest.
pub const EROFS_IS_DATA: &str = "containerd.io/snapshot/pantala.erofs.data";
/// A layer that is a whole EROFS image, as containerd 2.3 names it.
const EROFS_LAYER: &str = "application/vnd.erofs.layer.v1";
/// The name registered with IANA.
const EROFS: &str = "application/vnd.erofs";
/// The same for containerd 2.1.
const EROFS_SUFFIX: &str = ".erofs";
const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
const NYDUS_IS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
const NYDUS_IS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const NYDUS_VERSION: [&str; 2] = [
    "containerd.io/snapshot/nydus-fs-version",
    "containerd.io/snapshot/nydus-rafs-version",
];
/// How indexes mark manifests that only nydus can use.
const NYDUS_OS_FEATURE: &str = "nydus.remoteimage.v1";
/// Layers of an image; overlayfs stacks fewer, and nydus images have one blob for each.
const LAYERS_MAX: usize = 4096;

/// The file in a nydus bootstrap layer.
const BOOTSTRAP_PATH: &str = "image/image.boot";
/// The largest bootstrap taken: that of some 10 million files.
pub const BOOTSTRAP_LEN_MAX: u64 = 4 << 30;
/// Entries of a bootstrap layer before its bootstrap: there are a folder or two.
const BOOTSTRAP_ENTRIES_MAX: usize = 64;

/// A blob that a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// Its digest.
    pub digest: BlobDigest,
    /// Its length in bytes.
    pub size: u64,
}

/// One layer that the kernel mounts as EROFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErofsLayer {
    /// The EROFS image.
    pub image: LayerBlob,
    /// Its devices, in the order of its device table; none where the image holds its own data, or none.
    pub devices: Vec<LayerBlob>,
    /// True where the image holds the data of its files, so that only a part of it is metadata.
    pub holds_data: bool,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageKind {
    /// Archives, to be unpacked. The layers, lowest first.
    Oci(Vec<LayerBlob>),
    /// EROFS images, to be mounted and stacked. The layers, lowest first.
    Erofs(Vec<ErofsLayer>),
    /// nydus: one bootstrap for all, and its blobs, in no order that means anything.
    Nydus {
        /// The layer with the bootstrap, a compressed archive.
        bootstrap: LayerBlob,
        /// The layers that are blobs.
        blobs: Vec<LayerBlob>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default, rename = "os.features")]
    os_features: Vec<String>,
}

impl Descriptor {
    fn blob(&self) -> Result<LayerBlob, FormatError> {
        let digest = self
            .digest
            .parse()
            .map_err(|e: pantala_wire::id::IdError| malformed(e.to_string()))?;
        Ok(LayerBlob {
            digest,
            size: self.size,
        })
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name).map(String::as_str)
    }

    fn is_nydus_blob(&self) -> bool {
        self.media_type == NYDUS_BLOB || self.annotation(NYDUS_IS_BLOB) == Some("true")
    }

    fn is_nydus_bootstrap(&self) -> bool {
        self.annotation(NYDUS_IS_BOOTSTRAP) == Some("true")
    }

    /// containerd's rule: the name says so, and nothing is wrapped around the image.
    fn is_whole_erofs(&self) -> bool {
        [EROFS, EROFS_LAYER].contains(&self.media_type.as_str())
            || self.media_type.ends_with(EROFS_SUFFIX)
    }
}

/// What the image with this manifest is.
///
/// # Errors
/// Where it is no image manifest, mixes kinds, or is of a kind that cannot be mounted.
pub fn classify(manifest: &[u8]) -> Result<ImageKind, FormatError> {
    let document = parse(manifest)?;
    let layers = document
        .layers
        .ok_or_else(|| malformed("names no layers; an index is no image"))?;
    if layers.len() > LAYERS_MAX {
        return Err(malformed(format!(
            "names {} layers, more than {LAYERS_MAX}",
            layers.len()
        )));
    }
    let count = |is: fn(&Descriptor) -> bool| layers.iter().filter(|layer| is(layer)).count();
    let is_pantala =
        |layer: &Descriptor| layer.media_type == EROFS_METADATA || layer.media_type == EROFS_DATA;
    let (pantala, whole) = (count(is_pantala), count(Descriptor::is_whole_erofs));
    let nydus = count(|layer| layer.is_nydus_blob() || layer.is_nydus_bootstrap());
    match (nydus, pantala, whole) {
        (0, 0, 0) => layers
            .iter()
            .map(Descriptor::blob)
            .collect::<Result<_, _>>()
            .map(ImageKind::Oci),
        (n, 0, 0) if n == layers.len() => nydus_image(&layers),
        (0, n, 0) if n == layers.len() => pantala_layers(&layers).map(ImageKind::Erofs),
        (0, 0, n) if n == layers.len() => {
            let layer = |layer: &Descriptor| {
                Ok(ErofsLayer {
                    image: layer.blob()?,
                    devices: Vec::new(),
                    holds_data: true,
                })
            };
            layers
                .iter()
                .map(layer)
                .collect::<Result<_, _>>()
                .map(ImageKind::Erofs)
        }
        _ => Err(FormatError::Unsupported {
            what: "an image with layers of several kinds".into(),
            hint: "convert all of them: `pantala convert`",
        }),
    }
}

fn nydus_image(layers: &[Descriptor]) -> Result<ImageKind, FormatError> {
    let mut bootstraps = layers.iter().filter(|layer| layer.is_nydus_bootstrap());
    let (Some(bootstrap), None) = (bootstraps.next(), bootstraps.next()) else {
        return Err(malformed("does not name exactly one nydus bootstrap"));
    };
    let version = NYDUS_VERSION
        .iter()
        .find_map(|name| bootstrap.annotation(name));
    if version == Some("5") {
        return Err(FormatError::Unsupported {
            what: "a nydus image of version 5".into(),
            hint: "the kernel cannot mount it; convert it with `nydusify convert --fs-version 6`",
        });
    }
    let blobs = layers.iter().filter(|layer| !layer.is_nydus_bootstrap());
    Ok(ImageKind::Nydus {
        bootstrap: bootstrap.blob()?,
        blobs: blobs.map(Descriptor::blob).collect::<Result<_, _>>()?,
    })
}

fn pantala_layers(layers: &[Descriptor]) -> Result<Vec<ErofsLayer>, FormatError> {
    let data: Vec<LayerBlob> = layers
        .iter()
        .filter(|layer| layer.media_type == EROFS_DATA)
        .map(Descriptor::blob)
        .collect::<Result<_, _>>()?;
    let metadata = layers
        .iter()
        .filter(|layer| layer.media_type == EROFS_METADATA);
    let layer = |layer: &Descriptor| {
        let names = layer.annotation(EROFS_DEVICES).unwrap_or_default();
        let device = |name: &str| {
            data.iter()
                .find(|blob| blob.digest.to_string() == name)
                .cloned()
                .ok_or_else(|| {
                    malformed(format!(
                        "names the device {name:.80}, which is none of its layers"
                    ))
                })
        };
        Ok(ErofsLayer {
            image: layer.blob()?,
            devices: names
                .split(',')
                .filter(|name| !name.is_empty())
                .map(device)
                .collect::<Result<_, _>>()?,
            holds_data: false,
        })
    };
    metadata.map(layer).collect()
}

/// The manifest of an index to use on this `os` and `architecture`: one that nydus marked, if there is
/// one, for it can be mounted at once. Nothing where the index has none for them.
///
/// # Errors
/// Where it is no index.
pub fn choose(
    index: &[u8],
    os: &str,
    architecture: &str,
) -> Result<Option<BlobDigest>, FormatError> {
    let manifests = parse(index)?
        .manifests
        .ok_or_else(|| malformed("is no index"))?;
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_some_and(|platform| platform.os == os && platform.architecture == architecture)
    };
    let is_nydus = |descriptor: &&Descriptor| {
        let features = descriptor
            .platform
            .as_ref()
            .map(|platform| &platform.os_features);
        features.is_some_and(|features| features.iter().any(|feature| feature == NYDUS_OS_FEATURE))
    };
    let fitting: Vec<&Descriptor> = manifests.iter().filter(fits).collect();
    let chosen = fitting
        .iter()
        .copied()
        .find(|descriptor| is_nydus(descriptor))
        .or(fitting.first().copied());
    chosen
        .map(|descriptor| descriptor.blob().map(|blob| blob.digest))
        .transpose()
}

/// Writes the bootstrap out of the layer that holds it, an archive in gzip, in zstd or plain, and returns its
/// length. Reads and writes as much as it is told to and no more than [`BOOTSTRAP_LEN_MAX`].
///
/// # Errors
/// Where there is no bootstrap in it, or reading or writing fails.
pub fn extract_bootstrap(layer: impl Read, out: &mut impl Write) -> Result<u64, ExtractError> {
    let mut layer = std::io::BufReader::new(layer);
    let head = std::io::BufRead::fill_buf(&mut layer)?;
    let plain: Box<dyn Read> = match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(layer)?),
        _ => Box::new(layer),
    };
    let mut archive = tar::Archive::new(plain);
    for entry in archive.entries()?.take(BOOTSTRAP_ENTRIES_MAX) {
        let mut entry = entry?;
        let path = entry.path_bytes();
        let path = path.strip_prefix(b"./").unwrap_or(&path);
        if path == BOOTSTRAP_PATH.as_bytes() && entry.header().entry_type().is_file() {
            if entry.size() > BOOTSTRAP_LEN_MAX {
                return Err(malformed_layer(format!("has {} bytes", entry.size())).into());
            }
            return Ok(std::io::copy(&mut entry, out)?);
        }
    }
    Err(malformed_layer(format!("has no {BOOTSTRAP_PATH}")).into())
}

/// Why there is no bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// The layer is no bootstrap layer.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It could not be read, unpacked or written.
    #[error("the nydus bootstrap cannot be unpacked: {0}")]
    Io(#[from] std::io::Error),
}

fn parse(bytes: &[u8]) -> Result<Document, FormatError> {
    let document: Document = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
    match document.schema_version {
        2 => Ok(document),
        other => Err(malformed(format!("has the schema version {other}"))),
    }
}

fn malformed(why: impl Into<String>) -> FormatError {
    FormatError::malformed("the manifest", why)
}

fn malformed_layer(why: impl Into<String>) -> FormatError {
    FormatError::malformed("the nydus bootstrap layer", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(kind: &str, byte: &str, annotations: &str) -> String {
        let digest = byte.repeat(32);
        format!(
            r#"{{"mediaType":"{kind}","digest":"sha256:{digest}","size":7,"annotations":{{{annotations}}}}}"#
        )
    }

    fn manifest(layers: &[String]) -> Result<ImageKind, FormatError> {
        classify(
            format!(
                r#"{{"schemaVersion":2,"config":{{}},"layers":[{}]}}"#,
                layers.join(",")
            )
            .as_bytes(),
        )
    }

    fn blob(byte: u8) -> LayerBlob {
        LayerBlob {
            digest: BlobDigest::new([byte; 32]),
            size: 7,
        }
    }

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const BOOTSTRAP: &str = r#""containerd.io/snapshot/nydus-bootstrap":"true""#;

    #[test]
    fn each_kind_of_image_is_told_from_its_layers() {
        assert_eq!(
            manifest(&[layer(TAR, "aa", "")]),
            Ok(ImageKind::Oci(vec![blob(0xaa)]))
        );
        let devices = format!(r#""{EROFS_DEVICES}":"sha256:{}""#, "bb".repeat(32));
        assert_eq!(
            manifest(&[
                layer(EROFS_METADATA, "aa", &devices),
                layer(EROFS_DATA, "bb", ""),
                layer(EROFS_METADATA, "cc", "")
            ]),
            Ok(ImageKind::Erofs(vec![
                ErofsLayer {
                    image: blob(0xaa),
                    devices: vec![blob(0xbb)],
                    holds_data: false
                },
                ErofsLayer {
                    image: blob(0xcc),
                    devices: vec![],
                    holds_data: false
                },
            ]))
        );
        for kind in [
            "application/vnd.erofs.layer.v1",
            "application/vnd.oci.image.layer.v1.erofs",
        ] {
            let whole = ErofsLayer {
                image: blob(0xaa),
                devices: vec![],
                holds_data: true,
            };
            assert_eq!(
                manifest(&[layer(kind, "aa", "")]),
                Ok(ImageKind::Erofs(vec![whole]))
            );
        }
        assert_eq!(
            manifest(&[layer(NYDUS_BLOB, "aa", ""), layer(TAR, "bb", BOOTSTRAP)]),
            Ok(ImageKind::Nydus {
                bootstrap: blob(0xbb),
                blobs: vec![blob(0xaa)]
            })
        );
    }

    #[test]
    fn images_that_cannot_be_mounted_say_why() {
        let version_5 = format!(r#"{BOOTSTRAP},"containerd.io/snapshot/nydus-fs-version":"5""#);
        let says = |layers: &[String]| manifest(layers).unwrap_err().to_string();
        assert!(
            says(&[layer(NYDUS_BLOB, "aa", ""), layer(TAR, "bb", &version_5)])
                .contains("--fs-version 6")
        );
        assert!(says(&[layer(NYDUS_BLOB, "aa", "")]).contains("exactly one"));
        assert!(
            says(&[layer(TAR, "aa", ""), layer(EROFS_DATA, "bb", "")]).contains("several kinds")
        );
        let devices = format!(r#""{EROFS_DEVICES}":"sha256:{}""#, "bb".repeat(32));
        assert!(says(&[layer(EROFS_METADATA, "aa", &devices)]).contains("none of its layers"));
        for bad in [
            "",
            "[]",
            r#"{"schemaVersion":1,"layers":[]}"#,
            r#"{"schemaVersion":2}"#,
        ] {
            classify(bad.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn an_index_gives_the_nydus_image_of_the_platform_first() {
        let entry = |byte: &str, platform: &str| {
            format!(
                r#"{{"digest":"sha256:{}","size":1,"platform":{{{platform}}}}}"#,
                byte.repeat(32)
            )
        };
        let amd64 = r#""os":"linux","architecture":"amd64""#;
        let nydus = format!(r#"{amd64},"os.features":["nydus.remoteimage.v1"]"#);
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{}]}}"#,
            entry("aa", amd64),
            entry("bb", &nydus)
        );
        let chosen = |architecture| choose(index.as_bytes(), "linux", architecture).unwrap();
        assert_eq!(chosen("amd64"), Some(BlobDigest::new([0xbb; 32])));
        assert_eq!(chosen("arm64"), None);
    }

    #[test]
    fn the_bootstrap_is_found_however_the_layer_is_compressed() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        archive
            .append_data(&mut header, "image/image.boot", &b"boot"[..])
            .unwrap();
        let plain = archive.into_inner().unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        for layer in [
            plain.clone(),
            gzip.finish().unwrap(),
            zstd::bulk::compress(&plain, 1).unwrap(),
        ] {
            let mut out = Vec::new();
            assert_eq!(extract_bootstrap(&layer[..], &mut out).unwrap(), 4);
            assert_eq!(out, b"boot");
        }
        extract_bootstrap(&plain[1024..], &mut Vec::new()).unwrap_err();
    }
}
