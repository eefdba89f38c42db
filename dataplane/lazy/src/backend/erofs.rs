//! Mounting and unmounting EROFS, by the system calls themselves.
//!
//! mount(8) is not used: given a regular file it may quietly make a loop device of it, on whose reads no
//! event is raised.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::MountError;

fn refused(what: String, source: impl Into<io::Error>) -> MountError {
    MountError::Kernel {
        what,
        source: source.into(),
    }
}

/// Mounts the image `metadata` with `devices`, in the order of its device table, on `at`.
///
/// # Errors
/// The kernel's; a path that cannot stand in the mount's options is `InvalidInput`.
pub fn mount(metadata: &Path, devices: &[&Path], at: &Path) -> Result<(), MountError> {
    let what = || {
        format!(
            "mount the EROFS image {} on {}",
            metadata.display(),
            at.display()
        )
    };
    let mut options = Vec::new();
    for device in devices {
        let path = device.as_os_str().as_bytes();
        if path.contains(&b',') {
            return Err(refused(
                what(),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        if !options.is_empty() {
            options.push(b',');
        }
        options.extend(b"device=");
        options.extend(path);
    }
    let options = CString::new(options)
        .map_err(|_| refused(what(), io::Error::from(io::ErrorKind::InvalidInput)))?;
    rustix::mount::mount(
        metadata,
        at,
        "erofs",
        MountFlags::RDONLY | MountFlags::NODEV,
        options.as_c_str(),
    )
    .map_err(|error| refused(what(), error))
}

/// Mounts `lower`, the lowest first, as one read-only tree on `at`.
///
/// # Errors
/// As [`mount`].
pub fn mount_overlay(lower: &[&Path], at: &Path) -> Result<(), MountError> {
    let what = || {
        format!(
            "mount an overlay of {} layers on {}",
            lower.len(),
            at.display()
        )
    };
    let mut options = b"lowerdir=".to_vec();
    for (index, dir) in lower.iter().rev().enumerate() {
        let path = dir.as_os_str().as_bytes();
        if path.iter().any(|byte| matches!(byte, b',' | b':' | b'\\')) {
            return Err(refused(
                what(),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        if index > 0 {
            options.push(b':');
        }
        options.extend(path);
    }
    let options = CString::new(options)
        .map_err(|_| refused(what(), io::Error::from(io::ErrorKind::InvalidInput)))?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    rustix::mount::mount("overlay", at, "overlay", flags, options.as_c_str())
        .map_err(|error| refused(what(), error))
}

/// Takes down what is mounted on `at`.
///
/// # Errors
/// The kernel's: `ResourceBusy` while somebody uses it, `InvalidInput` where nothing is mounted.
pub fn unmount(at: &Path) -> Result<(), MountError> {
    rustix::mount::unmount(at, UnmountFlags::NOFOLLOW)
        .map_err(|error| refused(format!("unmount {}", at.display()), error))
}

/// Takes what is mounted on `at` out of sight at once; whoever has files of it open keeps them.
///
/// # Errors
/// As [`unmount`].
pub fn detach(at: &Path) -> Result<(), MountError> {
    let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
    rustix::mount::unmount(at, flags)
        .map_err(|error| refused(format!("detach {}", at.display()), error))
}

/// Block size of [`empty_image`], and its length.
const BLOCK_BYTES: usize = 4096;

/// The smallest image there is, an empty directory: what a probe mounts.
pub fn empty_image() -> Vec<u8> {
    const SUPERBLOCK: usize = 1024;
    /// In units of 32 bytes from the image's start: right after the superblock.
    const ROOT: usize = (SUPERBLOCK + 128) / 32;
    let mut image = vec![0; BLOCK_BYTES];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(SUPERBLOCK, &0xE0F5_E1E2_u32.to_le_bytes());
    put(SUPERBLOCK + 12, &[12]);
    put(SUPERBLOCK + 14, &(ROOT as u16).to_le_bytes());
    put(SUPERBLOCK + 16, &1_u64.to_le_bytes());
    put(SUPERBLOCK + 36, &1_u32.to_le_bytes());
    // A compact inode whose data follow it.
    let inode = ROOT * 32;
    put(inode, &4_u16.to_le_bytes());
    put(inode + 4, &0o040_755_u16.to_le_bytes());
    put(inode + 6, &2_u16.to_le_bytes());
    put(inode + 8, &27_u32.to_le_bytes());
    put(inode + 20, &1_u32.to_le_bytes());
    // Two entries and their names, "." and "..".
    for (index, name_offset) in [24_u16, 25].into_iter().enumerate() {
        let entry = inode + 32 + 12 * index;
        put(entry, &(ROOT as u64).to_le_bytes());
        put(entry + 8, &name_offset.to_le_bytes());
        put(entry + 10, &[2]);
    }
    put(inode + 32 + 24, b"...");
    image
}
