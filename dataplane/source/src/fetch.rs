//! The transfer of a range: performs what [`crate::retry`] decides.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::unfold;
use http::header::{HeaderValue, IF_RANGE, RANGE};
use http::{HeaderMap, Method};
use pantala_wire::ByteRange;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use url::Url;

use crate::answer::{BodyPlan, judge_body};
use crate::client::{Answer, Request};
use crate::credential::Credential;
use crate::error::{Lie, SourceError};
use crate::reply::next_chunk;
use crate::retry::{Next, Transfer};
use crate::source::Inner;
use crate::validator::Validator;

/// How long the end of a body that is complete is waited for, to see that nothing follows.
const END_GRACE: Duration = Duration::from_secs(1);

/// What is fetched, and how it is recognised.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) url: Url,
    pub(crate) credential: Credential,
    pub(crate) size: u64,
    pub(crate) identity: Identity,
}

/// What makes two answers parts of one thing.
#[derive(Debug)]
pub(crate) enum Identity {
    /// The name is the content's digest: a differing size is a lie.
    Digest,
    /// Whatever the URL holds, told apart by a validator where there is one: a differing size is
    /// a change.
    Version(Option<Validator>),
}

/// What a transfer has shown of its origin so far; readable while and after it runs.
#[derive(Debug, Default)]
pub struct TransferFacts {
    range_ignored: AtomicBool,
    discarded_bytes: AtomicU64,
    retries: AtomicU64,
}

impl TransferFacts {
    /// Whether the origin sent more than the range asked for, from the blob's start. Such an
    /// origin is better asked once for everything than often for ranges.
    pub fn range_ignored(&self) -> bool {
        self.range_ignored.load(Ordering::Relaxed)
    }

    /// Bytes that came and were not asked for.
    pub fn discarded_bytes(&self) -> u64 {
        self.discarded_bytes.load(Ordering::Relaxed)
    }

    /// How often the origin was asked again.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }
}

/// Exactly the bytes of a range, in order.
///
/// Cuts and stalls are mended on the way. An error is the last item; dropping the stream ends the
/// transfer.
pub struct BodyStream {
    items: Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>,
    facts: Arc<TransferFacts>,
}

impl BodyStream {
    /// What is known of the origin; stays readable when the stream is gone.
    pub fn facts(&self) -> Arc<TransferFacts> {
        Arc::clone(&self.facts)
    }
}

impl Stream for BodyStream {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.as_mut().poll_next(cx)
    }
}

impl std::fmt::Debug for BodyStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BodyStream")
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

/// Starts a transfer: returns once the origin has accepted it.
pub(crate) async fn fetch(
    inner: Arc<Inner>,
    subject: Subject,
    range: ByteRange,
) -> Result<BodyStream, SourceError> {
    if range.end() > subject.size {
        return Err(SourceError::BadRange {
            start: range.start(),
            end: range.end(),
            size: subject.size,
        });
    }
    let turn = inner.transfer_turn(&subject.url).await?;
    let mut fetch = Fetch {
        transfer: inner.transfer(range),
        facts: Arc::default(),
        open: None,
        subject,
        inner,
        _turn: turn,
    };
    fetch.ask().await?;
    Ok(fetch.into_stream())
}

pub(crate) struct Fetch {
    inner: Arc<Inner>,
    subject: Subject,
    transfer: Transfer,
    open: Option<OpenBody>,
    facts: Arc<TransferFacts>,
    _turn: OwnedSemaphorePermit,
}

/// An accepted answer, somewhere in its body.
pub(crate) struct OpenBody {
    answer: Answer,
    /// Bytes still to be thrown away.
    skip: u64,
    /// Bytes still announced.
    announced: u64,
    /// Bytes that have been looked at and not been read yet.
    peeked: Option<Bytes>,
}

impl OpenBody {
    pub(crate) fn new(answer: Answer, plan: BodyPlan) -> Self {
        Self {
            answer,
            skip: plan.skip,
            announced: plan.announced,
            peeked: None,
        }
    }

    /// The next bytes, which stay where they are.
    pub(crate) async fn peek(&mut self, stall_timeout: Duration) -> Result<Bytes, SourceError> {
        if let Some(bytes) = &self.peeked {
            return Ok(bytes.clone());
        }
        match next_chunk(&mut self.answer, stall_timeout).await? {
            Ok(Some(bytes)) => Ok(self.peeked.insert(bytes).clone()),
            Ok(None) | Err(_) => Err(SourceError::Cut {
                host: self.answer.host.clone(),
                offset: 0,
                end: self.announced,
            }),
        }
    }
}

