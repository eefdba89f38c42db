//! What the mirror is served from: the engine for blobs, the registry for everything else.

use std::sync::Arc;

use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode};
use pantala_mirror::{
    Backend, BackendError, BackendErrorKind, BlobOpen, BlobProbe, BlobVerdict, BodyStream,
    MirrorEvent, RequestKind, UpstreamReply, UpstreamRequest, UpstreamUrl,
};
use pantala_source::{Credential, Reply, SourceError, Upstream};
use pantala_wire::layout::BLOB_SIZE_MAX;

use crate::engine::{DirectError, Opened, ReadError, ReadRequest, Shared, SourceAccess};
use crate::metrics::{Origin, OutcomeLabel, RequestLabel};

/// The node, as its mirror sees it.
pub struct NodeBackend {
    shared: Arc<Shared>,
}

impl NodeBackend {
    /// Serves from these downloads.
    pub const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

/// In the caller's name, and nobody else's: the node adds no credentials of its own.
fn credential(authorization: Option<HeaderValue>) -> Credential {
    authorization.map_or(Credential::NONE, Credential::Header)
}

fn upstream(url: &UpstreamUrl) -> Result<Upstream, BackendError> {
    url.to_string().parse().map_err(|error| {
        BackendError::new(
            BackendErrorKind::Forbidden,
            format!("upstream {url}: {error}"),
        )
    })
}

fn source_error(error: &SourceError) -> BackendError {
    let kind = match error {
        SourceError::NotFound { .. } => BackendErrorKind::NotFound,
        SourceError::TimedOut { .. } => BackendErrorKind::Timeout,
        SourceError::RateLimited { .. } => BackendErrorKind::Overloaded,
        SourceError::Forbidden(_) => BackendErrorKind::Forbidden,
        _ if error.is_retryable() => BackendErrorKind::Unavailable,
        _ => BackendErrorKind::BadUpstream,
    };
    let failed = BackendError::new(kind, error.to_string());
    match error.retry_after() {
        Some(after) => failed.with_retry_after(after),
        None => failed,
    }
}

fn direct_error(error: &DirectError) -> BackendError {
    match error {
        DirectError::Source(error) => source_error(error),
        DirectError::WrongDigest(_) => {
            BackendError::new(BackendErrorKind::BadUpstream, error.to_string())
        }
    }
}

fn read_error(error: &ReadError) -> BackendError {
    match error {
        ReadError::Failed { source, .. } => source_error(source),
        ReadError::Direct(error) => direct_error(error),
        ReadError::NoWay(_) | ReadError::Interrupted(_) | ReadError::Mended(_) => {
            BackendError::new(BackendErrorKind::Unavailable, error.to_string())
        }
        ReadError::Store(_) => BackendError::new(BackendErrorKind::Internal, error.to_string()),
    }
}

/// The registry's reply, as the mirror passes it on; its bytes are counted.
fn passed_on(shared: &Arc<Shared>, reply: Reply) -> UpstreamReply {
    let counter = shared.metrics.registry_other.clone();
    let (status, headers) = (reply.status, reply.headers.clone());
    let body = reply.into_stream().map(move |chunk| {
        let chunk = chunk.map_err(|error| source_error(&error))?;
        counter.inc_by(chunk.len() as u64);
        Ok(chunk)
    });
    UpstreamReply {
        status,
        headers,
        body: Box::pin(body),
    }
}

/// The registry's no, as the client shall see it.
fn refused(status: StatusCode, headers: HeaderMap) -> BlobVerdict {
    BlobVerdict::Refused(UpstreamReply {
        status,
        headers,
        body: Box::pin(futures_util::stream::empty()),
    })
}

/// A refusal is a verdict; anything else says nothing of the caller's right.
fn verdict_of(error: SourceError) -> Result<BlobVerdict, BackendError> {
    match error {
        SourceError::Refused {
            status, headers, ..
        } => Ok(refused(status, HeaderMap::clone(&headers))),
        SourceError::NotFound { status, .. } => Ok(refused(status, HeaderMap::new())),
        SourceError::RateLimited {
            status,
            retry_after,
            ..
        } => {
            let mut headers = HeaderMap::new();
            if let Some(after) = retry_after {
                let seconds = HeaderValue::from(after.as_secs().max(1));
                headers.insert(http::header::RETRY_AFTER, seconds);
            }
            Ok(refused(status, headers))
        }
        error => Err(source_error(&error)),
    }
}

impl Backend for NodeBackend {
    async fn exchange(&self, request: UpstreamRequest) -> Result<UpstreamReply, BackendError> {
        let upstream = upstream(&request.upstream)?;
        let mut headers = request.headers;
        let credential = credential(headers.remove(http::header::AUTHORIZATION));
        let reply = self
            .shared
            .source
            .exchange(
                request.method,
                &upstream,
                &request.path_and_query,
                headers,
                &credential,
            )
            .await
            .map_err(|error| source_error(&error))?;
        Ok(passed_on(&self.shared, reply))
    }

