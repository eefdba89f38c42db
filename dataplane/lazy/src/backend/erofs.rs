//! Mounting and unmounting EROFS, by the kernel's own calls.
//!
//! Never by mount(8): some versions of it make a loop device of the metadata, quietly, and then no read of a hole is
//! noticed. And by fsconfig(2), not mount(2), whose options must fit one page and cannot hold a comma: images have dozens
//! of devices.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::MountError;

/// fsconfig(2) takes values of up to this length.
pub(crate) const VALUE_BYTES_MAX: usize = 255;
/// Lines of the kernel's explanation of a failed mount that are passed on.
const EXPLANATION_LINES_MAX: usize = 8;

/// Makes a [`MountError::Kernel`].
pub(crate) fn refused(what: impl Into<String>, source: impl Into<io::Error>) -> MountError {
    MountError::Kernel {
        what: what.into(),
        source: source.into(),
    }
}

/// Mounts EROFS, read-only, on `at`. `options` are the kernel's, in the order of the image's devices; values of up to
/// [`VALUE_BYTES_MAX`] bytes.
pub(crate) fn mount_with(options: &[(&str, &OsStr)], at: &Path) -> Result<(), MountError> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| refused("open the EROFS driver", errno))?;
    let failed = |what: String, errno: rustix::io::Errno| {
        let why = explanation(context.as_fd());
        let what = if why.is_empty() {
            what
        } else {
            format!("{what} ({why})")
        };
        refused(what, errno)
    };
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, value.as_bytes())
            .map_err(|errno| failed(format!("set {key}={}", value.display()), errno))?;
    }
    fsconfig_set_flag(context.as_fd(), "ro").map_err(|errno| failed("set ro".into(), errno))?;
    fsconfig_create(context.as_fd())
        .map_err(|errno| failed(format!("mount EROFS on {}", at.display()), errno))?;
    let mounted = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV,
    )
    .map_err(|errno| failed(format!("mount EROFS on {}", at.display()), errno))?;
    move_mount(
        mounted.as_fd(),
        "",
        rustix::fs::CWD,
        at,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|errno| refused(format!("attach EROFS to {}", at.display()), errno))
}

/// What the kernel says about a mount that failed: one message a read, `e TEXT` or the like.
fn explanation(context: BorrowedFd<'_>) -> String {
    let mut lines = Vec::new();
    let mut message = [0; 1024];
    while lines.len() < EXPLANATION_LINES_MAX {
        match rustix::io::read(context, &mut message) {
            Ok(len) if len > 0 => {
                let text = String::from_utf8_lossy(&message[..len]);
                lines.push(text.trim().to_owned());
            }
            _ => break,
        }
    }
    lines.join("; ")
}

/// Mounts the image `metadata` with `devices`, in the order of its device table, on `at`.
///
/// # Errors
/// The kernel's; paths have at most 255 bytes.
pub fn mount(metadata: &Path, devices: &[&Path], at: &Path) -> Result<(), MountError> {
    let mut options = vec![("source", metadata.as_os_str())];
    options.extend(devices.iter().map(|path| ("device", path.as_os_str())));
    mount_with(&options, at)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_the_kernel_refuses_says_what_was_tried() {
        let missing = Path::new("/nonexistent/image");
        let error =
            mount(missing, &[], Path::new("/nonexistent")).expect_err("there is no such image");
        let text = error.to_string();
        assert!(text.starts_with("cannot "), "{text}");
    }
}
