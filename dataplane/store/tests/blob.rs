//! What a blob does on a real file system.

mod rig;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pantala_store::{Blob, Sha256Progress, Sha256Verdict, Store, StoreConfig, StoreError};
use pantala_wire::tree::group_digests;
use pantala_wire::{GROUP_SIZE, PieceIndex};
use rig::{Sample, claim};
use tempfile::TempDir;

const GROUP: usize = GROUP_SIZE as usize;
const LIMIT_BYTES: u64 = 1 << 30;

fn open(dir: &TempDir) -> Store {
    Store::open(StoreConfig::new(dir.path(), LIMIT_BYTES)).unwrap()
}

fn setup(size: usize) -> (TempDir, Store, Sample, Blob) {
    let dir = TempDir::new().unwrap();
    let store = open(&dir);
    let sample = Sample::new(size as u64, size);
    let blob = store.create(&sample.digest, size as u64).unwrap();
    (dir, store, sample, blob)
}

fn file_of(dir: &Path, sample: &Sample, name: &str) -> PathBuf {
    let hex = sample.digest.to_hex();
    dir.join("blobs/sha256")
        .join(&hex[..2])
        .join(hex)
        .join(name)
}

fn flip(path: &Path, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn a_blob_of_any_size_goes_in_comes_out_and_survives_a_restart() {
    for size in [
        0,
        1,
        GROUP - 1,
        GROUP,
        1 << 20,
        (1 << 20) + 1,
        (3 << 20) + GROUP + 7,
    ] {
        let (dir, store, sample, blob) = setup(size);
        assert!(!blob.is_complete());
        sample.put_all(&blob).unwrap();
        assert_eq!(sample.read(&blob, 0, size + 1).unwrap(), size);
        sample.complete(&blob);
        assert!(blob.is_complete() && blob.unflushed_bytes() == 0);
        drop((blob, store));
        let store = open(&dir);
        let summary = store.list().pop().unwrap();
        assert!(summary.complete && summary.size == size as u64);
        let blob = store.open_existing(&sample.digest).unwrap().unwrap();
        assert!(blob.is_complete() && blob.held().is_full());
        assert_eq!(sample.read(&blob, 0, size + 1).unwrap(), size);
        assert_eq!(blob.read_at(u64::MAX, &mut [0]).unwrap(), 0);
    }
}

#[test]
fn groups_are_readable_as_they_arrive_and_reads_stop_at_the_gap() {
    let (_dir, _store, sample, blob) = setup((2 << 20) + 100);
    let bytes = &sample.bytes;
    assert_eq!(blob.readable_from(0), 0);
    blob.write_groups(0, &bytes[..2 * GROUP]).unwrap();
    blob.write_groups(3 * GROUP as u64, &bytes[3 * GROUP..4 * GROUP])
        .unwrap();
    assert_eq!(blob.readable_from(0), 2 * GROUP as u64);
    assert_eq!(blob.readable_from(5), 2 * GROUP as u64);
    assert_eq!(sample.read(&blob, 10, 1 << 20).unwrap(), 2 * GROUP - 10);
    assert_eq!(sample.read(&blob, 2 * GROUP as u64, 1).unwrap(), 0);
    assert_eq!(blob.written_digest(PieceIndex(0)), None);
    sample.put(&blob, 1).unwrap();
    blob.write_groups(2 * GROUP as u64, &bytes[2 * GROUP..1 << 20])
        .unwrap();
    let claim = sample.claim(0);
    assert_eq!(blob.written_digest(PieceIndex(0)), Some(claim.piece_digest));
    assert_eq!(blob.readable_from(0), 2 << 20);
    // One write over the end of a piece and to the end of the blob.
    blob.discard_piece(PieceIndex(1)).unwrap();
    assert_eq!(blob.readable_from(0), 1 << 20);
    blob.write_groups(1 << 20, &bytes[1 << 20..]).unwrap();
    assert_eq!(sample.read(&blob, 0, 4 << 20).unwrap(), bytes.len());
}

#[test]
fn writes_that_are_not_whole_groups_of_the_blob_are_refused() {
    let (_dir, _store, _sample, blob) = setup(3 * GROUP + 9);
    let data = vec![0; 4 * GROUP];
    for (offset, len) in [
        (0, 0),
        (1, GROUP),
        (0, GROUP - 1),
        (0, 4 * GROUP),
        (3 * GROUP as u64, 8),
        (3 * GROUP as u64, 10),
        (4 * GROUP as u64, GROUP),
        (!(GROUP_SIZE - 1), GROUP),
    ] {
        let result = blob.write_groups(offset, &data[..len]);
        assert!(
            matches!(result, Err(StoreError::Unaligned { .. })),
            "{offset} {len}"
        );
    }
    blob.write_groups(3 * GROUP as u64, &data[..9]).unwrap();
}

#[test]
fn a_piece_is_held_only_with_all_its_groups_and_the_claimed_digest() {
    let (_dir, _store, sample, blob) = setup(2 << 20);
    let piece = PieceIndex(0);
    let (start, bytes) = sample.piece(0);
    let right = sample.claim(0);
    assert!(matches!(
        blob.commit_piece(piece, right),
        Err(StoreError::Unwritten(_))
    ));
    blob.write_groups(start, &bytes[GROUP..].repeat(2)[..GROUP])
        .unwrap();
    blob.write_groups(start + GROUP_SIZE, &bytes[GROUP..])
        .unwrap();
    assert!(matches!(
        blob.commit_piece(piece, right),
        Err(StoreError::WrongDigest { .. })
    ));
    assert!(blob.held().is_empty() && blob.piece_proof(piece).unwrap().is_none());
    blob.write_groups(start, &bytes[..GROUP]).unwrap();
    blob.commit_piece(piece, right).unwrap();
    blob.commit_piece(piece, right).unwrap();
    let other = claim(&sample.digest, 0, 0, &bytes[GROUP..]);
    assert!(matches!(
        blob.commit_piece(piece, other),
        Err(StoreError::WrongDigest { .. })
    ));
    assert!(matches!(
        blob.write_groups(0, &bytes[..GROUP]),
        Err(StoreError::AlreadyHeld(_))
    ));
    let proof = blob.piece_proof(piece).unwrap().unwrap();
    assert_eq!(proof.claim, right);
    assert_eq!(proof.group_digests, group_digests(0, bytes));
    let past = PieceIndex(2);
    assert!(matches!(
        blob.commit_piece(past, right),
        Err(StoreError::NoSuchPiece(_))
    ));
    assert!(blob.piece_proof(past).unwrap().is_none());
    blob.discard_piece(past).unwrap();
}

#[test]
fn a_group_that_is_not_the_announced_one_is_never_readable() {
    let (_dir, _store, sample, blob) = setup(4 * GROUP);
    let expected = group_digests(0, &sample.bytes);
    let mut bytes = sample.bytes.clone();
    bytes[2 * GROUP + 5] ^= 1;
    let result = blob.write_verified_groups(0, &bytes, &expected);
    assert!(matches!(result, Err(StoreError::WrongGroup { offset }) if offset == 2 * GROUP_SIZE));
    let result = blob.write_verified_groups(0, &sample.bytes, &expected[..3]);
    assert!(matches!(result, Err(StoreError::WrongGroup { offset }) if offset == 3 * GROUP_SIZE));
    assert_eq!(blob.readable_from(0), 0);
    blob.write_verified_groups(0, &sample.bytes, &expected)
        .unwrap();
    assert_eq!(sample.read(&blob, 0, 4 * GROUP).unwrap(), 4 * GROUP);
}

#[test]
fn damage_on_disk_is_found_at_the_first_read_and_healed_by_fetching_again() {
    let (dir, store, sample, blob) = setup(3 << 20);
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    drop((blob, store));
    flip(&file_of(dir.path(), &sample, "data"), (1 << 20) + 77);
    let store = open(&dir);
    let blob = store.open_existing(&sample.digest).unwrap().unwrap();
    assert!(blob.held().is_full());
    assert_eq!(sample.read(&blob, 0, 1 << 20).unwrap(), 1 << 20);
    let result = sample.read(&blob, 0, 3 << 20);
    assert!(matches!(
        result,
        Err(StoreError::Corrupt {
            piece: PieceIndex(1),
            ..
        })
    ));
    assert!(!blob.is_complete() && blob.held().len() == 2);
    assert_eq!(sample.read(&blob, 0, 3 << 20).unwrap(), 1 << 20);
    drop((blob, store));
    // Not complete after another restart either, until it is verified anew.
    let store = open(&dir);
    let blob = store.create(&sample.digest, 3 << 20).unwrap();
    assert!(!blob.is_complete() && blob.held().len() == 2);
    sample.put(&blob, 1).unwrap();
    sample.complete(&blob);
    assert_eq!(sample.read(&blob, 0, 3 << 20).unwrap(), 3 << 20);
}

#[test]
fn a_piece_is_verified_once_in_the_life_of_a_store() {
    let (dir, store, sample, blob) = setup(1 << 20);
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    drop((blob, store));
    let store = open(&dir);
    let read = |expect: usize| {
        let blob = store.open_existing(&sample.digest).unwrap().unwrap();
        assert_eq!(sample.read(&blob, 0, 16).unwrap(), expect);
    };
    read(16);
    // Far from what is read below: only a second verification would notice.
    flip(&file_of(dir.path(), &sample, "data"), (1 << 20) - 1);
    read(16);
}

#[test]
fn a_blob_with_unusable_files_is_absent_and_can_be_made_again() {
    type Damage = fn(&Path, &Sample);
    let damages: [Damage; 8] = [
        |dir, sample| flip(&file_of(dir, sample, "meta"), 0),
        |dir, sample| flip(&file_of(dir, sample, "meta"), 30),
        |dir, sample| flip(&file_of(dir, sample, "meta"), 70),
        |dir, sample| fs::write(file_of(dir, sample, "meta"), b"").unwrap(),
        |dir, sample| fs::write(file_of(dir, sample, "data"), b"short").unwrap(),
        |dir, sample| fs::remove_file(file_of(dir, sample, "data")).unwrap(),
        |dir, sample| fs::remove_file(file_of(dir, sample, "meta")).unwrap(),
        |dir, sample| {
            let other = Sample::new(99, 10);
            let from = file_of(dir, sample, "");
            let to = file_of(dir, &other, "");
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::rename(from, to).unwrap();
        },
    ];
    for (index, damage) in damages.iter().enumerate() {
        let (dir, store, sample, blob) = setup(GROUP + 1);
        sample.put_all(&blob).unwrap();
        sample.complete(&blob);
        drop((blob, store));
        damage(dir.path(), &sample);
        let store = open(&dir);
        assert_eq!(store.list(), [], "damage {index}");
        assert_eq!(store.usage_bytes(), 0);
        let blob = store
            .create(&sample.digest, sample.bytes.len() as u64)
            .unwrap();
        sample.put_all(&blob).unwrap();
        sample.complete(&blob);
    }
}

#[test]
fn a_wrong_sha256_is_found_and_its_proof_cannot_be_had_or_reused() {
    let (_dir, _store, sample, blob) = setup(3 << 20);
    let mut progress = Sha256Progress::new();
    let verdict = |progress: &mut Sha256Progress| blob.verify_sha256(progress).unwrap();
    sample.put(&blob, 0).unwrap();
    assert!(matches!(verdict(&mut progress), Sha256Verdict::Unfinished));
    assert_eq!(progress.hashed_bytes(), 1 << 20);
    // The author of piece 1 lies.
    let lie = vec![3; 1 << 20];
    blob.write_groups(1 << 20, &lie).unwrap();
    blob.commit_piece(PieceIndex(1), claim(&sample.digest, 1, 1 << 20, &lie))
        .unwrap();
    sample.put(&blob, 2).unwrap();
    assert!(matches!(verdict(&mut progress), Sha256Verdict::Mismatch));
    blob.discard_piece(PieceIndex(1)).unwrap();
    assert!(matches!(verdict(&mut progress), Sha256Verdict::Unfinished));
    sample.put(&blob, 1).unwrap();
    let Sha256Verdict::Match(proof) = verdict(&mut progress) else {
        panic!("the truth is refused");
    };
    blob.discard_piece(PieceIndex(2)).unwrap();
    sample.put(&blob, 2).unwrap();
    assert!(matches!(
        blob.mark_complete(proof),
        Err(StoreError::StaleProof(_))
    ));
    assert!(!blob.is_complete());
    sample.complete(&blob);
}

#[test]
fn another_size_is_refused_where_the_blob_is_sure_or_in_use_and_else_believed() {
    let (_dir, store, sample, blob) = setup(GROUP);
    let wrong = |store: &Store| store.create(&sample.digest, 7);
    assert!(matches!(wrong(&store), Err(StoreError::WrongSize { .. })));
    drop(blob);
    let blob = wrong(&store).unwrap();
    assert_eq!(blob.layout().blob_size(), 7);
    drop(blob);
    let blob = store.create(&sample.digest, GROUP_SIZE).unwrap();
    sample.put_all(&blob).unwrap();
    sample.complete(&blob);
    drop(blob);
    assert!(matches!(wrong(&store), Err(StoreError::WrongSize { .. })));
    assert!(matches!(
        store.create(&sample.digest, u64::MAX),
        Err(StoreError::Layout(_))
    ));
}

#[test]
fn files_are_the_owners_alone_and_one_process_has_the_store() {
    let (dir, store, sample, blob) = setup(GROUP);
    for name in ["data", "meta", ""] {
        let mode = fs::metadata(file_of(dir.path(), &sample, name))
            .unwrap()
            .permissions()
            .mode();
        let wanted = if name.is_empty() { 0o700 } else { 0o600 };
        assert_eq!(mode & 0o777, wanted, "{name}");
    }
    let error = Store::open(StoreConfig::new(dir.path(), LIMIT_BYTES)).unwrap_err();
    assert!(
        matches!(error, StoreError::Locked { pid: Some(pid), .. } if pid == std::process::id())
    );
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id()))
    );
    drop(store);
    // An open blob keeps the lock.
    assert!(Store::open(StoreConfig::new(dir.path(), LIMIT_BYTES)).is_err());
    drop(blob);
    open(&dir);
}

#[test]
fn pieces_that_were_committed_but_not_flushed_stay_while_the_process_lives() {
    let (dir, store, sample, blob) = setup(2 << 20);
    sample.put_all(&blob).unwrap();
    drop(blob);
    let blob = store.open_existing(&sample.digest).unwrap().unwrap();
    assert!(blob.held().is_full());
    assert_eq!(blob.unflushed_bytes(), 2 << 20);
    assert_eq!(sample.read(&blob, 0, 2 << 20).unwrap(), 2 << 20);
    drop((blob, store));
    // This restart stands for a crash: nothing has vouched for the pieces.
    let blob = open(&dir).open_existing(&sample.digest).unwrap().unwrap();
    assert!(blob.held().is_empty());
}
