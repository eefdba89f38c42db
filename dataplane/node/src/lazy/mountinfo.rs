//! What is mounted where, by the kernel's own list. Pure.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mount points in the text of `/proc/self/mountinfo` with the types of their file systems, in the
/// order in which they were mounted.
pub fn parse(text: &[u8]) -> Vec<(PathBuf, String)> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<(PathBuf, String)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = unescape(fields.nth(4)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    let point = PathBuf::from(OsString::from_vec(point));
    Some((point, String::from_utf8_lossy(kind).into_owned()))
}

/// Blanks and backslashes stand there as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let byte = digits.and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// The type of what is on top at `at`, if anything is mounted there.
pub fn mounted_at<'a>(mounts: &'a [(PathBuf, String)], at: &Path) -> Option<&'a str> {
    let on_top = mounts.iter().rev().find(|(point, _)| point == at);
    on_top.map(|(_, kind)| kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_counts_and_blanks_are_unescaped() {
        let text = b"22 1 0:20 / /a\\040b rw,relatime shared:1 - ext4 /dev/vda rw\n\
            23 22 0:21 / /a\\040b ro - erofs /x ro\nnonsense\n\n24 1 0:3 / /c rw master:1 shared:2 - tmpfs t rw";
        let mounts = parse(text);
        assert_eq!(mounted_at(&mounts, Path::new("/a b")), Some("erofs"));
        assert_eq!(mounted_at(&mounts, Path::new("/c")), Some("tmpfs"));
        assert_eq!(mounted_at(&mounts, Path::new("/a")), None);
        assert_eq!(unescape(b"\\9x\\04"), b"\\9x\\04");
    }
}
