//! Bytes lent where they lie, on a real file system: what they are, and that they stay so.

mod rig;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use pantala_store::{Blob, Store, StoreConfig, StoreError};
use pantala_wire::tree::group_digests;
use pantala_wire::{ByteRange, GROUP_SIZE, PieceIndex};
use rig::{Rng, Sample, Seed, claim, seeds};
use tempfile::TempDir;

const GROUP: usize = GROUP_SIZE as usize;
const PIECE: usize = 1 << 20;

fn setup(size: usize) -> (TempDir, Store, Sample, Blob) {
    let dir = TempDir::new().unwrap();
    let store = Store::open(StoreConfig::new(dir.path(), 1 << 30)).unwrap();
    let sample = Sample::new(size as u64, size);
    let blob = store.create(&sample.digest, size as u64).unwrap();
    (dir, store, sample, blob)
}

fn slice(blob: &Blob, start: usize, end: usize) -> Result<Option<Bytes>, StoreError> {
    blob.slice(ByteRange::new(start as u64, end as u64).unwrap())
}

fn data_file(dir: &TempDir, sample: &Sample) -> PathBuf {
    let hex = sample.digest.to_hex();
    let place = dir.path().join("blobs/sha256").join(&hex[..2]);
    place.join(hex).join("data")
}

#[test]
fn a_slice_is_the_readable_bytes_of_any_range_and_nothing_at_a_gap() {
    let size = 2 * PIECE + 3 * GROUP + 77;
    let (_dir, _store, sample, blob) = setup(size);
    assert_eq!(slice(&blob, 0, 1).unwrap(), None);
    sample.put(&blob, 0).unwrap();
    sample.put(&blob, 2).unwrap();
    let bytes = &sample.bytes;
    blob.write_groups(PIECE as u64, &bytes[PIECE..PIECE + GROUP])
        .unwrap();
    let readable = [
        (0, PIECE + GROUP),
        (5, 6),
        (PIECE - 1, PIECE + 1),
        (GROUP - 4095, 3 * GROUP + 1),
        (2 * PIECE, size),
        (size - 1, size),
    ];
    for (start, end) in readable {
        assert!(slice(&blob, start, end).unwrap().unwrap() == bytes[start..end]);
    }
    for (start, end) in [
        (0, PIECE + GROUP + 1),
        (PIECE + GROUP, size),
        (size - 1, size + 1),
    ] {
        assert_eq!(slice(&blob, start, end).unwrap(), None, "{start}..{end}");
    }
    assert_eq!(slice(&blob, usize::MAX - 1, usize::MAX).unwrap(), None);
}

#[test]
fn a_slice_keeps_the_bytes_of_a_piece_that_is_dropped_and_written_anew() {
    let (_dir, _store, sample, blob) = setup(PIECE + 100);
    sample.put_all(&blob).unwrap();
    let whole = slice(&blob, 0, PIECE + 100).unwrap().unwrap();
    let tail = slice(&blob, PIECE + 50, PIECE + 100).unwrap().unwrap();
    for round in 1..4_u8 {
        // Another author, with another word about each piece.
        let lies = [vec![round; PIECE], vec![round; 100]];
        for (piece, lie) in lies.iter().enumerate() {
            let index = PieceIndex(piece as u32);
            let start = (piece * PIECE) as u64;
            blob.discard_piece(index).unwrap();
            blob.write_groups(start, lie).unwrap();
            blob.commit_piece(index, claim(&sample.digest, index.0, start, lie))
                .unwrap();
        }
        let seen = slice(&blob, PIECE - 10, PIECE + 10).unwrap().unwrap();
        assert!(seen.iter().all(|byte| *byte == round));
        assert!(whole == sample.bytes && tail == sample.bytes[PIECE + 50..]);
    }
    drop((whole, tail));
    let seen = slice(&blob, 0, PIECE + 100).unwrap().unwrap();
    assert!(seen.iter().all(|byte| *byte == 3));
}

#[test]
fn groups_that_are_rewritten_before_their_piece_is_held_stay_in_a_slice() {
    let (_dir, _store, _sample, blob) = setup(PIECE);
    blob.write_groups(0, &vec![1; 4 * GROUP]).unwrap();
    let first = slice(&blob, 0, 2 * GROUP).unwrap().unwrap();
    // Beside what is lent, and over it.
    blob.write_groups(2 * GROUP_SIZE, &vec![2; GROUP]).unwrap();
    blob.write_groups(GROUP_SIZE, &vec![3; GROUP]).unwrap();
    assert!(first.iter().all(|byte| *byte == 1));
    let now = slice(&blob, 0, 4 * GROUP).unwrap().unwrap();
    let fills: Vec<u8> = now.chunks(GROUP).map(|group| group[0]).collect();
    assert_eq!(fills, [1, 3, 2, 1]);
}

