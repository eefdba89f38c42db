//! An image whose layers do to each other all that layers can do.

use std::path::Path;

use anyhow::Result;
use tar::{Builder, EntryType, Header};

use crate::rig::image::Image;

/// Makes it below `dir`.
pub(super) fn image(dir: &Path) -> Result<Image> {
    Image::of_tars(dir, &[first()?, second()?, third()?])
}

type Layer = Builder<Vec<u8>>;

fn add(layer: &mut Layer, kind: EntryType, name: &str, mode: u32, text: &str) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(u64::from(mode) % 7);
    header.set_gid(u64::from(mode) % 5);
    header.set_mtime(1_700_000_000 + u64::from(mode));
    match kind {
        EntryType::Symlink | EntryType::Link => {
            header.set_size(0);
            layer.append_link(&mut header, name, text)?;
        }
        EntryType::Char => {
            header.set_size(0);
            header.set_device_major(1)?;
            header.set_device_minor(3)?;
            layer.append_data(&mut header, name, std::io::empty())?;
        }
        _ => {
            header.set_size(text.len() as u64);
            layer.append_data(&mut header, name, text.as_bytes())?;
        }
    }
    Ok(())
}

fn file(layer: &mut Layer, name: &str, text: &str) -> Result<()> {
    add(layer, EntryType::Regular, name, 0o644, text)
}

fn dir(layer: &mut Layer, name: &str, mode: u32) -> Result<()> {
    add(layer, EntryType::Directory, name, mode, "")
}

fn first() -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    for (name, mode) in [
        ("a/", 0o755),
        ("a/b/", 0o700),
        ("opaque/", 0o755),
        ("tmp/", 0o1777),
    ] {
        dir(&mut layer, name, mode)?;
    }
    for name in [
        "a/b/deep",
        "a/gone",
        "opaque/below",
        "changed",
        "owner",
        "becomes-dir",
    ] {
        file(&mut layer, name, name)?;
    }
    add(&mut layer, EntryType::Regular, "setuid", 0o4755, "#!")?;
    add(&mut layer, EntryType::Link, "hard", 0o644, "changed")?;
    add(&mut layer, EntryType::Link, "a/hard-too", 0o644, "changed")?;
    add(
        &mut layer,
        EntryType::Symlink,
        "link",
        0o777,
        "../../absent",
    )?;
    add(&mut layer, EntryType::Char, "null", 0o666, "")?;
    add(&mut layer, EntryType::Fifo, "fifo", 0o600, "")?;
    layer.append_pax_extensions([
        ("SCHILY.xattr.user.note", b"kept".as_slice()),
        ("SCHILY.xattr.security.capability", CAPABILITY),
    ])?;
    file(&mut layer, "with-attributes", "x")?;
    Ok(layer.into_inner()?)
}

/// `cap_net_raw+ep`, as the kernel keeps it.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn second() -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    file(&mut layer, "a/.wh.gone", "")?;
    dir(&mut layer, "opaque/", 0o750)?;
    file(&mut layer, "opaque/.wh..wh..opq", "")?;
    file(&mut layer, "opaque/fresh", "fresh")?;
    file(&mut layer, "changed", "changed by the second layer")?;
    add(&mut layer, EntryType::Regular, "owner", 0o600, "owner")?;
    file(&mut layer, ".wh.becomes-dir", "")?;
    file(&mut layer, "a/b/new", &"0123456789abcdef".repeat(10_000))?;
    Ok(layer.into_inner()?)
}

fn third() -> Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    dir(&mut layer, "becomes-dir/", 0o711)?;
    file(
        &mut layer,
        "becomes-dir/file",
        "in a directory that was a file",
    )?;
    file(&mut layer, ".wh.link", "")?;
    file(&mut layer, "a/gone", "back again")?;
    Ok(layer.into_inner()?)
}
