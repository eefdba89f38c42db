//! EROFS images of a real tree, made by mkfs.erofs: what is called metadata is all that the kernel needs
//! to list them and to know where their data is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pantala_lazy::format::erofs::{
    Extent, Known, Progress, RangeSet, SUPERBLOCK_END, Superblock, Walk, check_image,
};

use crate::rig::{Mount, Random, can_mount, describe, has_mkfs, make_tree, run};

/// An image of which only what was asked for is there.
struct Partial {
    image: Vec<u8>,
    there: RangeSet,
    requests: usize,
}

impl Known for Partial {
    fn get(&self, start: u64, len: u64) -> Option<Cow<'_, [u8]>> {
        let end = start + len;
        self.there
            .covers(start, end)
            .then(|| Cow::Borrowed(&self.image[start as usize..end as usize]))
    }
}

/// Walks an image as over a network. Returns the metadata and the extents seen.
fn walk(image: Vec<u8>) -> (Partial, RangeSet, Vec<Extent>) {
    let superblock = Superblock::parse(&image).unwrap();
    let len = image.len() as u64;
    let mut walk = Walk::new(&superblock, len).unwrap();
    let mut partial = Partial {
        image,
        there: RangeSet::default(),
        requests: 0,
    };
    let mut extents = Vec::new();
    loop {
        let progress = walk.resume(&partial, &mut |extent| {
            extents.push(extent);
            Ok(())
        });
        match progress.unwrap() {
            Progress::Done => return (partial, walk.metadata().clone(), extents),
            Progress::Need(ranges) => {
                assert!(!ranges.is_empty());
                for range in ranges {
                    assert!(
                        !partial.there.covers(range.start(), range.end()),
                        "{range:?} twice"
                    );
                    partial.there.insert(range.start(), range.end());
                    partial.requests += 1;
                }
            }
        }
    }
}

/// A tree as a mount shows it, but for what is in its files.
fn listing(root: &Path) -> BTreeMap<PathBuf, (u64, u32, String)> {
    use std::os::unix::fs::MetadataExt;
    let mut out = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                dirs.push(path.clone());
            }
            let link = fs::read_link(&path).map_or(String::new(), |to| to.display().to_string());
            out.insert(
                path.strip_prefix(root).unwrap().to_owned(),
                (meta.size(), meta.mode(), link),
            );
        }
    }
    out
}

