//! A real file system tree, made into an EROFS image with its data on a device of its own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// Where the tree's files come from: real programs and data that every Debian machine has.
const SOURCES: &[&str] = &["/usr/bin", "/usr/sbin", "/usr/share/perl5"];
/// Files larger than this are left out, so that there are many.
const FILE_BYTES_MAX: u64 = 3 << 20;
/// Sizes around what file systems cut at.
const ODD_SIZES: &[usize] = &[0, 1, 4095, 4096, 4097, 65_535, 131_073, 1_048_577];

/// One regular file of the image.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its path below the mount.
    pub path: PathBuf,
    /// Its length.
    pub size_bytes: u64,
    /// sha256 of its content, in hex.
    pub digest: String,
}

/// An image, and what it must read as.
#[derive(Debug, Clone)]
pub struct Image {
    /// The EROFS image with the metadata.
    pub metadata: PathBuf,
    /// All data.
    pub blob: PathBuf,
    /// Every regular file.
    pub entries: Vec<Entry>,
    /// A program in the image, and its arguments, that prints `DIGEST  PATH` for each path that it is given.
    pub digester: Vec<String>,
}

/// sha256 in hex.
pub fn digest_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Image {
    /// Makes an image of about `total_bytes` in `dir`. `digester` is a program to put into it, or else the machine's
    /// sha256sum.
    pub fn make(dir: &Path, total_bytes: u64, digester: Option<&Path>) -> io::Result<Self> {
        let tree = dir.join("tree");
        fs::create_dir_all(tree.join("odd"))?;
        for (number, size) in ODD_SIZES.iter().enumerate() {
            let bytes: Vec<u8> = (0..*size).map(|at| (at * 7 + number + 1) as u8).collect();
            fs::write(tree.join(format!("odd/{size}")), bytes)?;
        }
        let from = digester.unwrap_or(Path::new("/usr/bin/sha256sum"));
        fs::copy(from, tree.join("digester"))?;
        fs::set_permissions(tree.join("digester"), PermissionsExt::from_mode(0o755))?;
        copy_real_files(&tree, total_bytes)?;
        let (metadata, blob) = (dir.join("metadata.erofs"), dir.join("blob"));
        let output = Command::new("mkfs.erofs")
            .args(["--quiet", "--chunksize=1048576", "-T0", "-x-1"])
            .arg(format!("--blobdev={}", blob.display()))
            .args([&metadata, &tree])
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!(
                "mkfs.erofs: {}",
                String::from_utf8_lossy(&output.stderr)
            )));
        }
        let mut entries = Vec::new();
        list(&tree, &tree, &mut entries)?;
        fs::remove_dir_all(&tree)?;
        let mut digester_line = vec!["digester".to_owned()];
        if digester.is_some() {
            digester_line.push("digest".to_owned());
        }
        Ok(Self {
            metadata,
            blob,
            entries,
            digester: digester_line,
        })
    }

    /// Writes down what [`read_list`](Self::read_list) reads.
    pub fn write_list(&self, path: &Path) -> io::Result<()> {
        let mut file = File::create(path)?;
        for entry in &self.entries {
            let name = entry.path.display();
            writeln!(file, "{} {} {name}", entry.digest, entry.size_bytes)?;
        }
        Ok(())
    }

    /// The entries of an image made elsewhere.
    pub fn read_list(path: &Path) -> io::Result<Vec<Entry>> {
        fs::read_to_string(path)?
            .lines()
            .map(|line| {
                let mut fields = line.splitn(3, ' ');
                let mut next = || {
                    fields
                        .next()
                        .ok_or_else(|| io::Error::other("a short line"))
                };
                Ok(Entry {
                    digest: next()?.to_owned(),
                    size_bytes: next()?.parse().map_err(io::Error::other)?,
                    path: next()?.into(),
                })
            })
            .collect()
    }
}

fn copy_real_files(tree: &Path, total_bytes: u64) -> io::Result<()> {
    let mut copied = 0;
    for source in SOURCES {
        let to = tree.join(source.trim_start_matches('/'));
        fs::create_dir_all(&to)?;
        let Ok(files) = fs::read_dir(source) else {
            continue;
        };
        let mut files: Vec<_> = files.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            let meta = fs::symlink_metadata(&file)?;
            if copied >= total_bytes || !meta.is_file() || meta.len() > FILE_BYTES_MAX {
                continue;
            }
            let Some(name) = file.file_name() else {
                continue;
            };
            fs::copy(&file, to.join(name))?;
            copied += meta.len();
        }
    }
    Ok(())
}

fn list(root: &Path, dir: &Path, entries: &mut Vec<Entry>) -> io::Result<()> {
    let mut paths: Vec<_> = fs::read_dir(dir)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            list(root, &path, entries)?;
        } else {
            let bytes = fs::read(&path)?;
            entries.push(Entry {
                path: path
                    .strip_prefix(root)
                    .map_err(io::Error::other)?
                    .to_owned(),
                size_bytes: bytes.len() as u64,
                digest: digest_of(&bytes),
            });
        }
    }
    Ok(())
}
