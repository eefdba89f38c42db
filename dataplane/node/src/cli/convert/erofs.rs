//! One layer: its archive unpacked and made into an EROFS image with a device beside it.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pantala_wire::BlobDigest;
use sha2::{Digest as _, Sha256};

use super::super::failure::{Failure, about_file};
use super::super::output::plain;
use super::document::{Made, Pair};
use super::unpack::unpack;

/// Chunks of a file on the device: long, so that an index is small and reads stay in one piece. Shorter files have
/// shorter ones.
const CHUNK_BYTES: u32 = 1 << 20;
/// The image's time. Files that are younger get it, so it lies far in the future: 2100-01-01.
const SOURCE_DATE_EPOCH: &str = "4102444800";
/// Read at once when hashing.
const BUFFER_BYTES: usize = 1 << 20;
/// What a failed mkfs.erofs is quoted with.
const COMPLAINT_CHARS_MAX: usize = 500;
/// The largest window of a zstd layer: that of `zstd --ultra`. More is an attack on our memory.
const ZSTD_WINDOW_LOG2_MAX: u32 = 27;

/// A layer as it became.
pub(super) struct Converted {
    pub(super) pair: Pair,
    pub(super) metadata: PathBuf,
    pub(super) data: PathBuf,
}

/// Converts the layer in the file `blob`, whose archive has the digest `diff`, below the empty folder `dir`. `read` is
/// told of bytes read of the blob.
pub(super) fn convert(
    blob: &Path,
    diff: BlobDigest,
    dir: &Path,
    mkfs: &Path,
    read: impl FnMut(u64),
) -> Result<Converted, Failure> {
    let root = dir.join("root");
    std::fs::create_dir(&root).map_err(|e| about_file("create", &root, &e))?;
    unpack_verified(blob, diff, &root, read)?;
    let (metadata, data) = (dir.join("metadata"), dir.join("data"));
    make(mkfs, &root, &metadata, Some(&data), diff)?;
    // Only the image is needed from here on; the tree may be large.
    let empty = std::fs::metadata(&data).map_or(true, |meta| meta.len() == 0);
    if empty {
        // Without a device, so that the mount needs none.
        make(mkfs, &root, &metadata, None, diff)?;
    }
    std::fs::remove_dir_all(&root).map_err(|e| about_file("remove", &root, &e))?;
    Ok(Converted {
        pair: Pair {
            metadata: digest_of(&metadata)?,
            data: if empty { None } else { Some(digest_of(&data)?) },
        },
        metadata,
        data,
    })
}

fn unpack_verified(
    blob: &Path,
    diff: BlobDigest,
    root: &Path,
    read: impl FnMut(u64),
) -> Result<(), Failure> {
    let fail = |e: std::io::Error| about_file("read", blob, &e);
    let file = File::open(blob).map_err(fail)?;
    let mut layer = BufReader::with_capacity(BUFFER_BYTES, Counting { inner: file, read });
    let head = std::io::BufRead::fill_buf(&mut layer).map_err(fail)?;
    let archive: Box<dyn Read + '_> = match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(layer).map_err(fail)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG2_MAX).map_err(fail)?;
            Box::new(decoder)
        }
        _ => Box::new(layer),
    };
    let mut archive = Hashing {
        inner: archive,
        hasher: Sha256::new(),
    };
    unpack(&mut archive, root).map_err(|e| {
        let failure = Failure::new(e.to_string());
        match e {
            super::unpack::UnpackError::File { ref source, .. }
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                failure.hint("choose a folder with more space with --work-dir")
            }
            _ => failure,
        }
    })?;
    // Archives end before their file does.
    std::io::copy(&mut archive, &mut std::io::sink()).map_err(fail)?;
    let got = BlobDigest::new(archive.hasher.finalize().into());
    match got == diff {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "a layer unpacks to {got}, and the image's configuration says {diff}"
        ))
        .hint("the image is damaged: build it again")),
    }
}

/// Runs mkfs.erofs so that the same tree gives the same bytes.
fn make(
    mkfs: &Path,
    root: &Path,
    image: &Path,
    data: Option<&Path>,
    diff: BlobDigest,
) -> Result<(), Failure> {
    let mut command = Command::new(mkfs);
    command.args(["--quiet", "--preserve-mtime"]);
    // The image's own name and time, which it would draw otherwise. -T would give its time to all files.
    command.arg(format!("-U{}", uuid(diff)));
    command.env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH);
    if let Some(data) = data {
        command.arg(format!("--chunksize={CHUNK_BYTES}"));
        let mut option = std::ffi::OsString::from("--blobdev=");
        option.push(data);
        command.arg(option);
    }
    let output = command
        .arg(image)
        .arg(root)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Failure::new(format!("cannot run {}: {e}", mkfs.display()))
                .hint("install erofs-utils 1.5 or later, or name mkfs.erofs with --mkfs")
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.chars().take(COMPLAINT_CHARS_MAX).collect();
    Err(Failure::new(format!(
        "{} failed ({}): {}",
        mkfs.display(),
        output.status,
        plain(&said)
    ))
    .hint("it must know --blobdev and --preserve-mtime (erofs-utils 1.5 or later)"))
}

/// A name for the image that its content decides: a UUID of version 8.
fn uuid(diff: BlobDigest) -> String {
    let hex = diff.to_hex();
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..32]
    )
}

/// The digest and length of a file.
fn digest_of(path: &Path) -> Result<Made, Failure> {
    let fail = |e: std::io::Error| about_file("read", path, &e);
    let mut file = File::open(path).map_err(fail)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut size = 0;
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => break,
            n => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
    Ok(Made {
        digest: BlobDigest::new(hasher.finalize().into()),
        size,
    })
}

struct Counting<F> {
    inner: File,
    read: F,
}

impl<F: FnMut(u64)> Read for Counting<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        (self.read)(n as u64);
        Ok(n)
    }
}

struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}
