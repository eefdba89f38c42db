//! Images whose layers containerd must not download: an EROFS image apart from its data, and the two
//! kinds of layers that nydus' tools make.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::rig::files::gather;
use crate::rig::image::{Described, Image, program_files};

/// Bytes of files beside the program and its libraries.
const DATA_BYTES: u64 = 8_000_000;
/// The size that `pantala` fetches in: devices are cut at the same places.
const CHUNK_BYTES: u32 = 1 << 20;

/// An image and what it was made of.
pub(super) struct LazyImage {
    pub(super) image: Image,
    /// What a container must see.
    pub(super) source: PathBuf,
}

/// Whether EROFS images can be made here.
pub(super) fn missing() -> Option<String> {
    let found = Command::new("mkfs.erofs").arg("-V").output().is_ok();
    (!found).then(|| "needs mkfs.erofs (package erofs-utils)".to_owned())
}

/// An ordinary image: one archive.
pub(super) fn archive(dir: &Path) -> Result<LazyImage> {
    let source = gather_source(dir)?;
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", &source)?;
    let image = Image::of_tars(&dir.join("layout"), &[tar.into_inner()?])?;
    Ok(LazyImage { image, source })
}

/// A metadata layer over a data layer.
pub(super) fn erofs(dir: &Path) -> Result<LazyImage> {
    let source = gather_source(dir)?;
    let (metadata, data) = (dir.join("metadata"), dir.join("data"));
    fs::File::create(&data)?;
    mkfs(&[
        &format!("--chunksize={CHUNK_BYTES}"),
        &format!("--blobdev={}", data.display()),
        &metadata.display().to_string(),
        &source.display().to_string(),
    ])?;
    let (data_digest, _) = crate::rig::image::digest_of(&data)?;
    let layers = [
        Described {
            file: data,
            media_type: "application/vnd.oci.image.layer.pantala.erofs.data.v1",
            annotations: Box::new(
                |digest| json!({"containerd.io/snapshot/pantala.erofs.data": digest}),
            ),
        },
        Described {
            file: metadata,
            media_type: "application/vnd.oci.image.layer.pantala.erofs.metadata.v1",
            annotations: Box::new(move |digest| {
                json!({
                    "containerd.io/snapshot/pantala.erofs.metadata": digest,
                    "containerd.io/snapshot/pantala.erofs.devices": data_digest,
                })
            }),
        },
    ];
    let image = Image::of_described(&dir.join("layout"), &layers)?;
    Ok(LazyImage { image, source })
}

/// A blob, and a layer with a bootstrap. The bootstrap here is an EROFS image without devices: which
/// kind it is makes no difference to containerd.
pub(super) fn nydus(dir: &Path) -> Result<LazyImage> {
    let source = gather_source(dir)?;
    let boot = dir.join("image.boot");
    mkfs(&[&boot.display().to_string(), &source.display().to_string()])?;
    let blob = dir.join("blob");
    fs::write(&blob, "no tar at all")?;
    let bootstrap = dir.join("bootstrap.tar");
    let mut tar = tar::Builder::new(fs::File::create(&bootstrap)?);
    tar.mode(tar::HeaderMode::Deterministic);
    tar.append_path_with_name(&boot, "image/image.boot")?;
    tar.into_inner()?;
    let layers = [
        Described {
            file: blob,
            media_type: "application/vnd.oci.image.layer.nydus.blob.v1",
            annotations: Box::new(|_| json!({"containerd.io/snapshot/nydus-blob": "true"})),
        },
        Described {
            file: bootstrap,
            media_type: "application/vnd.oci.image.layer.v1.tar",
            annotations: Box::new(|_| json!({"containerd.io/snapshot/nydus-bootstrap": "true"})),
        },
    ];
    let image = Image::of_described(&dir.join("layout"), &layers)?;
    Ok(LazyImage { image, source })
}

/// A program that can run, and real files.
fn gather_source(dir: &Path) -> Result<PathBuf> {
    let source = dir.join("source");
    let files = gather(DATA_BYTES).into_iter().map(|file| file.path);
    for path in program_files()?.into_iter().chain(files) {
        let to = source.join(path.strip_prefix("/").unwrap_or(&path));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(&path, &to).with_context(|| path.display().to_string())?;
    }
    Ok(source)
}

fn mkfs(arguments: &[&str]) -> Result<()> {
    let output = Command::new("mkfs.erofs")
        .args(arguments)
        .output()
        .context("starting mkfs.erofs")?;
    if !output.status.success() {
        bail!("mkfs.erofs: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
