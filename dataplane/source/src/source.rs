//! [`Source`]: the crate's face.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT};
use http::{HeaderMap, Method};
use pantala_wire::name::RepositoryName;
use pantala_wire::{BlobDigest, ByteRange};
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use crate::address::{ResolveNames, SystemNames, check_url};
use crate::answer::{remove_hop_by_hop, status_error};
use crate::auth::{Authenticator, Shell};
use crate::client::{Answer, Client, Request, drain};
use crate::clock::Clock;
use crate::config::{ConfigError, SourceConfig};
use crate::counters::{Counters, SourceTotals};
use crate::credential::Credential;
use crate::error::SourceError;
use crate::fetch::{BodyStream, Identity, Subject, fetch};
use crate::gate::{Gate, Kind};
use crate::opening::OpenedBlob;
use crate::probe::{BlobInfo, UrlInfo};
use crate::reply::Reply;
use crate::retry::{RetryPolicy, Transfer};
use crate::upstream::{Upstream, UpstreamError};

/// Registries and other origins, as they are seen from here.
///
/// A clone is a handle to the same connections, tokens and counts. Everything is cancelled by
/// dropping its future or stream; nothing runs on behind them. Nothing is written to disk.
#[derive(Clone)]
pub struct Source {
    inner: Arc<Inner>,
}

/// What all requests share.
pub(crate) struct Inner {
    pub(crate) config: SourceConfig,
    pub(crate) clock: Clock,
    pub(crate) counters: Counters,
    client: Client,
    authenticator: Authenticator,
    gate: Gate,
}

impl Source {
    /// Reads the CAs and sets up the HTTP clients; connects to nothing.
    pub fn new(config: SourceConfig) -> Result<Self, ConfigError> {
        Self::with_names(config, Arc::new(SystemNames))
    }

