//! Manifests: which of an index's images is wanted, and which blobs an image consists of. Pure.

use pantala_wire::BlobDigest;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// Kinds of manifest that are understood, one `Accept` header each.
pub(super) const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Registries refuse larger manifests themselves (the distribution specification suggests 4 MiB).
pub(super) const MANIFEST_MAX_BYTES: u64 = 8 << 20;
/// Blobs of one image: overlayfs ends at 128 layers, nydus and artifacts stay far below this.
const BLOBS_MAX: usize = 4_096;

/// A manifest that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ManifestError {
    #[error("the manifest is malformed: {0}")]
    Malformed(String),
    #[error("the manifest is of a kind that is not supported ({0})")]
    Kind(String),
    #[error("the image does not exist for {wanted}; it exists for {}", .offered.join(", "))]
    Platform {
        wanted: String,
        offered: Vec<String>,
    },
    #[error("the manifest is not the one asked for: its digest is {got}, not {wanted}")]
    Digest { got: BlobDigest, wanted: BlobDigest },
    #[error("the image has {0} blobs; at most {BLOBS_MAX} are taken")]
    TooMany(usize),
}

/// A blob as a manifest names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BlobName {
    pub(super) digest: BlobDigest,
    pub(super) size: u64,
}

/// What a manifest turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Manifest {
    /// One image: its kind, its configuration and layers.
    Image { kind: String, blobs: Vec<BlobName> },
    /// Images for several platforms, of which this one is wanted.
    Index(BlobDigest),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    media_type: Option<String>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

/// An operating system and a machine: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Platform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_str() {
            "" => Ok(()),
            variant => write!(f, "/{variant}"),
        }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] if !variant.is_empty() => (os, architecture, variant),
            _ => ("", "", ""),
        };
        if os.is_empty() || architecture.is_empty() {
            return Err(format!("{text:?} is not a platform"));
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        })
    }
}

impl Platform {
    /// The platform that this program was built for, in the words of images.
    pub(super) fn own() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            os: std::env::consts::OS.to_owned(),
            architecture: architecture.to_owned(),
            variant: String::new(),
        }
    }

    /// Whether an image of platform `offered` is one of this platform; a variant that was not asked
    /// for does not matter.
    fn takes(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && (self.variant.is_empty() || self.variant == offered.variant)
    }
}

/// The digest of a manifest, held against the one that was asked for, if one was.
pub(super) fn digest_of(
    body: &[u8],
    wanted: Option<BlobDigest>,
) -> Result<BlobDigest, ManifestError> {
    let got = BlobDigest::new(Sha256::digest(body).into());
    match wanted {
        Some(wanted) if wanted != got => Err(ManifestError::Digest { got, wanted }),
        _ => Ok(got),
    }
}

/// Reads a manifest that has been verified.
pub(super) fn parse(
    body: &[u8],
    content_type: &str,
    platform: &Platform,
) -> Result<Manifest, ManifestError> {
    let document: Document =
        serde_json::from_slice(body).map_err(|e| ManifestError::Malformed(e.to_string()))?;
    if document.schema_version != 2 {
        return Err(ManifestError::Kind(format!(
            "schema version {}",
            document.schema_version
        )));
    }
    if let Some(manifests) = &document.manifests {
        return choose(manifests, platform).map(Manifest::Index);
    }
    let config = document
        .config
        .ok_or_else(|| ManifestError::Kind("neither an image nor an index".into()))?;
    let named = document.layers.len() + 1;
    if named > BLOBS_MAX {
        return Err(ManifestError::TooMany(named));
    }
    let mut blobs = [&config]
        .into_iter()
        .chain(&document.layers)
        .map(|descriptor| {
            Ok(BlobName {
                digest: digest(&descriptor.digest)?,
                size: descriptor.size,
            })
        })
        .collect::<Result<Vec<_>, ManifestError>>()?;
    // Layers may repeat; each is fetched once.
    blobs.sort();
    blobs.dedup_by_key(|blob| blob.digest);
    let kind = document.media_type.unwrap_or_else(|| {
        content_type
            .split(';')
            .next()
            .unwrap_or("")
            .trim()
            .to_owned()
    });
    Ok(Manifest::Image { kind, blobs })
}

