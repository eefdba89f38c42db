//! Asks the registry about callers' rights, once for all who ask the same at the same time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use pantala_wire::BlobDigest;
use pantala_wire::name::RepositoryName;
use parking_lot::Mutex;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::backend::{BackendError, BackendErrorKind, UpstreamReply, VerdictOrigin};
use crate::reply::{Payload, Reject, registry_failure, strip_hop_by_hop};
use crate::upstream::UpstreamUrl;
use crate::verdict::{KeyMaker, Known, Subject, VerdictCache, VerdictKey};

/// Largest body of a refusal that is passed on: an error document, a few hundred bytes in practice.
const REFUSAL_BODY_BYTES_MAX: usize = 64 << 10;

/// A registry's refusal, kept whole so that everyone who waited for it can have it.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Refusal {
    /// Reads a refusing reply; a body that is too long or breaks off is left out.
    pub(crate) async fn read(reply: UpstreamReply) -> Self {
        let mut headers = reply.headers;
        strip_hop_by_hop(&mut headers);
        headers.remove(header::CONTENT_LENGTH);
        let mut body = BytesMut::new();
        let mut stream = reply.body;
        while let Some(chunk) = stream.next().await {
            match chunk {
                Ok(chunk) if body.len() + chunk.len() <= REFUSAL_BODY_BYTES_MAX => {
                    body.extend_from_slice(&chunk);
                }
                _ => {
                    body.clear();
                    headers.remove(header::CONTENT_ENCODING);
                    break;
                }
            }
        }
        Self {
            status: reply.status,
            headers,
            body: body.freeze(),
        }
    }

    /// Whether it says nothing about the caller's right, only that the registry is ill or busy.
    fn is_no_answer(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }

    /// The refusal as this caller gets it.
    pub(crate) fn into_response(self, is_head: bool) -> Result<Response<Payload>, Reject> {
        if let Some(reject) = registry_failure(self.status, &self.headers) {
            return Err(reject);
        }
        // "Refused" with a status that refuses nothing would hand a body to a client as the blob.
        if !self.status.is_client_error() {
            return Err(Reject::new(
                StatusCode::BAD_GATEWAY,
                "BADUPSTREAM",
                format!(
                    "the registry answered {} to the question whether the content may be read",
                    self.status
                ),
            ));
        }
        let payload = if is_head {
            Payload::Empty
        } else {
            Payload::Full(self.body)
        };
        let mut response = Response::new(payload);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        Ok(response)
    }
}

/// What came of asking.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// The caller may read.
    Readable { size_bytes: u64 },
    /// The caller may not.
    Refused(Refusal),
    /// No answer.
    Failed(BackendError),
}

type Pending = watch::Receiver<Option<(Outcome, VerdictOrigin)>>;

/// The verdicts known and the questions under way.
pub(crate) struct Gate {
    keys: KeyMaker,
    known: Mutex<VerdictCache>,
    /// Bounded by the requests at once: each waits for at most one.
    asking: Mutex<HashMap<VerdictKey, Pending>>,
    epoch: Instant,
}

/// Takes a question off the list however its asking ends, a panic included.
struct Asking {
    gate: Arc<Gate>,
    key: VerdictKey,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.gate.asking.lock().remove(&self.key);
    }
}