    /// The same with another resolver, whose answers are held against the address rule, too.
    pub fn with_names(
        config: SourceConfig,
        names: Arc<dyn ResolveNames>,
    ) -> Result<Self, ConfigError> {
        let inner = Inner {
            client: Client::new(&config, names)?,
            authenticator: Authenticator::new(),
            gate: Gate::new(config.transfers_per_host_max, config.exchanges_per_host_max),
            clock: Clock::new(),
            counters: Counters::default(),
            config,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// How large a blob is, or why this credential does not get it: the registry's word on both.
    pub async fn probe_blob(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        digest: &BlobDigest,
        credential: &Credential,
    ) -> Result<BlobInfo, SourceError> {
        let url = blob_url(upstream, repository, digest)?;
        self.inner.probe_blob(&url, digest, credential).await
    }

    /// Whether this credential gets a blob and how large it is, by a request for its first
    /// `first_bytes`, which follow with the returned value.
    ///
    /// Sent once. A refusal of the registry itself is [`SourceError::Refused`],
    /// [`SourceError::NotFound`] or [`SourceError::RateLimited`]; after any other error
    /// [`Self::probe_blob`] may still find out.
    pub async fn open_blob(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        digest: &BlobDigest,
        first_bytes: u64,
        credential: &Credential,
    ) -> Result<OpenedBlob, SourceError> {
        let url = blob_url(upstream, repository, digest)?;
        self.inner
            .open_blob(url, digest, first_bytes, credential)
            .await
    }

    /// The bytes `range` of a blob whose size is known.
    ///
    /// Returns when the registry has accepted the request. Cuts, stalls and passing failures are
    /// mended within the bounds of the configuration, before the first byte and after it. The bytes
    /// are what the registry sent: whether they are the blob's is for the caller to verify.
    pub async fn fetch_blob(
        &self,
        upstream: &Upstream,
        repository: &RepositoryName,
        digest: &BlobDigest,
        size: u64,
        range: ByteRange,
        credential: &Credential,
    ) -> Result<BodyStream, SourceError> {
        let subject = Subject {
            url: blob_url(upstream, repository, digest)?,
            credential: credential.clone(),
            size,
            identity: Identity::Digest,
        };
        fetch(Arc::clone(&self.inner), subject, range).await
    }

    /// One request as it is, for manifests and whatever else a client asks of its registry.
    ///
    /// `headers` are passed on but for those of the connection and `Authorization`, which is the
    /// credential's. Every answer is a success here, 401 with its challenge and 404 included;
    /// redirects of GET and HEAD are followed. GET and HEAD are tried again where the connection or
    /// the registry failed in a way that may pass.
    pub async fn exchange(
        &self,
        method: Method,
        upstream: &Upstream,
        path_and_query: &str,
        headers: HeaderMap,
        credential: &Credential,
    ) -> Result<Reply, SourceError> {
        let url = upstream.join(path_and_query)?;
        self.inner.exchange(method, url, headers, credential).await
    }

    /// What is at a plain URL.
    pub async fn probe_url(
        &self,
        url: &Url,
        credential: &Credential,
    ) -> Result<UrlInfo, SourceError> {
        let url = plain_url(url)?;
        self.inner.probe_url(&url, credential).await
    }

    /// The bytes `range` of what is at a plain URL and was looked at before.
    ///
    /// `size` and the version are `info`'s; [`SourceError::Changed`] where either no longer holds.
    pub async fn fetch_url(
        &self,
        url: &Url,
        info: &UrlInfo,
        range: ByteRange,
        credential: &Credential,
    ) -> Result<BodyStream, SourceError> {
        let size = info.size.ok_or(SourceError::BadRange {
            start: range.start(),
            end: range.end(),
            size: 0,
        })?;
        let subject = Subject {
            url: plain_url(url)?,
            credential: credential.clone(),
            size,
            identity: Identity::Version(info.validator.clone()),
        };
        fetch(Arc::clone(&self.inner), subject, range).await
    }

    /// Whatever a plain URL answers, in one go: for origins that do not know a size.
    pub async fn open_url(
        &self,
        url: &Url,
        headers: HeaderMap,
        credential: &Credential,
    ) -> Result<Reply, SourceError> {
        let url = plain_url(url)?;
        self.inner
            .exchange(Method::GET, url, headers, credential)
            .await
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Sums since this source was made, for metrics.
    pub fn totals(&self) -> SourceTotals {
        self.inner.counters.totals()
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("totals", &self.totals())
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// Sends one request, with the credential, following redirects.
    pub(crate) async fn send(
        &self,
        request: Request,
        credential: &Credential,
    ) -> Result<Answer, SourceError> {
        self.counters.requested();
        let shell = Shell {
            client: &self.client,
            clock: &self.clock,
            counters: &self.counters,
            stall_timeout: self.config.stall_timeout,
            token_patience: self.config.first_byte_timeout,
        };
        self.authenticator.send(shell, request, credential).await
    }

    async fn exchange(
        &self,
        method: Method,
        url: Url,
        mut headers: HeaderMap,
        credential: &Credential,
    ) -> Result<Reply, SourceError> {
        remove_hop_by_hop(&mut headers);
        headers.remove(CONTENT_LENGTH);
        headers.remove(EXPECT);
        let turn = self.exchange_turn(&url).await?;
        let is_repeatable = matches!(method, Method::GET | Method::HEAD);
        let request = Request {
            method,
            url,
            headers,
            authorization: None,
            body: Bytes::new(),
        };
        let mut attempts = self.attempts();
        loop {
            match self.send(request.clone(), credential).await {
                Ok(answer) if is_repeatable && answer.status().is_server_error() => {
                    let error = status_error(
                        &answer.host,
                        answer.status(),
                        answer.headers(),
                        self.clock.date(),
                    );
                    // An origin that says when to come back says so to the client.
                    let give_up = error.retry_after().is_some()
                        || self.pause(&mut attempts, error).await.is_err();
                    if give_up {
                        return Ok(Reply::new(answer, self.config.stall_timeout, Some(turn)));
                    }
                    drain(answer.response).await;
                }
                Ok(answer) => {
                    return Ok(Reply::new(answer, self.config.stall_timeout, Some(turn)));
                }
                Err(error) if is_repeatable => self.pause(&mut attempts, error).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// The state machine of a transfer of `range` that starts now.
    pub(crate) fn transfer(&self, range: ByteRange) -> Transfer {
        let policy = RetryPolicy {
            retries_max: self.config.retries_max,
            patience: self.config.patience,
        };
        // Transfers of one node differ, too, or they would all come back at the same time.
        let seed = self.config.jitter_seed.wrapping_add(
            self.counters
                .transfer_number()
                .wrapping_mul(0x2545_f491_4f6c_dd1d),
        );
        Transfer::new(policy, range, seed, self.clock.now())
    }

    /// The same for a request without a range of its own.
    pub(crate) fn attempts(&self) -> Transfer {
        const ONE: ByteRange = match ByteRange::new(0, 1) {
            Some(range) => range,
            None => unreachable!(),
        };
        self.transfer(ONE)
    }

    pub(crate) async fn transfer_turn(
        &self,
        url: &Url,
    ) -> Result<OwnedSemaphorePermit, SourceError> {
        self.gate
            .turn(url, Kind::Transfer, self.config.patience)
            .await
    }

    pub(crate) async fn exchange_turn(
        &self,
        url: &Url,
    ) -> Result<OwnedSemaphorePermit, SourceError> {
        self.gate
            .turn(url, Kind::Exchange, self.config.first_byte_timeout)
            .await
    }
}

fn blob_url(
    upstream: &Upstream,
    repository: &RepositoryName,
    digest: &BlobDigest,
) -> Result<Url, UpstreamError> {
    upstream.join(&format!("/v2/{repository}/blobs/{digest}"))
}

/// A URL that may be asked: http(s), no user name, no address that is never connected to.
fn plain_url(url: &Url) -> Result<Url, UpstreamError> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(UpstreamError::Scheme);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(UpstreamError::UserInfo);
    }
    check_url(url)?;
    let mut url = url.clone();
    url.set_fragment(None);
    Ok(url)
}
