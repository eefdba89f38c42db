//! Two images: large files for throughput and faults, and a tree of real files to start from.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::SEED;
use super::read::Noise;
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::files::gather;
use crate::rig::image::Image;
use crate::rig::lazy::mkfs;

/// Where the image with the large files is pushed.
pub(super) const FILES: &str = "perf/lazy-files:v1";
/// Where the tree is pushed.
pub(super) const TREE: &str = "perf/lazy-tree:v1";
/// Read from its start to its end.
pub(super) const SEQUENTIAL: &str = "sequential";
/// Read at random places.
pub(super) const RANDOM: &str = "random";
/// As `pantala convert` makes them.
const CHUNK_BYTES: u32 = 1 << 20;
/// The part of the tree's bytes that a start reads.
const START_SHARE: f64 = 0.05;

/// What a node calls the image pushed as `name`.
pub(super) fn reference(name: &str) -> String {
    format!("{REGISTRY_NAME}/{name}")
}

pub(super) struct Images {
    /// The two large files.
    pub(super) files: Image,
    /// What is in them.
    pub(super) files_root: PathBuf,
    /// Real files.
    pub(super) tree: Image,
    /// What is in it.
    pub(super) tree_root: PathBuf,
    /// Paths from the tree's root that a start reads, in that order.
    pub(super) start_set: Vec<PathBuf>,
    /// Their bytes.
    pub(super) start_bytes: u64,
}

impl Images {
    /// `bytes` for each of the two files, and for the tree.
    pub(super) fn make(rig: &Rig, bytes: u64) -> Result<Self> {
        let dir = rig.scratch("images")?;
        let (files_root, tree_root) = (dir.join("files"), dir.join("tree"));
        fs::create_dir_all(&files_root)?;
        // Noise: equal chunks would be stored once, and then no read would be sequential.
        for (seed, name) in [(SEED, SEQUENTIAL), (SEED + 1, RANDOM)] {
            write_noise(&files_root.join(name), bytes, seed)?;
        }
        let mut copied = copy_real_files(&tree_root, bytes)?;
        let total: u64 = copied.iter().map(|(_, bytes)| bytes).sum();
        Noise::new(SEED).shuffle(&mut copied);
        let mut room = (total as f64 * START_SHARE) as u64;
        // One that is too large for what is left is passed over.
        copied.retain(|(_, bytes)| {
            let fits = *bytes <= room;
            room -= if fits { *bytes } else { 0 };
            fits
        });
        ensure!(!copied.is_empty(), "no file is small enough for a start");
        let image = |number: usize, root: &Path| -> Result<Image> {
            let pair = mkfs(&dir, number, root, CHUNK_BYTES)?;
            Image::erofs(&dir.join(format!("layout-{number}")), &[pair])
        };
        Ok(Self {
            files: image(0, &files_root)?,
            tree: image(1, &tree_root)?,
            files_root,
            tree_root,
            start_bytes: copied.iter().map(|(_, bytes)| bytes).sum(),
            start_set: copied.into_iter().map(|(path, _)| path).collect(),
        })
    }
}

/// Whole chunks of noise, at least `bytes`: a last chunk in part would be no reader's business here.
fn write_noise(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let mut noise = Noise::new(seed);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for _ in 0..bytes.next_multiple_of(u64::from(CHUNK_BYTES)) / 8 {
        file.write_all(&noise.next().to_le_bytes())?;
    }
    file.flush()?;
    Ok(())
}

/// Copies files of this machine, and returns their names and sizes.
fn copy_real_files(root: &Path, bytes: u64) -> Result<Vec<(PathBuf, u64)>> {
    let mut copied = Vec::new();
    for file in gather(bytes) {
        let name = file.path.strip_prefix("/")?;
        let copy = root.join(name);
        fs::create_dir_all(copy.parent().context("a file has a parent")?)?;
        // A file that vanished or cannot be read is no reason to fail.
        if let Ok(bytes) = fs::copy(&file.path, &copy)
            && bytes > 0
        {
            copied.push((name.to_owned(), bytes));
        }
    }
    Ok(copied)
}
