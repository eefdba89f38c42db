//! `GET` and `HEAD` of a manifest: a tag is always asked of the registry; content comes from
//! memory where the registry lets the caller have it. No byte that can be checked against a
//! digest is served or kept unchecked.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Response, StatusCode};
use pantala_wire::BlobDigest;
use pantala_wire::name::{ManifestReference, RepositoryName};
use ring::digest::{Context, SHA256};
use tokio::time::{Instant, timeout_at};

use crate::authorize::{Outcome, Refusal};
use crate::backend::{
    Backend, BackendError, BackendErrorKind, BodyStream, MirrorEvent, UpstreamReply,
    UpstreamRequest,
};
use crate::blob::{etag_of, not_modified, stamp};
use crate::manifest_cache::{CachedManifest, MANIFEST_CACHED_BYTES_MAX, accepts, finish};
use crate::proxy::exchange;
use crate::reply::{
    DOCKER_CONTENT_DIGEST, Payload, Reject, content_length, pass_on, registry_failure,
    strip_hop_by_hop,
};
use crate::request::Ask;
use crate::service::{Shared, TagKey};
use crate::verdict::{Subject, VerdictKey};

/// Largest manifest that is passed on at all: far above the 4 MiB that registries take, and a
/// bound on what one request may pull through.
const MANIFEST_PASSED_BYTES_MAX: u64 = 32 << 20;

pub(crate) async fn serve<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: &RepositoryName,
    reference: &ManifestReference,
) -> Result<Response<Payload>, Reject> {
    let headers = revalidating_headers(&ask.headers);
    match reference {
        ManifestReference::Digest(digest) => {
            by_digest(shared, ask, repository, *digest, headers).await
        }
        ManifestReference::Tag(tag) => by_tag(shared, ask, repository, tag, headers).await,
    }
}

/// The caller's headers without what would make the registry send less than the whole manifest,
/// or send it in a form whose digest is another.
fn revalidating_headers(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    for name in [
        header::RANGE,
        header::IF_RANGE,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::ACCEPT_ENCODING,
    ] {
        headers.remove(name);
    }
    headers
}

fn accept_lines(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
}

/// The manifest from memory, if the client takes its media type.
fn cached<B: Backend>(
    shared: &Shared<B>,
    ask: &Ask,
    digest: &BlobDigest,
) -> Option<CachedManifest> {
    let found = shared.manifests.lock().get(digest)?;
    let media_type = found.media_type.to_str().ok()?;
    accepts(accept_lines(&ask.headers), media_type).then_some(found)
}

fn verdict_key<B: Backend>(
    shared: &Shared<B>,
    ask: &Ask,
    repository: &RepositoryName,
    digest: &BlobDigest,
) -> VerdictKey {
    shared.gate.key(
        ask.headers.get(header::AUTHORIZATION),
        &ask.upstream,
        repository,
        Subject::Manifest,
        digest,
    )
}

async fn by_digest<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: &RepositoryName,
    digest: BlobDigest,
    headers: HeaderMap,
) -> Result<Response<Payload>, Reject> {
    let found = cached(shared, ask, &digest);
    shared.backend.observe(MirrorEvent::ManifestLookup {
        hit: found.is_some(),
    });
    if let Some(found) = found {
        let key = verdict_key(shared, ask, repository, &digest);
        let question = UpstreamRequest {
            upstream: ask.upstream.clone(),
            method: Method::HEAD,
            path_and_query: ask.path_and_query.clone(),
            headers: headers.clone(),
        };
        let backend = shared.backend.clone();
        let asking = async move {
            match backend.exchange(question).await {
                Ok(reply) if reply.status == StatusCode::OK => Outcome::Readable { size_bytes: 0 },
                Ok(reply) => Outcome::Refused(Refusal::read(reply).await),
                Err(error) => Outcome::Failed(error),
            }
        };
        let (outcome, origin) = shared.gate.decide(key, ask.deadline, asking).await;
        shared.backend.observe(MirrorEvent::Verdict {
            origin,
            readable: matches!(outcome, Outcome::Readable { .. }),
        });
        match outcome {
            Outcome::Readable { .. } => return Ok(from_memory(ask, &digest, found)),
            // A reply to HEAD has no body to explain itself with: let the GET below fetch one.
            Outcome::Refused(_) if !ask.is_head => {}
            Outcome::Refused(refusal) => return refusal.into_response(true),
            Outcome::Failed(error) => return Err(error.into()),
        }
    }
    let reply = exchange(shared, ask, ask.method(), headers, ask.deadline).await?;
    receive(shared, ask, repository, reply, Some(digest), None).await
}

