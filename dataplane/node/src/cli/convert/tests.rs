//! Layers unpacked and made into images: against tar itself, and against what strangers may send. What
//! needs root or mkfs.erofs says so on stderr where that is missing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use pantala_wire::BlobDigest;
use sha2::{Digest as _, Sha256};
use tar::EntryType;

use super::unpack::unpack;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("left out: only root can keep owners and devices");
    }
    root
}

/// Path, kind, and link target or content.
type Entry<'a> = (&'a str, EntryType, &'a str);

/// An archive of these; paths are written as they are, hostile ones too.
fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, kind, text) in entries {
        let mut header = tar::Header::new_gnu();
        let name = header.as_gnu_mut().unwrap();
        name.name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(1234);
        header.set_gid(5678);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        let is_file = *kind == EntryType::Regular;
        if is_file {
            header.set_size(text.len() as u64);
        } else if matches!(kind, EntryType::Link | EntryType::Symlink) {
            header.as_gnu_mut().unwrap().linkname[..text.len()].copy_from_slice(text.as_bytes());
        } else if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(4).unwrap();
            header.set_device_minor(9).unwrap();
        }
        header.set_cksum();
        let content = if is_file { text.as_bytes() } else { b"" };
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// What is in a tree: modes, owners, times, links, contents.
fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let kind = meta.file_type();
            let content = if kind.is_dir() {
                dirs.push(path.clone());
                String::new()
            } else if kind.is_symlink() {
                fs::read_link(&path).unwrap().display().to_string()
            } else if kind.is_file() {
                format!("{:x}", Sha256::digest(fs::read(&path).unwrap()))
            } else {
                format!("{} {}", meta.rdev(), kind.is_fifo())
            };
            let text = format!(
                "{:o} {}:{} {}.{} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec()
            );
            out.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    out
}

#[test]
fn a_tree_unpacks_as_tar_unpacks_it() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/deep")).unwrap();
    for len in [0, 1, 511, 512, 513, 100_000] {
        fs::write(tree.join(format!("sub/{len}")), vec![len as u8; len]).unwrap();
    }
    fs::set_permissions(tree.join("sub/513"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(tree.join("sub/1"), Some(70_000), Some(3)).unwrap();
    std::os::unix::fs::symlink("../sub/1", tree.join("sub/deep/link")).unwrap();
    fs::hard_link(tree.join("sub/512"), tree.join("hard")).unwrap();
    let long = "n".repeat(200);
    fs::write(tree.join(&long), "long name").unwrap();
    for format in ["pax", "gnu"] {
        let file = dir.path().join(format);
        let status = Command::new("tar")
            .arg(format!("--format={format}"))
            .arg("-cf")
            .arg(&file)
            .arg("-C")
            .arg(&tree)
            .arg(".")
            .status();
        assert!(status.unwrap().success());
        let (ours, theirs) = (
            dir.path().join(format!("{format}-ours")),
            dir.path().join(format!("{format}-theirs")),
        );
        fs::create_dir(&ours).unwrap();
        fs::create_dir(&theirs).unwrap();
        unpack(fs::File::open(&file).unwrap(), &ours).unwrap();
        let status = Command::new("tar")
            .arg("-xpf")
            .arg(&file)
            .arg("-C")
            .arg(&theirs)
            .status();
        assert!(status.unwrap().success());
        assert_eq!(describe(&ours), describe(&theirs), "{format}");
        assert_eq!(fs::metadata(ours.join("hard")).unwrap().nlink(), 2);
    }
}

#[test]
fn what_leads_out_of_the_image_is_refused() {
    if !is_root() {
        return;
    }
    use EntryType::{Directory, Link, Regular, Symlink};
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let (out, secret_text) = (
        outside.path().display().to_string(),
        secret.display().to_string(),
    );
    let cases: [(&str, Vec<Entry>); 12] = [
        ("dots", vec![("../evil", Regular, "x")]),
        ("dots inside", vec![("a/../../evil", Regular, "x")]),
        ("link to dots", vec![("a", Link, "../../../etc/passwd")]),
        ("link to a file outside", vec![("a", Link, &secret_text)]),
        (
            "through a link",
            vec![("l", Symlink, &out), ("l/evil", Regular, "x")],
        ),
        (
            "through a link to dots",
            vec![
                ("l", Symlink, "../../../../../../.."),
                ("l/evil", Regular, "x"),
            ],
        ),
        (
            "over a link",
            vec![("l", Symlink, &secret_text), ("l", Regular, "x")],
        ),
        (
            "a directory over a link",
            vec![
                ("l", Symlink, &out),
                ("l", Directory, ""),
                ("l/evil", Regular, "x"),
            ],
        ),
        (
            "whiteout through a link",
            vec![("l", Symlink, &out), ("l/.wh.secret", Regular, "")],
        ),
        (
            "opaque through a link",
            vec![("l", Symlink, &out), ("l/.wh..wh..opq", Regular, "")],
        ),
        ("whiteout of dots", vec![(".wh...", Regular, "")]),
        ("the root as a file", vec![("/", Regular, "x")]),
    ];
    for (name, entries) in cases {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        // Refused, or kept inside: either way nothing outside changes.
        let result = unpack(&archive(&entries)[..], &root);
        let mut there: Vec<_> = fs::read_dir(outside.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        there.sort();
        assert_eq!(there, std::slice::from_ref(&secret), "{name}");
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret", "{name}");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1, "{name}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{name}");
        assert!(!Path::new("/evil").exists(), "{name}");
        if name.contains("dots") && !name.contains("through") {
            result.unwrap_err();
        }
    }
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    if !is_root() {
        return;
    }
    use EntryType::{Char, Directory, Regular};
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let entries = [
        ("gone/.wh.file", Regular, ""),
        ("opaque/.wh..wh..opq", Regular, ""),
        ("opaque/new", Regular, "new"),
        // Replaced by this very layer: there, and nothing of the one below shows through.
        (".wh.again", Regular, ""),
        ("again", Directory, ""),
        ("again/x", Regular, "x"),
        ("file", Regular, "here"),
        (".wh.file", Regular, ""),
        ("deep/.wh.er", Regular, ""),
        ("deep/er/file", Regular, "x"),
        ("device", Char, ""),
    ];
    unpack(&archive(&entries)[..], root).unwrap();
    let is_whiteout = |path: &str| {
        let meta = fs::symlink_metadata(root.join(path)).unwrap();
        meta.file_type().is_char_device() && meta.rdev() == 0
    };
    let is_opaque = |path: &str| {
        let mut value = [0; 8];
        rustix::fs::getxattr(root.join(path), "trusted.overlay.opaque", &mut value[..])
            .is_ok_and(|len| &value[..len] == b"y")
    };
    assert!(is_whiteout("gone/file") && !is_opaque("gone"));
    assert!(is_opaque("opaque") && is_opaque("again") && is_opaque("deep/er"));
    assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "here");
    assert_eq!(
        fs::metadata(root.join("device")).unwrap().rdev(),
        rustix::fs::makedev(4, 9)
    );
    assert_eq!(fs::read_to_string(root.join("deep/er/file")).unwrap(), "x");
}

#[test]
fn numbers_that_are_left_out_are_0() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_path("file").unwrap();
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, &b"x"[..]).unwrap();
    unpack(&archive.into_inner().unwrap()[..], dir.path()).unwrap();
    let meta = fs::metadata(dir.path().join("file")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mtime(), meta.mode() & 0o7777),
        (0, 0, 0, 0)
    );
}

