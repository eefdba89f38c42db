//! The metadata file of a blob, byte by byte. Pure: bytes in, values out, and no bytes panic.
//!
//! All numbers are little-endian. `P` is the number of pieces, `G` the groups of a full piece.
//!
//! ```text
//!   offset  bytes    what
//!        0      8    magic "pantBLOB"
//!        8      4    version, 1
//!       12      4    log2 of the piece size
//!       16      8    size of the blob
//!       24     32    sha256 of the blob
//!       56      8    zero
//!       64     32    BLAKE3 of bytes 0..64 (key derivation, context IDENTITY_CONTEXT)
//!      512     32    seal: BLAKE3 of bytes 0..64 under SEAL_CONTEXT where the blob's sha256 has been
//!                    verified; anything else: it has not
//!      544      8    last access, as a count of the store's accesses
//!     4096  B=⌈P/8⌉  durable bitmap: piece p is bit p%8 of byte p/8
//!        R   P x L   records, R = 4096 + B rounded up to 4096, L = 128 + 32 G
//!                      0  32    the piece's digest       )
//!                     32  32    its author's node ID     ) the claim
//!                     64  64    the author's signature   )
//!                    128  32 G  the digests of its groups (the last piece may have fewer)
//!          (total)   rounded up to 4096
//! ```
//!
//! Bytes 0..96 are written once. The seal, the bitmap and the records change alone and can each be
//! torn by a crash without harm: half a seal is none, each byte of the bitmap is the old or the new
//! one, and a record proves itself: its groups merge into its digest, which its author has signed.

use pantala_wire::claim::ClaimError;
use pantala_wire::layout::LayoutError;
use pantala_wire::tree::{TreeError, check_group_digests};
use pantala_wire::{
    BlobDigest, Claim, GroupDigest, NodeId, PieceDigest, PieceIndex, PieceLayout, PieceSet,
};

const MAGIC: &[u8; 8] = b"pantBLOB";
const VERSION: u32 = 1;
const IDENTITY_LEN: usize = 64;
const IDENTITY_CONTEXT: &str = "pantala store v1: identity of a metadata file";
const SEAL_CONTEXT: &str = "pantala store v1: the blob's sha256 is verified";

/// What files and their parts are rounded up to: a page, and a block of most file systems.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes before the bitmap.
pub const HEAD_LEN: usize = 4096;
/// Where the seal is.
pub const SEAL_OFFSET: u64 = 512;
/// Where the last access is.
pub const ACCESS_OFFSET: u64 = 544;
/// Bytes of a record before the digests of its groups.
const CLAIM_LEN: usize = 128;

/// Bytes that are no metadata file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Shorter or longer than the file of such a blob.
    #[error("{got} bytes where {expected} belong")]
    Length {
        /// Bytes there.
        got: u64,
        /// Bytes that belong there.
        expected: u64,
    },
    /// Not a metadata file.
    #[error("no magic number: not a metadata file")]
    Magic,
    /// Written by another version of this program.
    #[error("format version {0}, known is {VERSION}")]
    Version(u32),
    /// Changed since it was written.
    #[error("the head does not match its checksum")]
    Checksum,
    /// A size or piece size that this program would not choose.
    #[error("the piece size 2^{0} does not belong to the blob's size")]
    PieceSize(u32),
    /// A blob too large to be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The group digests of a record do not make its piece digest.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The claim of a record is not its author's.
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

/// What a peer needs to believe a piece: its author's claim and the digests of its groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceProof {
    /// The author's word.
    pub claim: Claim,
    /// The digests of the piece's groups, in order; they merge into the claim's digest.
    pub group_digests: Vec<GroupDigest>,
}

/// Whose metadata it is, and so where everything lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    digest: BlobDigest,
    layout: PieceLayout,
}

