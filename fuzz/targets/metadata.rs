//! The store's metadata file after any crash, rot or attack.
//!
//! A checksum and signatures stand in front of most of the parser, which no mutation gets right by
//! chance. So the first byte of the input says what is repaired before the rest is read: nothing, the
//! head, or the head and the records of all pieces marked durable.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pantala_wire::claim::Claim;
use pantala_wire::tree::piece_digest;
use pantala_wire::{BlobDigest, GroupDigest, NodeId, PieceIndex, PieceLayout};
use ring::signature::{Ed25519KeyPair, KeyPair};

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/store/src/meta.rs"]
mod meta;

use meta::{HEAD_LEN, Header, PieceProof, parse, parse_head};

/// Largest blob of a repaired file: 24 pieces, so that the file stays small.
const BLOB_SIZE_MAX: u64 = 24 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((&mode, rest)) = data.split_first() else {
        return;
    };
    let repair_head = mode & 1 == 1;
    let repair_records = mode & 3 == 3;
    let mut file = rest.to_vec();
    let mut header = None;
    if repair_head {
        let Some((size, _)) = rest.split_first_chunk::<8>() else {
            return;
        };
        let layout = PieceLayout::new(u64::from_le_bytes(*size) % (BLOB_SIZE_MAX + 1))
            .expect("far below the largest");
        let made = Header::new(BlobDigest::new([mode; 32]), layout);
        file.resize(made.file_len() as usize, 0);
        file[..96].copy_from_slice(&made.encode());
        if repair_records {
            repair(&made, &mut file);
        }
        header = Some(made);
    }
    let parsed = parse(&file);
    if let Ok(head) = parse_head(&file) {
        assert!(header.is_none_or(|made| made == head.header));
    }
    let Ok(parsed) = parsed else {
        assert!(header.is_none(), "a head that was repaired");
        return;
    };
    let made = parsed.head.header;
    let marked = made.decode_bitmap(&file[HEAD_LEN..]).len() as usize;
    assert_eq!(parsed.pieces.len() + parsed.wrong.len(), marked);
    if repair_records {
        assert!(parsed.wrong.is_empty(), "{:?}", parsed.wrong);
    }
    for (piece, proof) in &parsed.pieces {
        let record = made.encode_record(proof);
        assert_eq!(made.check_record(*piece, &record).as_ref(), Ok(proof));
    }
});

/// Makes the record of every piece marked durable prove itself, with the groups that it has.
fn repair(header: &Header, file: &mut [u8]) {
    let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("a seed of the right length");
    let author = NodeId::try_from(key.public_key().as_ref()).expect("a key of the right length");
    let marked: Vec<PieceIndex> = header.decode_bitmap(&file[HEAD_LEN..]).iter().collect();
    for piece in marked {
        let start = header.record_offset(piece) as usize;
        let record = &mut file[start..start + header.record_len()];
        let count = header.layout().groups_in(piece) as usize;
        let group_digests: Vec<GroupDigest> = record[128..]
            .as_chunks::<32>()
            .0
            .iter()
            .take(count)
            .map(|digest| GroupDigest(*digest))
            .collect();
        let piece_digest = piece_digest(&group_digests).expect("a piece has a group");
        let signed = Claim::signed_form(header.digest(), piece, &piece_digest);
        let signature = key.sign(&signed).as_ref().try_into().expect("64 bytes");
        record.copy_from_slice(&header.encode_record(&PieceProof {
            claim: Claim {
                piece_digest,
                author,
                signature,
            },
            group_digests,
        }));
    }
}
