//! Listens to what a parent holds, for as long as the download wants it.

use std::sync::Arc;

use pantala_quic::{Blame, Error as QuicError};
use pantala_swarm::{Gone, Input};
use pantala_wire::message::{self, request, response};
use pantala_wire::{NodeId, PieceRun, Priority};

use super::Shared;
use super::task::Task;

/// Why a parent's news ended.
#[derive(Debug, thiserror::Error)]
enum SubscribeError {
    #[error(transparent)]
    Quic(#[from] QuicError),
    #[error("the parent ended the stream")]
    Ended,
    #[error("the parent refuses")]
    Refused,
    #[error("the parent no longer holds the blob")]
    Dropped,
    #[error("the parent sent a frame that does not belong here")]
    Unexpected,
    #[error("the parent says the blob has {0} bytes in pieces of 2^{1}")]
    OtherSize(u64, u32),
}

/// Performs `Action::Subscribe` until the stream ends, then says so to the task.
pub(super) async fn run(shared: Arc<Shared>, task: Arc<Task>, parent: NodeId) {
    let Err(error) = listen(&shared, &task, parent).await;
    tracing::debug!(digest = %task.digest, ?parent, %error, "parent gone");
    let reason = match &error {
        SubscribeError::Quic(error) if error.blame() == Blame::Peer && !error.is_retryable() => {
            Gone::Lied
        }
        SubscribeError::Unexpected | SubscribeError::OtherSize(..) => Gone::Lied,
        SubscribeError::Quic(_) => Gone::Unreachable,
        SubscribeError::Ended => Gone::Closed,
        SubscribeError::Refused => Gone::Refused,
        SubscribeError::Dropped => Gone::Dropped,
    };
    if matches!(reason, Gone::Unreachable) {
        shared.parent_failed(task.digest, parent);
    }
    task.input(Input::ParentGone { parent, reason }).await;
}

async fn listen(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    parent: NodeId,
) -> Result<std::convert::Infallible, SubscribeError> {
    let connection = shared.peers.connection(parent).await?;
    let (mut send, mut recv) = connection.open(Priority::Client).await?;
    send.write_frame(&message::Request {
        digest: task.digest.as_bytes().to_vec().into(),
        kind: Some(request::Kind::Subscribe(message::Subscribe {})),
    })
    .await?;
    send.finish()?;
    let layout = task.blob.layout();
    loop {
        let have = match recv.read_frame::<message::Response>().await? {
            None => return Err(SubscribeError::Ended),
            Some(message::Response {
                kind: Some(response::Kind::Have(have)),
            }) => have,
            Some(message::Response {
                kind: Some(response::Kind::Refusal(_)),
            }) => return Err(SubscribeError::Refused),
            Some(_) => return Err(SubscribeError::Unexpected),
        };
        if have.dropped {
            return Err(SubscribeError::Dropped);
        }
        if have.blob_size != 0
            && (have.blob_size != layout.blob_size()
                || have.piece_size_log2 != layout.piece_size_log2())
        {
            return Err(SubscribeError::OtherSize(
                have.blob_size,
                have.piece_size_log2,
            ));
        }
        let (pairs, rest) = have.runs.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(SubscribeError::Unexpected);
        }
        let runs = pairs
            .iter()
            .map(|[first, count]| PieceRun {
                first: *first,
                count: *count,
            })
            .collect();
        task.input(Input::Have {
            parent,
            runs,
            complete: have.complete,
        })
        .await;
    }
}
