//! Blobs and manifests on their way into a registry, as the distribution specification has it: a blob in chunks,
//! then its digest; the manifest last.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_wire::BlobDigest;
use pantala_wire::name::{ManifestReference, RepositoryName};
use url::Url;

use crate::answer::status_error;
use crate::client::{Answer, Request, drain};
use crate::credential::Credential;
use crate::error::SourceError;
use crate::redirect::next_hop;
use crate::source::Source;
use crate::upstream::Upstream;

/// A blob that is being pushed. Give it [`Self::append`] its bytes in order, then [`Self::finish`]. A push that is
/// dropped is forgotten by the registry after a while.
///
/// Nothing is tried again here: a registry that has taken a chunk and could not say so would get it twice.
pub struct BlobPush {
    source: Source,
    url: Url,
    credential: Credential,
    sent_bytes: u64,
}

impl Source {
    /// Whether the registry has the blob.
    ///
    /// # Errors
    /// As of [`Self::probe_blob`], but for "not found".
    pub async fn has_blob(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        digest: &BlobDigest,
        credential: &Credential,
    ) -> Result<bool, SourceError> {
        match self
            .probe_blob(upstream, repository, digest, credential)
            .await
        {
            Ok(_) => Ok(true),
            Err(SourceError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Begins to push a blob.
    ///
    /// # Errors
    /// Where the registry refuses or cannot be reached.
    pub async fn push_blob(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        credential: &Credential,
    ) -> Result<BlobPush, SourceError> {
        let url = upstream.join(&format!("/v2/{repository}/blobs/uploads/"))?;
        let mut push = BlobPush {
            source: self.clone(),
            url,
            credential: credential.clone(),
            sent_bytes: 0,
        };
        push.step(Method::POST, HeaderMap::new(), Bytes::new())
            .await?;
        Ok(push)
    }

    /// Pushes a manifest, whose blobs the registry has, under `reference`.
    ///
    /// # Errors
    /// Where the registry refuses or cannot be reached.
    pub async fn push_manifest(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        reference: &ManifestReference,
        kind: &HeaderValue,
        manifest: Bytes,
        credential: &Credential,
    ) -> Result<(), SourceError> {
        let url = upstream.join(&format!("/v2/{repository}/manifests/{reference}"))?;
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, kind.clone())]);
        let answer = self
            .put(Method::PUT, url, headers, manifest, credential)
            .await?;
        self.expect(answer, StatusCode::CREATED).await.map(drop)
    }

    async fn put(
        &self,
        method: Method,
        url: Url,
        mut headers: HeaderMap,
        body: Bytes,
        credential: &Credential,
    ) -> Result<Answer, SourceError> {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let request = Request {
            method,
            url,
            headers,
            authorization: None,
            body,
        };
        self.inner().send(request, credential).await
    }

    async fn expect(&self, answer: Answer, status: StatusCode) -> Result<HeaderMap, SourceError> {
        let headers = answer.headers().clone();
        if answer.status() != status {
            let now = self.inner().clock.date();
            return Err(status_error(&answer.host, answer.status(), &headers, now));
        }
        drain(answer.response).await;
        Ok(headers)
    }
}

impl BlobPush {
    /// Sends the next bytes. Within the time for a first byte: a few MiB at a time.
    ///
    /// # Errors
    /// Where the registry refuses or cannot be reached; the push is over then.
    pub async fn append(&mut self, bytes: Bytes) -> Result<(), SourceError> {
        let Some(last) = (bytes.len() as u64).checked_sub(1) else {
            return Ok(());
        };
        let range = format!("{}-{}", self.sent_bytes, self.sent_bytes + last);
        let mut headers = HeaderMap::from_iter([(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        )]);
        if let Ok(range) = HeaderValue::from_str(&range) {
            headers.insert(CONTENT_RANGE, range);
        }
        self.sent_bytes += last + 1;
        self.step(Method::PATCH, headers, bytes).await
    }

    /// Tells the registry that this was all, and what it should be.
    ///
    /// # Errors
    /// Where the registry refuses, because it received something else for one.
    pub async fn finish(mut self, digest: &BlobDigest) -> Result<(), SourceError> {
        self.url
            .query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let answer = self
            .source
            .put(
                Method::PUT,
                self.url,
                HeaderMap::new(),
                Bytes::new(),
                &self.credential,
            )
            .await?;
        self.source
            .expect(answer, StatusCode::CREATED)
            .await
            .map(drop)
    }

    /// One request, whose answer says where the next one goes.
    async fn step(
        &mut self,
        method: Method,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<(), SourceError> {
        let answer = self
            .source
            .put(method, self.url.clone(), headers, body, &self.credential)
            .await?;
        let headers = self.source.expect(answer, StatusCode::ACCEPTED).await?;
        let hop = next_hop(&self.url, &headers, 0)?;
        if hop.crosses_origin {
            // What was meant for the registry is not shown to whom it points at.
            self.credential = Credential::NONE;
        }
        self.url = hop.url;
        Ok(())
    }
}