impl Fetch {
    /// A transfer whose first answer is there already.
    pub(crate) fn opened(
        inner: Arc<Inner>,
        subject: Subject,
        transfer: Transfer,
        body: OpenBody,
        turn: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            inner,
            subject,
            transfer,
            open: Some(body),
            facts: Arc::default(),
            _turn: turn,
        }
    }

    pub(crate) fn into_stream(self) -> BodyStream {
        let facts = Arc::clone(&self.facts);
        let items = unfold(Some(self), |fetch| async move {
            let mut fetch = fetch?;
            match fetch.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(fetch))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        BodyStream {
            items: Box::pin(items),
            facts,
        }
    }

    /// The next wanted bytes; `None` when all have come.
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            if self.transfer.wanted().is_none() {
                self.check_end().await?;
                return Ok(None);
            }
            self.ask().await?;
            match self.read().await {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) => {
                    self.open = None;
                    self.pause(error).await?;
                }
            }
        }
    }

    /// Asks for what is missing until an answer is accepted, unless one is open.
    async fn ask(&mut self) -> Result<(), SourceError> {
        while self.open.is_none() {
            let Some(wanted) = self.transfer.wanted() else {
                break;
            };
            match open(&self.inner, &self.subject, wanted).await {
                Ok((body, range_ignored)) => {
                    if range_ignored {
                        self.facts.range_ignored.store(true, Ordering::Relaxed);
                    }
                    self.open = Some(body);
                }
                Err(error) => self.pause(error).await?,
            }
        }
        Ok(())
    }

    /// Waits before the next attempt, or gives the failure back.
    async fn pause(&mut self, error: SourceError) -> Result<(), SourceError> {
        let result = self.inner.pause(&mut self.transfer, error).await;
        let retries = self.transfer.retries_total();
        self.facts.retries.store(retries, Ordering::Relaxed);
        result
    }

    /// Reads once from the open body; may yield nothing where all of it was to be skipped.
    async fn read(&mut self) -> Result<Bytes, SourceError> {
        let Some(wanted) = self.transfer.wanted() else {
            return Ok(Bytes::new());
        };
        let cut = |answer: &Answer| SourceError::Cut {
            host: answer.host.clone(),
            offset: wanted.start(),
            end: wanted.end(),
        };
        let Some(body) = self.open.as_mut() else {
            return Ok(Bytes::new());
        };
        let chunk = match body.peeked.take() {
            Some(bytes) => Ok(Some(bytes)),
            None => next_chunk(&mut body.answer, self.inner.config.stall_timeout).await?,
        };
        let Ok(Some(mut bytes)) = chunk else {
            return Err(cut(&body.answer));
        };
        let len = bytes.len() as u64;
        body.announced = body
            .announced
            .checked_sub(len)
            .ok_or_else(|| SourceError::Lied {
                host: body.answer.host.clone(),
                lie: Lie::TooLong,
            })?;
        let now = self.inner.clock.now();
        // Both fit in usize: they are no more than the length of `bytes`.
        let skipped = body.skip.min(len);
        body.skip -= skipped;
        bytes = bytes.split_off(skipped as usize);
        let kept = wanted.len().min(bytes.len() as u64);
        bytes.truncate(kept as usize);
        self.inner.counters.received(kept);
        if kept < len {
            self.inner.counters.discarded(len - kept);
            self.facts
                .discarded_bytes
                .fetch_add(len - kept, Ordering::Relaxed);
        }
        if kept > 0 {
            self.transfer.received(kept, now);
        } else if len > 0 {
            self.transfer.alive(now);
        }
        Ok(bytes)
    }

    /// After the last wanted byte: an answer that was to end there must end there.
    async fn check_end(&mut self) -> Result<(), SourceError> {
        let Some(mut body) = self.open.take() else {
            return Ok(());
        };
        if body.announced > 0 {
            // The rest is not wanted; dropping the answer closes its connection or stream.
            return Ok(());
        }
        match timeout(END_GRACE, body.answer.response.chunk()).await {
            Ok(Ok(Some(more))) if !more.is_empty() => Err(SourceError::Lied {
                host: body.answer.host,
                lie: Lie::TooLong,
            }),
            _ => Ok(()),
        }
    }
}

/// One request for `wanted`, judged; and whether the origin ignored the range.
async fn open(
    inner: &Inner,
    subject: &Subject,
    wanted: ByteRange,
) -> Result<(OpenBody, bool), SourceError> {
    let mut headers = HeaderMap::new();
    if wanted.len() < subject.size {
        let text = format!("bytes={}-{}", wanted.start(), wanted.end() - 1);
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(RANGE, value);
        }
        if let Identity::Version(Some(validator)) = &subject.identity {
            headers.insert(IF_RANGE, validator.value().clone());
        }
    }
    let request = Request {
        method: Method::GET,
        url: subject.url.clone(),
        headers,
        authorization: None,
        body: Bytes::new(),
    };
    let answer = inner.send(request, &subject.credential).await?;
    let plan = judge_body(
        &answer.host,
        answer.status(),
        answer.headers(),
        wanted,
        subject.size,
        inner.clock.date(),
    )
    .map_err(|error| match (&subject.identity, &error) {
        (
            Identity::Version(_),
            SourceError::Lied {
                host,
                lie: Lie::Size { .. } | Lie::RangeRefused,
            },
        ) => SourceError::Changed { host: host.clone() },
        _ => error,
    })?;
    if let Identity::Version(Some(validator)) = &subject.identity
        && !validator.allows(answer.headers())
    {
        return Err(SourceError::Changed { host: answer.host });
    }
    let range_ignored = plan.range_ignored(wanted);
    Ok((OpenBody::new(answer, plan), range_ignored))
}

impl Inner {
    /// Waits as the transfer's state machine says, or gives the failure back.
    pub(crate) async fn pause(
        &self,
        transfer: &mut Transfer,
        error: SourceError,
    ) -> Result<(), SourceError> {
        match transfer.failed(&error, self.clock.now()) {
            Next::GiveUp => Err(error),
            Next::Retry { wait } => {
                tracing::debug!(%error, wait_ms = wait.as_millis(), "trying again");
                self.counters.retried();
                tokio::time::sleep(wait).await;
                Ok(())
            }
        }
    }
}
