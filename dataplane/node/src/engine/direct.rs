//! Bytes of a source that go past the store, straight to a client.

use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pantala_source::{BodyStream, SourceError};
use pantala_wire::BlobDigest;
use sha2::{Digest, Sha256};

/// Why a direct read ended early.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The source's bytes are not the blob's.
    #[error("the source's bytes do not have the sha256 {0}")]
    WrongDigest(BlobDigest),
}

/// Bytes as they arrive from the source.
pub type DirectStream = Pin<Box<dyn Stream<Item = Result<Bytes, DirectError>> + Send>>;

/// `body` as it arrives. With `whole`, the digest of the blob that it is all of, its last chunk is
/// kept back until the sha256 is right: nobody receives a whole wrong blob.
pub(super) fn stream(body: BodyStream, whole: Option<BlobDigest>) -> DirectStream {
    let Some(digest) = whole else {
        return Box::pin(body.map(|chunk| Ok(chunk?)));
    };
    let state = Some((body, Sha256::new(), None::<Bytes>));
    Box::pin(futures_util::stream::unfold(
        state,
        move |state| async move {
            let (mut body, mut hasher, mut kept) = state?;
            loop {
                match body.next().await {
                    Some(Ok(chunk)) => {
                        hasher.update(&chunk);
                        if let Some(before) = kept.replace(chunk) {
                            return Some((Ok(before), Some((body, hasher, kept))));
                        }
                    }
                    Some(Err(error)) => return Some((Err(error.into()), None)),
                    None if hasher.finalize().as_slice() == digest.as_bytes() => {
                        return kept.map(|last| (Ok(last), None));
                    }
                    None => return Some((Err(DirectError::WrongDigest(digest)), None)),
                }
            }
        },
    ))
}
