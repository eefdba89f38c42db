//! What a request's path means.
//!
//! The grammar is narrow on purpose: a path that passes is also what the registry will understand
//! by it. Nothing is normalised; a path that would need it is refused.

use pantala_wire::BlobDigest;
use pantala_wire::name::{ManifestReference, RepositoryName};

/// Longest path accepted: a repository (255), a digest and the words between fit several times.
pub const PATH_LEN_MAX: usize = 1024;

/// A path's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `/healthy`.
    Healthy,
    /// `/server/ping`.
    Ping,
    /// `/metrics`.
    Metrics,
    /// `/v2/`: does the registry speak the protocol, and does it want credentials?
    Base,
    /// `/v2/<repository>/blobs/<digest>`.
    Blob {
        /// The repository.
        repository: RepositoryName,
        /// The blob.
        digest: BlobDigest,
    },
    /// `/v2/<repository>/manifests/<reference>`.
    Manifest {
        /// The repository.
        repository: RepositoryName,
        /// The tag or digest.
        reference: ManifestReference,
    },
    /// Anything else below `/v2/` (tags, referrers, the catalogue, digests of other algorithms):
    /// the registry's own business.
    Registry,
}

/// A path that is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// Longer than [`PATH_LEN_MAX`].
    #[error("the path is longer than {PATH_LEN_MAX} bytes")]
    TooLong,
    /// Percent-encoding, control or other characters that no registry path has.
    #[error(
        "the path has characters that no registry path has (percent-encoding included, but for %3A)"
    )]
    Characters,
    /// `.`, `..` or an empty segment.
    #[error("the path has an empty segment, \".\" or \"..\"")]
    Segments,
    /// Not a repository name.
    #[error(
        "malformed repository name: expected components of a-z, 0-9, '.', '_', '-' joined by '/'"
    )]
    Repository,
    /// Not a digest.
    #[error("malformed digest: expected \"sha256:\" and 64 lowercase hexadecimal digits")]
    Digest,
    /// Not a tag.
    #[error(
        "malformed tag: expected at most 128 of A-Z, a-z, 0-9, '_', '.', '-', not starting with '.' or '-'"
    )]
    Tag,
    /// Not a path that this server knows.
    #[error("nothing is served under this path")]
    Unknown,
}

/// Reads the path of a request (no query). Never panics, whatever the input.
pub fn parse_path(path: &str) -> Result<Route, RouteError> {
    match path {
        "/healthy" => return Ok(Route::Healthy),
        "/server/ping" => return Ok(Route::Ping),
        "/metrics" => return Ok(Route::Metrics),
        _ => {}
    }
    parse_registry_path(path)
}

/// Reads a path that is a registry's, as in a forward proxy's request: `/healthy` and its like
/// mean nothing here.
pub fn parse_registry_path(path: &str) -> Result<Route, RouteError> {
    if path.len() > PATH_LEN_MAX {
        return Err(RouteError::TooLong);
    }
    if path == "/v2/" || path == "/v2" {
        return Ok(Route::Base);
    }
    let Some(rest) = path.strip_prefix("/v2/") else {
        return Err(RouteError::Unknown);
    };
    // Some clients encode the colon of a digest. No other character of a registry path needs
    // encoding, so any other escape hides something.
    let decoded = rest.replace("%3A", ":").replace("%3a", ":");
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b':' | b'.' | b'_' | b'-');
    // `+`, `~`, `=` and `@` appear in extension APIs and mean nothing to a path parser.
    let harmless = |b: u8| plain(b) || matches!(b, b'+' | b'~' | b'=' | b'@' | b',');
    if !decoded.bytes().all(harmless) {
        return Err(RouteError::Characters);
    }
    let segments: Vec<&str> = decoded.split('/').collect();
    if segments.iter().any(|s| matches!(*s, "" | "." | "..")) {
        return Err(RouteError::Segments);
    }
    // The name may itself contain "blobs": what counts is the last segment but one.
    let [name @ .., kind @ ("blobs" | "manifests"), last] = segments.as_slice() else {
        return Ok(Route::Registry);
    };
    let repository: RepositoryName = name.join("/").parse().map_err(|_| RouteError::Repository)?;
    if is_other_digest(last) {
        return Ok(Route::Registry);
    }
    if *kind == "blobs" {
        let digest = last.parse().map_err(|_| RouteError::Digest)?;
        return Ok(Route::Blob { repository, digest });
    }
    let reference = last.parse().map_err(|_| {
        if last.contains(':') {
            RouteError::Digest
        } else {
            RouteError::Tag
        }
    })?;
    Ok(Route::Manifest {
        repository,
        reference,
    })
}