/// The same layer, compressed or not, gives the same two blobs; a damaged one none.
#[test]
fn a_layer_gives_the_same_blobs_each_time() {
    if !is_root() || Command::new("mkfs.erofs").arg("--help").output().is_err() {
        eprintln!("left out: mkfs.erofs is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let content = "some text ".repeat(3000);
    let plain = archive(&[
        ("b/file", EntryType::Regular, &content),
        ("a", EntryType::Symlink, "b"),
        ("b/.wh.x", EntryType::Regular, ""),
    ]);
    let diff = BlobDigest::new(Sha256::digest(&plain).into());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let forms = [
        plain.clone(),
        gzip.finish().unwrap(),
        zstd::bulk::compress(&plain, 1).unwrap(),
    ];
    let convert = |name: &str, bytes: &[u8], diff| {
        let blob = dir.path().join(name);
        fs::write(&blob, bytes).unwrap();
        let work = dir.path().join(format!("{name}-work"));
        fs::create_dir(&work).unwrap();
        super::erofs::convert(&blob, diff, &work, Path::new("mkfs.erofs"), |_| {})
    };
    let mut pairs = Vec::new();
    for (index, form) in forms.iter().enumerate() {
        let converted = convert(&format!("form-{index}"), form, diff).unwrap();
        let metadata = fs::read(&converted.metadata).unwrap();
        let data = fs::metadata(&converted.data).unwrap().len();
        pantala_lazy::format::erofs::check_image(&metadata, &[data]).unwrap();
        pairs.push(converted.pair);
    }
    assert!(
        pairs
            .iter()
            .all(|pair| *pair == pairs[0] && pair.data.is_some()),
        "{pairs:?}"
    );
    // A layer without content needs no device.
    let empty = archive(&[(".wh.x", EntryType::Regular, "")]);
    let converted = convert(
        "empty",
        &empty,
        BlobDigest::new(Sha256::digest(&empty).into()),
    )
    .unwrap();
    assert_eq!(converted.pair.data, None);
    pantala_lazy::format::erofs::check_image(&fs::read(&converted.metadata).unwrap(), &[]).unwrap();
    assert!(convert("lie", &plain, BlobDigest::new([1; 32])).is_err());
    assert!(convert("cut", &plain[..1000], diff).is_err());
}