fn choose(manifests: &[Descriptor], wanted: &Platform) -> Result<BlobDigest, ManifestError> {
    let of_platform = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_some_and(|offered| wanted.takes(offered))
    };
    match manifests.iter().find(of_platform) {
        Some(descriptor) => digest(&descriptor.digest),
        None => Err(ManifestError::Platform {
            wanted: wanted.to_string(),
            offered: manifests
                .iter()
                .filter_map(|descriptor| descriptor.platform.as_ref())
                .map(ToString::to_string)
                .collect(),
        }),
    }
}

fn digest(text: &str) -> Result<BlobDigest, ManifestError> {
    text.parse()
        .map_err(|e: pantala_wire::id::IdError| ManifestError::Malformed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(byte: &str) -> String {
        format!("{{\"digest\":\"sha256:{}\",\"size\":7}}", byte.repeat(32))
    }

    fn read(body: &str, platform: &str) -> Result<Manifest, ManifestError> {
        parse(
            body.as_bytes(),
            "a/b; charset=x",
            &platform.parse().unwrap(),
        )
    }

    #[test]
    fn an_image_is_its_configuration_and_each_layer_once() {
        let body = format!(
            "{{\"schemaVersion\":2,\"config\":{},\"layers\":[{},{}]}}",
            named("cc"),
            named("aa"),
            named("aa")
        );
        let Manifest::Image { kind, blobs } = read(&body, "linux/amd64").unwrap() else {
            panic!("not an image");
        };
        assert_eq!((kind.as_str(), blobs.len()), ("a/b", 2));
    }

    #[test]
    fn the_platform_asked_for_is_chosen() {
        let entry = |byte: &str, platform: &str| {
            format!(
                "{},\"platform\":{platform}}}",
                named(byte).trim_end_matches('}')
            )
        };
        let body = format!(
            "{{\"schemaVersion\":2,\"manifests\":[{},{},{}]}}",
            entry("aa", r#"{"os":"linux","architecture":"amd64"}"#),
            entry(
                "bb",
                r#"{"os":"linux","architecture":"arm","variant":"v6"}"#
            ),
            entry(
                "cc",
                r#"{"os":"linux","architecture":"arm","variant":"v7"}"#
            ),
        );
        let chosen = |platform| match read(&body, platform) {
            Ok(Manifest::Index(digest)) => digest.to_hex()[..2].to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(chosen("linux/amd64"), "aa");
        assert_eq!(chosen("linux/arm"), "bb");
        assert_eq!(chosen("linux/arm/v7"), "cc");
        assert_eq!(
            read(&body, "windows/amd64").unwrap_err().to_string(),
            "the image does not exist for windows/amd64; it exists for linux/amd64, linux/arm/v6, linux/arm/v7"
        );
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        for body in [
            "",
            "[]",
            "{}",
            "{\"schemaVersion\":1}",
            "{\"schemaVersion\":2}",
            "{\"schemaVersion\":2,\"config\":{\"digest\":\"../x\",\"size\":1}}",
            "{\"schemaVersion\":2,\"config\":{\"digest\":\"sha256:00\",\"size\":-1}}",
        ] {
            assert!(read(body, "linux/amd64").is_err(), "{body}");
        }
        let layers = vec![named("aa"); BLOBS_MAX].join(",");
        let body = format!(
            "{{\"schemaVersion\":2,\"config\":{},\"layers\":[{layers}]}}",
            named("bb")
        );
        assert_eq!(
            read(&body, "linux/amd64"),
            Err(ManifestError::TooMany(BLOBS_MAX + 1))
        );
    }

    #[test]
    fn a_manifest_with_another_digest_is_refused() {
        let got = digest_of(b"{}", None).unwrap();
        assert!(digest_of(b"{}", Some(got)).is_ok());
        assert!(digest_of(b"{ }", Some(got)).is_err());
    }

    #[test]
    fn platforms_are_two_or_three_words() {
        for bad in ["", "linux", "linux/", "/amd64", "a/b/", "a/b/c/d"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        assert_eq!(
            "linux/arm/v7".parse::<Platform>().unwrap().to_string(),
            "linux/arm/v7"
        );
    }
}
