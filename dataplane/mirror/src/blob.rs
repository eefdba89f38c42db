//! `GET` and `HEAD` of a blob: the caller's right first, then the range, then the bytes.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use pantala_wire::name::RepositoryName;
use pantala_wire::{BlobDigest, ByteRange};
use tokio::time::timeout_at;

use crate::authorize::{Outcome, Refusal};
use crate::backend::{
    Backend, BackendError, BackendErrorKind, BlobOpen, BlobProbe, BlobVerdict, BodyStream,
    MirrorEvent,
};
use crate::range::{RangeOutcome, content_range, parse_range, unsatisfied_range};
use crate::reply::{API_VERSION, DISTRIBUTION_API_VERSION, DOCKER_CONTENT_DIGEST, Payload, Reject};
use crate::request::Ask;
use crate::service::Shared;
use crate::verdict::Subject;

pub(crate) async fn serve<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: RepositoryName,
    digest: BlobDigest,
) -> Result<Response<Payload>, Reject> {
    let size_bytes = match probe(shared, ask, &repository, digest).await {
        Outcome::Readable { size_bytes } => size_bytes,
        Outcome::Refused(refusal) => return refusal.into_response(ask.is_head),
        Outcome::Failed(error) => return Err(error.into()),
    };
    let etag = etag_of(&digest);
    if let Some(not_modified) = not_modified(ask, &etag, &digest) {
        return Ok(not_modified);
    }
    let range = if ask.is_head {
        RangeOutcome::Whole
    } else {
        requested_range(ask, &etag, size_bytes)
    };
    let mut response = Response::new(Payload::Empty);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    stamp(headers, etag, &digest);
    let wanted = match range {
        RangeOutcome::Whole => ByteRange::new(0, size_bytes),
        RangeOutcome::Part(range) => {
            tracing::Span::current().record("range", tracing::field::debug(range));
            headers.insert(
                header::CONTENT_RANGE,
                ascii(content_range(range, size_bytes)),
            );
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            Some(range)
        }
        RangeOutcome::Unsatisfiable => {
            return Err(Reject::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "RANGE_INVALID",
                format!("the range lies outside the blob's {size_bytes} bytes"),
            )
            .with_header(header::CONTENT_RANGE, ascii(unsatisfied_range(size_bytes)))
            .with_header(header::ACCEPT_RANGES, HeaderValue::from_static("bytes")));
        }
    };
    let len = wanted.map_or(0, |range| range.len());
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(len));
    if let (Some(range), false) = (wanted, ask.is_head) {
        let open = BlobOpen {
            upstream: ask.upstream.clone(),
            repository,
            digest,
            size_bytes,
            range,
            authorization: ask.authorization(),
            priority: ask.priority,
            use_p2p: ask.use_p2p,
            prefetch: ask.prefetch,
        };
        let body = first_byte(shared, ask, open).await?;
        *response.body_mut() = Payload::Stream(body, Some(len));
    }
    Ok(response)
}

/// Whether a yes will be followed by the whole blob: no range of it, and no "unless it has changed".
fn reads_all(ask: &Ask) -> bool {
    let asks_for_less = [header::RANGE, header::IF_NONE_MATCH]
        .iter()
        .any(|name| ask.headers.contains_key(name));
    !ask.is_head && ask.use_p2p && !asks_for_less
}

async fn probe<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    repository: &RepositoryName,
    digest: BlobDigest,
) -> Outcome {
    let authorization = ask.authorization();
    let key = shared.gate.key(
        authorization.as_ref(),
        &ask.upstream,
        repository,
        Subject::Blob,
        &digest,
    );
    let question = BlobProbe {
        upstream: ask.upstream.clone(),
        repository: repository.clone(),
        digest,
        authorization,
        reads_all: reads_all(ask),
    };
    let backend = shared.backend.clone();
    let asking = async move {
        match backend.probe_blob(question).await {
            Ok(BlobVerdict::Readable { size_bytes }) => Outcome::Readable { size_bytes },
            Ok(BlobVerdict::Refused(reply)) => Outcome::Refused(Refusal::read(reply).await),
            Err(error) => Outcome::Failed(error),
        }
    };
    let (outcome, origin) = shared.gate.decide(key, ask.deadline, asking).await;
    shared.backend.observe(MirrorEvent::Verdict {
        origin,
        readable: matches!(outcome, Outcome::Readable { .. }),
    });
    outcome
}

/// Opens the blob and waits for its first bytes, so that a stall still has a status to tell it by.
async fn first_byte<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    open: BlobOpen,
) -> Result<BodyStream, Reject> {
    let opening = async {
        let mut body = shared.backend.open_blob(open).await?;
        loop {
            match body.next().await {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => return Ok((bytes, body)),
                Some(Err(error)) => return Err(error),
                None => {
                    return Err(BackendError::new(
                        BackendErrorKind::BadUpstream,
                        "the blob ended before its first byte",
                    ));
                }
            }
        }
    };
    let (first, rest): (Bytes, BodyStream) =
        timeout_at(ask.deadline, opening).await.map_err(|_| {
            Reject::late(
                "neither a peer nor the registry gave a first byte",
                shared.config.first_byte_timeout,
            )
        })??;
    Ok(Box::pin(stream::iter([Ok(first)]).chain(rest)))
}

/// The entity tag of content with this digest.
pub(crate) fn etag_of(digest: &BlobDigest) -> String {
    format!("\"{digest}\"")
}

/// What every reply with (or about) content of this digest carries.
pub(crate) fn stamp(headers: &mut http::HeaderMap, etag: String, digest: &BlobDigest) {
    headers.insert(header::ETAG, ascii(etag));
    headers.insert(DOCKER_CONTENT_DIGEST, ascii(digest.to_string()));
    headers.insert(DISTRIBUTION_API_VERSION, API_VERSION);
}

/// 304 where the client already has it.
pub(crate) fn not_modified(
    ask: &Ask,
    etag: &str,
    digest: &BlobDigest,
) -> Option<Response<Payload>> {
    // "A recipient MUST use the weak comparison function" (RFC 9110, section 13.1.2).
    let has_it = ask
        .headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag);
    has_it.then(|| {
        let mut response = Response::new(Payload::Empty);
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        stamp(response.headers_mut(), etag.to_owned(), digest);
        response
    })
}

fn requested_range(ask: &Ask, etag: &str, size_bytes: u64) -> RangeOutcome {
    // Several Range lines are a list by another name: ignored like one.
    let mut lines = ask.headers.get_all(header::RANGE).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return RangeOutcome::Whole;
    };
    // If-Range takes the strong comparison; a date never matches, since blobs have none.
    let if_range = ask.headers.get(header::IF_RANGE);
    if if_range.is_some_and(|value| value.as_bytes() != etag.as_bytes()) {
        return RangeOutcome::Whole;
    }
    line.to_str()
        .map_or(RangeOutcome::Whole, |text| parse_range(text, size_bytes))
}

/// A header value of digits, hexadecimal and ASCII punctuation.
fn ascii(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
