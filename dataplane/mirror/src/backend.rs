//! What the mirror needs from the node: a way to registries, and the bytes of blobs.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pantala_wire::name::RepositoryName;
use pantala_wire::{BlobDigest, ByteRange, Priority};

use crate::upstream::UpstreamUrl;

/// The bytes of a body as they arrive. An error ends it; ending early is an error too.
pub type BodyStream = Pin<Box<dyn Stream<Item = Result<Bytes, BackendError>> + Send>>;

/// What the node does for the mirror. Cheap to call many times at once; dropping a returned
/// future or stream gives up the request.
pub trait Backend: Send + Sync + 'static {
    /// Sends a request to the registry with the caller's headers and gives its reply, whatever
    /// its status: manifests, `/v2/`, tags, referrers, anything that is not a blob. Redirects are
    /// the backend's business; the caller's `Authorization` never crosses an origin.
    fn exchange(
        &self,
        request: UpstreamRequest,
    ) -> impl Future<Output = Result<UpstreamReply, BackendError>> + Send;

    /// Asks the registry whether this caller may read this blob of this repository, and its size.
    /// The answer is the registry's own, given to a request with this caller's credentials; where the
    /// caller wants the whole blob, that may be the request that fetches it. A reply that refuses
    /// (401, 403, 404, 429...) is a verdict, not an error.
    fn probe_blob(
        &self,
        request: BlobProbe,
    ) -> impl Future<Output = Result<BlobVerdict, BackendError>> + Send;

    /// Opens exactly the bytes of `range`, from the store, the swarm or the source. The stream
    /// yields them as they arrive, verified. Only called for a caller with a positive verdict.
    fn open_blob(
        &self,
        request: BlobOpen,
    ) -> impl Future<Output = Result<BodyStream, BackendError>> + Send;

    /// The body of `/metrics`, in Prometheus' text format.
    fn metrics_text(&self) -> String;

    /// Takes note of something countable. Called on the way of requests: must not block.
    fn observe(&self, event: MirrorEvent);
}

/// A request for a registry. `Authorization` among the headers is marked sensitive.
#[derive(Debug, Clone)]
pub struct UpstreamRequest {
    /// The registry.
    pub upstream: UpstreamUrl,
    /// `GET` or `HEAD`.
    pub method: Method,
    /// Path and query as the registry shall see them.
    pub path_and_query: String,
    /// The caller's headers, every line of them, without those that end at this hop, `Host`, and
    /// `X-Dragonfly-*`.
    pub headers: HeaderMap,
}

/// A registry's reply.
pub struct UpstreamReply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers; those that end at this hop are dropped by the mirror.
    pub headers: HeaderMap,
    /// Its body; empty for a reply to `HEAD`.
    pub body: BodyStream,
}

impl std::fmt::Debug for UpstreamReply {
    // Headers may hold cookies and signed locations.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpstreamReply")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// The question whether a caller may read a blob.
#[derive(Debug, Clone)]
pub struct BlobProbe {
    /// The registry.
    pub upstream: UpstreamUrl,
    /// The repository through which the caller asks.
    pub repository: RepositoryName,
    /// The blob.
    pub digest: BlobDigest,
    /// The caller's `Authorization`, marked sensitive.
    pub authorization: Option<HeaderValue>,
    /// The caller goes on to read the blob from its start to its end, if it may, from whoever has it.
    pub reads_all: bool,
}

/// The registry's answer to a [`BlobProbe`].
#[derive(Debug)]
pub enum BlobVerdict {
    /// The caller may read it.
    Readable {
        /// Its size.
        size_bytes: u64,
    },
    /// The registry's refusal, passed on as it is.
    Refused(UpstreamReply),
}

/// Which bytes of which blob to open, and how.
#[derive(Debug, Clone)]
pub struct BlobOpen {
    /// The registry that vouched for the caller.
    pub upstream: UpstreamUrl,
    /// The repository through which the caller asks.
    pub repository: RepositoryName,
    /// The blob.
    pub digest: BlobDigest,
    /// The blob's size, as the registry states it.
    pub size_bytes: u64,
    /// The bytes wanted; within the blob.
    pub range: ByteRange,
    /// The caller's `Authorization`, for the source alone; marked sensitive.
    pub authorization: Option<HeaderValue>,
    /// How urgent they are.
    pub priority: Priority,
    /// Whether peers may be asked (`X-Dragonfly-Use-P2P`; true where not said).
    pub use_p2p: bool,
    /// Whether the rest of the blob shall be fetched too (`X-Dragonfly-Prefetch`, where said).
    pub prefetch: Option<bool>,
}

/// What kind of failure; decides the status that the client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BackendErrorKind {
    /// Nothing came in time: 504.
    Timeout,
    /// No source can be reached at present: 503.
    Unavailable,
    /// Too much to do: 503 with `Retry-After`.
    Overloaded,
    /// Not served by policy: 403.
    Forbidden,
    /// Does not exist: 404.
    NotFound,
    /// The upstream answered nonsense: 502.
    BadUpstream,
    /// A fault of this node: 500.
    Internal,
}

