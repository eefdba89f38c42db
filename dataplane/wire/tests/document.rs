//! `docs/wire.md` shows real bytes: what this crate says is what stands there.

use bytes::BytesMut;
use pantala_wire::frame::{self, FRAME_SIZE_MAX};
use pantala_wire::layout::{BLOB_SIZE_MAX, PIECE_COUNT_TARGET};
use pantala_wire::message::{
    self, Fetch, Have, PieceHead, Refusal, Request, Response, Subscribe, refusal, request, response,
};
use pantala_wire::tree::{check_group_digests, group_digests, piece_digest};
use pantala_wire::{BlobDigest, Claim, NodeId, PieceIndex, PieceLayout, Priority};
use ring::digest::{SHA256, digest};
use ring::signature::{Ed25519KeyPair, KeyPair};

const DOCUMENT: &str = include_str!("../../../docs/wire.md");

/// The bytes of the block that begins with "```hex NAME": on each line up to two spaces.
fn shown(name: &str) -> Vec<u8> {
    let start = format!("```hex {name}\n");
    let (_, block) = DOCUMENT
        .split_once(&start)
        .unwrap_or_else(|| panic!("no block {name:?} in docs/wire.md"));
    let (block, _) = block.split_once("```").expect("the block has an end");
    block
        .lines()
        .map(|line| line.split_once("  ").map_or(line, |(bytes, _)| bytes))
        .flat_map(|bytes| hex::decode(bytes.replace(' ', "")).expect("hexadecimal"))
        .collect()
}

#[track_caller]
fn assert_shown(name: &str, bytes: &[u8]) {
    let lines: Vec<String> = bytes
        .chunks(16)
        .map(|line| {
            let bytes: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
            bytes.join(" ")
        })
        .collect();
    assert!(
        shown(name) == bytes,
        "block {name:?} of docs/wire.md should hold these bytes:\n{}",
        lines.join("\n")
    );
}

/// The example's blob: two groups and seven bytes.
fn blob() -> Vec<u8> {
    (0..131_079u32).map(|i| (i % 251) as u8).collect()
}

fn blob_digest() -> BlobDigest {
    BlobDigest::try_from(digest(&SHA256, &blob()).as_ref()).unwrap()
}

fn author() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[0x07; 32]).unwrap()
}

fn claim() -> Claim {
    let piece_digest = piece_digest(&group_digests(0, &blob())).unwrap();
    let signed = Claim::signed_form(&blob_digest(), PieceIndex(0), &piece_digest);
    Claim {
        piece_digest,
        author: NodeId::try_from(author().public_key().as_ref()).unwrap(),
        signature: author().sign(&signed).as_ref().try_into().unwrap(),
    }
}

fn request(kind: request::Kind) -> Request {
    Request {
        digest: blob_digest().as_bytes().to_vec().into(),
        kind: Some(kind),
    }
}

fn response(kind: response::Kind) -> Response {
    Response { kind: Some(kind) }
}

/// Takes the frame that the document shows, as a node would.
fn read<M: prost::Message + Default>(name: &str) -> M {
    let mut buffer = BytesMut::from(&shown(name)[..]);
    let message = frame::take(&mut buffer).unwrap().unwrap();
    assert!(buffer.is_empty());
    message
}

#[test]
fn the_fetch_of_the_example_is_what_a_node_sends() {
    let fetch = request(request::Kind::Fetch(Fetch {
        piece: 0,
        first_group: 1,
        group_count: 0,
        priority: Priority::Client as u32,
    }));
    assert_shown("fetch request", &frame::encode(&fetch));
    assert_eq!(read::<Request>("fetch request"), fetch);
}

#[test]
fn the_head_of_the_example_is_what_a_node_answers_and_passes_the_receivers_rules() {
    let groups = group_digests(0, &blob());
    let digests: Vec<u8> = groups.iter().flat_map(|g| g.0).collect();
    let head = PieceHead {
        piece: 0,
        first_group: 1,
        group_digests: digests.into(),
        claim: Some(message::Claim::from(&claim())),
        length: 131_079 - 65_536,
    };
    assert_shown(
        "piece head",
        &frame::encode(&response(response::Kind::Piece(head))),
    );

    let Some(response::Kind::Piece(head)) = read::<Response>("piece head").kind else {
        panic!("not a piece head");
    };
    let layout = PieceLayout::new(131_079).unwrap();
    let claim = Claim::try_from(head.claim.as_ref().unwrap()).unwrap();
    claim.verify(&blob_digest(), PieceIndex(0)).unwrap();
    let checked = check_group_digests(
        &layout,
        PieceIndex(0),
        &head.group_digests,
        &claim.piece_digest,
    );
    assert_eq!(checked, Ok(groups));
}

#[test]
fn the_signed_form_of_the_example_is_what_its_author_signed() {
    let claim = claim();
    let signed = Claim::signed_form(&blob_digest(), PieceIndex(0), &claim.piece_digest);
    assert_shown("signed form", &signed);
}

#[test]
fn the_subscribe_of_the_example_is_what_a_node_sends() {
    let subscribe = request(request::Kind::Subscribe(Subscribe {}));
    assert_shown("subscribe request", &frame::encode(&subscribe));
}

#[test]
fn the_have_of_the_example_is_what_a_node_answers() {
    let have = Have {
        blob_size: 131_079,
        piece_size_log2: 20,
        runs: vec![0, 1],
        complete: true,
        dropped: false,
    };
    assert_shown(
        "have",
        &frame::encode(&response(response::Kind::Have(have))),
    );
}

#[test]
fn the_refusal_of_the_example_is_what_a_node_answers() {
    let refusal = Refusal {
        reason: refusal::Reason::Busy.into(),
        detail: "too many requests at once".to_owned(),
    };
    assert_shown(
        "refusal",
        &frame::encode(&response(response::Kind::Refusal(refusal))),
    );
}

#[test]
fn the_limits_and_reasons_of_the_document_are_the_codes() {
    for limit in [
        FRAME_SIZE_MAX.to_string(),
        PIECE_COUNT_TARGET.to_string(),
        BLOB_SIZE_MAX.to_string(),
    ] {
        assert!(DOCUMENT.contains(&limit), "{limit} is not in docs/wire.md");
    }
    for number in 0..=4 {
        let name = refusal::Reason::try_from(number).unwrap().as_str_name();
        let row = format!("| {number} | `{name}` |");
        assert!(DOCUMENT.contains(&row), "{row} is not in docs/wire.md");
    }
}
