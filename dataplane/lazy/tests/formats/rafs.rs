//! nydus images of a real tree, made by nydus-image, filled by `RafsDevice`, mounted by the kernel.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pantala_lazy::format::FormatError;
use pantala_lazy::format::rafs::device::RafsDevice;
use pantala_lazy::format::rafs::{Bootstrap, ChunkMap};
use pantala_lazy::{Device, FillError};
use pantala_wire::{ByteRange, Priority};
use tokio::runtime::Handle;

use crate::rig::{FileBlob, Mount, Random, can_mount, describe, make_rafs, make_tree, nydus_image};

/// A parsed image with its blobs.
struct Image {
    bootstrap: std::path::PathBuf,
    maps: Vec<ChunkMap>,
    blobs: Vec<Arc<FileBlob>>,
}

fn load(bootstrap: &Path, blob_dir: &Path) -> Image {
    let bytes = fs::read(bootstrap).unwrap();
    let parsed = Bootstrap::parse(&bytes).unwrap();
    let blobs: Vec<_> = parsed
        .blobs()
        .iter()
        .map(|blob| FileBlob::open(&blob_dir.join(blob.id.to_hex())))
        .collect();
    let metas: Vec<Option<&[u8]>> = parsed
        .blobs()
        .iter()
        .zip(&blobs)
        .map(|(blob, file)| {
            let range = blob.meta_range()?;
            Some(&file.bytes[range.start() as usize..range.end() as usize])
        })
        .collect();
    Image {
        bootstrap: bootstrap.to_owned(),
        maps: parsed.chunk_maps(&bytes, &metas).unwrap(),
        blobs,
    }
}

impl Image {
    fn devices(self, dir: &Path) -> (Vec<RafsDevice>, Vec<Arc<FileBlob>>) {
        let devices =
            self.maps
                .into_iter()
                .zip(&self.blobs)
                .enumerate()
                .map(|(index, (map, blob))| {
                    RafsDevice::open(
                        dir,
                        &format!("device-{index}"),
                        map,
                        blob.clone(),
                        Handle::current(),
                    )
                    .unwrap()
                });
        (devices.collect(), self.blobs)
    }
}

async fn fill_all(device: &RafsDevice, urgency: Priority) -> Result<(), FillError> {
    device
        .fill(ByteRange::new(0, device.size_bytes()).unwrap(), urgency)
        .await
}

/// Makes, fills and mounts an image of each kind, and compares every file.
#[tokio::test(flavor = "multi_thread")]
async fn a_filled_image_mounts_and_equals_its_source() {
    let Some(maker) = nydus_image().filter(|_| can_mount()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(1));
    let expected = describe(&tree);
    for (name, options) in [
        ("zstd", &["--compressor", "zstd"][..]),
        (
            "lz4",
            &["--compressor", "lz4_block", "--digester", "sha256"],
        ),
        ("none", &["--compressor", "none", "--chunk-size", "0x10000"]),
        (
            "small",
            &[
                "--compressor",
                "zstd",
                "--chunk-size",
                "0x1000",
                "--digester",
                "sha256",
            ],
        ),
        ("toc", &["--compressor", "zstd", "--features", "blob-toc"]),
    ] {
        let dir = dir.path().join(name);
        let (bootstrap, blobs) = make_rafs(&maker, &tree, &dir, options);
        let image = load(&bootstrap, &blobs);
        let bootstrap = image.bootstrap.clone();
        let (devices, _) = image.devices(&dir);
        for device in &devices {
            fill_all(device, Priority::Bulk).await.unwrap();
            assert!(device.is_complete());
        }
        let paths: Vec<&Path> = devices.iter().map(|device| device.path()).collect();
        let mount = Mount::new(&bootstrap, &paths, dir.join("mnt"));
        assert!(
            describe(mount.path()) == expected,
            "{name}: the mount differs from the tree"
        );
    }
}