/// A failure of the backend, told so that a client's operator can act on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// Its kind.
    pub kind: BackendErrorKind,
    /// What failed and why. Goes to the client: no credentials, no signed URLs.
    pub message: String,
    /// What to do about it, where something can be done.
    pub hint: Option<String>,
    /// When to try again, where known.
    pub retry_after: Option<Duration>,
}

impl BackendError {
    /// An error of this kind.
    pub fn new(kind: BackendErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            retry_after: None,
        }
    }
    /// With a word on what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// With a time to try again.
    #[must_use]
    pub const fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
}

/// What a request was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// A blob or a part of one.
    Blob,
    /// A manifest.
    Manifest,
    /// `/v2/` and everything else of the registry's.
    Registry,
    /// A forward-proxy request that is no registry's.
    Proxy,
    /// `CONNECT`.
    Tunnel,
    /// Health and metrics.
    Internal,
    /// Not understood or not allowed.
    Rejected,
}

impl RequestKind {
    /// A label for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Manifest => "manifest",
            Self::Registry => "registry",
            Self::Proxy => "proxy",
            Self::Tunnel => "tunnel",
            Self::Internal => "internal",
            Self::Rejected => "rejected",
        }
    }
}

/// How a verdict on a caller's right came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VerdictOrigin {
    /// Known from before, still fresh.
    Cached,
    /// Known from before; the registry could not be asked again.
    Stale,
    /// The registry was asked.
    Asked,
    /// Another request was asking the same at this moment.
    Shared,
}

impl VerdictOrigin {
    /// A label for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Stale => "stale",
            Self::Asked => "asked",
            Self::Shared => "shared",
        }
    }
}

/// Something to count.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MirrorEvent {
    /// A client connected.
    ConnectionOpened,
    /// A client's connection ended.
    ConnectionClosed,
    /// A connection was turned away: too many are open.
    ConnectionRefused,
    /// A request's last byte was handed over, or the request failed.
    RequestEnded {
        /// What it was for.
        kind: RequestKind,
        /// The status sent.
        status: u16,
        /// Body bytes handed to the connection.
        body_bytes: u64,
        /// From the request's head to the reply's head (for blobs: to the first byte).
        first_byte: Duration,
        /// From the request's head to the end.
        total: Duration,
        /// Whether the body was cut short: by a failure here or by the client.
        cut: bool,
    },
    /// A caller's right was established, or refused.
    Verdict {
        /// How.
        origin: VerdictOrigin,
        /// Whether the caller may read.
        readable: bool,
    },
    /// A manifest was wanted by digest (or by a tag that names one).
    ManifestLookup {
        /// Whether memory had it.
        hit: bool,
    },
    /// A tunnel ended.
    TunnelEnded {
        /// Bytes from the client to the target.
        sent_bytes: u64,
        /// Bytes from the target to the client.
        received_bytes: u64,
    },
}
