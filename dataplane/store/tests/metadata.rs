//! The metadata parser on bytes that nobody wrote.

mod rig;

use std::sync::LazyLock;

use pantala_store::meta::{self, Header, MetaError};
use pantala_store::{PieceProof, StoreConfig};
use pantala_wire::tree::group_digests;
use pantala_wire::{GROUP_SIZE, PieceIndex, PieceLayout, PieceSet};
use proptest::prelude::*;
use rig::Sample;

static SAMPLE: LazyLock<Sample> =
    LazyLock::new(|| Sample::new(5, (2 << 20) + GROUP_SIZE as usize + 3));
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| file(&SAMPLE));

/// The whole file of a complete blob of three pieces.
fn file(sample: &Sample) -> Vec<u8> {
    let header = Header::new(sample.digest, sample.layout);
    let mut bytes = vec![0; header.file_len() as usize];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    put(0, &header.encode());
    put(meta::SEAL_OFFSET as usize, &header.seal());
    let all = PieceSet::full(sample.layout.piece_count());
    put(meta::HEAD_LEN, &header.encode_bitmap(&all));
    for piece in 0..sample.layout.piece_count() {
        let (start, data) = sample.piece(piece);
        let proof = PieceProof {
            claim: sample.claim(piece),
            group_digests: group_digests(start, data),
        };
        let at = header.record_offset(PieceIndex(piece)) as usize;
        put(at, &header.encode_record(&proof));
    }
    bytes
}

fn sample() -> &'static Sample {
    &SAMPLE
}

#[test]
fn what_is_written_is_read_again() {
    let sample = sample();
    let meta = meta::parse(&FILE).unwrap();
    assert_eq!(meta.head.header, Header::new(sample.digest, sample.layout));
    assert!(meta.head.sealed && meta.wrong.is_empty());
    let pieces: Vec<u32> = meta.pieces.iter().map(|(piece, _)| piece.0).collect();
    assert_eq!(pieces, [0, 1, 2]);
    assert_eq!(meta.pieces[2].1.claim, sample.claim(2));
    assert_eq!(meta.pieces[2].1.group_digests.len(), 2);
}

#[test]
fn the_store_writes_the_format_that_the_parser_reads() {
    let dir = tempfile::tempdir().unwrap();
    let sample = sample();
    let store = pantala_store::Store::open(StoreConfig::new(dir.path(), 1 << 30)).unwrap();
    let blob = store
        .create(&sample.digest, sample.layout.blob_size())
        .unwrap();
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    drop(blob);
    let hex = sample.digest.to_hex();
    let path = dir
        .path()
        .join("blobs/sha256")
        .join(&hex[..2])
        .join(hex)
        .join("meta");
    let mut written = std::fs::read(path).unwrap();
    assert_eq!(meta::parse(&written).unwrap().pieces.len(), 3);
    // The last access is the store's to choose.
    written[meta::ACCESS_OFFSET as usize..][..8].fill(0);
    assert!(written == *FILE);
}

#[test]
fn a_head_that_claims_the_largest_blob_costs_no_memory() {
    let layout = PieceLayout::new(pantala_wire::layout::BLOB_SIZE_MAX).unwrap();
    let header = Header::new(sample().digest, layout);
    let mut bytes = vec![0; meta::HEAD_LEN];
    bytes[..96].copy_from_slice(&header.encode());
    assert!(matches!(meta::parse(&bytes), Err(MetaError::Length { .. })));
    assert_eq!(meta::parse_head(&bytes).unwrap().header, header);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn mutated_bytes_yield_true_records_or_none(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        grown in 0usize..3,
    ) {
        let whole = FILE.clone();
        let true_meta = meta::parse(&whole).unwrap();
        let mut bytes = whole;
        for (at, xor) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= xor;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        bytes.extend(vec![7; grown]);
        if let Ok(meta) = meta::parse(&bytes) {
            prop_assert_eq!(meta.head.header, true_meta.head.header);
            for (piece, proof) in meta.pieces {
                let (_, right) = &true_meta.pieces[piece.0 as usize];
                prop_assert_eq!(&proof, right);
            }
        }
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(meta::parse(&bytes).is_err());
        let header = Header::new(sample().digest, sample().layout);
        for piece in [0, 2, 3, u32::MAX] {
            prop_assert!(header.check_record(PieceIndex(piece), &bytes).is_err());
        }
        prop_assert!(header.decode_bitmap(&bytes).len() <= 3);
    }

    /// The checksum does not protect from whoever writes the file: the parser must.
    #[test]
    fn forged_heads_with_a_right_checksum_are_bounded(
        size in any::<u64>(),
        piece_size_log2 in any::<u32>(),
        rest in proptest::collection::vec(any::<u8>(), 0..3000),
    ) {
        let mut bytes = vec![0; meta::HEAD_LEN];
        bytes[..96].copy_from_slice(&Header::new(sample().digest, sample().layout).encode());
        bytes[12..16].copy_from_slice(&piece_size_log2.to_le_bytes());
        bytes[16..24].copy_from_slice(&size.to_le_bytes());
        let context = "pantala store v1: identity of a metadata file";
        let check = blake3::derive_key(context, &bytes[..64]);
        bytes[64..96].copy_from_slice(&check);
        bytes.extend(rest);
        if let Ok(meta) = meta::parse(&bytes) {
            prop_assert!(meta.pieces.is_empty());
        }
    }
}
