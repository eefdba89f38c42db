//! An answer that is passed on: status, headers, and a body that is read as the caller likes.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use futures_util::stream::unfold;
use http::{HeaderMap, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::answer::{content_length, remove_hop_by_hop};
use crate::client::Answer;
use crate::error::{Phase, SourceError};

/// What an origin answered, whatever the status.
#[derive(Debug)]
pub struct Reply {
    /// The origin's status.
    pub status: StatusCode,
    /// The origin's headers, without those of the connection.
    pub headers: HeaderMap,
    body: Body,
}

impl Reply {
    pub(crate) fn new(
        answer: Answer,
        stall_timeout: Duration,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let mut headers = answer.headers().clone();
        remove_hop_by_hop(&mut headers);
        Self {
            status: answer.status(),
            headers,
            body: Body {
                announced_bytes: content_length(answer.headers()).filter(|_| !answer.is_head),
                answer,
                stall_timeout,
                read_bytes: 0,
                _turn: turn,
            },
        }
    }

    /// Who answered, after redirects: host and port, for messages.
    pub fn host(&self) -> &str {
        &self.body.answer.host
    }

    /// The whole body, which may have `limit_bytes` at most.
    pub async fn bytes(self, limit_bytes: u64) -> Result<Bytes, SourceError> {
        self.body.collect(limit_bytes).await
    }

    /// The body as it comes. After an error nothing more comes.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static {
        unfold(Some(self.body), |body| async move {
            let mut body = body?;
            match body.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(body))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

/// A body that is being read.
#[derive(Debug)]
struct Body {
    answer: Answer,
    stall_timeout: Duration,
    announced_bytes: Option<u64>,
    read_bytes: u64,
    _turn: Option<OwnedSemaphorePermit>,
}

impl Body {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let chunk = next_chunk(&mut self.answer, self.stall_timeout).await?;
        match chunk {
            Ok(Some(bytes)) => {
                self.read_bytes += bytes.len() as u64;
                Ok(Some(bytes))
            }
            Ok(None) => Ok(None),
            Err(_) => Err(SourceError::Cut {
                host: self.answer.host.clone(),
                offset: self.read_bytes,
                end: self.announced_bytes.unwrap_or(self.read_bytes),
            }),
        }
    }

    async fn collect(mut self, limit_bytes: u64) -> Result<Bytes, SourceError> {
        let too_large = |host: &str| SourceError::TooLarge {
            host: host.to_owned(),
            limit_bytes,
        };
        if self.announced_bytes.is_some_and(|n| n > limit_bytes) {
            return Err(too_large(&self.answer.host));
        }
        let mut all = BytesMut::new();
        while let Some(bytes) = self.next().await? {
            if self.read_bytes > limit_bytes {
                return Err(too_large(&self.answer.host));
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }
}

/// The next bytes of a body, within the time allowed for them.
pub(crate) async fn next_chunk(
    answer: &mut Answer,
    stall_timeout: Duration,
) -> Result<reqwest::Result<Option<Bytes>>, SourceError> {
    timeout(stall_timeout, answer.response.chunk())
        .await
        .map_err(|_| SourceError::TimedOut {
            host: answer.host.clone(),
            phase: Phase::NextByte,
            limit: stall_timeout,
        })
}

/// The whole body of a short answer.
pub(crate) async fn read_bounded(
    answer: Answer,
    limit_bytes: u64,
    stall_timeout: Duration,
) -> Result<Bytes, SourceError> {
    Reply::new(answer, stall_timeout, None)
        .bytes(limit_bytes)
        .await
}
