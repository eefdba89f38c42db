//! One blob into one file: taken up where it stopped, verified, complete or an error.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use futures_util::StreamExt;
use pantala_wire::BlobDigest;
use sha2::{Digest as _, Sha256};

use super::super::failure::{Failure, about_file};
use super::about_source;
use super::manifest::BlobName;
use super::progress::Progress;
use super::way::{Part, Way};

/// Blobs fetched at the same time: as many as the container runtimes take.
pub(super) const TRANSFERS_MAX: usize = 3;
/// Times that a transfer may break without a byte more before it is given up.
const BREAKS_MAX: u32 = 5;
/// How much of a file is hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A file that grows to a blob.
pub(super) struct Growing<'a> {
    path: &'a Path,
    file: File,
    hasher: Sha256,
    /// Bytes written and hashed.
    pub(super) len: u64,
}

impl<'a> Growing<'a> {
    /// Opens or creates the file and hashes what it holds; more than `size_max` is nothing.
    pub(super) fn open(path: &'a Path, size_max: u64) -> Result<Self, Failure> {
        let fail = |e: std::io::Error| about_file("write", path, &e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail)?;
        let mut growing = Self {
            path,
            file,
            hasher: Sha256::new(),
            len: 0,
        };
        if growing.file.metadata().map_err(fail)?.len() > size_max {
            growing.restart()?;
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match growing.file.read(&mut chunk).map_err(fail)? {
                0 => return Ok(growing),
                n => {
                    growing.hasher.update(&chunk[..n]);
                    growing.len += n as u64;
                }
            }
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file
            .write_all(bytes)
            .map_err(|e| about_file("write", self.path, &e))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn restart(&mut self) -> Result<(), Failure> {
        let fail = |e: std::io::Error| about_file("write", self.path, &e);
        self.file.set_len(0).map_err(fail)?;
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// Makes the file durable and tells its digest.
    pub(super) fn finish(self) -> Result<BlobDigest, Failure> {
        self.file
            .sync_all()
            .map_err(|e| about_file("write", self.path, &e))?;
        Ok(BlobDigest::new(self.hasher.finalize().into()))
    }
}

/// Fetches `blob` to `path`. What is there already is kept if it turns out right.
pub(super) async fn fetch(
    way: &Way,
    blob: &BlobName,
    path: &Path,
    progress: &Progress,
) -> Result<(), Failure> {
    let mut file = Growing::open(path, blob.size)?;
    let had = file.len;
    progress.add(had);
    fill(way, blob, &mut file, progress).await?;
    if file.finish()? == blob.digest {
        return Ok(());
    }
    // Nothing of it can be trusted. If a part was from an earlier run, that may be the culprit.
    std::fs::remove_file(path).map_err(|e| about_file("remove", path, &e))?;
    progress.take_back(blob.size);
    if had == 0 {
        return Err(wrong(blob));
    }
    let mut file = Growing::open(path, blob.size)?;
    fill(way, blob, &mut file, progress).await?;
    if file.finish()? == blob.digest {
        return Ok(());
    }
    std::fs::remove_file(path).map_err(|e| about_file("remove", path, &e))?;
    Err(wrong(blob))
}

fn wrong(blob: &BlobName) -> Failure {
    Failure::new(format!(
        "what was received is not the blob {}: its bytes are wrong",
        blob.digest
    ))
    .hint("the registry, or something on the way to it, corrupts data; try --no-node to tell which")
}

/// Fetches what is missing, through cuts as long as each try brings something.
async fn fill(
    way: &Way,
    blob: &BlobName,
    file: &mut Growing<'_>,
    progress: &Progress,
) -> Result<(), Failure> {
    let mut breaks = 0;
    while file.len < blob.size {
        let before = file.len;
        let mut stream = match way.blob(blob, file.len).await? {
            Part::Bytes(stream) => stream,
            Part::FromStart(stream) => {
                progress.take_back(file.len);
                file.restart()?;
                stream
            }
        };
        let mut broken = None;
        while let Some(item) = stream.next().await {
            match item {
                Ok(bytes) if file.len + bytes.len() as u64 > blob.size => {
                    return Err(Failure::new(format!(
                        "the blob {} is longer than its manifest says",
                        blob.digest
                    )));
                }
                Ok(bytes) => {
                    file.write(&bytes)?;
                    progress.add(bytes.len() as u64);
                }
                Err(e) => {
                    broken = Some(e);
                    break;
                }
            }
        }
        if file.len == blob.size {
            return Ok(());
        }
        breaks = if file.len > before { 0 } else { breaks + 1 };
        if breaks == BREAKS_MAX {
            let doing = format!("read the blob {}", blob.digest);
            return Err(match broken {
                Some(e) => about_source(&doing, &e, &way.credential),
                None => Failure::new(format!(
                    "cannot {doing}: it ends at {} of {} bytes",
                    file.len, blob.size
                )),
            });
        }
    }
    Ok(())
}
