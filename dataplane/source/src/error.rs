//! What goes wrong with an origin, whose fault it is, and whether asking again can help.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::address::ForbiddenAddress;
use crate::upstream::UpstreamError;

/// An origin did not give what was asked of it.
///
/// Cheap to clone: one failed request may have to be told to many that wait for it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// The origin answered, and the answer is no.
    #[error("{host} refused the request with status {status}: check the credentials and the name")]
    Refused {
        /// Who refused.
        host: String,
        /// 401, 403 or another status of the 4xx class.
        status: StatusCode,
        /// The answer's headers without those of the connection; `WWW-Authenticate` among them.
        headers: Arc<HeaderMap>,
    },
    /// The origin has no such thing, or says so to this caller.
    #[error("{host} does not have what was asked for (status {status})")]
    NotFound {
        /// Who was asked.
        host: String,
        /// 404 or 410.
        status: StatusCode,
    },
    /// The origin wants to be left alone for longer than may be waited here.
    #[error("{host} limits the rate of requests{}", after(*.retry_after))]
    RateLimited {
        /// Who was asked.
        host: String,
        /// 429 or 503.
        status: StatusCode,
        /// How long the origin said to wait, where it did.
        retry_after: Option<Duration>,
    },
    /// The origin could not be reached, or answered with a failure of its own, until patience or
    /// retries ran out.
    #[error("{host} is unavailable: {reason}")]
    Unavailable {
        /// Who was asked.
        host: String,
        /// What the last attempt ended with.
        reason: String,
        /// The last attempt's status, where there was an answer.
        status: Option<StatusCode>,
    },
    /// The origin's certificate is not trusted here.
    #[error(
        "the TLS certificate of {host} is not accepted ({reason}): configure the CA that issued it"
    )]
    Untrusted {
        /// Who was asked.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing came for too long, until patience or retries ran out.
    #[error("{host} did not {phase} within {} ms", .limit.as_millis())]
    TimedOut {
        /// Who was asked.
        host: String,
        /// What did not happen in time.
        phase: Phase,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection ended early, and retries ran out.
    #[error("{host} cut the transfer at byte {offset} of {end}")]
    Cut {
        /// Who was asked.
        host: String,
        /// The first byte that is missing.
        offset: u64,
        /// One past the last byte wanted.
        end: u64,
    },
    /// The origin contradicts itself or what is known of the blob.
    #[error("{host} gave a wrong answer: {lie}")]
    Lied {
        /// Who was asked.
        host: String,
        /// What is wrong with the answer.
        lie: Lie,
    },
    /// The thing at a URL is not the one that was looked at before.
    #[error("the content at {host} changed in the middle of the transfer: start again")]
    Changed {
        /// Who was asked.
        host: String,
    },
    /// A redirect that is not followed.
    #[error("{host} redirected to where it is not followed: {fault}")]
    Redirect {
        /// Who redirected.
        host: String,
        /// Why not.
        fault: RedirectFault,
    },
    /// The address is one that is never connected to.
    #[error(transparent)]
    Forbidden(#[from] ForbiddenAddress),
    /// The token service that the registry names gave no token.
    #[error("no token from {host} for the registry: {reason}")]
    Token {
        /// The token service.
        host: String,
        /// Why.
        reason: TokenFault,
    },
    /// The answer is larger than its reader allows.
    #[error("the answer of {host} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// Who was asked.
        host: String,
        /// How much was allowed.
        limit_bytes: u64,
    },
    /// The request itself cannot be made.
    #[error(transparent)]
    BadRequest(UpstreamError),
    /// The range is not inside of what is asked for.
    #[error("bytes {start}..{end} are not inside of the {size} bytes there are")]
    BadRange {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Size of the whole.
        size: u64,
    },
}

fn after(retry_after: Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| {
        format!(": try again after {} s", wait.as_secs())
    })
}

impl From<UpstreamError> for SourceError {
    fn from(error: UpstreamError) -> Self {
        match error {
            // One kind for a forbidden address, wherever it was found.
            UpstreamError::Forbidden(address) => Self::Forbidden(address),
            other => Self::BadRequest(other),
        }
    }
}

/// What an origin did not do in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A connection of the few allowed per host became free.
    Turn,
    /// The token that another request is fetching came.
    Token,
    /// The connection was made.
    Connect,
    /// The head of the answer came.
    FirstByte,
    /// The next bytes of the body came.
    NextByte,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Turn => "finish its other requests",
            Self::Token => "get its caller a token",
            Self::Connect => "accept a connection",
            Self::FirstByte => "answer",
            Self::NextByte => "send more of the body",
        })
    }
}

