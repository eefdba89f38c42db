//! The forms of answers: payloads, refusals as OCI error bodies, and which headers may pass.

use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};

use crate::backend::{BackendError, BackendErrorKind, BodyStream, UpstreamReply};
use crate::policy::PolicyError;
use crate::route::RouteError;

/// `Docker-Content-Digest`, by which clients check what they got.
pub(crate) const DOCKER_CONTENT_DIGEST: HeaderName =
    HeaderName::from_static("docker-content-digest");
/// `Docker-Distribution-Api-Version`, by which old clients know a registry.
pub(crate) const DISTRIBUTION_API_VERSION: HeaderName =
    HeaderName::from_static("docker-distribution-api-version");
/// Its one value.
pub(crate) const API_VERSION: HeaderValue = HeaderValue::from_static("registry/2.0");

/// When a client may come back after a failure of unknown length.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);

/// Headers that concern one connection only (RFC 9110, section 7.6.1), and those of proxies.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// A reply's body before it is metered.
pub(crate) enum Payload {
    /// None.
    Empty,
    /// All of it, at hand.
    Full(Bytes),
    /// Bytes to come; with their number where it is known.
    Stream(BodyStream, Option<u64>),
}

/// A request that is not served, and what the client is told.
#[derive(Debug)]
pub(crate) struct Reject {
    pub(crate) status: StatusCode,
    /// An error code of the distribution specification, or one in its manner.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    pub(crate) retry_after: Option<Duration>,
    /// A few at most; a map would make every `Result` large.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

impl Reject {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            hint: None,
            retry_after: None,
            headers: Vec::new(),
        }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Nothing came before the bound on the first byte.
    pub(crate) fn late(what: &str, limit: Duration) -> Self {
        let mut reject = Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "TIMEOUT",
            format!("{what} within {} ms", limit.as_millis()),
        )
        .with_hint("try again, or another mirror; mirror.first_byte_timeout_ms sets the bound");
        reject.retry_after = Some(RETRY_AFTER_DEFAULT);
        reject
    }

    /// Too many of something are under way.
    pub(crate) fn overloaded(what: &str) -> Self {
        let mut reject = Self::new(StatusCode::SERVICE_UNAVAILABLE, "TOOMANYREQUESTS", what)
            .with_hint("try again in a moment, or another mirror");
        reject.retry_after = Some(RETRY_AFTER_DEFAULT);
        reject
    }

    pub(crate) fn into_response(self) -> Response<Payload> {
        let detail = self.hint.map(|hint| serde_json::json!({ "hint": hint }));
        let body = serde_json::json!({
            "errors": [{ "code": self.code, "message": self.message, "detail": detail }]
        })
        .to_string();
        let mut response = Response::new(Payload::Full(Bytes::from(body)));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.extend(self.headers);
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        headers.insert(DISTRIBUTION_API_VERSION, API_VERSION);
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: "0" would invite a client to hammer.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

impl From<BackendError> for Reject {
    fn from(error: BackendError) -> Self {
        let (status, code) = match error.kind {
            BackendErrorKind::Timeout => (StatusCode::GATEWAY_TIMEOUT, "TIMEOUT"),
            BackendErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
            BackendErrorKind::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "TOOMANYREQUESTS"),
            BackendErrorKind::Forbidden => (StatusCode::FORBIDDEN, "DENIED"),
            BackendErrorKind::NotFound => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            BackendErrorKind::BadUpstream => (StatusCode::BAD_GATEWAY, "BADUPSTREAM"),
            BackendErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
        };
        let mut reject = Self::new(status, code, error.message);
        reject.hint = error.hint;
        reject.retry_after = error.retry_after.or_else(|| {
            let passing = matches!(status.as_u16(), 503 | 504);
            passing.then_some(RETRY_AFTER_DEFAULT)
        });
        reject
    }
}

impl From<PolicyError> for Reject {
    fn from(error: PolicyError) -> Self {
        let (status, code) = match error {
            PolicyError::Malformed { .. } => (StatusCode::BAD_REQUEST, "UNSUPPORTED"),
            PolicyError::NotAllowed(_) | PolicyError::ForbiddenAddress(_) => {
                (StatusCode::FORBIDDEN, "DENIED")
            }
        };
        Self::new(status, code, error.to_string()).with_hint(error.hint())
    }
}

impl From<RouteError> for Reject {
    fn from(error: RouteError) -> Self {
        let (status, code) = match error {
            RouteError::TooLong => (StatusCode::URI_TOO_LONG, "NAME_INVALID"),
            RouteError::Characters | RouteError::Segments | RouteError::Repository => {
                (StatusCode::BAD_REQUEST, "NAME_INVALID")
            }
            RouteError::Digest => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            RouteError::Tag => (StatusCode::BAD_REQUEST, "TAG_INVALID"),
            RouteError::Unknown => (StatusCode::NOT_FOUND, "UNSUPPORTED"),
        };
        let reject = Self::new(status, code, error.to_string());
        if error == RouteError::Unknown {
            return reject.with_hint("this is a registry mirror: paths start with /v2/");
        }
        reject
    }
}

/// Drops the headers that end at this hop, those named by `Connection` included.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.into_iter().chain(HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// A failure of the registry itself (5xx) in the terms of a gateway, or `None`: only a registry's
/// word on the request is passed on, and a client must be able to tell who is ill.
pub(crate) fn registry_failure(status: StatusCode, headers: &HeaderMap) -> Option<Reject> {
    if !status.is_server_error() {
        return None;
    }
    let as_gateway = match status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => status,
        _ => StatusCode::BAD_GATEWAY,
    };
    let mut reject = Reject::new(
        as_gateway,
        "UNAVAILABLE",
        format!("the registry answered {status}"),
    )
    .with_hint("the registry is failing; try again later");
    if let Some(after) = headers.get(header::RETRY_AFTER) {
        reject = reject.with_header(header::RETRY_AFTER, after.clone());
    } else if as_gateway != StatusCode::BAD_GATEWAY {
        reject.retry_after = Some(RETRY_AFTER_DEFAULT);
    }
    Some(reject)
}

/// Passes a registry's reply on: its word as it is, its failures as a gateway's.
pub(crate) fn pass_on(reply: UpstreamReply, is_head: bool) -> Result<Response<Payload>, Reject> {
    if let Some(reject) = registry_failure(reply.status, &reply.headers) {
        return Err(reject);
    }
    let mut headers = reply.headers;
    strip_hop_by_hop(&mut headers);
    let len = content_length(&headers);
    if reply.status.is_informational() {
        return Err(Reject::new(
            StatusCode::BAD_GATEWAY,
            "BADUPSTREAM",
            format!("the registry ended its reply with {}", reply.status),
        ));
    }
    let bodiless = is_head
        || matches!(
            reply.status,
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        );
    let payload = if bodiless {
        Payload::Empty
    } else {
        Payload::Stream(reply.body, len)
    };
    let mut response = Response::new(payload);
    *response.status_mut() = reply.status;
    *response.headers_mut() = headers;
    Ok(response)
}

/// The `Content-Length`, where there is exactly one that is a number.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    let mut values = headers.get_all(header::CONTENT_LENGTH).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    value.to_str().ok()?.trim().parse().ok()
}
