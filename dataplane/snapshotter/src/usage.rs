//! The disk that a directory tree takes, counted as containerd counts: blocks, and each inode once.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};
use rustix::io::Errno;

use crate::core::Usage;

/// `st_blocks` counts these, whatever the file system's blocks are.
const BLOCK_BYTES: u64 = 512;
/// Directories within each other: each takes a descriptor while it is counted. No path that a program
/// can name is half as deep.
const DEPTH_MAX: usize = 4_096;

/// Counts the tree at `root`, without following links. What vanishes meanwhile is not counted.
pub(crate) fn disk_usage(root: &Path) -> io::Result<Usage> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = openat(CWD, root, flags, Mode::empty())?;
    let mut count = Count::default();
    count.add(&fstat(&top)?);
    let mut open = vec![Dir::new(top)?];
    while let Some(dir) = open.last_mut() {
        let Some(entry) = dir.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = match statat(dir.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        count.add(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if open.len() >= DEPTH_MAX {
                return Err(io::Error::other("directories are nested too deeply"));
            }
            let below = match openat(open[open.len() - 1].fd()?, name, flags, Mode::empty()) {
                Ok(below) => below,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            open.push(Dir::new(below)?);
        }
    }
    Ok(count.usage)
}

#[derive(Default)]
struct Count {
    usage: Usage,
    /// Files that have several names, and so may come again.
    linked: HashSet<(u64, u64)>,
}

impl Count {
    fn add(&mut self, stat: &Stat) {
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_dir && stat.st_nlink > 1 && !self.linked.insert((stat.st_dev, stat.st_ino)) {
            return;
        }
        self.usage.inodes += 1;
        self.usage.size_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_with_two_names_counts_once_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let empty = disk_usage(root).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::create_dir(root.join("below")).unwrap();
        fs::write(root.join("below/file"), vec![1; 100_000]).unwrap();
        let one = disk_usage(root).unwrap();
        assert_eq!(one.inodes, 3);
        assert!(one.size_bytes >= empty.size_bytes + 100_000);
        fs::hard_link(root.join("below/file"), root.join("again")).unwrap();
        assert_eq!(disk_usage(root).unwrap(), one);
        std::os::unix::fs::symlink("/", root.join("link")).unwrap();
        assert_eq!(disk_usage(root).unwrap().inodes, 4);
    }

    #[test]
    fn a_tree_deeper_than_a_path_can_be_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let name = "x".repeat(200);
        let mut at = openat(
            CWD,
            dir.path(),
            OFlags::RDONLY | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        for _ in 0..60 {
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
            at = openat(
                &at,
                &name,
                OFlags::RDONLY | OFlags::DIRECTORY,
                Mode::empty(),
            )
            .unwrap();
        }
        assert_eq!(disk_usage(dir.path()).unwrap().inodes, 61);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert!(disk_usage(Path::new("/nonexistent/tree")).is_err());
    }
}
