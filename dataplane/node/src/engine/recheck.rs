//! Asks the source for one piece again, to find out whose word about it was false.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;
use futures_util::StreamExt;
use pantala_control::Command;
use pantala_source::SourceError;
use pantala_store::StoreError;
use pantala_swarm::{Author, Failure, Input, Recheck};
use pantala_wire::tree::{group_digests, piece_digest};
use pantala_wire::{Claim, PieceDigest, PieceIndex};

use super::Shared;
use super::fetch_source::source_failure;
use super::task::Task;

/// Why the source's word on a piece was not learned.
#[derive(Debug, thiserror::Error)]
enum RecheckError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no caller has shown a way to the source")]
    NoAccess,
    #[error("the blob has no such piece")]
    NoPiece,
}

/// Performs `Action::Recheck` and reports what came of it.
pub(super) async fn run(shared: Arc<Shared>, task: Arc<Task>, piece: PieceIndex) {
    let outcome = match recheck(&shared, &task, piece).await {
        Ok(None) => Recheck::Same,
        Ok(Some((false_claim, truth))) => {
            let author = blame(&shared, &task, piece, false_claim, truth);
            Recheck::Replaced { author }
        }
        Err(error) => {
            tracing::warn!(digest = %task.digest, piece = piece.0, %error, "the source could not be asked again");
            Recheck::Failed(match &error {
                RecheckError::Source(error) => source_failure(error),
                RecheckError::NoAccess => Failure::Unauthorised,
                RecheckError::NoPiece => Failure::Fatal(error.to_string()),
                RecheckError::Store(error) => {
                    let reason = error.to_string();
                    task.input(Input::StoreFailed { reason }).await;
                    return;
                }
            })
        }
    };
    task.input(Input::Rechecked { piece, outcome }).await;
}

/// Reports a false claim of another node; says whose it was.
fn blame(
    shared: &Shared,
    task: &Task,
    piece: PieceIndex,
    claim: Option<Claim>,
    truth: PieceDigest,
) -> Author {
    let Some(claim) = claim else {
        return Author::Unknown;
    };
    if claim.author == shared.identity.node_id() {
        return Author::This;
    }
    let relayer = task.relayers.lock().get(&piece).copied();
    shared.control.accuse(Command::FalseClaim {
        digest: task.digest,
        piece,
        claim,
        true_digest: truth,
        relayer: relayer.unwrap_or(claim.author),
    });
    Author::Other(claim.author)
}

/// The false claim and the true digest, or `None` where the piece is what the source has.
async fn recheck(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    piece: PieceIndex,
) -> Result<Option<(Option<Claim>, PieceDigest)>, RecheckError> {
    let access = task.access().ok_or(RecheckError::NoAccess)?;
    let layout = task.blob.layout();
    let range = layout.piece_range(piece).ok_or(RecheckError::NoPiece)?;
    let mut body = shared
        .source
        .fetch_blob(
            &access.upstream,
            &access.repository,
            &task.digest,
            layout.blob_size(),
            range,
            &access.credential,
        )
        .await?;
    // At most one piece; the machine bounds how many rechecks run at once.
    let mut data = BytesMut::with_capacity(range.len() as usize);
    while let Some(chunk) = body.next().await {
        data.extend_from_slice(&chunk?);
    }
    let (shared, task) = (Arc::clone(shared), Arc::clone(task));
    super::blocking(move || {
        let truth =
            piece_digest(&group_digests(range.start(), &data)).ok_or(RecheckError::NoPiece)?;
        let proof = match task.blob.piece_proof(piece) {
            Ok(proof) => proof,
            // Rotten since it was written: nobody's claim was false, but the piece is to be replaced.
            Err(StoreError::Corrupt { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        if proof
            .as_ref()
            .is_some_and(|p| p.claim.piece_digest == truth)
        {
            return Ok(None);
        }
        task.replaced.fetch_add(1, Ordering::AcqRel);
        task.blob.discard_piece(piece)?;
        task.blob.write_groups(range.start(), &data)?;
        let claim = shared.identity.sign_claim(&task.digest, piece, &truth);
        task.blob.commit_piece(piece, claim)?;
        Ok(Some((proof.map(|p| p.claim), truth)))
    })
    .await
}