/// An image merged of two layers has a blob each, of which files may use a part.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_several_blobs_mounts_and_equals_its_sources() {
    let Some(maker) = nydus_image().filter(|_| can_mount()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    make_tree(&lower, &mut Random::new(2));
    fs::create_dir_all(upper.join("random")).unwrap();
    fs::write(upper.join("random/4097"), vec![42; 70_000]).unwrap();
    fs::write(upper.join("new"), Random::new(3).bytes(200_000)).unwrap();
    let (bootstrap_lower, blobs) = make_rafs(&maker, &lower, &dir.path().join("image"), &[]);
    let bootstrap_upper = dir.path().join("bootstrap-upper");
    crate::rig::run(
        std::process::Command::new(&maker)
            .args([
                "create",
                "--fs-version",
                "6",
                "--type",
                "dir-rafs",
                "--parent-bootstrap",
            ])
            .arg(&bootstrap_lower)
            .arg("--bootstrap")
            .arg(&bootstrap_upper)
            .arg("--blob-dir")
            .arg(&blobs)
            .arg(&upper),
    );
    let image = load(&bootstrap_upper, &blobs);
    let (devices, _) = image.devices(dir.path());
    assert_eq!(devices.len(), 2);
    for device in &devices {
        fill_all(device, Priority::Bulk).await.unwrap();
    }
    let paths: Vec<&Path> = devices.iter().map(|device| device.path()).collect();
    let mount = Mount::new(&bootstrap_upper, &paths, dir.path().join("mnt"));
    for (path, source) in [
        ("random/4097", &upper),
        ("new", &upper),
        ("text/3333333", &lower),
        ("hard", &lower),
    ] {
        assert!(
            fs::read(mount.path().join(path)).unwrap() == fs::read(source.join(path)).unwrap(),
            "{path}"
        );
    }
}

/// The table at a blob's end says the same as the bootstrap's.
#[test]
fn the_blobs_own_table_gives_the_same_chunks() {
    let Some(maker) = nydus_image() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(7));
    let (bootstrap, blobs) = make_rafs(&maker, &tree, dir.path(), &[]);
    let expected = load(&bootstrap, &blobs).maps;
    // The flag for batches makes it look there; there are none in it.
    let mut bytes = fs::read(&bootstrap).unwrap();
    let blob_table = u64::from_le_bytes(bytes[1160..1168].try_into().unwrap()) as usize;
    bytes[blob_table + 84] |= 0x40;
    fs::write(&bootstrap, &bytes).unwrap();
    assert!(
        Bootstrap::parse(&bytes).unwrap().blobs()[0]
            .meta_range()
            .is_some()
    );
    let found = load(&bootstrap, &blobs).maps;
    assert_eq!(found[0].chunks(), expected[0].chunks());
}

/// Ranges in random order, many at once: hardly a byte is fetched twice, and what was asked for is right.
#[tokio::test(flavor = "multi_thread")]
async fn overlapping_fills_share_their_work() {
    let Some((dir, image, reference)) = small_image() else {
        return;
    };
    let (devices, blobs) = image.devices(dir.path());
    let (device, blob) = (&devices[0], &blobs[0]);
    let mut random = Random::new(4);
    let size = device.size_bytes();
    let fills: Vec<_> = (0..400)
        .map(|_| {
            let start = random.below(size);
            let end = (start + 1 + random.below(300_000)).min(size);
            (device.clone(), ByteRange::new(start, end).unwrap())
        })
        .map(|(device, range)| {
            tokio::spawn(async move {
                device.fill(range, Priority::Fault).await.unwrap();
                range
            })
        })
        .collect();
    for fill in fills {
        let range = fill.await.unwrap();
        let (start, end) = (range.start() as usize, range.end() as usize);
        assert!(
            fs::read(device.path()).unwrap()[start..end] == reference[start..end],
            "{range:?}"
        );
    }
    fill_all(device, Priority::Bulk).await.unwrap();
    let packed: u64 = device
        .map()
        .chunks()
        .iter()
        .map(|chunk| chunk.packed.len())
        .sum();
    // Small gaps between chunks are read along, also where their chunks are there already.
    let read = blob.read_bytes();
    assert!(
        read <= packed + packed / 20,
        "{read} bytes read of {packed}"
    );
}