/// A sha512 digest, the other algorithm that the OCI image specification registers: well-formed,
/// but no identity here, so the registry answers for it.
fn is_other_digest(text: &str) -> bool {
    text.strip_prefix("sha512:").is_some_and(|hex| {
        hex.len() == 128
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest_text() -> String {
        format!("sha256:{}", "ab".repeat(32))
    }

    #[test]
    fn the_paths_of_the_distribution_specification_are_understood() {
        let d = digest_text();
        let blob = Route::Blob {
            repository: "team/app".parse().unwrap(),
            digest: d.parse().unwrap(),
        };
        for path in [
            format!("/v2/team/app/blobs/{d}"),
            format!("/v2/team/app/blobs/{}", d.replace(':', "%3A")),
            format!("/v2/team/app/blobs/{}", d.replace(':', "%3a")),
        ] {
            assert_eq!(parse_path(&path).unwrap(), blob, "{path}");
        }
        for reference in ["v1", "V1.2_x-y", &d] {
            assert_eq!(
                parse_path(&format!("/v2/blobs/manifests/manifests/{reference}")).unwrap(),
                Route::Manifest {
                    repository: "blobs/manifests".parse().unwrap(),
                    reference: reference.parse().unwrap(),
                }
            );
        }
        for (path, route) in [
            ("/v2/", Route::Base),
            ("/v2", Route::Base),
            ("/healthy", Route::Healthy),
            ("/server/ping", Route::Ping),
            ("/metrics", Route::Metrics),
            ("/v2/team/app/tags/list", Route::Registry),
            ("/v2/_catalog", Route::Registry),
        ] {
            assert_eq!(parse_path(path).unwrap(), route, "{path}");
        }
        let sha512 = format!("/v2/a/blobs/sha512:{}", "0".repeat(128));
        assert_eq!(parse_path(&sha512).unwrap(), Route::Registry);
        let referrers = format!("/v2/a/referrers/{d}");
        assert_eq!(parse_path(&referrers).unwrap(), Route::Registry);
    }

    #[test]
    fn tricks_are_refused_each_for_its_reason() {
        let d = digest_text();
        for (path, error) in [
            (format!("/v2/../v2/a/blobs/{d}"), RouteError::Segments),
            (format!("/v2/a/./blobs/{d}"), RouteError::Segments),
            (format!("/v2//blobs/{d}"), RouteError::Segments),
            (format!("/v2/a//blobs/{d}"), RouteError::Segments),
            (format!("/v2/a/blobs/{d}/"), RouteError::Segments),
            (format!("/v2/%2e%2e/blobs/{d}"), RouteError::Characters),
            (format!("/v2/a%2fb/blobs/{d}"), RouteError::Characters),
            (format!("/v2/a/blobs/{d}%00"), RouteError::Characters),
            (
                format!("/v2/a/blobs/{}", d.replace(':', "%253A")),
                RouteError::Characters,
            ),
            ("/v2/a\\b/tags/list".to_owned(), RouteError::Characters),
            ("/v2/a;b/tags/list".to_owned(), RouteError::Characters),
            (format!("/v2/A/blobs/{d}"), RouteError::Repository),
            (format!("/v2/blobs/{d}"), RouteError::Repository),
            (format!("/v2/a:b/blobs/{d}"), RouteError::Repository),
            ("/v2/a/blobs/sha256:00".to_owned(), RouteError::Digest),
            (
                format!("/v2/a/blobs/{}", d.to_uppercase()),
                RouteError::Digest,
            ),
            ("/v2/a/blobs/latest".to_owned(), RouteError::Digest),
            ("/v2/a/manifests/sha256:xyz".to_owned(), RouteError::Digest),
            ("/v2/a/manifests/.hidden".to_owned(), RouteError::Tag),
            ("/".to_owned(), RouteError::Unknown),
            ("/v1/_ping".to_owned(), RouteError::Unknown),
            ("/healthy/".to_owned(), RouteError::Unknown),
            ("*".to_owned(), RouteError::Unknown),
            (
                format!("/v2/{}/tags/list", "a".repeat(2000)),
                RouteError::TooLong,
            ),
        ] {
            assert_eq!(parse_path(&path).unwrap_err(), error, "{path}");
        }
        assert_eq!(
            parse_registry_path("/healthy").unwrap_err(),
            RouteError::Unknown
        );
    }

    proptest! {
        #[test]
        fn any_text_is_answered_and_no_accepted_path_climbs(path in "(/v2)?[/.a-z%0-9:A-F]{0,80}") {
            if let Ok(route) = parse_path(&path) {
                prop_assert!(!path.split('/').any(|segment| segment == ".."));
                if let Route::Blob { repository, digest } = route {
                    let canonical = format!("/v2/{repository}/blobs/{digest}");
                    prop_assert_eq!(path.replace("%3A", ":").replace("%3a", ":"), canonical);
                }
            }
        }

        #[test]
        fn every_valid_blob_path_is_accepted(
            name in "[a-z0-9]{1,8}([._/-][a-z0-9]{1,8}){0,4}", bytes in any::<[u8; 32]>(),
        ) {
            let digest = BlobDigest::new(bytes);
            let route = parse_path(&format!("/v2/{name}/blobs/{digest}"));
            prop_assert_eq!(route, Ok(Route::Blob { repository: name.parse().unwrap(), digest }));
        }
    }
}