    async fn probe_blob(&self, request: BlobProbe) -> Result<BlobVerdict, BackendError> {
        let access = SourceAccess {
            upstream: upstream(&request.upstream)?,
            repository: request.repository,
            credential: credential(request.authorization),
        };
        if request.reads_all {
            match self.shared.open_first(request.digest, access.clone()).await {
                Opened::Sized(size_bytes) => return Ok(BlobVerdict::Readable { size_bytes }),
                Opened::Refused(error) => return verdict_of(error),
                Opened::Not => {}
            }
        }
        let probe = self.shared.source.probe_blob(
            &access.upstream,
            &access.repository,
            &request.digest,
            &access.credential,
        );
        match probe.await {
            Ok(info) if info.size > BLOB_SIZE_MAX => Err(BackendError::new(
                BackendErrorKind::BadUpstream,
                format!(
                    "{} has {} bytes, which is more than is handled",
                    request.digest, info.size
                ),
            )),
            Ok(info) => Ok(BlobVerdict::Readable {
                size_bytes: info.size,
            }),
            Err(error) => verdict_of(error),
        }
    }

    async fn open_blob(&self, request: BlobOpen) -> Result<BodyStream, BackendError> {
        let access = SourceAccess {
            upstream: upstream(&request.upstream)?,
            repository: request.repository,
            credential: credential(request.authorization),
        };
        let (digest, size) = (request.digest, request.size_bytes);
        if !request.use_p2p {
            return self
                .direct(&request.digest, size, request.range, &access)
                .await;
        }
        let read = ReadRequest {
            range: request.range,
            priority: request.priority,
            access: Some(access.clone()),
        };
        match self.shared.read(digest, size, read).await {
            Ok(stream) => {
                if request.prefetch == Some(true) {
                    let (shared, access) = (Arc::clone(&self.shared), access);
                    tokio::spawn(async move {
                        if let Err(error) = shared.prefetch(digest, size, Some(access)).await {
                            tracing::debug!(%digest, %error, "no prefetch");
                        }
                    });
                }
                let stream = stream.map(|chunk| chunk.map_err(|error| read_error(&error)));
                Ok(Box::pin(stream))
            }
            Err(error) => {
                tracing::warn!(%digest, %error, "cannot store the blob: passing it through from the source");
                self.direct(&digest, size, request.range, &access).await
            }
        }
    }

    fn metrics_text(&self) -> String {
        self.shared.metrics_text()
    }

    fn observe(&self, event: MirrorEvent) {
        let metrics = &self.shared.metrics;
        match event {
            MirrorEvent::RequestEnded {
                kind,
                status,
                first_byte,
                cut,
                ..
            } => {
                if kind == RequestKind::Blob && status < 400 {
                    metrics.first_byte.observe(first_byte.as_secs_f64());
                }
                let status = match status / 100 {
                    _ if cut => "cut",
                    2 => "2xx",
                    3 => "3xx",
                    4 => "4xx",
                    _ => "5xx",
                };
                let kind = kind.as_str();
                metrics
                    .mirror_requests
                    .get_or_create(&RequestLabel { kind, status })
                    .inc();
            }
            MirrorEvent::Verdict { origin, readable } => {
                let outcome = if readable { origin.as_str() } else { "refused" };
                metrics
                    .verdicts
                    .get_or_create(&OutcomeLabel { outcome })
                    .inc();
            }
            MirrorEvent::ConnectionOpened => {
                metrics.mirror_connections.inc();
            }
            MirrorEvent::ConnectionClosed => {
                metrics.mirror_connections.dec();
            }
            _ => {}
        }
    }
}

impl NodeBackend {
    /// Reads past the store and the swarm.
    async fn direct(
        &self,
        digest: &pantala_wire::BlobDigest,
        size_bytes: u64,
        range: pantala_wire::ByteRange,
        access: &SourceAccess,
    ) -> Result<BodyStream, BackendError> {
        let body = self
            .shared
            .direct(digest, size_bytes, range, access)
            .await
            .map_err(|error| source_error(&error))?;
        let metrics = Arc::clone(&self.shared.metrics);
        let body = body.map(move |chunk| {
            let chunk = chunk.map_err(|error| direct_error(&error))?;
            metrics.received(Origin::Passthrough, chunk.len() as u64);
            metrics.client_sent.inc_by(chunk.len() as u64);
            Ok(chunk)
        });
        Ok(Box::pin(body))
    }
}
