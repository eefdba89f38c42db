//! The peer protocol as a stranger speaks it: frames, messages, claims, digests, runs.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use pantala_wire::frame::{self, FRAME_SIZE_MAX, HEADER_SIZE};
use pantala_wire::message::{PieceHead, Request, Response, request, response};
use pantala_wire::tree::check_group_digests;
use pantala_wire::{
    BlobDigest, Claim, GROUP_SIZE, PieceDigest, PieceIndex, PieceLayout, PieceRun, PieceSet,
    Priority,
};
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let Some((&which, stream)) = data.split_first() else {
        return;
    };
    let mut buffer = BytesMut::from(stream);
    loop {
        let before = buffer.len();
        let more = if which & 1 == 0 {
            take::<Request>(&mut buffer, check_request)
        } else {
            take::<Response>(&mut buffer, check_response)
        };
        if !more {
            return;
        }
        assert!(buffer.len() + HEADER_SIZE <= before, "no progress");
    }
});

/// Takes a frame; false where none is left, or the bytes are none.
fn take<M: Message + Default + PartialEq>(buffer: &mut BytesMut, check: fn(&M)) -> bool {
    let Ok(Some(message)) = frame::take::<M>(buffer) else {
        return false;
    };
    // What was read can be said again, and means the same.
    if message.encoded_len() <= FRAME_SIZE_MAX {
        let mut again = BytesMut::from(&frame::encode(&message)[..]);
        let read = frame::take::<M>(&mut again);
        assert!(read.is_ok_and(|read| read.as_ref() == Some(&message)));
    }
    check(&message);
    true
}

fn check_request(request: &Request) {
    let _ = BlobDigest::try_from(request.digest.as_ref());
    if let Some(request::Kind::Fetch(fetch)) = &request.kind {
        let _ = Priority::from_wire(fetch.priority);
        let layout = layout();
        let piece = PieceIndex(fetch.piece);
        assert_eq!(
            layout.groups_in(piece) == 0,
            layout.piece_range(piece).is_none()
        );
    }
}

fn check_response(response: &Response) {
    match &response.kind {
        Some(response::Kind::Have(have)) => {
            let count = PieceLayout::new(have.blob_size).map_or(0, |l| l.piece_count());
            let mut set = PieceSet::empty(count);
            for pair in have.runs.as_chunks::<2>().0 {
                set.insert_run(PieceRun {
                    first: pair[0],
                    count: pair[1],
                });
            }
            assert!(set.len() <= count);
            assert_eq!(set.iter().count() as u32, set.len());
        }
        Some(response::Kind::Piece(head)) => check_head(head),
        _ => {}
    }
}

fn check_head(head: &PieceHead) {
    let piece = PieceIndex(head.piece);
    let claim = head.claim.as_ref().map(Claim::try_from);
    let expected = match claim {
        Some(Ok(claim)) => {
            // Nobody can sign by chance.
            assert!(claim.verify(&BlobDigest::new([0; 32]), piece).is_err());
            claim.piece_digest
        }
        _ => PieceDigest([0; 32]),
    };
    if let Ok(groups) = check_group_digests(&layout(), piece, &head.group_digests, &expected) {
        assert_eq!(groups.len(), layout().groups_in(piece) as usize);
    }
}

/// Three pieces, the last of five groups and some bytes.
fn layout() -> PieceLayout {
    PieceLayout::new((2 << 20) + 5 * GROUP_SIZE + 7).expect("far below the largest")
}
