//! How registries name things: repositories, tags and image references.
//!
//! The grammar is that of the OCI distribution specification ("Pulling manifests") and, for the
//! short forms that people type, of the container tools (`nginx` means
//! `docker.io/library/nginx:latest`).

use std::fmt;
use std::str::FromStr;

use crate::id::BlobDigest;

/// Longest repository name accepted, host excluded (distribution specification: 255 with host).
pub const REPOSITORY_LEN_MAX: usize = 255;
/// Longest tag (distribution specification).
pub const TAG_LEN_MAX: usize = 128;
/// Longest host with port: a DNS name and `:65535`.
pub const HOST_LEN_MAX: usize = 260;

/// A text that names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a repository name.
    #[error(
        "malformed repository name: expected components of a-z, 0-9, '.', '_', '-' joined by '/'"
    )]
    Repository,
    /// Not a tag.
    #[error(
        "malformed tag: expected at most 128 of A-Z, a-z, 0-9, '_', '.', '-', not starting with '.' or '-'"
    )]
    Tag,
    /// Not a digest of a kind that is handled.
    #[error(
        "malformed or unsupported digest: expected \"sha256:\" and 64 lowercase hexadecimal digits"
    )]
    Digest,
    /// Not a host name or address with an optional port.
    #[error("malformed registry host")]
    Host,
}

/// A repository of a registry, such as `library/nginx`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryName(String);

impl RepositoryName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One path component: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alnum(first) || !alnum(last) {
        return false;
    }
    // Between two alphanumeric runs stands one '.', one or two '_', or any number of '-'.
    bytes
        .split(|&b| alnum(b))
        .filter(|separator| !separator.is_empty())
        .all(|separator| {
            matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|&b| b == b'-')
        })
}

impl FromStr for RepositoryName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() <= REPOSITORY_LEN_MAX && text.split('/').all(is_component) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Repository)
        }
    }
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ManifestReference {
    /// A name that may move.
    Tag(String),
    /// The content itself.
    Digest(BlobDigest),
}

impl fmt::Display for ManifestReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl FromStr for ManifestReference {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains(':') {
            return text
                .parse()
                .map(Self::Digest)
                .map_err(|_| NameError::Digest);
        }
        let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let valid = !text.is_empty()
            && text.len() <= TAG_LEN_MAX
            && text.bytes().all(ok)
            && !text.starts_with(['.', '-']);
        valid
            .then(|| Self::Tag(text.to_owned()))
            .ok_or(NameError::Tag)
    }
}

/// Whether `text` is a host name, IPv4 address or bracketed IPv6 address with an optional port.
pub fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, rest)) => {
            if v6.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest {
                "" => return true,
                _ => match rest.strip_prefix(':') {
                    Some(port) => ("v6", Some(port)),
                    None => return false,
                },
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    text.len() <= HOST_LEN_MAX
        && host.split('.').all(label)
        && port.is_none_or(|p| {
            p.len() <= 5
                && p.bytes().all(|b| b.is_ascii_digit())
                && p.parse::<u16>().is_ok_and(|n| n > 0)
        })
}

/// An image: `registry.example:5000/team/app:v1`, `...@sha256:...`, or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference {
    /// Registry host with an optional port, as typed; `docker.io` where none was typed.
    pub registry: String,
    /// The repository.
    pub repository: RepositoryName,
    /// Which manifest; where both a tag and a digest were typed, the digest.
    pub reference: ManifestReference,
}

impl ImageReference {
    /// The registry used where none is typed.
    pub const DEFAULT_REGISTRY: &str = "docker.io";
}

impl FromStr for ImageReference {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse::<BlobDigest>()
                        .map_err(|_| NameError::Digest)?,
                ),
            ),
            None => (text, None),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':', '[']) || host == "localhost" => {
                (host, path)
            }
            _ => (Self::DEFAULT_REGISTRY, rest),
        };
        let (path, tag) = match path.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (path, None),
        };
        if !is_host(host) {
            return Err(NameError::Host);
        }
        let repository: RepositoryName = if host == Self::DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}").parse()?
        } else {
            path.parse()?
        };
        let tag = match tag.unwrap_or("latest").parse()? {
            tag @ ManifestReference::Tag(_) => tag,
            ManifestReference::Digest(_) => return Err(NameError::Tag),
        };
        Ok(Self {
            registry: host.to_owned(),
            repository,
            reference: digest.map_or(tag, ManifestReference::Digest),
        })
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = match self.reference {
            ManifestReference::Tag(_) => ':',
            ManifestReference::Digest(_) => '@',
        };
        write!(
            f,
            "{}/{}{separator}{}",
            self.registry, self.repository, self.reference
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms_mean_what_the_container_tools_mean() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (typed, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("team/app:v1", "docker.io/team/app:v1"),
            ("localhost/app", "localhost/app:latest"),
            (
                "r.test:5000/a/b__c/d--e:V_1.2",
                "r.test:5000/a/b__c/d--e:V_1.2",
            ),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            (
                &format!("r.test/x:v1@{digest}"),
                &format!("r.test/x@{digest}"),
            ),
        ] {
            let parsed: ImageReference = typed.parse().unwrap_or_else(|e| panic!("{typed}: {e}"));
            assert_eq!(parsed.to_string(), full);
            assert_eq!(full.parse::<ImageReference>().unwrap(), parsed);
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "/",
            "a//b",
            "../etc",
            "r.test/../x",
            "r.test/A",
            "r.test/a_",
            "r.test/a___b",
            "r.test/a..b",
            "r.test/x:",
            "r.test/x:.v",
            "r.test/x@sha256:00",
            "r.test:0/x",
            "r.test:99999/x",
            "-r.test/x",
            "r.test/x:a/b",
            "r.test/%2e%2e/x",
            "[::g]/x",
            "r.test/a b",
            "user@r.test/x",
        ] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad}");
        }
        assert!("a".repeat(256).parse::<RepositoryName>().is_err());
        assert!("t".repeat(129).parse::<ManifestReference>().is_err());
    }
}