async fn by_tag<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: &RepositoryName,
    tag: &str,
    headers: HeaderMap,
) -> Result<Response<Payload>, Reject> {
    let tag_key: TagKey = (ask.upstream.clone(), repository.clone(), tag.to_owned());
    // Asking for the digest first is worth a round trip only where the content may be at hand.
    let last = shared.tags.lock().get(&tag_key).copied();
    let is_worth_asking = last.is_some_and(|digest| cached(shared, ask, &digest).is_some());
    if !ask.is_head && is_worth_asking {
        let now = Instant::now();
        let half = now + ask.deadline.saturating_duration_since(now) / 2;
        let reply = exchange(shared, ask, Method::HEAD, headers.clone(), half).await?;
        if let Some(reject) = registry_failure(reply.status, &reply.headers) {
            return Err(reject);
        }
        let named = stated_digest(&reply.headers).filter(|_| reply.status == StatusCode::OK);
        let found = named.and_then(|digest| Some((digest, cached(shared, ask, &digest)?)));
        shared.backend.observe(MirrorEvent::ManifestLookup {
            hit: found.is_some(),
        });
        if let Some((digest, found)) = found {
            let key = verdict_key(shared, ask, repository, &digest);
            shared.gate.allow(key, 0);
            shared.tags.lock().put(tag_key, digest);
            return Ok(from_memory(ask, &digest, found));
        }
    }
    let reply = exchange(shared, ask, ask.method(), headers, ask.deadline).await?;
    receive(shared, ask, repository, reply, None, Some(tag_key)).await
}

fn stated_digest(headers: &HeaderMap) -> Option<BlobDigest> {
    headers
        .get(DOCKER_CONTENT_DIGEST)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn from_memory(ask: &Ask, digest: &BlobDigest, found: CachedManifest) -> Response<Payload> {
    let etag = etag_of(digest);
    if let Some(not_modified) = not_modified(ask, &etag, digest) {
        return not_modified;
    }
    let len = found.bytes.len();
    let mut response = Response::new(if ask.is_head {
        Payload::Empty
    } else {
        Payload::Full(found.bytes)
    });
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, found.media_type);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(len));
    stamp(headers, etag, digest);
    response
}

