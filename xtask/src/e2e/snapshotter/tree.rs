//! A file tree, written down to every detail that a layer can carry.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// The longest list of names, and the longest value, of extended attributes: the kernel's limit.
const XATTR_MAX_BYTES: usize = 65_536;

/// No test takes longer; the files of the images are all older.
const UNPACKED_LATELY_S: u64 = 3_600;

/// Each path with what is known of it.
pub(super) type Tree = BTreeMap<PathBuf, String>;

/// Reads all below `root`.
pub(super) fn read(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            let described = describe(&path).with_context(|| path.display().to_string())?;
            if fs::symlink_metadata(&path)?.is_dir() {
                dirs.push(path.clone());
            }
            tree.insert(path.strip_prefix(root)?.to_owned(), described);
        }
    }
    Ok(tree)
}

fn describe(path: &Path) -> Result<String> {
    let meta = fs::symlink_metadata(path)?;
    let content = if meta.is_symlink() {
        fs::read_link(path)?.display().to_string()
    } else if meta.is_file() {
        hex::encode(Sha256::digest(fs::read(path)?))
    } else {
        format!("device {}", meta.rdev())
    };
    // The number of links of a directory is the file system's own affair.
    let links = if meta.is_dir() { 0 } else { meta.nlink() };
    // A directory that no layer names is made when its first file is unpacked.
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let age_s = now.saturating_sub(meta.mtime().unsigned_abs());
    let modified = match meta.is_dir() && age_s < UNPACKED_LATELY_S {
        true => "when unpacked".to_owned(),
        false => format!("{}.{}", meta.mtime(), meta.mtime_nsec()),
    };
    Ok(format!(
        "{:o} {}:{} links {links} modified {modified} xattrs {:?} {content}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        xattrs(path)?,
    ))
}

fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; XATTR_MAX_BYTES];
    let length = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if name.is_empty() {
            continue;
        }
        let mut value = vec![0; XATTR_MAX_BYTES];
        let name = std::ffi::OsStr::from_bytes(name);
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_string_lossy().into_owned(), value);
    }
    Ok(found)
}

/// Fails with the first differences.
pub(super) fn compare(one: &Tree, other: &Tree) -> Result<()> {
    let absent = "absent".to_owned();
    let paths: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let differences: Vec<String> = paths
        .into_iter()
        .filter_map(|path| {
            let sides = [one, other].map(|tree| tree.get(path).unwrap_or(&absent));
            (sides[0] != sides[1])
                .then(|| format!("{}: {} | {}", path.display(), sides[0], sides[1]))
        })
        .collect();
    if !differences.is_empty() {
        let shown = &differences[..differences.len().min(10)];
        bail!("{} differences:\n{}", differences.len(), shown.join("\n"));
    }
    Ok(())
}
