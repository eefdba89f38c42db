//! Limits, eviction, full disks.

mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;

use pantala_store::{Blob, Store, StoreConfig, StoreError};
use proptest::prelude::*;
use rig::Sample;
use rig::sim::SimFs;

const GROUP: usize = 64 * 1024;
/// What a blob of one group takes: its data, and two blocks and a record of metadata.
const ONE_BYTES: u64 = GROUP as u64 + 3 * 4096;

fn sample(seed: u64) -> Sample {
    Sample::new(seed, GROUP)
}

fn store(fs: &SimFs, blobs: u64, low_watermark_percent: u8) -> Store {
    let config = StoreConfig {
        low_watermark_percent,
        ..StoreConfig::new("/store", blobs * ONE_BYTES)
    };
    Store::open_on(config, Arc::new(fs.clone())).unwrap()
}

fn make(store: &Store, seed: u64) -> Result<Blob, StoreError> {
    let sample = sample(seed);
    let blob = store.create(&sample.digest, GROUP as u64)?;
    if blob.held().is_empty() {
        sample.put_all(&blob)?;
        sample.complete(&blob);
    }
    Ok(blob)
}

fn has(store: &Store, seed: u64) -> bool {
    let digest = sample(seed).digest;
    store.list().iter().any(|summary| summary.digest == digest)
}

#[test]
fn the_least_recently_used_blobs_go_first_down_to_the_low_watermark() {
    let fs = SimFs::new(1);
    let store = store(&fs, 10, 50);
    for seed in 0..10 {
        make(&store, seed).unwrap();
    }
    assert_eq!(store.usage_bytes(), 10 * ONE_BYTES);
    store.open_existing(&sample(0).digest).unwrap().unwrap();
    make(&store, 10).unwrap();
    assert_eq!(store.usage_bytes(), 5 * ONE_BYTES);
    let left: Vec<u64> = (0..11).filter(|seed| has(&store, *seed)).collect();
    assert_eq!(left, [0, 7, 8, 9, 10]);
}

#[test]
fn the_order_of_use_survives_a_restart_and_a_lower_limit() {
    let fs = SimFs::new(1);
    let first = store(&fs, 6, 100);
    for seed in 0..6 {
        make(&first, seed).unwrap();
    }
    make(&first, 1).unwrap();
    drop(first);
    let second = store(&fs, 3, 100);
    let left: Vec<u64> = (0..6).filter(|seed| has(&second, *seed)).collect();
    assert_eq!(left, [1, 4, 5]);
    // What is used now counts as later than all that was used before the restart.
    make(&second, 4).unwrap();
    make(&second, 7).unwrap();
    assert!(has(&second, 4) && !has(&second, 5));
}

#[test]
fn an_open_blob_is_never_evicted_and_a_full_store_says_so() {
    let fs = SimFs::new(1);
    let store = store(&fs, 3, 100);
    let open: Vec<Blob> = (0..2).map(|seed| make(&store, seed).unwrap()).collect();
    make(&store, 2).unwrap();
    let third = make(&store, 3).unwrap();
    let error = make(&store, 4).unwrap_err();
    let full = StoreError::Full {
        needed_bytes: ONE_BYTES,
        limit_bytes: 3 * ONE_BYTES,
        pinned_bytes: 3 * ONE_BYTES,
    };
    assert_eq!(error.to_string(), full.to_string());
    drop(third.clone());
    assert!(make(&store, 4).is_err());
    drop(third);
    make(&store, 4).unwrap();
    assert!(open.iter().all(|blob| blob.held().is_full()));
}

#[test]
fn a_blob_that_can_never_fit_evicts_nothing() {
    let fs = SimFs::new(1);
    let store = store(&fs, 3, 50);
    for seed in 0..3 {
        make(&store, seed).unwrap();
    }
    let huge = store.create(&sample(9).digest, 4 * ONE_BYTES);
    assert!(matches!(
        huge,
        Err(StoreError::Full {
            pinned_bytes: 0,
            ..
        })
    ));
    assert_eq!(store.list().len(), 3);
}

#[test]
fn a_removed_blob_that_is_open_can_be_read_and_made_again_beside_itself() {
    let fs = SimFs::new(1);
    let store = store(&fs, 3, 100);
    let old = make(&store, 0).unwrap();
    assert!(store.remove(old.digest()).unwrap());
    assert!(!store.remove(old.digest()).unwrap());
    assert_eq!(store.list(), []);
    assert_eq!(store.usage_bytes(), ONE_BYTES);
    let new = store.create(old.digest(), GROUP as u64).unwrap();
    assert!(new.held().is_empty() && old.held().is_full());
    assert_eq!(store.usage_bytes(), 2 * ONE_BYTES);
    assert_eq!(sample(0).read(&old, 0, GROUP).unwrap(), GROUP);
    assert_eq!(sample(0).read(&new, 0, GROUP).unwrap(), 0);
    old.flush().unwrap();
    drop(old);
    assert_eq!(store.usage_bytes(), ONE_BYTES);
    sample(0).put_all(&new).unwrap();
    sample(0).complete(&new);
}

