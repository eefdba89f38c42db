//! The way to a registry: through the node's mirror, or straight.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{ACCEPT, CONTENT_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_source::{Credential, Reply, Source, SourceError, Upstream};
use pantala_wire::name::{ManifestReference, RepositoryName};
use pantala_wire::{BlobDigest, ByteRange};

use super::super::failure::Failure;
use super::super::output::plain;
use super::manifest::{ACCEPTED, BlobName, MANIFEST_MAX_BYTES};
use super::{about_source, login_hint};

/// An error answer worth quoting is shorter.
const ERROR_MAX_BYTES: u64 = 64 << 10;

/// How one repository is read.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) source: Source,
    /// The registry, or the node's mirror.
    pub(super) upstream: Upstream,
    /// The registry's name for the node; absent on the straight way.
    pub(super) ns: Option<String>,
    pub(super) repository: RepositoryName,
    pub(super) credential: Credential,
}

/// A manifest as it came.
pub(super) struct RawManifest {
    pub(super) body: Bytes,
    pub(super) content_type: String,
    /// `Docker-Content-Digest`, where it is one.
    pub(super) announced: Option<BlobDigest>,
}

/// What came of asking for a part of a blob.
pub(super) enum Part {
    /// The bytes from the offset asked for.
    Bytes(BoxStream<'static, Result<Bytes, SourceError>>),
    /// The bytes from 0, as the range was ignored.
    FromStart(BoxStream<'static, Result<Bytes, SourceError>>),
}

impl Way {
    /// Through the mirror at `node`.
    pub(super) fn mirror(node: SocketAddr) -> Result<Upstream, Failure> {
        format!("http://{node}")
            .parse()
            .map_err(|e| Failure::usage(format!("{node} cannot be a mirror: {e}")))
    }

    pub(super) async fn manifest(
        &self,
        reference: &ManifestReference,
    ) -> Result<RawManifest, Failure> {
        let mut headers = HeaderMap::new();
        for kind in ACCEPTED {
            headers.append(ACCEPT, HeaderValue::from_static(kind));
        }
        let doing = format!("read the manifest {reference} of {}", self.repository);
        let reply = self
            .ask(&format!("manifests/{reference}"), headers)
            .await
            .map_err(|e| about_source(&doing, &e, &self.credential))?;
        if reply.status != StatusCode::OK {
            return Err(self.refused(&doing, reply).await);
        }
        let text = |name: &str| {
            let value = reply.headers.get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let content_type = text("content-type").unwrap_or_default();
        let announced = text("docker-content-digest").and_then(|digest| digest.parse().ok());
        let body = reply
            .bytes(MANIFEST_MAX_BYTES)
            .await
            .map_err(|e| about_source(&doing, &e, &self.credential))?;
        Ok(RawManifest {
            body,
            content_type,
            announced,
        })
    }

    /// The bytes of `blob` from `offset` on; `offset` is below its size.
    pub(super) async fn blob(&self, blob: &BlobName, offset: u64) -> Result<Part, Failure> {
        let doing = format!("read the blob {}", blob.digest);
        let fail = |e: SourceError| about_source(&doing, &e, &self.credential);
        if self.ns.is_none() {
            let Some(range) = ByteRange::new(offset, blob.size) else {
                return Ok(Part::Bytes(futures_util::stream::empty().boxed()));
            };
            let stream = self
                .source
                .fetch_blob(
                    &self.upstream,
                    &self.repository,
                    &blob.digest,
                    blob.size,
                    range,
                    &self.credential,
                )
                .await
                .map_err(fail)?;
            return Ok(Part::Bytes(stream.boxed()));
        }
        let mut headers = HeaderMap::new();
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            headers.insert(RANGE, range);
        }
        let path = format!("blobs/{}", blob.digest);
        let reply = self.ask(&path, headers).await.map_err(fail)?;
        match reply.status {
            StatusCode::OK => Ok(Part::FromStart(reply.into_stream().boxed())),
            StatusCode::PARTIAL_CONTENT if starts_at(&reply.headers, offset) => {
                Ok(Part::Bytes(reply.into_stream().boxed()))
            }
            StatusCode::PARTIAL_CONTENT => Err(Failure::new(format!(
                "cannot {doing}: the node answered with another range"
            ))),
            _ => Err(self.refused(&doing, reply).await),
        }
    }

    async fn ask(&self, what: &str, headers: HeaderMap) -> Result<Reply, SourceError> {
        let mut path = format!("/v2/{}/{what}", self.repository);
        if let Some(ns) = &self.ns {
            let query = url::form_urlencoded::Serializer::new(String::new())
                .append_pair("ns", ns)
                .finish();
            path = format!("{path}?{query}");
        }
        self.source
            .exchange(
                Method::GET,
                &self.upstream,
                &path,
                headers,
                &self.credential,
            )
            .await
    }

    /// An answer that is no success, in the answer's own words where it has any.
    async fn refused(&self, doing: &str, reply: Reply) -> Failure {
        let status = reply.status;
        let host = reply.host().to_owned();
        let body = reply.bytes(ERROR_MAX_BYTES).await.unwrap_or_default();
        let says = message_of(&body).map_or_else(String::new, |text| format!(" ({text})"));
        let failure = Failure::new(format!("cannot {doing}: {host} answers {status}{says}"));
        match (status, &self.ns) {
            (StatusCode::UNAUTHORIZED, _) => failure.hint(login_hint(&self.credential)),
            (StatusCode::FORBIDDEN, Some(ns)) => failure.hint(format!(
                "the node serves only registries that its configuration names: add \
                 [registries.\"{ns}\"], or go past it with --no-node"
            )),
            (StatusCode::FORBIDDEN, None) => failure.hint(login_hint(&self.credential)),
            (StatusCode::NOT_FOUND, _) => {
                failure.hint("check the name; some registries say this of what a user may not read")
            }
            (status, Some(_)) if status.is_server_error() => {
                failure.hint("see the node's log, or go past it with --no-node")
            }
            _ => failure,
        }
    }
}

/// Whether a `Content-Range` begins at `offset`.
fn starts_at(headers: &HeaderMap, offset: u64) -> bool {
    headers
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.strip_prefix("bytes "))
        .and_then(|text| text.split_once('-'))
        .and_then(|(start, _)| start.trim().parse().ok())
        == Some(offset)
}

/// The first message of a registry's error document.
fn message_of(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let message = value["errors"][0]["message"].as_str()?;
    Some(plain(&message.chars().take(300).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_must_begin_where_it_was_asked_to() {
        let headers = |text| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, HeaderValue::from_static(text));
            headers
        };
        assert!(starts_at(&headers("bytes 7-9/10"), 7));
        for bad in [
            "bytes 0-9/10",
            "bytes */10",
            "7-9/10",
            "bytes 7",
            "bytes 70-9/10",
        ] {
            assert!(!starts_at(&headers(bad), 7), "{bad}");
        }
        assert!(!starts_at(&HeaderMap::new(), 0));
    }

    #[test]
    fn a_registrys_words_are_quoted_without_control_characters() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no \u001b[31m way"}]}"#;
        assert_eq!(message_of(body).as_deref(), Some("no  [31m way"));
        assert_eq!(message_of(b"<html>"), None);
    }
}