/// Somebody who waits does not wait for a fetch that nobody waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_overtakes_a_prefetch_of_the_same_chunk() {
    let Some((dir, image, _)) = small_image() else {
        return;
    };
    let (devices, blobs) = image.devices(dir.path());
    let (device, blob) = (devices[0].clone(), &blobs[0]);
    blob.gate.forget_permits(usize::MAX);
    let range = ByteRange::new(0, 1).unwrap();
    let slow = tokio::spawn({
        let device = device.clone();
        async move { device.fill(range, Priority::Prefetch).await }
    });
    while blob.reads.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let fast = tokio::spawn(async move { device.fill(range, Priority::Fault).await });
    while blob.reads.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(blob.reads.lock().unwrap()[1].1, Priority::Fault);
    blob.gate.add_permits(10);
    fast.await.unwrap().unwrap();
    slow.await.unwrap().unwrap();
}

/// Bytes that the digest does not vouch for never reach the file, and a good answer later heals it.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_chunks_never_appear() {
    let Some((dir, image, reference)) = small_image() else {
        return;
    };
    let (devices, blobs) = image.devices(dir.path());
    let device = &devices[0];
    blobs[0].lie.store(true, Ordering::SeqCst);
    let error = device
        .fill(ByteRange::new(0, 4096).unwrap(), Priority::Fault)
        .await
        .unwrap_err();
    assert!(matches!(error, FillError::Corrupt { .. }), "{error}");
    assert!(
        fs::read(device.path()).unwrap()[..4096]
            .iter()
            .all(|byte| *byte == 0)
    );
    blobs[0].lie.store(false, Ordering::SeqCst);
    fill_all(device, Priority::Fault).await.unwrap();
    assert!(fs::read(device.path()).unwrap() == reference);
}

/// After a restart, what was persisted is there and what was not is fetched again.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_persisted_survives_a_restart() {
    let Some((dir, image, reference)) = small_image() else {
        return;
    };
    let blob_dir = dir.path().join("image/blobs");
    let bootstrap = image.bootstrap.clone();
    let (devices, _) = image.devices(dir.path());
    let half = ByteRange::new(0, devices[0].size_bytes() / 2).unwrap();
    devices[0].fill(half, Priority::Fault).await.unwrap();
    devices[0].persist().unwrap();
    let kept = devices[0].present_bytes();
    fill_all(&devices[0], Priority::Fault)
        .await
        .unwrap_or_default();
    // A crash right after the record of the first half: the later one never reached the disk.
    let record = dir.path().join("device-0.chunks");
    drop(devices);
    let (devices, blobs) = load(&bootstrap, &blob_dir).devices(dir.path());
    assert!(devices[0].is_complete() && blobs[0].read_bytes() == 0);
    drop(devices);
    // A record that is damaged, or another image's, vouches for nothing.
    let mut bytes = fs::read(&record).unwrap();
    bytes[60] ^= 1;
    fs::write(&record, &bytes).unwrap();
    let (devices, _) = load(&bootstrap, &blob_dir).devices(dir.path());
    assert_eq!(devices[0].present_bytes(), 0);
    assert!(kept > 0);
    // Nor does one whose data file is gone.
    fill_all(&devices[0], Priority::Fault).await.unwrap();
    fs::remove_file(devices[0].path()).unwrap();
    drop(devices);
    let (devices, _) = load(&bootstrap, &blob_dir).devices(dir.path());
    assert_eq!(devices[0].present_bytes(), 0);
    fill_all(&devices[0], Priority::Fault).await.unwrap();
    assert!(fs::read(devices[0].path()).unwrap() == reference);
}

