//! Random operations, faults and crashes, checked against a model.
//!
//! The model is small: each blob's true bytes, and the pieces that a flush has promised to keep.
//! Whatever happens, a read returns true bytes or none, and a promised piece survives every crash.

mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use pantala_store::{Blob, Sha256Progress, Sha256Verdict, Store, StoreConfig, StoreError};
use pantala_wire::tree::group_digests;
use pantala_wire::{ByteRange, GROUP_SIZE, PieceIndex};
use rig::sim::SimFs;
use rig::{Rng, Sample, Seed, seeds};

const GROUP: usize = GROUP_SIZE as usize;
const RUNS_PER_SEED: usize = 4;
const STEPS_PER_RUN: u64 = 60;
/// Slices kept while other things happen; the disk of the test checks that nothing is written to them.
const SLICES_MAX: usize = 8;

struct Machine {
    fs: SimFs,
    rng: Rng,
    samples: Vec<Sample>,
    limit_bytes: u64,
    /// Not all blobs fit. A crash may bring evicted ones back, and the start then evicts others.
    evicts: bool,
    store: Option<Store>,
    open: BTreeMap<usize, Blob>,
    slices: Vec<Bytes>,
    /// Pieces that must survive, per sample.
    kept: Vec<BTreeSet<u32>>,
    /// Bytes may have rotted: promises of survival are off, those of right bytes are not.
    rotten: bool,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let sizes = [
            0,
            1,
            GROUP - 1,
            GROUP,
            3 * GROUP + 5,
            16 * GROUP,
            17 * GROUP + 1,
            33 * GROUP,
        ];
        let samples: Vec<Sample> = (0..4)
            .map(|index| {
                Sample::new(
                    rng.next(),
                    sizes[rng.below(sizes.len() as u64) as usize] + index,
                )
            })
            .collect();
        let total: u64 = samples
            .iter()
            .map(|sample| sample.layout.blob_size() + (32 << 10))
            .sum();
        let evicts = rng.chance(50);
        Self {
            fs: SimFs::new(seed),
            limit_bytes: if evicts { total * 2 / 3 } else { total },
            evicts,
            kept: vec![BTreeSet::new(); samples.len()],
            samples,
            rng,
            store: None,
            open: BTreeMap::new(),
            slices: Vec::new(),
            rotten: false,
        }
    }

    fn start(&mut self) {
        let config = StoreConfig::new("/store", self.limit_bytes);
        let store = Store::open_on(config, Arc::new(self.fs.clone())).expect("a sound disk opens");
        for (index, sample) in self.samples.iter().enumerate() {
            let blob = store
                .open_existing(&sample.digest)
                .expect("a sound disk reads");
            let kept = std::mem::take(&mut self.kept[index]);
            if self.rotten || (self.evicts && blob.is_none()) {
                continue;
            }
            for piece in kept {
                let blob = blob
                    .as_ref()
                    .unwrap_or_else(|| panic!("blob {index} was lost"));
                assert!(
                    blob.held().contains(PieceIndex(piece)),
                    "piece {piece} of {index} was lost"
                );
                let (start, bytes) = sample.piece(piece);
                assert_eq!(sample.read(blob, start, bytes.len()).unwrap(), bytes.len());
                self.kept[index].insert(piece);
            }
            if let Some(blob) = blob.filter(|blob| blob.is_complete()) {
                // Names of a blob that was removed and made anew may come back in any mixture: what
                // was not promised may turn out to be damaged, but never to be something else.
                match blob.verify_sha256(&mut Sha256Progress::new()) {
                    Ok(Sha256Verdict::Match(_)) => {}
                    Err(StoreError::Corrupt { piece, .. }) => {
                        assert!(!self.kept[index].contains(&piece.0));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        self.store = Some(store);
    }

    fn stop(&mut self) {
        self.open.clear();
        self.slices.clear();
        self.store = None;
    }

    /// What a failed operation may say in this test: the faults that were injected, and their
    /// consequences. Wrong bytes, false claims or broken bounds would be the store's own doing.
    fn tolerate<T>(&self, result: Result<T, StoreError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(
                StoreError::Io { .. }
                | StoreError::DiskFull { .. }
                | StoreError::Full { .. }
                | StoreError::Corrupt { .. }
                | StoreError::AlreadyHeld(_)
                | StoreError::Unwritten(_)
                | StoreError::BeingRead(_)
                | StoreError::Dropped(_),
            ) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Corruption is dropped data: the promise ended with it, and a fault must have caused it.
    fn after_faults(&mut self, index: usize) {
        if let Some(blob) = self.open.get(&index) {
            let held = blob.held();
            self.kept[index].retain(|piece| held.contains(PieceIndex(*piece)));
        }
    }

    fn create(&mut self, index: usize) {
        let store = self.store.clone().unwrap();
        let sample = &self.samples[index];
        let blob = self.tolerate(store.create(&sample.digest, sample.layout.blob_size()));
        if let Some(blob) = blob {
            self.open.insert(index, blob);
        } else {
            // It may have failed with evictions half done.
            for (other, kept) in self.kept.iter_mut().enumerate() {
                if !self.open.contains_key(&other) {
                    kept.clear();
                }
            }
        }
        self.forget_evicted();
        if !self.fs.is_crashed() {
            assert!(store.usage_bytes() <= self.limit_bytes);
        }
    }

    fn forget_evicted(&mut self) {
        let listed = self.store.as_ref().unwrap().list();
        for (index, sample) in self.samples.iter().enumerate() {
            let there = listed.iter().any(|summary| summary.digest == sample.digest);
            assert!(
                there || !self.open.contains_key(&index),
                "an open blob was evicted"
            );
            if !there {
                self.kept[index].clear();
            }
        }
    }

    fn step(&mut self) {
        let index = self.rng.below(self.samples.len() as u64) as usize;
        let Some(blob) = self.open.get(&index).cloned() else {
            self.create(index);
            // Metadata that cannot be read costs the blob.
            return self.after_faults(index);
        };
        let sample = &self.samples[index];
        let size = sample.layout.blob_size();
        let piece_count = u64::from(sample.layout.piece_count());
        let piece = self.rng.below(piece_count.max(1)) as u32;
        let there = size > 0;
        match self.rng.below(100) {
            0..30 if there => {
                let (start, bytes) = sample.piece(piece);
                let groups = bytes.len().div_ceil(GROUP) as u64;
                let first = self.rng.below(groups) as usize;
                let count = self.rng.below(groups - first as u64) as usize + 1;
                let range = first * GROUP..((first + count) * GROUP).min(bytes.len());
                let at = start + range.start as u64;
                let bytes = &bytes[range];
                if self.rng.chance(50) {
                    self.tolerate(blob.write_groups(at, bytes));
                    return;
                }
                let part_len = self.rng.below(2 * GROUP_SIZE) as usize + 1;
                let parts: Vec<Bytes> =
                    bytes.chunks(part_len).map(Bytes::copy_from_slice).collect();
                let digests = group_digests(at, bytes);
                self.tolerate(blob.write_verified_slices(at, &parts, &digests));
            }
            30..50 if there => {
                self.tolerate(sample.put(&blob, piece));
            }
            50..60 => {
                // What a restart found is promised by whoever flushed it, and by this flush only
                // once it has been verified.
                let found = blob.held().iter().collect::<Vec<PieceIndex>>();
                let sound = found.into_iter().filter(|piece| {
                    let range = sample.layout.piece_range(*piece).unwrap();
                    self.kept[index].contains(&piece.0)
                        || matches!(blob.verify_range(range), Ok(true))
                });
                let sound: Vec<u32> = sound.map(|piece| piece.0).collect();
                if self.tolerate(blob.flush()).is_some() {
                    self.kept[index].extend(sound);
                    assert_eq!(blob.unflushed_bytes(), 0);
                }
            }
            60..70 if there => {
                let start = self.rng.below(size);
                let end = start + self.rng.below((size - start).min(3 << 20)) + 1;
                let range = ByteRange::new(start, end).unwrap();
                let readable = blob.readable_from(start) >= end;
                if let Some(slice) = self.tolerate(blob.slice(range)) {
                    assert_eq!(slice.is_some(), readable);
                    let right = &sample.bytes[start as usize..end as usize];
                    assert!(
                        slice.as_ref().is_none_or(|slice| slice == right),
                        "wrong bytes"
                    );
                    if self.slices.len() == SLICES_MAX {
                        let gone = self.rng.below(SLICES_MAX as u64) as usize;
                        self.slices.swap_remove(gone);
                    }
                    self.slices.extend(slice);
                }
            }
            70..80 if there => {
                let offset = self.rng.below(size);
                let len = self.rng.below((size - offset).min(3 << 20)) as usize + 1;
                let readable = blob.readable_from(offset);
                let read = self.tolerate(sample.read(&blob, offset, len));
                if let Some(read) = read {
                    assert_eq!(read as u64, (readable - offset).min(len as u64));
                }
            }
            80..84 if there => {
                self.kept[index].remove(&piece);
                self.tolerate(blob.discard_piece(PieceIndex(piece)));
                assert!(!blob.held().contains(PieceIndex(piece)));
            }
            84..88 if there => {
                let held = blob.held().contains(PieceIndex(piece));
                if let Some(proof) = self.tolerate(blob.piece_proof(PieceIndex(piece))) {
                    assert_eq!(proof.is_some(), held);
                    let right = proof.is_none_or(|proof| proof.claim == sample.claim(piece));
                    assert!(right, "a wrong proof");
                }
            }
            88..92 => {
                let mut progress = Sha256Progress::new();
                match self.tolerate(blob.verify_sha256(&mut progress)) {
                    Some(Sha256Verdict::Match(proof)) => {
                        let done = self.tolerate(blob.mark_complete(proof));
                        assert!(done.is_none() || blob.is_complete());
                    }
                    Some(Sha256Verdict::Mismatch) => panic!("true bytes have the wrong sha256"),
                    Some(Sha256Verdict::Unfinished) | None => {}
                }
            }
            92..98 => {
                self.open.remove(&index);
            }
            98 => {
                self.kept[index].clear();
                self.tolerate(self.store.as_ref().unwrap().remove(&sample.digest));
                self.open.remove(&index);
            }
            _ => {
                let full = self.rng.chance(50);
                self.fs.set_full(full);
            }
        }
        drop(blob);
        self.after_faults(index);
    }

    fn run(&mut self, fault_rate: u64) {
        self.start();
        self.fs.set_fault_rate(fault_rate);
        let crash_in = self.rng.below(STEPS_PER_RUN * 5);
        self.fs.crash_in(crash_in);
        for _ in 0..STEPS_PER_RUN {
            self.step();
            if self.fs.is_crashed() {
                break;
            }
        }
        // Where it has not crashed by now, it does so between two operations.
        self.fs.crash_in(0);
        self.stop();
        self.fs.restart();
    }
}

#[test]
fn after_any_crash_flushed_pieces_are_there_and_no_read_returns_wrong_bytes() {
    for seed in seeds(60) {
        let _seed = Seed(seed);
        let mut machine = Machine::new(seed);
        for _ in 0..RUNS_PER_SEED {
            machine.run(0);
        }
        machine.start();
    }
}

#[test]
fn after_crashes_amid_failing_operations_no_read_returns_wrong_bytes() {
    for seed in seeds(60) {
        let _seed = Seed(seed);
        let mut machine = Machine::new(seed ^ 0xfa11);
        for _ in 0..RUNS_PER_SEED {
            machine.run(200);
        }
        machine.start();
    }
}

#[test]
fn when_data_and_metadata_rot_no_read_returns_wrong_bytes() {
    for seed in seeds(60) {
        let _seed = Seed(seed);
        let mut machine = Machine::new(seed ^ 0x407);
        machine.rotten = true;
        for _ in 0..RUNS_PER_SEED {
            machine.run(0);
            for file in machine.fs.files() {
                if machine.rng.chance(50) {
                    machine.fs.rot(&file, &mut machine.rng);
                }
            }
        }
        machine.start();
    }
}
