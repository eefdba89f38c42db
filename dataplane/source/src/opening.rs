//! The first request for a blob of which nothing is known: its answer tells whether the credential
//! may read it and how large it is, and brings its first bytes.

use std::sync::Arc;

use bytes::Bytes;
use http::header::RANGE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_wire::{BlobDigest, ByteRange};
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use crate::answer::{content_length, content_range, judge_body, status_error};
use crate::client::{Answer, Request};
use crate::credential::Credential;
use crate::error::{Lie, SourceError};
use crate::fetch::{BodyStream, Fetch, Identity, OpenBody, Subject};
use crate::probe::check_named_digest;
use crate::source::Inner;

/// A blob that the origin has begun to send. Dropping it ends the transfer.
pub struct OpenedBlob {
    inner: Arc<Inner>,
    subject: Subject,
    body: OpenBody,
    turn: OwnedSemaphorePermit,
}

impl OpenedBlob {
    /// The blob's size in bytes, as the origin states it.
    pub fn size(&self) -> u64 {
        self.subject.size
    }

    /// Some bytes of the blob's start, as soon as there are any. They come again with the body.
    pub async fn peek(&mut self) -> Result<Bytes, SourceError> {
        self.body.peek(self.inner.config.stall_timeout).await
    }

    /// Exactly the bytes before `end`, which lies within the blob: those that are on their way, and
    /// where they are fewer, the rest by further requests. `None` where that is no byte.
    pub fn into_body(self, end: u64) -> Option<BodyStream> {
        let range = ByteRange::new(0, end.min(self.subject.size))?;
        let transfer = self.inner.transfer(range);
        Some(Fetch::opened(self.inner, self.subject, transfer, self.body, self.turn).into_stream())
    }
}

impl std::fmt::Debug for OpenedBlob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenedBlob")
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// One request for the bytes before `first_bytes`. It is not repeated: who asks has another way.
    pub(crate) async fn open_blob(
        self: &Arc<Self>,
        url: Url,
        digest: &BlobDigest,
        first_bytes: u64,
        credential: &Credential,
    ) -> Result<OpenedBlob, SourceError> {
        let turn = self.transfer_turn(&url).await?;
        let mut headers = HeaderMap::new();
        let range = format!("bytes=0-{}", first_bytes.max(1) - 1);
        if let Ok(value) = HeaderValue::from_str(&range) {
            headers.insert(RANGE, value);
        }
        let request = Request {
            method: Method::GET,
            url: url.clone(),
            headers,
            authorization: None,
            body: Bytes::new(),
        };
        let answer = self.send(request, credential).await?;
        if !answer.status().is_success() {
            return Err(self.opening_error(&answer));
        }
        check_named_digest(answer.headers(), &answer.host, digest)?;
        let size = stated_size(&answer).ok_or_else(|| SourceError::Lied {
            host: answer.host.clone(),
            lie: Lie::NoSize,
        })?;
        let asked =
            ByteRange::new(0, size.min(first_bytes.max(1))).ok_or_else(|| SourceError::Lied {
                host: answer.host.clone(),
                lie: Lie::NoSize,
            })?;
        let plan = judge_body(
            &answer.host,
            answer.status(),
            answer.headers(),
            asked,
            size,
            self.clock.date(),
        )?;
        let subject = Subject {
            url,
            credential: credential.clone(),
            size,
            identity: Identity::Digest,
        };
        Ok(OpenedBlob {
            inner: Arc::clone(self),
            subject,
            body: OpenBody::new(answer, plan),
            turn,
        })
    }

    /// A refusal is the registry's word on the credential; an object store that it redirected to
    /// knows nothing of credentials, so that its refusal is only a failure.
    fn opening_error(&self, answer: &Answer) -> SourceError {
        if answer.crossed_origin {
            return SourceError::Unavailable {
                host: answer.host.clone(),
                reason: format!("status {}", answer.status()),
                status: Some(answer.status()),
            };
        }
        status_error(
            &answer.host,
            answer.status(),
            answer.headers(),
            self.clock.date(),
        )
    }
}

fn stated_size(answer: &Answer) -> Option<u64> {
    match answer.status() {
        StatusCode::PARTIAL_CONTENT => content_range(answer.headers())?.total,
        _ => content_length(answer.headers()),
    }
}