/// Takes in the registry's reply: checks it, keeps it, passes it on.
async fn receive<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: &RepositoryName,
    mut reply: UpstreamReply,
    asked_for: Option<BlobDigest>,
    tag: Option<TagKey>,
) -> Result<Response<Payload>, Reject> {
    if reply.status != StatusCode::OK {
        return pass_on(reply, ask.is_head);
    }
    if ask.is_head {
        if let Some(digest) = asked_for {
            let key = verdict_key(shared, ask, repository, &digest);
            shared.gate.allow(key, 0);
        }
        return pass_on(reply, true);
    }
    if is_encoded(&reply.headers) {
        return Err(bad_manifest(
            "the registry sent the manifest in a content coding that was not asked for",
        ));
    }
    let stated_len = content_length(&reply.headers);
    if stated_len.is_some_and(|len| len > MANIFEST_PASSED_BYTES_MAX) {
        return Err(too_large());
    }
    let expected = asked_for.or_else(|| stated_digest(&reply.headers));
    let read = read_up_to(&mut reply.body, MANIFEST_CACHED_BYTES_MAX);
    let (head, is_whole) = timeout_at(ask.deadline, read).await.map_err(|_| {
        Reject::late(
            "the registry did not send the whole manifest",
            shared.config.first_byte_timeout,
        )
    })??;
    let mut headers = reply.headers;
    strip_hop_by_hop(&mut headers);
    if !is_whole {
        let body = checked(head, reply.body, expected);
        let mut response = Response::new(Payload::Stream(body, stated_len));
        *response.headers_mut() = headers;
        return Ok(response);
    }
    let bytes = join(head);
    if stated_len.is_some_and(|len| len != bytes.len() as u64) {
        return Err(bad_manifest("the registry cut the manifest short"));
    }
    let digest = expected.unwrap_or_else(|| crate::manifest_cache::digest_of(&bytes));
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .cloned()
        .unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let manifest = CachedManifest {
        media_type,
        bytes: bytes.clone(),
    };
    shared
        .manifests
        .lock()
        .insert(digest, manifest)
        .map_err(|wrong| bad_manifest(&wrong.to_string()))?;
    let key = verdict_key(shared, ask, repository, &digest);
    shared.gate.allow(key, 0);
    if let Some(tag) = tag {
        shared.tags.lock().put(tag, digest);
    }
    let etag = etag_of(&digest);
    if let Some(not_modified) = not_modified(ask, &etag, &digest) {
        return Ok(not_modified);
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    stamp(&mut headers, etag, &digest);
    let mut response = Response::new(Payload::Full(bytes));
    *response.headers_mut() = headers;
    Ok(response)
}

fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .any(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
}

fn bad_manifest(message: &str) -> Reject {
    Reject::new(StatusCode::BAD_GATEWAY, "MANIFEST_INVALID", message)
        .with_hint("try again; if it stays, the registry (or a proxy before it) is broken")
}

fn too_large() -> Reject {
    bad_manifest("the manifest is larger than any that is passed on (32 MiB)")
}

/// Chunks until the body ends (`true`) or more than `limit_bytes` have come.
async fn read_up_to(
    body: &mut BodyStream,
    limit_bytes: usize,
) -> Result<(VecDeque<Bytes>, bool), Reject> {
    let mut chunks = VecDeque::new();
    let mut len = 0;
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        len += chunk.len();
        chunks.push_back(chunk);
        if len > limit_bytes {
            return Ok((chunks, false));
        }
    }
    Ok((chunks, true))
}

fn join(mut chunks: VecDeque<Bytes>) -> Bytes {
    if chunks.len() == 1 {
        return chunks.pop_front().unwrap_or_default();
    }
    let mut all = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
    for chunk in chunks {
        all.extend_from_slice(&chunk);
    }
    all.freeze()
}

/// What [`checked`] has passed on and holds back.
struct Checking {
    head: VecDeque<Bytes>,
    rest: BodyStream,
    held: Bytes,
    seen: Context,
    seen_bytes: u64,
    expected: Option<BlobDigest>,
    is_done: bool,
}

/// A huge manifest on its way: its last chunk is held back until all of it proved right, so that
/// wrong bytes end in a cut connection and never in a complete reply.
fn checked(head: VecDeque<Bytes>, rest: BodyStream, expected: Option<BlobDigest>) -> BodyStream {
    let checking = Checking {
        head,
        rest,
        held: Bytes::new(),
        seen: Context::new(&SHA256),
        seen_bytes: 0,
        expected,
        is_done: false,
    };
    Box::pin(stream::try_unfold(checking, |mut checking| async move {
        loop {
            if checking.is_done {
                return Ok(None);
            }
            let next = match checking.head.pop_front() {
                Some(chunk) => Some(chunk),
                None => checking.rest.next().await.transpose()?,
            };
            let Some(chunk) = next else {
                let actual = finish(checking.seen.clone());
                if checking.expected.is_some_and(|expected| expected != actual) {
                    return Err(broken(
                        "the manifest does not have the digest it came under",
                    ));
                }
                checking.is_done = true;
                let last = std::mem::take(&mut checking.held);
                return Ok(Some((last, checking)));
            };
            checking.seen_bytes += chunk.len() as u64;
            if checking.seen_bytes > MANIFEST_PASSED_BYTES_MAX {
                return Err(broken(
                    "the manifest is larger than any that is passed on (32 MiB)",
                ));
            }
            checking.seen.update(&chunk);
            let out = std::mem::replace(&mut checking.held, chunk);
            if !out.is_empty() {
                return Ok(Some((out, checking)));
            }
        }
    }))
}

fn broken(message: &str) -> BackendError {
    BackendError::new(BackendErrorKind::BadUpstream, message)
}
