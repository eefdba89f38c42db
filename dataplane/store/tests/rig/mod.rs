//! What the store's tests share: blobs with known bytes, an author, a seeded generator.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod sim;

use pantala_store::{Blob, Sha256Progress, Sha256Verdict, StoreError};
use pantala_wire::tree::{group_digests, piece_digest};
use pantala_wire::{BlobDigest, Claim, NodeId, PieceIndex, PieceLayout};
use ring::signature::{Ed25519KeyPair, KeyPair};

/// A small generator (splitmix64): the same seed draws the same numbers everywhere.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Says which seed failed.
pub(crate) struct Seed(pub(crate) u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "failed with seed {0}: run again with PANTALA_SEED={0}",
                self.0
            );
        }
    }
}

/// The seeds to run: `count` of them, or the one in `PANTALA_SEED`; `PANTALA_SEEDS` runs more.
pub(crate) fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match (number("PANTALA_SEED"), number("PANTALA_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, more) => (0..more.unwrap_or(count)).collect(),
    }
}

/// A blob whose every byte is known.
pub(crate) struct Sample {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: BlobDigest,
    pub(crate) layout: PieceLayout,
}

impl Sample {
    pub(crate) fn new(seed: u64, size: usize) -> Self {
        let mut rng = Rng(seed);
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            bytes.extend_from_slice(&rng.next().to_le_bytes());
        }
        bytes.truncate(size);
        Self::of(bytes)
    }

    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        use sha2::Digest;
        let digest = BlobDigest::new(sha2::Sha256::digest(&bytes).into());
        let layout = PieceLayout::new(bytes.len() as u64).unwrap();
        Self {
            bytes,
            digest,
            layout,
        }
    }

    pub(crate) fn piece(&self, piece: u32) -> (u64, &[u8]) {
        let range = self.layout.piece_range(PieceIndex(piece)).unwrap();
        let bytes = &self.bytes[range.start() as usize..range.end() as usize];
        (range.start(), bytes)
    }

    /// What the author says of the piece.
    pub(crate) fn claim(&self, piece: u32) -> Claim {
        let (start, bytes) = self.piece(piece);
        claim(&self.digest, piece, start, bytes)
    }

    /// Writes and commits a piece.
    pub(crate) fn put(&self, blob: &Blob, piece: u32) -> Result<(), StoreError> {
        let (start, bytes) = self.piece(piece);
        blob.write_groups(start, bytes)?;
        blob.commit_piece(PieceIndex(piece), self.claim(piece))
    }

    pub(crate) fn put_all(&self, blob: &Blob) -> Result<(), StoreError> {
        (0..self.layout.piece_count()).try_for_each(|piece| self.put(blob, piece))
    }

    /// Verifies the sha256 and marks the blob complete.
    pub(crate) fn complete(&self, blob: &Blob) {
        match blob.verify_sha256(&mut Sha256Progress::new()).unwrap() {
            Sha256Verdict::Match(proof) => blob.mark_complete(proof).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Reads the blob from `offset` and checks every byte that comes.
    pub(crate) fn read(&self, blob: &Blob, offset: u64, len: usize) -> Result<usize, StoreError> {
        let mut out = vec![0xa5; len];
        let read = blob.read_at(offset, &mut out)?;
        let start = offset as usize;
        assert!(
            out[..read] == self.bytes[start..start + read],
            "wrong bytes in {start}..{}",
            start + read
        );
        Ok(read)
    }
}

/// A claim that `bytes` are piece `piece` of the blob, whether they are or not.
pub(crate) fn claim(blob: &BlobDigest, piece: u32, start: u64, bytes: &[u8]) -> Claim {
    let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    let digest = piece_digest(&group_digests(start, bytes)).unwrap();
    let signed = Claim::signed_form(blob, PieceIndex(piece), &digest);
    Claim {
        piece_digest: digest,
        author: NodeId::try_from(key.public_key().as_ref()).unwrap(),
        signature: key.sign(&signed).as_ref().try_into().unwrap(),
    }
}