impl Gate {
    /// A gate with a fresh random secret; `None` where the system has no randomness.
    pub(crate) fn new(verdicts_max: usize, ttl: Duration, stale: Duration) -> Option<Self> {
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).ok()?;
        Some(Self {
            keys: KeyMaker::new(&secret),
            known: Mutex::new(VerdictCache::new(verdicts_max, ttl, stale)),
            asking: Mutex::new(HashMap::new()),
            epoch: Instant::now(),
        })
    }

    pub(crate) fn key(
        &self,
        authorization: Option<&HeaderValue>,
        upstream: &UpstreamUrl,
        repository: &RepositoryName,
        subject: Subject,
        digest: &BlobDigest,
    ) -> VerdictKey {
        self.keys
            .key(authorization, upstream, repository, subject, digest)
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// The registry said yes in passing (it sent the content itself).
    pub(crate) fn allow(&self, key: VerdictKey, size_bytes: u64) {
        self.known.lock().allow(key, size_bytes, self.now());
    }

    /// The caller's right: known, or asked of the registry before `deadline`.
    pub(crate) async fn decide<F>(
        self: &Arc<Self>,
        key: VerdictKey,
        deadline: Instant,
        ask: F,
    ) -> (Outcome, VerdictOrigin)
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let known = self.known.lock().look(&key, self.now());
        if let Known::Fresh { size_bytes } = known {
            return (Outcome::Readable { size_bytes }, VerdictOrigin::Cached);
        }
        let (mut pending, is_first) = self.join_or_ask(key, known, deadline, ask);
        let settled = timeout_at(deadline, pending.wait_for(Option::is_some)).await;
        let (outcome, origin) = match settled {
            Ok(Ok(settled)) => settled.clone().unwrap_or_else(unanswered),
            Ok(Err(_)) | Err(_) => unanswered(),
        };
        if origin == VerdictOrigin::Asked && !is_first {
            return (outcome, VerdictOrigin::Shared);
        }
        (outcome, origin)
    }

    fn join_or_ask<F>(
        self: &Arc<Self>,
        key: VerdictKey,
        known: Known,
        deadline: Instant,
        ask: F,
    ) -> (Pending, bool)
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let mut asking = self.asking.lock();
        if let Some(pending) = asking.get(&key) {
            return (pending.clone(), false);
        }
        let (settle, pending) = watch::channel(None);
        asking.insert(key, pending.clone());
        drop(asking);
        let guard = Asking {
            gate: self.clone(),
            key,
        };
        // With a stale verdict at hand, half of the time must be left for the bytes.
        let ask_until = match known {
            Known::Stale { .. } => {
                let now = Instant::now();
                now + deadline.saturating_duration_since(now) / 2
            }
            Known::Fresh { .. } | Known::Unknown => deadline,
        };
        // A task of its own: the one who asked first may go away while others wait.
        tokio::spawn(async move {
            let outcome = match timeout_at(ask_until, ask).await {
                Ok(outcome) => outcome,
                Err(_) => unanswered().0,
            };
            let settled = guard.gate.settle(key, known, outcome);
            drop(guard);
            settle.send_replace(Some(settled));
        });
        (pending, true)
    }

    fn settle(&self, key: VerdictKey, known: Known, outcome: Outcome) -> (Outcome, VerdictOrigin) {
        let now = self.now();
        let no_answer = match &outcome {
            Outcome::Readable { size_bytes } => {
                self.known.lock().allow(key, *size_bytes, now);
                false
            }
            Outcome::Refused(refusal) if !refusal.is_no_answer() => {
                self.known.lock().refuse(&key);
                false
            }
            Outcome::Refused(_) => true,
            Outcome::Failed(error) => matches!(
                error.kind,
                BackendErrorKind::Timeout
                    | BackendErrorKind::Unavailable
                    | BackendErrorKind::Overloaded
                    | BackendErrorKind::BadUpstream
            ),
        };
        match known {
            Known::Stale { size_bytes } if no_answer => {
                self.known.lock().postpone(&key, now);
                (Outcome::Readable { size_bytes }, VerdictOrigin::Stale)
            }
            _ => (outcome, VerdictOrigin::Asked),
        }
    }
}

fn unanswered() -> (Outcome, VerdictOrigin) {
    let error = BackendError::new(
        BackendErrorKind::Timeout,
        "the registry did not say in time whether the caller may read this",
    )
    .with_hint("check that the registry is up; mirror.first_byte_timeout_ms sets the bound");
    (Outcome::Failed(error), VerdictOrigin::Asked)
}
