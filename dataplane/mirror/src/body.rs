//! The body that goes to the client: counted, bounded by its announced length, and never ended
//! cleanly where bytes are missing.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};
use tracing::Span;

use crate::backend::{Backend, BackendError, BackendErrorKind, MirrorEvent, RequestKind};
use crate::reply::Payload;

/// How long a failed body waits before it says so. The connection is dropped with all that still
/// waits for its socket: this lets the good bytes before the failure (the reply's head may be
/// among them) leave first, and a client resume after them instead of starting anew.
const FLUSH_BEFORE_CUT: Duration = Duration::from_millis(50);

/// What is known of a request when its reply's head is ready; reports its end when dropped.
pub(crate) struct Meter<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) span: Span,
    pub(crate) kind: RequestKind,
    pub(crate) status: StatusCode,
    pub(crate) started: Instant,
    pub(crate) head_at: Instant,
    pub(crate) body_bytes: u64,
    pub(crate) complete: bool,
    pub(crate) failure: Option<BackendError>,
    /// Counts as a request under way until the last byte is handed over.
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

impl<B: Backend> Drop for Meter<B> {
    fn drop(&mut self) {
        let total = self.started.elapsed();
        self.span.record("status", self.status.as_u16());
        self.span.record("bytes", self.body_bytes);
        self.span.record("seconds", total.as_secs_f64());
        let _entered = self.span.enter();
        match &self.failure {
            Some(error) => {
                tracing::warn!(kind = ?error.kind, %error, "reply cut: its bytes failed");
            }
            None if !self.complete => tracing::debug!("reply cut: the client went away"),
            None => tracing::debug!("request ended"),
        }
        self.backend.observe(MirrorEvent::RequestEnded {
            kind: self.kind,
            status: self.status.as_u16(),
            body_bytes: self.body_bytes,
            first_byte: self.head_at.duration_since(self.started),
            total,
            cut: !self.complete,
        });
    }
}

/// A reply's body.
pub(crate) struct ReplyBody<B: Backend> {
    payload: Payload,
    /// Bytes still owed, where their number was announced.
    owed_bytes: Option<u64>,
    /// A failure that waits for the bytes before it to leave.
    failing: Option<(BackendError, Pin<Box<Sleep>>)>,
    meter: Meter<B>,
}

impl<B: Backend> ReplyBody<B> {
    pub(crate) fn new(payload: Payload, mut meter: Meter<B>) -> Self {
        let owed_bytes = match &payload {
            Payload::Empty => Some(0),
            Payload::Full(bytes) => Some(bytes.len() as u64),
            Payload::Stream(_, len) => *len,
        };
        meter.complete = owed_bytes == Some(0);
        Self {
            payload,
            owed_bytes,
            failing: None,
            meter,
        }
    }

    fn fail(
        &mut self,
        error: BackendError,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BackendError>>> {
        // Let go of what the bytes came from: it is of no more use.
        self.payload = Payload::Empty;
        self.meter.complete = false;
        self.meter.failure = Some(error.clone());
        self.failing = Some((error, Box::pin(tokio::time::sleep(FLUSH_BEFORE_CUT))));
        self.poll_failing(cx)
    }

    fn poll_failing(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BackendError>>> {
        let Some((error, pause)) = &mut self.failing else {
            return Poll::Ready(None);
        };
        std::task::ready!(pause.as_mut().poll(cx));
        Poll::Ready(Some(Err(error.clone())))
    }

    fn count(
        &mut self,
        bytes: Bytes,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BackendError>>> {
        let len = bytes.len() as u64;
        if let Some(owed) = self.owed_bytes {
            let Some(left) = owed.checked_sub(len) else {
                let error = BackendError::new(
                    BackendErrorKind::Internal,
                    "more bytes came than were announced",
                );
                return self.fail(error, cx);
            };
            self.owed_bytes = Some(left);
            self.meter.complete = left == 0;
        }
        self.meter.body_bytes += len;
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

impl<B: Backend> http_body::Body for ReplyBody<B> {
    type Data = Bytes;
    type Error = BackendError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BackendError>>> {
        let this = &mut *self;
        if this.failing.is_some() {
            return this.poll_failing(cx);
        }
        match &mut this.payload {
            Payload::Empty => Poll::Ready(None),
            Payload::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                if bytes.is_empty() {
                    return Poll::Ready(None);
                }
                this.count(bytes, cx)
            }
            Payload::Stream(..) if this.owed_bytes == Some(0) => Poll::Ready(None),
            Payload::Stream(stream, _) => match std::task::ready!(stream.as_mut().poll_next(cx)) {
                Some(Ok(bytes)) => this.count(bytes, cx),
                Some(Err(error)) => this.fail(error, cx),
                None => match this.owed_bytes {
                    None | Some(0) => {
                        this.meter.complete = true;
                        Poll::Ready(None)
                    }
                    Some(owed) => {
                        let error = BackendError::new(
                            BackendErrorKind::BadUpstream,
                            format!("the bytes ended {owed} too early"),
                        );
                        this.fail(error, cx)
                    }
                },
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.owed_bytes == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        match self.owed_bytes {
            Some(owed) => SizeHint::with_exact(owed),
            None => SizeHint::default(),
        }
    }
}
