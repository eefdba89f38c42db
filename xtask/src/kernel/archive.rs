//! The initramfs: a cpio archive ("newc") with one program.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// What the kernel looks for at the end.
const TRAILER: &str = "TRAILER!!!";

/// Writes an initramfs whose `/init` is `program`.
pub(super) fn write_initramfs(path: &Path, program: &Path) -> Result<()> {
    let program = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let mut archive = Vec::with_capacity(program.len() + 1024);
    for name in ["dev", "proc", "sys", "tmp", "run"] {
        append(&mut archive, name, DIRECTORY, &[]);
    }
    append(&mut archive, "init", PROGRAM, &program);
    append(&mut archive, TRAILER, 0, &[]);
    fs::write(path, archive).with_context(|| format!("writing {}", path.display()))
}

/// One entry: a head of hexadecimal numbers, the name, the content; name and content end at a multiple of 4.
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let name_bytes = name.len() as u32 + 1;
    let (inode, links) = (archive.len() as u32, 1);
    // inode, mode, owner, group, links, time, size, device, device, its own device, its own device, name, checksum
    let fields = [
        inode,
        mode,
        0,
        0,
        links,
        0,
        content.len() as u32,
        0,
        0,
        0,
        0,
        name_bytes,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_lengths_that_its_head_says() {
        let mut archive = Vec::new();
        append(&mut archive, "init", PROGRAM, b"hello");
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[6 + 6 * 8..6 + 7 * 8], b"00000005");
        assert_eq!(&archive[6 + 11 * 8..6 + 12 * 8], b"00000005");
        // 110 bytes of head and 5 of name, then 5 of content; both filled up to a multiple of 4.
        assert_eq!(archive.len(), 116 + 8);
        assert_eq!(&archive[116..121], b"hello");
    }
}
