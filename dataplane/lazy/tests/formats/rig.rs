//! Trees of files, the makers of images, and mounts.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pantala_lazy::FillError;
use pantala_lazy::format::rafs::device::BlobRanges;
use pantala_wire::{ByteRange, Priority};
use rustix::fs::XattrFlags;
use rustix::mount::{MountFlags, UnmountFlags};

/// xorshift64*: a stream of bytes from a seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        eprintln!("seed {seed}");
        Self(seed.max(1))
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A tree with every kind of file that images hold, and of every awkward length.
pub(crate) fn make_tree(root: &Path, random: &mut Random) {
    let write = |path: &str, bytes: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    for len in [
        0,
        1,
        100,
        4095,
        4096,
        4097,
        65_537,
        1 << 20,
        (1 << 20) + 1,
        3_333_333,
    ] {
        write(&format!("random/{len}"), &random.bytes(len));
        let text: Vec<u8> = (0..len)
            .map(|at| b"all work and no play\n"[at / 3 % 21])
            .collect();
        write(&format!("text/{len}"), &text);
        write(&format!("zeros/{len}"), &vec![0; len]);
    }
    // A directory of several blocks, and small files that share batches and tails.
    for index in 0..700 {
        let len = random.below(300) as usize;
        let name = format!("many/a file with a rather long name {index:05}");
        write(&name, &random.bytes(len));
    }
    write("deep/a/b/c/d/e/f/g/h/file", b"deep");
    write("twin/one", b"the same text in two places");
    write("twin/two", b"the same text in two places");
    fs::create_dir(root.join("empty")).unwrap();
    fs::hard_link(root.join("random/4097"), root.join("hard")).unwrap();
    symlink("random/4097", root.join("short-link")).unwrap();
    symlink("x".repeat(1000), root.join("long-link")).unwrap();
    fs::set_permissions(root.join("random/100"), fs::Permissions::from_mode(0o4751)).unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::setxattr(root.join(path), name, value, XattrFlags::empty()).unwrap();
    };
    set("random/1", "user.one", b"1");
    set("many", "user.directory", &[7; 300]);
    for index in 0..20 {
        set(
            &format!("many/a file with a rather long name {index:05}"),
            "user.shared",
            b"by all",
        );
    }
}

/// All that a mount must show of a tree.
pub(crate) fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut out = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let kind = meta.file_type();
            let content = if kind.is_dir() {
                dirs.push(path.clone());
                "dir".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if kind.is_file() {
                format!("{} {}", meta.len(), blake3::hash(&fs::read(&path).unwrap()))
            } else {
                format!("device {} {}", meta.rdev(), kind.is_char_device())
            };
            let xattrs = if kind.is_symlink() {
                String::new()
            } else {
                xattrs(&path)
            };
            let links = if kind.is_file() { meta.nlink() } else { 0 };
            let text = format!(
                "{:o} {}:{} links {links} {content} {xattrs}",
                meta.mode(),
                meta.uid(),
                meta.gid()
            );
            out.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    out
}

fn xattrs(path: &Path) -> String {
    let mut names = [0u8; 4096];
    let len = rustix::fs::listxattr(path, &mut names[..]).unwrap();
    let mut names: Vec<_> = names[..len]
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .collect();
    names.sort_unstable();
    let value = |name: &&[u8]| {
        let mut value = [0u8; 4096];
        let name = CString::new(*name).unwrap();
        let len = rustix::fs::getxattr(path, &name, &mut value[..]).unwrap();
        format!("{name:?}={}", blake3::hash(&value[..len]))
    };
    names.iter().map(value).collect::<Vec<_>>().join(",")
}

/// Says what is left out, or finds nydus-image.
pub(crate) fn nydus_image() -> Option<PathBuf> {
    let beside = std::env::var_os("PANTALA_NYDUSD")
        .map(|nydusd| PathBuf::from(nydusd).with_file_name("nydus-image"));
    let found = beside
        .into_iter()
        .chain([PathBuf::from("/var/cache/pantala/nydus/bin/nydus-image")])
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("left out: nydus-image is not installed");
    }
    found
}

pub(crate) fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root();
    if !can {
        eprintln!("left out: only root can mount");
    }
    can
}

pub(crate) fn has_mkfs() -> bool {
    let has = Command::new("mkfs.erofs").arg("--help").output().is_ok();
    if !has {
        eprintln!("left out: mkfs.erofs is not installed");
    }
    has
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A nydus image of `tree` in `dir`: the bootstrap, and the folder with the blobs.
pub(crate) fn make_rafs(
    maker: &Path,
    tree: &Path,
    dir: &Path,
    options: &[&str],
) -> (PathBuf, PathBuf) {
    let blobs = dir.join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let bootstrap = dir.join("bootstrap");
    run(Command::new(maker)
        .args([
            "create",
            "--fs-version",
            "6",
            "--type",
            "dir-rafs",
            "--whiteout-spec",
            "none",
        ])
        .args(options)
        .arg("--bootstrap")
        .arg(&bootstrap)
        .arg("--blob-dir")
        .arg(&blobs)
        .arg(tree));
    (bootstrap, blobs)
}

/// A file-backed EROFS mount, by mount(2) itself; taken down when dropped.
pub(crate) struct Mount(PathBuf);

impl Mount {
    pub(crate) fn new(metadata: &Path, devices: &[&Path], at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        let options: Vec<String> = devices
            .iter()
            .map(|path| format!("device={}", path.display()))
            .collect();
        let options = CString::new(options.join(",")).unwrap();
        rustix::mount::mount(
            metadata,
            &at,
            "erofs",
            MountFlags::RDONLY,
            Some(options.as_c_str()),
        )
        .unwrap_or_else(|e| panic!("mounting {metadata:?} with {options:?}: {e}"));
        Self(at)
    }
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A file system of so many bytes; taken down when dropped.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(crate) fn new(at: PathBuf, bytes: u64) -> Self {
        fs::create_dir_all(&at).unwrap();
        let options = CString::new(format!("size={bytes}")).unwrap();
        let flags = MountFlags::empty();
        rustix::mount::mount("tmpfs", &at, "tmpfs", flags, Some(options.as_c_str())).unwrap();
        Self(at)
    }
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A blob in a file, which counts what is read of it and can be told to fail or to lie.
pub(crate) struct FileBlob {
    pub(crate) bytes: Vec<u8>,
    pub(crate) reads: std::sync::Mutex<Vec<(ByteRange, Priority)>>,
    pub(crate) lie: std::sync::atomic::AtomicBool,
    /// Reads wait for it to be added to.
    pub(crate) gate: tokio::sync::Semaphore,
}

impl FileBlob {
    pub(crate) fn open(path: &Path) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {
            bytes: fs::read(path).unwrap(),
            reads: std::sync::Mutex::default(),
            lie: false.into(),
            gate: tokio::sync::Semaphore::new(tokio::sync::Semaphore::MAX_PERMITS),
        })
    }
    pub(crate) fn read_bytes(&self) -> u64 {
        self.reads
            .lock()
            .unwrap()
            .iter()
            .map(|(range, _)| range.len())
            .sum()
    }
}

impl BlobRanges for FileBlob {
    fn read(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<Bytes, FillError>> {
        self.reads.lock().unwrap().push((range, urgency));
        async move {
            self.gate.acquire().await.unwrap().forget();
            let mut bytes = self.bytes[range.start() as usize..range.end() as usize].to_vec();
            if self.lie.load(std::sync::atomic::Ordering::SeqCst) {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            Ok(bytes.into())
        }
        .boxed()
    }
}
