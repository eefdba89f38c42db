//! Mounting EROFS by the kernel's own calls.
//!
//! Never by mount(8): some versions of it make a loop device of the metadata, quietly, and then no read of a hole is
//! noticed. And by fsconfig(2), not mount(2), whose options must fit one page and cannot hold a comma: images have dozens
//! of devices.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use super::MountError;

/// fsconfig(2) takes values of up to this length.
pub const VALUE_BYTES_MAX: usize = 255;
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
pub fn mount_erofs(options: &[(&str, &OsStr)], at: &Path) -> Result<(), MountError> {
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

/// Takes away what is mounted on `at`. It is gone at once for who opens a path; who has a file of it open keeps it.
pub fn detach(at: &Path) -> Result<(), MountError> {
    unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|errno| refused(format!("unmount {}", at.display()), errno))
}

/// One mount of this process's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Where.
    pub at: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
    /// What is mounted.
    pub source: PathBuf,
}

/// The mounts of this process's namespace, the later ones last.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// One line of mountinfo: fields with spaces between, the fifth is the mount point, and after `-` type and source.
fn parse(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let at = unescape(fields.nth(4)?);
    fields.find(|field| *field == b"-")?;
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    Some(Mounted {
        at,
        fs_type,
        source,
    })
}

/// Undoes `\040` and the like.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.first_chunk::<3>()).flatten();
        let value =
            octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_its_escapes() {
        let line = br"36 35 0:42 / /mnt/a\040b rw,noatime master:1 - erofs /dev/\134x ro,acl";
        assert_eq!(
            parse(line),
            Some(Mounted {
                at: "/mnt/a b".into(),
                fs_type: "erofs".into(),
                source: r"/dev/\x".into(),
            })
        );
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 0:42 / /mnt rw"), None);
    }

    #[test]
    fn a_mount_that_the_kernel_refuses_says_what_was_tried() {
        let missing = Path::new("/nonexistent/image");
        let error = mount_erofs(
            &[("source", missing.as_os_str())],
            Path::new("/nonexistent"),
        )
        .expect_err("there is no such image");
        let text = error.to_string();
        assert!(text.starts_with("cannot "), "{text}");
    }
}