/// How an answer contradicts the question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// The announced size of the whole is not the known one.
    #[error("it says the whole has {announced} bytes, but it has {expected}")]
    Size {
        /// What is known.
        expected: u64,
        /// What was announced.
        announced: u64,
    },
    /// 206 without a usable `Content-Range`.
    #[error("a partial answer without a well-formed Content-Range")]
    ContentRange,
    /// 206 with another range than the one asked for.
    #[error("it sent bytes {got_start}..{got_end} when {start}..{end} were asked for")]
    WrongRange {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// First byte sent.
        got_start: u64,
        /// One past the last byte sent.
        got_end: u64,
    },
    /// `Content-Length` disagrees with `Content-Range`.
    #[error("Content-Length is {length}, but the range has {range_len} bytes")]
    Length {
        /// `Content-Length`.
        length: u64,
        /// Length of the `Content-Range`.
        range_len: u64,
    },
    /// The body went on after its end.
    #[error("the body is longer than announced")]
    TooLong,
    /// 416 for a range inside of the blob.
    #[error("it has no such range: its content is shorter than announced")]
    RangeRefused,
    /// The body is not the blob itself but an encoding of it.
    #[error("the body is encoded ({0}), although that was not asked for")]
    Encoded(String),
    /// `Docker-Content-Digest` names another blob.
    #[error("it answered with another blob ({0})")]
    Digest(String),
    /// The bytes are no HTTP answer, or one with absurd headers.
    #[error("malformed or oversized HTTP answer ({0})")]
    Malformed(String),
    /// A status that has no meaning here.
    #[error("status {0} makes no sense here")]
    Status(StatusCode),
    /// Neither HEAD nor GET tells the size.
    #[error("it does not say how large the content is")]
    NoSize,
}

/// Why a redirect is not followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedirectFault {
    /// More hops than allowed.
    #[error("more than {0} redirects")]
    TooMany(usize),
    /// No `Location`, or not a URL.
    #[error("missing or malformed Location")]
    Location,
    /// From https to http.
    #[error("from https to http")]
    Downgrade,
    /// Not http or https, or with a user name in it.
    #[error("to a URL of a kind that is not followed")]
    Kind,
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    /// The realm is not a URL that may be asked.
    #[error("its realm is not an http(s) URL that may be used")]
    Realm,
    /// The service's answer has no token in it.
    #[error("the token service's answer is malformed")]
    Malformed,
    /// The service refused.
    #[error("the token service answered with status {0}: check user and password")]
    Refused(StatusCode),
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The one who asked: the name, the credentials, the range.
    Caller,
    /// The origin or its token service.
    Origin,
    /// The way there, or the origin: it cannot be told apart from here.
    Network,
    /// The settings of this node.
    Configuration,
}

impl SourceError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Refused { .. }
            | Self::NotFound { .. }
            | Self::BadRequest(_)
            | Self::BadRange { .. }
            | Self::Forbidden(_) => Blame::Caller,
            Self::RateLimited { .. }
            | Self::Lied { .. }
            | Self::Changed { .. }
            | Self::Redirect { .. }
            | Self::Token { .. }
            | Self::TooLarge { .. } => Blame::Origin,
            Self::Unavailable { .. } | Self::TimedOut { .. } | Self::Cut { .. } => Blame::Network,
            Self::Untrusted { .. } => Blame::Configuration,
        }
    }

    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Unavailable { .. }
            | Self::TimedOut { .. }
            | Self::Cut { .. } => true,
            Self::Token { reason, .. } => {
                matches!(reason, TokenFault::Refused(status)
                    if status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS)
            }
            _ => false,
        }
    }

    /// How long the origin asked to be left alone, where it did.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The origin's own status, where it is the reason.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. }
            | Self::NotFound { status, .. }
            | Self::RateLimited { status, .. } => Some(*status),
            Self::Unavailable { status, .. } => *status,
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_retryable() {
        let host = || "h".to_owned();
        let limited = SourceError::RateLimited {
            host: host(),
            status: StatusCode::TOO_MANY_REQUESTS,
            retry_after: Some(Duration::from_secs(7)),
        };
        assert!(limited.is_retryable());
        assert_eq!(limited.retry_after(), Some(Duration::from_secs(7)));
        assert_eq!(
            limited.to_string(),
            "h limits the rate of requests: try again after 7 s"
        );
        let missing = SourceError::NotFound {
            host: host(),
            status: StatusCode::NOT_FOUND,
        };
        assert!(!missing.is_retryable());
        assert_eq!(missing.blame(), Blame::Caller);
        let lied = SourceError::Lied {
            host: host(),
            lie: Lie::TooLong,
        };
        assert!(!lied.is_retryable());
        assert_eq!(lied.blame(), Blame::Origin);
    }
}