#[test]
fn a_slice_outlives_its_blob_its_eviction_and_its_store() {
    let (dir, store, sample, blob) = setup(3 * PIECE);
    sample.put_all(&blob).unwrap();
    let slices: Vec<Bytes> = (0..3)
        .map(|piece| {
            slice(&blob, piece * PIECE, (piece + 1) * PIECE)
                .unwrap()
                .unwrap()
        })
        .collect();
    drop(blob);
    assert!(store.remove(&sample.digest).unwrap());
    assert_eq!(store.usage_bytes(), 0);
    // Made anew in the same place, with other bytes.
    let blob = store.create(&sample.digest, 3 << 20).unwrap();
    blob.write_groups(0, &vec![9; 3 * PIECE]).unwrap();
    drop((blob, store));
    dir.close().unwrap();
    assert!(slices.concat() == sample.bytes);
}

#[test]
fn whoever_opens_a_blob_again_writes_nothing_under_the_slices_of_before() {
    let (_dir, store, sample, blob) = setup(2 * PIECE);
    sample.put_all(&blob).unwrap();
    let kept = slice(&blob, 0, 2 * PIECE).unwrap().unwrap();
    drop(blob);
    let blob = store.open_existing(&sample.digest).unwrap().unwrap();
    blob.discard_piece(PieceIndex(1)).unwrap();
    blob.write_groups(PIECE as u64, &vec![7; PIECE]).unwrap();
    assert!(kept == sample.bytes);
    let again = slice(&blob, 0, 2 * PIECE).unwrap().unwrap();
    assert!(again[..PIECE] == sample.bytes[..PIECE]);
    assert!(again[PIECE..].iter().all(|byte| *byte == 7));
}

#[test]
fn damage_is_found_before_the_first_slice_and_healed_by_fetching_again() {
    let (dir, store, sample, blob) = setup(2 * PIECE);
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    drop((blob, store));
    let path = data_file(&dir, &sample);
    let mut bytes = fs::read(&path).unwrap();
    bytes[PIECE + 5] ^= 1;
    fs::write(&path, bytes).unwrap();
    let store = Store::open(StoreConfig::new(dir.path(), 1 << 30)).unwrap();
    let blob = store.open_existing(&sample.digest).unwrap().unwrap();
    assert!(slice(&blob, 0, 10).unwrap().unwrap() == sample.bytes[..10]);
    let damaged = slice(&blob, PIECE - 1, PIECE + 1);
    assert!(matches!(
        damaged,
        Err(StoreError::Corrupt {
            piece: PieceIndex(1),
            ..
        })
    ));
    assert_eq!(slice(&blob, PIECE - 1, PIECE + 1).unwrap(), None);
    sample.put(&blob, 1).unwrap();
    assert!(slice(&blob, 0, 2 * PIECE).unwrap().unwrap() == sample.bytes);
}

#[test]
fn a_file_that_somebody_has_cut_short_costs_its_pieces_and_not_the_process() {
    let (dir, _store, sample, blob) = setup(2 * PIECE);
    sample.put_all(&blob).unwrap();
    assert!(slice(&blob, 0, 2 * PIECE).unwrap().unwrap() == sample.bytes);
    let file = fs::File::options()
        .write(true)
        .open(data_file(&dir, &sample))
        .unwrap();
    file.set_len((PIECE + GROUP) as u64).unwrap();
    let lost = slice(&blob, 0, 2 * PIECE);
    assert!(matches!(
        lost,
        Err(StoreError::Corrupt {
            piece: PieceIndex(1),
            ..
        })
    ));
    assert!(slice(&blob, 0, PIECE).unwrap().unwrap() == sample.bytes[..PIECE]);
    sample.put(&blob, 1).unwrap();
    assert!(slice(&blob, 0, 2 * PIECE).unwrap().unwrap() == sample.bytes);
}

