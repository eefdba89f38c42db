//! Syncs that fail, and words that are not their author's.

mod rig;

use std::sync::Arc;

use pantala_store::{Store, StoreConfig, StoreError};
use pantala_wire::PieceIndex;
use rig::Sample;
use rig::sim::SimFs;

const PIECE: usize = 1 << 20;

fn open(fs: &SimFs) -> Store {
    let config = StoreConfig::new("/store", 1 << 30);
    Store::open_on(config, Arc::new(fs.clone())).unwrap()
}

#[test]
fn a_failed_flush_drops_what_it_cannot_vouch_for_and_the_blob_recovers() {
    let (fs, sample) = (SimFs::new(1), Sample::new(1, 3 * PIECE));
    let store = open(&fs);
    let blob = store.create(&sample.digest, 3 * PIECE as u64).unwrap();
    sample.put(&blob, 0).unwrap();
    blob.write_groups(PIECE as u64, &sample.bytes[PIECE..2 * PIECE])
        .unwrap();
    fs.set_fail_syncs(true);
    assert!(matches!(blob.flush(), Err(StoreError::Io { .. })));
    assert!(blob.held().is_empty());
    assert_eq!(blob.readable_from(0), 0);
    assert_eq!(blob.readable_from(PIECE as u64), PIECE as u64);
    fs.set_fail_syncs(false);
    sample.put(&blob, 2).unwrap();
    blob.flush().unwrap();
    drop((blob, store));
    fs.restart();
    let blob = open(&fs).open_existing(&sample.digest).unwrap().unwrap();
    assert_eq!(blob.held().iter().collect::<Vec<_>>(), [PieceIndex(2)]);
    assert_eq!(sample.read(&blob, 2 * PIECE as u64, PIECE).unwrap(), PIECE);
}

#[test]
fn a_blob_that_lost_a_piece_is_not_complete_again_because_a_sync_failed() {
    let (fs, sample) = (SimFs::new(1), Sample::new(1, 2 * PIECE));
    let store = open(&fs);
    let blob = store.create(&sample.digest, 2 * PIECE as u64).unwrap();
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    fs.set_fail_syncs(true);
    assert!(blob.discard_piece(PieceIndex(1)).is_err());
    assert!(!blob.is_complete() && blob.held().len() == 1);
    fs.set_fail_syncs(false);
    sample.put(&blob, 1).unwrap();
    blob.flush().unwrap();
    drop((blob, store));
    fs.restart();
    // All pieces are there, but nobody has hashed the blob since.
    let blob = open(&fs).open_existing(&sample.digest).unwrap().unwrap();
    assert!(blob.held().is_full() && !blob.is_complete());
}

#[test]
fn a_piece_whose_claim_is_not_its_authors_is_not_held_after_a_restart() {
    let (fs, sample) = (SimFs::new(1), Sample::new(1, 2 * PIECE));
    let store = open(&fs);
    let blob = store.create(&sample.digest, 2 * PIECE as u64).unwrap();
    sample.put(&blob, 0).unwrap();
    let mut forged = sample.claim(1);
    forged.signature[3] ^= 1;
    blob.write_groups(PIECE as u64, &sample.bytes[PIECE..])
        .unwrap();
    blob.commit_piece(PieceIndex(1), forged).unwrap();
    blob.flush().unwrap();
    drop((blob, store));
    let blob = open(&fs).open_existing(&sample.digest).unwrap().unwrap();
    assert_eq!(blob.held().iter().collect::<Vec<_>>(), [PieceIndex(0)]);
}