#[test]
fn a_full_disk_evicts_below_the_limit_and_then_gives_up_cleanly() {
    let fs = SimFs::new(1);
    let store = store(&fs, 100, 100);
    fs.set_capacity(3 * ONE_BYTES);
    let open: Vec<Blob> = (0..2).map(|seed| make(&store, seed).unwrap()).collect();
    make(&store, 2).unwrap();
    make(&store, 3).unwrap();
    assert!(!has(&store, 2));
    let last = make(&store, 3).unwrap();
    let error = make(&store, 4).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }) && error.is_full());
    assert_eq!(store.usage_bytes(), 3 * ONE_BYTES);
    assert!(!has(&store, 4) && fs.files().len() == 6);
    drop((open, last));
}

#[test]
fn a_write_on_a_full_disk_fails_and_leaves_nothing_readable() {
    let fs = SimFs::new(1);
    let store = store(&fs, 10, 100);
    let sample = sample(0);
    let blob = store.create(&sample.digest, GROUP as u64).unwrap();
    fs.set_full(true);
    let error = blob.write_groups(0, &sample.bytes).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }));
    assert_eq!(blob.readable_from(0), 0);
    fs.set_full(false);
    blob.write_groups(0, &sample.bytes).unwrap();
    fs.set_full(true);
    let claim = sample.claim(0);
    assert!(
        blob.commit_piece(pantala_wire::PieceIndex(0), claim)
            .is_err()
    );
    assert!(blob.held().is_empty());
    fs.set_full(false);
    blob.commit_piece(pantala_wire::PieceIndex(0), claim)
        .unwrap();
}

#[test]
fn a_watermark_that_is_no_share_is_refused() {
    for percent in [0, 101] {
        let config = StoreConfig {
            low_watermark_percent: percent,
            ..StoreConfig::new("/store", 1)
        };
        let result = Store::open_on(config, Arc::new(SimFs::new(1)));
        assert!(matches!(result, Err(StoreError::Config(_))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is opened, closed and removed: the limit holds, open blobs stay, and what is
    /// evicted was used before what stays.
    #[test]
    fn the_limit_holds_and_open_blobs_stay(
        limit in 1u64..6,
        low in 1u8..=100,
        steps in proptest::collection::vec((0u64..9, 0u8..10), 1..60),
    ) {
        let fs = SimFs::new(0);
        let store = store(&fs, limit, low);
        let mut open: BTreeMap<u64, Blob> = BTreeMap::new();
        for (seed, what) in steps {
            match what {
                0..6 => {
                    let before = store.list();
                    match make(&store, seed) {
                        Ok(blob) => { open.insert(seed, blob); }
                        Err(StoreError::Full { pinned_bytes, .. }) => {
                            prop_assert_eq!(pinned_bytes, open.len() as u64 * ONE_BYTES);
                            prop_assert_eq!(open.len() as u64, limit);
                        }
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                    let after = store.list();
                    let is_left = |digest| after.iter().any(|summary| summary.digest == digest);
                    let is_open = |digest| open.values().any(|blob| *blob.digest() == digest);
                    let evicted = before.iter().filter(|summary| !is_left(summary.digest));
                    let evicted_last = evicted.map(|summary| summary.last_access).max();
                    let stay = before.iter().filter(|s| is_left(s.digest) && !is_open(s.digest));
                    let stay_first = stay.map(|summary| summary.last_access).min();
                    if let (Some(evicted), Some(stay)) = (evicted_last, stay_first) {
                        prop_assert!(evicted < stay);
                    }
                }
                6..9 => drop(open.remove(&seed)),
                _ => {
                    open.remove(&seed);
                    store.remove(&sample(seed).digest).unwrap();
                }
            }
            prop_assert!(store.usage_bytes() <= limit * ONE_BYTES);
            for blob in open.values() {
                prop_assert!(blob.held().is_full());
                prop_assert!(store.list().iter().any(|s| s.digest == *blob.digest()));
            }
        }
        open.clear();
        let used = store.usage_bytes();
        prop_assert_eq!(used, store.list().len() as u64 * ONE_BYTES);
        prop_assert_eq!(fs.files().len(), store.list().len() * 2);
    }
}
