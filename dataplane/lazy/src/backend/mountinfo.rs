//! What is mounted where, by the kernel's own list.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

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
///
/// # Errors
/// Where the kernel's list cannot be read.
pub fn mounts() -> io::Result<Vec<Mounted>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(parse).collect())
}

/// What is on top at `at`, if anything is mounted there.
pub fn mounted_at<'a>(mounts: &'a [Mounted], at: &Path) -> Option<&'a Mounted> {
    mounts.iter().rev().find(|mount| mount.at == at)
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
    fn the_uppermost_mount_counts() {
        let mount = |at: &str, kind: &str| Mounted {
            at: at.into(),
            fs_type: kind.into(),
            source: "x".into(),
        };
        let mounts = [
            mount("/a", "ext4"),
            mount("/a", "erofs"),
            mount("/b", "tmpfs"),
        ];
        let kind =
            |at: &str| mounted_at(&mounts, Path::new(at)).map(|mount| mount.fs_type.as_str());
        assert_eq!(
            (kind("/a"), kind("/b"), kind("/c")),
            (Some("erofs"), Some("tmpfs"), None)
        );
    }
}
