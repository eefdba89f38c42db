//! Real files of this machine, as the content of images.

use std::fs;
use std::path::{Path, PathBuf};

/// Larger files would make layers much larger than asked.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A file and its size.
#[derive(Debug, Clone)]
pub(crate) struct RealFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// Regular files of this machine, in a fixed order, until `bytes` are reached or there are no more.
pub(crate) fn gather(bytes: u64) -> Vec<RealFile> {
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let roots = [
        PathBuf::from("/usr/lib"),
        PathBuf::from("/usr/share"),
        PathBuf::from("/usr/bin"),
        home.join(".rustup/toolchains"),
        home.join(".cargo/registry/src"),
        PathBuf::from("/usr/local"),
    ];
    let mut found = Vec::new();
    let mut total = 0;
    for root in roots {
        walk(&root, bytes, &mut total, &mut found);
        if total >= bytes {
            break;
        }
    }
    found
}

fn walk(dir: &Path, wanted: u64, total: &mut u64, found: &mut Vec<RealFile>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if *total >= wanted {
            return;
        }
        // Of the entry itself: links are not followed, so there are no loops.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let path = entry.path();
        if metadata.is_dir() {
            walk(&path, wanted, total, found);
        } else if metadata.is_file()
            && (1..=FILE_BYTES_MAX).contains(&metadata.len())
            && fs::File::open(&path).is_ok()
        {
            *total += metadata.len();
            found.push(RealFile {
                path,
                bytes: metadata.len(),
            });
        }
    }
}