#[test]
fn slices_of_a_stream_are_written_as_one_and_only_if_every_group_is_right() {
    let (_dir, _store, sample, blob) = setup(PIECE + 3 * GROUP + 9);
    let cut = |bytes: &[u8], len: usize| -> Vec<Bytes> {
        bytes.chunks(len).map(Bytes::copy_from_slice).collect()
    };
    let expected = group_digests(0, &sample.bytes);
    let mut wrong = sample.bytes.clone();
    wrong[2 * GROUP + 5] ^= 1;
    let result = blob.write_verified_slices(0, &cut(&wrong, 1434), &expected);
    assert!(matches!(result, Err(StoreError::WrongGroup { offset }) if offset == 2 * GROUP_SIZE));
    let right = cut(&sample.bytes, 1434);
    let result = blob.write_verified_slices(0, &right, &expected[1..]);
    assert!(matches!(result, Err(StoreError::WrongGroup { offset: 0 })));
    let result = blob.write_verified_slices(0, &right[1..], &expected);
    assert!(matches!(result, Err(StoreError::Unaligned { .. })));
    let result = blob.write_verified_slices(0, &[], &[]);
    assert!(matches!(result, Err(StoreError::Unaligned { .. })));
    assert_eq!(blob.readable_from(0), 0);
    for len in [1, 1434, GROUP - 1, GROUP, GROUP + 1, 3 * PIECE] {
        let (_dir, _store, sample, blob) = setup(PIECE + 3 * GROUP + 9);
        blob.write_verified_slices(0, &cut(&sample.bytes, len), &expected)
            .unwrap();
        for piece in 0..2 {
            blob.commit_piece(PieceIndex(piece), sample.claim(piece))
                .unwrap();
        }
        let size = sample.bytes.len();
        assert_eq!(sample.read(&blob, 0, size).unwrap(), size);
    }
}

/// Every group is filled with one byte, so that a slice that changed or mixes writers shows.
fn check(slice: &[u8], start: usize) -> Vec<u8> {
    let mut fills = Vec::new();
    let mut rest = slice;
    let mut at = start;
    while !rest.is_empty() {
        let len = (GROUP - at % GROUP).min(rest.len());
        let (group, tail) = rest.split_at(len);
        assert!(
            group.iter().all(|byte| *byte == group[0]),
            "bytes of two writers"
        );
        fills.push(group[0]);
        at += len;
        rest = tail;
    }
    fills
}

#[test]
fn slices_stay_what_they_are_while_writers_disagree_and_pieces_are_dropped() {
    const WRITERS: u64 = 2;
    const ROUNDS: u64 = 250;
    const SIZE: usize = PIECE + 4 * GROUP;
    for seed in seeds(2) {
        let _seed = Seed(seed);
        let (_dir, store, sample, blob) = setup(SIZE);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (done, sample) = (&done, &sample);
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let store = store.clone();
                    scope.spawn(move || {
                        let mut rng = Rng(seed * 10 + writer);
                        for round in 0..ROUNDS {
                            // Opened and closed all the time: slices outlive it.
                            let blob = store.open_existing(&sample.digest).unwrap().unwrap();
                            let piece = PieceIndex(rng.below(2) as u32);
                            let groups = if piece.0 == 0 { 16 } else { 4 };
                            let first = rng.below(groups) as usize;
                            let count = rng.below(groups - first as u64) as usize + 1;
                            let fill = (writer + WRITERS * round) as u8;
                            let at = piece.0 as usize * PIECE + first * GROUP;
                            match blob.write_groups(at as u64, &vec![fill; count * GROUP]) {
                                Ok(_) | Err(StoreError::Dropped(_)) => {}
                                Err(error) => panic!("{error}"),
                            }
                            if rng.chance(20) {
                                blob.discard_piece(piece).unwrap();
                            }
                        }
                    })
                })
                .collect();
            for reader in 0..2 {
                let store = store.clone();
                scope.spawn(move || {
                    let mut rng = Rng(seed * 10 + 7 + reader);
                    let mut kept: Vec<(usize, Bytes, Vec<u8>)> = Vec::new();
                    while !done.load(Ordering::Relaxed) {
                        let blob = store.open_existing(&sample.digest).unwrap().unwrap();
                        let start = rng.below(SIZE as u64) as usize;
                        let end = blob.readable_from(start as u64) as usize;
                        if start < end
                            && let Some(bytes) = slice(&blob, start, end).unwrap()
                        {
                            let fills = check(&bytes, start);
                            kept.push((start, bytes, fills));
                        }
                        drop(blob);
                        if kept.len() > 6 {
                            let (start, bytes, fills) = kept.swap_remove(rng.below(7) as usize);
                            assert_eq!(check(&bytes, start), fills, "a slice has changed");
                        }
                    }
                    for (start, bytes, fills) in kept {
                        assert_eq!(check(&bytes, start), fills, "a slice has changed");
                    }
                });
            }
            drop(blob);
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
