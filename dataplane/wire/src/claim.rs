//! A node's signed word on a piece: "I read these bytes from the source; this is their digest."
//!
//! A claim travels with its piece from node to node. Whoever finds that a blob's sha256 is wrong
//! asks the source for the pieces again and knows, by the signature, whose word was false.

use ring::signature::{ED25519, UnparsedPublicKey};

use crate::id::{BlobDigest, NodeId, PieceIndex};
use crate::message;
use crate::tree::PieceDigest;

/// Binds the signature to this use, so that no other signature of a node can pass for a claim.
const CONTEXT: &[u8; 16] = b"pantala claim v1";
/// Bytes of the signed form.
pub const SIGNED_LEN: usize = CONTEXT.len() + 32 + 4 + 32;

/// A claim that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// A field has the wrong length, or the claim is absent.
    #[error("malformed claim")]
    Malformed,
    /// The signature is not the author's.
    #[error("the claim's signature is not its author's ({0:?})")]
    Signature(NodeId),
}

/// The digest of a piece, in the name of the node that fetched it from the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// What the author says the piece's digest is.
    pub piece_digest: PieceDigest,
    /// Who says so.
    pub author: NodeId,
    /// The author's Ed25519 signature over [`Claim::signed_form`].
    pub signature: [u8; 64],
}

impl Claim {
    /// The bytes that an author signs for `piece` of `blob`: the context, the blob's sha256, the
    /// piece's number (big-endian), the piece's digest.
    pub fn signed_form(
        blob: &BlobDigest,
        piece: PieceIndex,
        digest: &PieceDigest,
    ) -> [u8; SIGNED_LEN] {
        let mut out = [0; SIGNED_LEN];
        out[..16].copy_from_slice(CONTEXT);
        out[16..48].copy_from_slice(blob.as_bytes());
        out[48..52].copy_from_slice(&piece.0.to_be_bytes());
        out[52..].copy_from_slice(&digest.0);
        out
    }

    /// Whether the author signed this claim for `piece` of `blob`.
    ///
    /// # Errors
    /// [`ClaimError::Signature`] where it did not.
    pub fn verify(&self, blob: &BlobDigest, piece: PieceIndex) -> Result<(), ClaimError> {
        UnparsedPublicKey::new(&ED25519, self.author.as_bytes())
            .verify(
                &Self::signed_form(blob, piece, &self.piece_digest),
                &self.signature,
            )
            .map_err(|_| ClaimError::Signature(self.author))
    }
}

impl From<&Claim> for message::Claim {
    fn from(claim: &Claim) -> Self {
        Self {
            piece_digest: claim.piece_digest.0.to_vec().into(),
            author: claim.author.as_bytes().to_vec().into(),
            signature: claim.signature.to_vec().into(),
        }
    }
}

impl TryFrom<&message::Claim> for Claim {
    type Error = ClaimError;
    fn try_from(claim: &message::Claim) -> Result<Self, ClaimError> {
        let malformed = |_| ClaimError::Malformed;
        Ok(Self {
            piece_digest: claim.piece_digest.as_ref().try_into().map_err(malformed)?,
            author: claim.author.as_ref().try_into().map_err(malformed)?,
            signature: claim
                .signature
                .as_ref()
                .try_into()
                .map_err(|_| ClaimError::Malformed)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{Ed25519KeyPair, KeyPair};

    #[test]
    fn a_claim_holds_for_its_own_piece_and_author_only() {
        let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let blob = BlobDigest::new([1; 32]);
        let piece_digest = PieceDigest([2; 32]);
        let signed = Claim::signed_form(&blob, PieceIndex(3), &piece_digest);
        let claim = Claim {
            piece_digest,
            author: NodeId::try_from(key.public_key().as_ref()).unwrap(),
            signature: key.sign(&signed).as_ref().try_into().unwrap(),
        };
        assert_eq!(claim.verify(&blob, PieceIndex(3)), Ok(()));
        assert!(claim.verify(&blob, PieceIndex(4)).is_err());
        assert!(
            claim
                .verify(&BlobDigest::new([9; 32]), PieceIndex(3))
                .is_err()
        );
        let other = Claim {
            author: NodeId::new([5; 32]),
            ..claim
        };
        assert!(other.verify(&blob, PieceIndex(3)).is_err());
        let sent = message::Claim::from(&claim);
        assert_eq!(Claim::try_from(&sent), Ok(claim));
        assert!(Claim::try_from(&message::Claim::default()).is_err());
    }
}
