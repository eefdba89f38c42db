//! Asks what there is, without fetching it.

use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_TYPE, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_wire::BlobDigest;
use url::Url;

use crate::answer::{content_length, content_range, foreign_encoding, status_error};
use crate::client::{Answer, Request, drain};
use crate::credential::Credential;
use crate::error::{Lie, SourceError};
use crate::source::Inner;
use crate::validator::Validator;

/// The digest of no bytes: the one blob whose length is 0.
const EMPTY_SHA256: [u8; 32] = [
    0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
    0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
];

/// What a registry says of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// The blob's size in bytes.
    pub size: u64,
    /// Whether the registry serves ranges of it, where it told.
    pub accepts_ranges: Option<bool>,
    /// `Content-Type`, as the registry gives it.
    pub content_type: Option<HeaderValue>,
}

/// What an origin says of a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlInfo {
    /// The size in bytes, where the origin knows it.
    pub size: Option<u64>,
    /// Whether the origin serves ranges of it, where it told.
    pub accepts_ranges: Option<bool>,
    /// Which version this is, where the origin names it.
    pub validator: Option<Validator>,
    /// `Content-Type`, as the origin gives it.
    pub content_type: Option<HeaderValue>,
}

/// What either kind of question found.
struct Found {
    size: Option<u64>,
    accepts_ranges: Option<bool>,
    headers: HeaderMap,
    host: String,
}

impl Inner {
    pub(crate) async fn probe_blob(
        &self,
        url: &Url,
        digest: &BlobDigest,
        credential: &Credential,
    ) -> Result<BlobInfo, SourceError> {
        let may_be_empty = *digest.as_bytes() == EMPTY_SHA256;
        let found = self.probe(url, credential, may_be_empty).await?;
        check_named_digest(&found.headers, &found.host, digest)?;
        let size = found.size.ok_or(SourceError::Lied {
            host: found.host,
            lie: Lie::NoSize,
        })?;
        Ok(BlobInfo {
            size,
            accepts_ranges: found.accepts_ranges,
            content_type: found.headers.get(CONTENT_TYPE).cloned(),
        })
    }

    pub(crate) async fn probe_url(
        &self,
        url: &Url,
        credential: &Credential,
    ) -> Result<UrlInfo, SourceError> {
        let found = self.probe(url, credential, false).await?;
        Ok(UrlInfo {
            size: found.size,
            accepts_ranges: found.accepts_ranges,
            validator: Validator::of(&found.headers),
            content_type: found.headers.get(CONTENT_TYPE).cloned(),
        })
    }

    /// HEAD, then a GET of one byte where that tells no size; both tried again after failures
    /// that may pass.
    async fn probe(
        &self,
        url: &Url,
        credential: &Credential,
        may_be_empty: bool,
    ) -> Result<Found, SourceError> {
        let _turn = self.exchange_turn(url).await?;
        let mut attempts = self.attempts();
        loop {
            match self.probe_once(url, credential, may_be_empty).await {
                Ok(found) => return Ok(found),
                Err(error) => self.pause(&mut attempts, error).await?,
            }
        }
    }

    async fn probe_once(
        &self,
        url: &Url,
        credential: &Credential,
        may_be_empty: bool,
    ) -> Result<Found, SourceError> {
        let head = self
            .send(request(Method::HEAD, url, HeaderMap::new()), credential)
            .await?;
        let status = head.status();
        if status.is_success() {
            let size = content_length(head.headers())
                .filter(|_| foreign_encoding(head.headers()).is_none())
                // Some origins answer every HEAD with a length of 0.
                .filter(|size| *size > 0 || may_be_empty);
            if size.is_some() {
                return Ok(found(size, accepts_ranges(head.headers()), head));
            }
        } else if !head_is_unsupported(&head) {
            return Err(self.refusal(&head));
        }
        self.probe_first_byte(url, credential).await
    }

    async fn probe_first_byte(
        &self,
        url: &Url,
        credential: &Credential,
    ) -> Result<Found, SourceError> {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let answer = self
            .send(request(Method::GET, url, headers), credential)
            .await?;
        let size = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                content_range(answer.headers()).and_then(|content| content.total)
            }
            // Nothing has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE if is_empty(answer.headers()) => Some(0),
            status if status.is_success() && foreign_encoding(answer.headers()).is_none() => {
                content_length(answer.headers())
            }
            status if status.is_success() => None,
            _ => return Err(self.refusal(&answer)),
        };
        let accepts = Some(answer.status() == StatusCode::PARTIAL_CONTENT);
        let (headers, host) = (answer.headers().clone(), answer.host.clone());
        drain(answer.response).await;
        Ok(Found {
            size,
            accepts_ranges: accepts,
            headers,
            host,
        })
    }

    fn refusal(&self, answer: &Answer) -> SourceError {
        status_error(
            &answer.host,
            answer.status(),
            answer.headers(),
            self.clock.date(),
        )
    }
}

/// An answer that names another digest than the one asked for is about something else.
pub(crate) fn check_named_digest(
    headers: &HeaderMap,
    host: &str,
    digest: &BlobDigest,
) -> Result<(), SourceError> {
    let named = headers
        .get("docker-content-digest")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<BlobDigest>().ok());
    match named {
        Some(named) if named != *digest => Err(SourceError::Lied {
            host: host.to_owned(),
            lie: Lie::Digest(named.to_string()),
        }),
        _ => Ok(()),
    }
}

fn found(size: Option<u64>, accepts_ranges: Option<bool>, answer: Answer) -> Found {
    Found {
        size,
        accepts_ranges,
        headers: answer.headers().clone(),
        host: answer.host,
    }
}

fn request(method: Method, url: &Url, headers: HeaderMap) -> Request {
    Request {
        method,
        url: url.clone(),
        headers,
        authorization: None,
        body: Bytes::new(),
    }
}

/// Whether a GET may still succeed: the origin knows no HEAD, or the request ended at an object
/// store whose signed URL is good for GET only.
fn head_is_unsupported(answer: &Answer) -> bool {
    let status = answer.status();
    matches!(status.as_u16(), 400 | 405 | 501)
        || (answer.crossed_origin && matches!(status.as_u16(), 401 | 403))
}

fn accepts_ranges(headers: &HeaderMap) -> Option<bool> {
    let value = headers.get(ACCEPT_RANGES)?.as_bytes();
    Some(value.eq_ignore_ascii_case(b"bytes"))
}

fn is_empty(headers: &HeaderMap) -> bool {
    headers
        .get(http::header::CONTENT_RANGE)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"bytes */0"))
}
