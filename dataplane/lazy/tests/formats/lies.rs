//! Images that lie: every field in turn, and many at once. They give errors; they never panic, and never make
//! us take more memory than they have bytes.

use std::fs;
use std::process::Command;

use pantala_lazy::format::FormatError;
use pantala_lazy::format::erofs::{Superblock, Walk};
use pantala_lazy::format::rafs::Bootstrap;

use crate::rig::{Random, has_mkfs, make_rafs, nydus_image, run};

fn small_tree(dir: &std::path::Path) -> std::path::PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), vec![3; 10_000]).unwrap();
    fs::write(tree.join("other"), "text").unwrap();
    std::os::unix::fs::symlink("other", tree.join("link")).unwrap();
    tree
}

fn read_bootstrap(bytes: &[u8]) -> Result<usize, FormatError> {
    let bootstrap = Bootstrap::parse(bytes)?;
    let metas = vec![None; bootstrap.blobs().len()];
    let maps = bootstrap.chunk_maps(bytes, &metas)?;
    for map in &maps {
        for chunk in map.chunks() {
            assert!(chunk.unpacked.end() <= map.device_len());
        }
    }
    bootstrap.prefetch(bytes)?;
    Ok(maps.len())
}

fn read_erofs(bytes: &[u8]) -> Result<u64, FormatError> {
    let superblock = Superblock::parse(bytes)?;
    let mut walk = Walk::new(&superblock, bytes.len() as u64)?;
    walk.resume(bytes, &mut |_| Ok(()))?;
    assert!(walk.metadata().total_bytes() <= bytes.len() as u64);
    Ok(walk.metadata().total_bytes())
}

/// Changes each byte of `image` that is not zero or lies in a structure, and then many at once.
fn lie<T>(image: &[u8], seed: u64, read: impl Fn(&[u8]) -> Result<T, FormatError>) {
    read(image).unwrap_or_else(|e| panic!("the image itself: {e}"));
    let mut bytes = image.to_vec();
    let mut refused = 0;
    for at in 0..bytes.len() {
        let is_structure = (1024..1700).contains(&at);
        if bytes[at] == 0 && !is_structure {
            continue;
        }
        for value in [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 1] {
            let kept = std::mem::replace(&mut bytes[at], value);
            refused += usize::from(read(&bytes).is_err());
            bytes[at] = kept;
        }
    }
    assert!(refused > 100, "only {refused} lies were found out");
    let mut random = Random::new(seed);
    for _ in 0..3000 {
        let mut bytes = image.to_vec();
        for _ in 0..1 + random.below(8) {
            let at = random.below(bytes.len() as u64 / 4) as usize * 4;
            let word = match random.below(3) {
                0 => random.next() as u32,
                1 => u32::MAX,
                _ => random.below(1 << 14) as u32,
            };
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes.truncate(bytes.len() - random.below(2) as usize * random.below(5000) as usize);
        let _ = read(&bytes);
    }
}

#[test]
fn bootstraps_that_lie_are_errors() {
    let Some(maker) = nydus_image() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tree = small_tree(dir.path());
    let (bootstrap, _) = make_rafs(&maker, &tree, &dir.path().join("image"), &[]);
    lie(&fs::read(bootstrap).unwrap(), 21, read_bootstrap);
}

#[test]
fn erofs_images_that_lie_are_errors() {
    if !has_mkfs() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = small_tree(dir.path());
    for (index, option) in ["-zlz4", "--chunksize=4096"].iter().enumerate() {
        let image = dir.path().join(format!("image-{index}"));
        run(Command::new("mkfs.erofs")
            .args(["--quiet", "-Enosbcrc", option])
            .arg(&image)
            .arg(&tree));
        lie(&fs::read(&image).unwrap(), 22, read_erofs);
    }
}