impl Header {
    /// The header of the blob `digest`, cut by `layout`.
    pub const fn new(digest: BlobDigest, layout: PieceLayout) -> Self {
        Self { digest, layout }
    }
    /// The blob.
    pub const fn digest(&self) -> &BlobDigest {
        &self.digest
    }
    /// How it is cut.
    pub const fn layout(&self) -> &PieceLayout {
        &self.layout
    }
    /// Bytes of the bitmap, which starts at [`HEAD_LEN`].
    pub const fn bitmap_len(&self) -> usize {
        self.layout.piece_count().div_ceil(8) as usize
    }
    /// Bytes of a record.
    pub const fn record_len(&self) -> usize {
        CLAIM_LEN + 32 * self.layout.groups_per_piece() as usize
    }
    /// Where the record of `piece` starts.
    pub const fn record_offset(&self, piece: PieceIndex) -> u64 {
        self.records_offset() + piece.0 as u64 * self.record_len() as u64
    }
    /// Bytes of the whole file.
    pub const fn file_len(&self) -> u64 {
        self.record_offset(PieceIndex(self.layout.piece_count()))
            .next_multiple_of(BLOCK_BYTES)
    }
    const fn records_offset(&self) -> u64 {
        (HEAD_LEN as u64 + self.bitmap_len() as u64).next_multiple_of(BLOCK_BYTES)
    }

    fn identity(&self) -> [u8; IDENTITY_LEN] {
        let mut out = [0; IDENTITY_LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.layout.piece_size_log2().to_le_bytes());
        out[16..24].copy_from_slice(&self.layout.blob_size().to_le_bytes());
        out[24..56].copy_from_slice(self.digest.as_bytes());
        out
    }

    /// The head of the file of a blob of which nothing is there yet.
    pub fn encode(&self) -> [u8; 96] {
        let mut out = [0; 96];
        let identity = self.identity();
        out[..IDENTITY_LEN].copy_from_slice(&identity);
        out[IDENTITY_LEN..].copy_from_slice(&blake3::derive_key(IDENTITY_CONTEXT, &identity));
        out
    }

    /// The seal of a blob whose sha256 has been verified.
    pub fn seal(&self) -> [u8; 32] {
        blake3::derive_key(SEAL_CONTEXT, &self.identity())
    }

    /// The record of a piece.
    pub fn encode_record(&self, proof: &PieceProof) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.record_len());
        out.extend_from_slice(&proof.claim.piece_digest.0);
        out.extend_from_slice(proof.claim.author.as_bytes());
        out.extend_from_slice(&proof.claim.signature);
        for group in &proof.group_digests {
            out.extend_from_slice(&group.0);
        }
        out.resize(self.record_len(), 0);
        out
    }

    /// Reads the record of `piece` and checks that its groups merge into its digest, but not the
    /// author's signature.
    ///
    /// # Errors
    /// [`MetaError::Length`] or [`MetaError::Tree`].
    pub fn decode_record(&self, piece: PieceIndex, bytes: &[u8]) -> Result<PieceProof, MetaError> {
        let length = || MetaError::Length {
            got: bytes.len() as u64,
            expected: self.record_len() as u64,
        };
        if bytes.len() != self.record_len() {
            return Err(length());
        }
        let (digest, rest) = bytes.split_first_chunk::<32>().ok_or_else(length)?;
        let (author, rest) = rest.split_first_chunk::<32>().ok_or_else(length)?;
        let (signature, rest) = rest.split_first_chunk::<64>().ok_or_else(length)?;
        let groups_len = self.layout.groups_in(piece) as usize * 32;
        let groups = rest.get(..groups_len).ok_or_else(length)?;
        let claim = Claim {
            piece_digest: PieceDigest(*digest),
            author: NodeId::new(*author),
            signature: *signature,
        };
        let group_digests = check_group_digests(&self.layout, piece, groups, &claim.piece_digest)?;
        Ok(PieceProof {
            claim,
            group_digests,
        })
    }

    /// Reads and fully checks the record of `piece`: groups, digest, signature.
    ///
    /// # Errors
    /// As [`Self::decode_record`], and [`MetaError::Claim`].
    pub fn check_record(&self, piece: PieceIndex, bytes: &[u8]) -> Result<PieceProof, MetaError> {
        let proof = self.decode_record(piece, bytes)?;
        proof.claim.verify(&self.digest, piece)?;
        Ok(proof)
    }

    /// The bitmap that says `pieces` are durable.
    pub fn encode_bitmap(&self, pieces: &PieceSet) -> Vec<u8> {
        let mut out = vec![0; self.bitmap_len()];
        for piece in pieces.iter() {
            if let Some(byte) = out.get_mut(piece.0 as usize / 8) {
                *byte |= 1 << (piece.0 % 8);
            }
        }
        out
    }

    /// The pieces whose bit is set in `bytes`; bits past the last piece are ignored.
    pub fn decode_bitmap(&self, bytes: &[u8]) -> PieceSet {
        let count = self.layout.piece_count();
        let mut set = PieceSet::empty(count);
        for piece in 0..count {
            let byte = bytes.get(piece as usize / 8).copied().unwrap_or(0);
            if byte >> (piece % 8) & 1 == 1 {
                set.insert(PieceIndex(piece));
            }
        }
        set
    }
}