/// A full disk is an error that says so, and costs nothing that was there.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told() {
    let Some((dir, image, reference)) = small_image().filter(|_| can_mount()) else {
        return;
    };
    let small = crate::rig::SmallDisk::new(dir.path().join("small"), 2 << 20);
    let (devices, _) = image.devices(small.path());
    let device = &devices[0];
    let first = ByteRange::new(0, 1 << 20).unwrap();
    device.fill(first, Priority::Fault).await.unwrap();
    let error = fill_all(device, Priority::Bulk).await.unwrap_err();
    assert!(matches!(error, FillError::Disk { .. }), "{error}");
    assert!(error.to_string().contains("free some space"), "{error}");
    assert!(!device.is_complete());
    device.fill(first, Priority::Fault).await.unwrap();
    assert!(fs::read(device.path()).unwrap()[..1 << 20] == reference[..1 << 20]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_outside_the_device_is_refused() {
    let Some((dir, image, _)) = small_image() else {
        return;
    };
    let (devices, _) = image.devices(dir.path());
    let size = devices[0].size_bytes();
    let outside = ByteRange::new(size - 1, size + 1).unwrap();
    let error = devices[0].fill(outside, Priority::Fault).await.unwrap_err();
    assert!(matches!(error, FillError::OutOfRange { .. }), "{error}");
}

#[test]
fn the_prefetch_table_names_the_files_in_it() {
    let Some(maker) = nydus_image() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(5));
    let list = dir.path().join("list");
    fs::write(&list, "/random/3333333\n/twin\n").unwrap();
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    let bootstrap = dir.path().join("bootstrap");
    crate::rig::run(
        std::process::Command::new(&maker)
            .args([
                "create",
                "--fs-version",
                "6",
                "--type",
                "dir-rafs",
                "--prefetch-policy",
                "fs",
                "--bootstrap",
            ])
            .arg(&bootstrap)
            .arg("--blob-dir")
            .arg(&blobs)
            .arg(&tree)
            .stdin(fs::File::open(&list).unwrap()),
    );
    let bytes = fs::read(&bootstrap).unwrap();
    let ranges = Bootstrap::parse(&bytes).unwrap().prefetch(&bytes).unwrap();
    let total: u64 = ranges.iter().map(|(_, range)| range.len()).sum();
    // The large file, and the one chunk that both small ones share.
    assert_eq!(total, 3_333_333 + 27, "{ranges:?}");
}

#[test]
fn version_5_is_refused_with_what_to_do() {
    let Some(maker) = nydus_image() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tree")).unwrap();
    fs::write(dir.path().join("tree/file"), "x").unwrap();
    fs::create_dir(dir.path().join("blobs")).unwrap();
    crate::rig::run(
        std::process::Command::new(&maker)
            .args([
                "create",
                "--fs-version",
                "5",
                "--type",
                "dir-rafs",
                "--bootstrap",
            ])
            .arg(dir.path().join("bootstrap"))
            .arg("--blob-dir")
            .arg(dir.path().join("blobs"))
            .arg(dir.path().join("tree")),
    );
    let error = Bootstrap::parse(&fs::read(dir.path().join("bootstrap")).unwrap())
        .err()
        .unwrap();
    assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("--fs-version 6"), "{error}");
}

/// An image of a tree with one blob of some MB, and what its device must hold.
fn small_image() -> Option<(tempfile::TempDir, Image, Vec<u8>)> {
    let maker = nydus_image()?;
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(6));
    let options = ["--compressor", "zstd", "--chunk-size", "0x10000"];
    let (bootstrap, blobs) = make_rafs(&maker, &tree, &dir.path().join("image"), &options);
    let image = load(&bootstrap, &blobs);
    let mut reference = vec![0; image.maps[0].device_len() as usize];
    for chunk in image.maps[0].chunks() {
        let packed =
            &image.blobs[0].bytes[chunk.packed.start() as usize..chunk.packed.end() as usize];
        let bytes = match packed.len() as u64 == chunk.unpacked.len() {
            true => packed.to_vec(),
            false => zstd::bulk::decompress(packed, chunk.unpacked.len() as usize).unwrap(),
        };
        reference[chunk.unpacked.start() as usize..chunk.unpacked.end() as usize]
            .copy_from_slice(&bytes);
    }
    Some((dir, image, reference))
}