/// Where the data of each file of some length lies, as the kernel reads the indexes.
fn extents_by_kernel(root: &Path) -> String {
    let mut paths: Vec<_> = listing(root)
        .into_iter()
        .filter(|(_, (size, mode, _))| *size > 5000 && mode & 0o170_000 == 0o100_000)
        .map(|(path, _)| path)
        .collect();
    paths.sort();
    let output = Command::new("filefrag")
        .arg("-v")
        .args(paths)
        .current_dir(root)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn make(tree: &Path, image: &Path, options: &[&str]) {
    run(Command::new("mkfs.erofs")
        .args(["--quiet", "-T0", "-U00000000-0000-0000-0000-000000000000"])
        .args(options)
        .arg(image)
        .arg(tree));
}

/// A copy of the image with nothing but its metadata lists as the image does.
#[test]
fn the_metadata_is_all_that_a_listing_needs() {
    if !has_mkfs() || !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(11));
    for (name, options) in [
        ("plain", &[][..]),
        ("chunked", &["--chunksize=4096"]),
        ("lz4", &["-zlz4"]),
        ("lz4hc-large", &["-zlz4hc", "-C65536"]),
        ("legacy", &["-zlz4", "-Elegacy-compress"]),
        ("tails", &["-zlz4", "-C32768", "-Eztailpacking"]),
        ("fragments", &["-zlz4hc", "-C65536", "-Efragments,dedupe"]),
        (
            "all",
            &["-zlz4", "-C65536", "-Eztailpacking,fragments,all-fragments"],
        ),
        ("shared-attributes", &["-x1"]),
        ("extended", &["-Eforce-inode-extended"]),
    ] {
        let full = dir.path().join(format!("{name}.erofs"));
        make(&tree, &full, options);
        let (partial, metadata, _) = walk(fs::read(&full).unwrap());
        let sparse = dir.path().join(format!("{name}.sparse"));
        let file = File::create(&sparse).unwrap();
        file.set_len(partial.image.len() as u64).unwrap();
        for range in metadata.iter() {
            let (start, end) = (range.start() as usize, range.end() as usize);
            file.write_all_at(&partial.image[start..end], range.start())
                .unwrap();
        }
        let image_len = partial.image.len() as u64;
        eprintln!(
            "{name}: {} of {image_len} bytes in {} ranges, {} requests",
            metadata.total_bytes(),
            metadata.range_count(),
            partial.requests
        );
        let whole = Mount::new(&full, &[], dir.path().join(format!("{name}.whole")));
        let hollow = Mount::new(&sparse, &[], dir.path().join(format!("{name}.hollow")));
        assert_eq!(listing(hollow.path()), listing(whole.path()), "{name}");
        assert_eq!(
            listing(whole.path()),
            listing(&tree)
                .into_iter()
                .map(|(path, mut entry)| {
                    // Directories have other lengths elsewhere.
                    entry.0 = listing(whole.path())[&path].0;
                    (path, entry)
                })
                .collect(),
            "{name}"
        );
        assert_eq!(
            extents_by_kernel(hollow.path()),
            extents_by_kernel(whole.path()),
            "{name}"
        );
        assert!(
            describe(whole.path()) == describe(&tree),
            "{name}: the rig's own image differs"
        );
    }
}

/// With a separate device, every byte of every file is in an extent of it, and the table fits.
#[test]
fn a_separate_device_is_described_by_the_image() {
    if !has_mkfs() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree, &mut Random::new(12));
    let (image, data) = (dir.path().join("meta"), dir.path().join("data"));
    let blobdev = format!("--blobdev={}", data.display());
    make(&tree, &image, &[&blobdev, "--chunksize=65536"]);
    let bytes = fs::read(&image).unwrap();
    let superblock = Superblock::parse(&bytes).unwrap();
    let size = fs::metadata(&data).unwrap().len();
    assert_eq!(superblock.device_count, 1);
    check_image(&bytes, &[size]).unwrap();
    check_image(&bytes, &[size - 4096]).unwrap_err();
    check_image(&bytes, &[]).unwrap_err();
    check_image(&bytes, &[size, size]).unwrap_err();
    let (_, _, extents) = walk(bytes);
    let on_device: u64 = extents
        .iter()
        .filter(|extent| extent.device == 1)
        .map(|extent| extent.len)
        .sum();
    let expected: u64 = listing(&tree)
        .iter()
        .filter(|(path, (_, mode, _))| mode & 0o170_000 == 0o100_000 && *path != Path::new("hard"))
        .map(|(_, (size, _, _))| size)
        .sum();
    assert!(on_device <= expected, "{on_device} of {expected}");
    // Chunks of zeros are holes; all else is there.
    assert!(
        on_device + 3 * (4 << 20) >= expected,
        "{on_device} of {expected}"
    );
    assert!(
        extents
            .iter()
            .all(|extent| extent.start + extent.len <= size || extent.device != 1)
    );
}

/// A changed byte in what the checksum covers is found, where mkfs.erofs wrote one.
#[test]
fn the_checksum_of_the_superblock_is_checked() {
    if !has_mkfs() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tree")).unwrap();
    fs::write(dir.path().join("tree/file"), "x").unwrap();
    let image = dir.path().join("image");
    make(&dir.path().join("tree"), &image, &[]);
    let bytes = fs::read(&image).unwrap();
    Superblock::parse(&bytes).unwrap();
    for at in [1024 + 70, SUPERBLOCK_END as usize + 3, 4095] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        Superblock::parse(&bytes).unwrap_err();
    }
}