/// The head of a metadata file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Whose metadata it is.
    pub header: Header,
    /// Whether the blob's sha256 had been verified.
    pub sealed: bool,
    /// When it was last used, as a count of the store's accesses.
    pub last_access: u64,
}

/// Reads the head of a metadata file from its first [`HEAD_LEN`] bytes.
///
/// # Errors
/// [`MetaError`] where it is not the head of a file that this version writes.
pub fn parse_head(bytes: &[u8]) -> Result<Head, MetaError> {
    let bytes = bytes.first_chunk::<HEAD_LEN>().ok_or(MetaError::Length {
        got: bytes.len() as u64,
        expected: HEAD_LEN as u64,
    })?;
    if &bytes[..8] != MAGIC {
        return Err(MetaError::Magic);
    }
    let u32_at =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if u32_at(8) != VERSION {
        return Err(MetaError::Version(u32_at(8)));
    }
    if bytes[64..96] != blake3::derive_key(IDENTITY_CONTEXT, &bytes[..IDENTITY_LEN]) {
        return Err(MetaError::Checksum);
    }
    let layout = PieceLayout::new(u64_at(16))?;
    if u32_at(12) != layout.piece_size_log2() {
        return Err(MetaError::PieceSize(u32_at(12)));
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(&bytes[24..56]);
    let header = Header::new(BlobDigest::new(digest), layout);
    let seal = SEAL_OFFSET as usize;
    Ok(Head {
        header,
        sealed: bytes[seal..seal + 32] == header.seal(),
        last_access: u64_at(ACCESS_OFFSET as usize),
    })
}

/// A whole metadata file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Its head.
    pub head: Head,
    /// The pieces that are durable and whose records hold, with their proofs.
    pub pieces: Vec<(PieceIndex, PieceProof)>,
    /// The pieces that are marked durable but whose records do not hold, and why.
    pub wrong: Vec<(PieceIndex, MetaError)>,
}

/// Reads a whole metadata file.
///
/// # Errors
/// [`MetaError`] where the head or the length is wrong; wrong records only cost their pieces.
pub fn parse(bytes: &[u8]) -> Result<Meta, MetaError> {
    let head = parse_head(bytes)?;
    let header = head.header;
    if bytes.len() as u64 != header.file_len() {
        return Err(MetaError::Length {
            got: bytes.len() as u64,
            expected: header.file_len(),
        });
    }
    let mut meta = Meta {
        head,
        pieces: Vec::new(),
        wrong: Vec::new(),
    };
    let bitmap = bytes.get(HEAD_LEN..).unwrap_or_default();
    for piece in header.decode_bitmap(bitmap).iter() {
        let start = header.record_offset(piece) as usize;
        let record = bytes.get(start..start + header.record_len());
        match header.check_record(piece, record.unwrap_or_default()) {
            Ok(proof) => meta.pieces.push((piece, proof)),
            Err(error) => meta.wrong.push((piece, error)),
        }
    }
    Ok(meta)
}
