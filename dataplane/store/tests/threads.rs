//! Many threads on one store. The interleavings are the machine's; what is checked holds in all.

mod rig;

use std::sync::atomic::{AtomicBool, Ordering};

use pantala_store::{Store, StoreConfig, StoreError};
use pantala_wire::{GROUP_SIZE, PieceIndex};
use rig::{Rng, Sample, Seed, seeds};
use tempfile::TempDir;

const GROUP: usize = GROUP_SIZE as usize;

#[test]
fn a_reader_sees_whole_groups_while_writers_disagree() {
    const WRITERS: u8 = 3;
    const ROUNDS: u64 = 60;
    let dir = TempDir::new().unwrap();
    let store = Store::open(StoreConfig::new(dir.path(), 1 << 30)).unwrap();
    let sample = Sample::new(1, 4 * GROUP);
    let blob = store.create(&sample.digest, 4 * GROUP_SIZE).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let blob = blob.clone();
                scope.spawn(move || {
                    let data = vec![writer + 1; 2 * GROUP];
                    let mut rng = Rng(u64::from(writer));
                    for _ in 0..ROUNDS {
                        blob.write_groups(rng.below(3) * GROUP_SIZE, &data).unwrap();
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            let (blob, done) = (blob.clone(), &done);
            scope.spawn(move || {
                let mut out = vec![0; 4 * GROUP];
                while !done.load(Ordering::Relaxed) {
                    let read = blob.read_at(0, &mut out).unwrap();
                    for group in out[..read].chunks(GROUP) {
                        assert!((1..=WRITERS).contains(&group[0]));
                        assert!(group.iter().all(|byte| *byte == group[0]), "a torn group");
                    }
                }
            });
        }
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    // Whatever won, digests and bytes agree: the truth replaces it and verifies.
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    assert_eq!(sample.read(&blob, 0, 4 * GROUP).unwrap(), 4 * GROUP);
}

#[test]
fn opening_filling_evicting_and_removing_at_once_never_mixes_blobs_up() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 120;
    for seed in seeds(3) {
        let _seed = Seed(seed);
        let dir = TempDir::new().unwrap();
        let samples: Vec<Sample> = (0..6).map(|n| Sample::new(n, 17 * GROUP)).collect();
        let limit_bytes = 4 * (17 * GROUP_SIZE + (32 << 10));
        let store = Store::open(StoreConfig::new(dir.path(), limit_bytes)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (store, samples) = (store.clone(), &samples);
                scope.spawn(move || {
                    let mut rng = Rng(seed * 100 + thread);
                    for _ in 0..ROUNDS {
                        round(&store, &samples[rng.below(6) as usize], &mut rng);
                    }
                });
            }
        });
        let used = store.usage_bytes();
        assert!(used <= limit_bytes);
        drop(store);
        let store = Store::open(StoreConfig::new(dir.path(), limit_bytes)).unwrap();
        assert_eq!(
            store.usage_bytes(),
            used,
            "an unlinked blob was still counted"
        );
        for summary in store.list() {
            let blob = store.open_existing(&summary.digest).unwrap().unwrap();
            let sample = samples.iter().find(|s| s.digest == summary.digest).unwrap();
            for piece in blob.held().iter() {
                let (start, bytes) = sample.piece(piece.0);
                assert_eq!(sample.read(&blob, start, bytes.len()).unwrap(), bytes.len());
            }
        }
    }
}

fn round(store: &Store, sample: &Sample, rng: &mut Rng) {
    if rng.chance(10) {
        store.remove(&sample.digest).unwrap();
        return;
    }
    let blob = match store.create(&sample.digest, sample.layout.blob_size()) {
        Ok(blob) => blob,
        Err(StoreError::Full { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let piece = rng.below(2) as u32;
    match rng.below(5) {
        0 | 1 => match sample.put(&blob, piece) {
            // Another thread was first, or discards it.
            Ok(())
            | Err(StoreError::AlreadyHeld(_) | StoreError::Unwritten(_) | StoreError::Dropped(_)) =>
                {}
            Err(error) => panic!("{error}"),
        },
        2 => blob.flush().unwrap(),
        3 => blob.discard_piece(PieceIndex(piece)).unwrap(),
        _ => {
            blob.piece_proof(PieceIndex(piece)).unwrap();
        }
    }
    sample
        .read(&blob, rng.below(17 * GROUP_SIZE), 1 << 20)
        .unwrap();
}
