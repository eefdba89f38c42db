//! One request from head to reply: understood, sent to its handler, metered.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use lru::LruCache;
use pantala_wire::BlobDigest;
use pantala_wire::name::RepositoryName;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field::{Empty, display};
use tracing::{Instrument, Span};

use crate::authorize::Gate;
use crate::backend::{Backend, RequestKind};
use crate::body::{Meter, ReplyBody};
use crate::config::MirrorConfig;
use crate::manifest_cache::ManifestCache;
use crate::reply::{Payload, Reject};
use crate::request::{Ask, Target};
use crate::route::Route;
use crate::upstream::UpstreamUrl;
use crate::{blob, manifest, proxy, tunnel};

/// A tag of a repository of a registry.
pub(crate) type TagKey = (UpstreamUrl, RepositoryName, String);

/// Tags whose last digest is remembered: a hint for saving a transfer, so a few suffice.
pub(crate) const TAGS_REMEMBERED_MAX: std::num::NonZeroUsize =
    std::num::NonZeroUsize::new(4096).expect("4096 is not zero");

/// What all requests share.
pub(crate) struct Shared<B: Backend> {
    pub(crate) config: MirrorConfig,
    pub(crate) backend: Arc<B>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) manifests: Mutex<ManifestCache>,
    pub(crate) tags: Mutex<LruCache<TagKey, BlobDigest>>,
    pub(crate) requests: Arc<Semaphore>,
    pub(crate) tunnels: Arc<Semaphore>,
    /// Everything that must have ended before `serve` returns.
    pub(crate) tasks: TaskTracker,
    /// Draining is over: end at once.
    pub(crate) stop: CancellationToken,
    pub(crate) next_id: AtomicU64,
}

/// Answers one request; never fails, since every failure has an answer.
pub(crate) async fn handle<B: Backend>(
    shared: Arc<Shared<B>>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody<B>>, Infallible> {
    let started = Instant::now();
    let span = tracing::info_span!(
        "request",
        id = shared.next_id.fetch_add(1, Ordering::Relaxed),
        kind = Empty,
        upstream = Empty,
        repository = Empty,
        reference = Empty,
        digest = Empty,
        range = Empty,
        status = Empty,
        bytes = Empty,
        seconds = Empty,
    );
    let is_head = request.method() == Method::HEAD;
    let mut done = Done {
        kind: RequestKind::Rejected,
        permit: None,
    };
    let answer = dispatch(&shared, request, started, &mut done)
        .instrument(span.clone())
        .await;
    span.record("kind", done.kind.as_str());
    let response = answer.unwrap_or_else(|reject| {
        span.in_scope(|| {
            tracing::info!(status = reject.status.as_u16(), code = reject.code, reason = %reject.message, "request refused");
        });
        reject.into_response()
    });
    let (mut parts, payload) = response.into_parts();
    let payload = match payload {
        // What a GET would have had is announced, and left out.
        Payload::Full(bytes) if is_head => {
            parts
                .headers
                .insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            Payload::Empty
        }
        payload => payload,
    };
    let meter = Meter {
        backend: shared.backend.clone(),
        span,
        kind: done.kind,
        status: parts.status,
        started,
        head_at: Instant::now(),
        body_bytes: 0,
        complete: false,
        failure: None,
        _permit: done.permit,
    };
    Ok(Response::from_parts(parts, ReplyBody::new(payload, meter)))
}

/// What dispatching found out besides the answer.
struct Done {
    kind: RequestKind,
    permit: Option<OwnedSemaphorePermit>,
}

async fn dispatch<B: Backend>(
    shared: &Arc<Shared<B>>,
    request: Request<Incoming>,
    started: Instant,
    done: &mut Done,
) -> Result<Response<Payload>, Reject> {
    if request.method() == Method::CONNECT {
        done.kind = RequestKind::Tunnel;
        return tunnel::open(shared, request).await;
    }
    let deadline = started + shared.config.first_byte_timeout;
    let (head, _body) = request.into_parts();
    let ask = Ask::read(
        &head.method,
        &head.uri,
        head.headers,
        &shared.config.policy,
        deadline,
    )?;
    let route = match &ask.target {
        Target::Own(route) => {
            done.kind = RequestKind::Internal;
            return Ok(own_page(shared, route));
        }
        Target::Registry(route) => Some(route.clone()),
        Target::Elsewhere => None,
    };
    // The pages above are answered however full the house is: they tell that it stands.
    let permit = shared
        .requests
        .clone()
        .try_acquire_owned()
        .map_err(|_| Reject::overloaded("too many requests are under way"))?;
    done.permit = Some(permit);
    let span = Span::current();
    span.record("upstream", display(&ask.upstream));
    match route {
        Some(Route::Blob { repository, digest }) => {
            done.kind = RequestKind::Blob;
            span.record("repository", repository.as_str());
            span.record("digest", display(&digest));
            blob::serve(shared, &ask, repository, digest).await
        }
        Some(Route::Manifest {
            repository,
            reference,
        }) => {
            done.kind = RequestKind::Manifest;
            span.record("repository", repository.as_str());
            span.record("reference", display(&reference));
            manifest::serve(shared, &ask, &repository, &reference).await
        }
        Some(_) => {
            done.kind = RequestKind::Registry;
            proxy::pass(shared, &ask).await
        }
        None => {
            done.kind = RequestKind::Proxy;
            proxy::pass(shared, &ask).await
        }
    }
}

fn own_page<B: Backend>(shared: &Shared<B>, route: &Route) -> Response<Payload> {
    let (media_type, text) = match route {
        Route::Metrics => (
            "text/plain; version=0.0.4; charset=utf-8",
            shared.backend.metrics_text(),
        ),
        _ => ("text/plain; charset=utf-8", "ok\n".to_owned()),
    };
    let mut response = Response::new(Payload::Full(Bytes::from(text)));
    *response.status_mut() = StatusCode::OK;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}
