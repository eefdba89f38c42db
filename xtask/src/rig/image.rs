//! Images made from real files of this machine, as an OCI layout.
//!
//! Layers are plain tars: the bytes that travel are the bytes of the files, so that the size of the
//! image is known and a compressor's speed is no part of any measurement.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::files::{RealFile, gather};

/// The program in every image that `ctr run` starts; it prints its arguments.
pub(crate) const PROGRAM: &str = "/usr/bin/echo";
/// Layers grow by this factor from one to the next, as the layers of real images differ in size.
const LAYER_GROWTH: f64 = 1.6;

/// What an image is to hold.
#[derive(Debug, Clone)]
pub(crate) struct ImageSpec {
    /// At least so many bytes of files in all layers together.
    pub(crate) bytes: u64,
    /// So many layers, of different sizes.
    pub(crate) layers: usize,
    /// Makes the digests of two images of the same files differ.
    pub(crate) label: String,
}

/// A blob of an image.
#[derive(Debug, Clone)]
pub(crate) struct BlobFile {
    /// `sha256:...`
    pub(crate) digest: String,
    pub(crate) bytes: u64,
}

/// An image in an OCI layout on disk.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    layout: PathBuf,
    pub(crate) manifest: BlobFile,
    pub(crate) config: BlobFile,
    pub(crate) layers: Vec<BlobFile>,
    /// Whether files had to be repeated under other names to reach the size.
    pub(crate) repeats_files: bool,
}

impl Image {
    /// Makes the image below `dir`.
    pub(crate) fn build(dir: &Path, spec: &ImageSpec) -> Result<Self> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).with_context(|| format!("creating {}", blobs.display()))?;
        // Each layer may end with a file that goes past its share.
        let files = gather(2 * spec.bytes);
        if files.is_empty() {
            bail!(
                "no readable files found below /usr/lib, /usr/share, /usr/bin or the Rust toolchain"
            );
        }
        let mut source = Source::new(files);
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for (number, wanted) in shares(spec.bytes, spec.layers).into_iter().enumerate() {
            let mut layer = LayerWriter::create(&blobs, number)?;
            let note = format!("{}, layer {number}\n", spec.label);
            layer.bytes(&format!("etc/pantala/layer-{number}"), note.as_bytes())?;
            if number == 0 {
                for file in program_files()? {
                    layer.file(&file, &file)?;
                }
            }
            let mut written = 0;
            while written < wanted {
                let (file, round) = source.next();
                let name = PathBuf::from(format!("data/{round}"))
                    .join(file.path.strip_prefix("/").unwrap_or(&file.path));
                // A file that vanished or cannot be read is no reason to fail; its size is not counted.
                if layer.file(&file.path, &name).is_ok() {
                    written += file.bytes;
                }
            }
            let blob = layer.finish()?;
            diff_ids.push(blob.digest.clone());
            layers.push(blob);
        }
        Self::assemble(dir, layers, &diff_ids, source.round > 0)
    }

    /// An image of one layer, the file `blob`, whatever is in it.
    pub(crate) fn wrap(dir: &Path, blob: &Path, layer: BlobFile) -> Result<Self> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        fs::copy(blob, blobs.join(layer.digest.trim_start_matches("sha256:")))?;
        let diff_ids = [layer.digest.clone()];
        Self::assemble(dir, vec![layer], &diff_ids, false)
    }

    /// An image of these layers, tars as they are.
    pub(crate) fn of_tars(dir: &Path, tars: &[Vec<u8>]) -> Result<Self> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let layers = tars.iter().map(|tar| {
            let hex = hex::encode(Sha256::digest(tar));
            fs::write(blobs.join(&hex), tar)?;
            Ok(BlobFile {
                digest: format!("sha256:{hex}"),
                bytes: tar.len() as u64,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        Self::assemble(dir, layers, &diff_ids, false)
    }

    /// An image of these layers, whatever they are: each with its file, media type and annotations.
    pub(crate) fn of_described(dir: &Path, layers: &[Described]) -> Result<Self> {
        let store = dir.join("blobs/sha256");
        fs::create_dir_all(&store)?;
        let (mut blobs, mut descriptors) = (Vec::new(), Vec::new());
        for layer in layers {
            let (digest, bytes) = digest_of(&layer.file)?;
            fs::copy(
                &layer.file,
                store.join(digest.trim_start_matches("sha256:")),
            )?;
            let annotations = (layer.annotations)(&digest);
            descriptors.push(json!({
                "mediaType": layer.media_type, "digest": digest, "size": bytes, "annotations": annotations,
            }));
            blobs.push(BlobFile { digest, bytes });
        }
        let diff_ids: Vec<String> = blobs.iter().map(|blob| blob.digest.clone()).collect();
        Self::describe(dir, blobs, &descriptors, &diff_ids, false)
    }

    /// An image whose layers are EROFS: pairs of metadata and data files, the lowest first.
    pub(crate) fn erofs(dir: &Path, pairs: &[(PathBuf, PathBuf)]) -> Result<Self> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let take = |file: &Path| -> Result<BlobFile> {
            let (digest, bytes) = digest_of(file)?;
            fs::rename(file, blobs.join(digest.trim_start_matches("sha256:")))?;
            Ok(BlobFile { digest, bytes })
        };
        let mut layers = Vec::new();
        let mut described = Vec::new();
        for (metadata, data) in pairs {
            let (metadata, data) = (take(metadata)?, take(data)?);
            described.push(json!({
                "mediaType": "application/vnd.oci.image.layer.pantala.erofs.metadata.v1",
                "digest": metadata.digest, "size": metadata.bytes,
                "annotations": {"containerd.io/snapshot/pantala.erofs.devices": data.digest},
            }));
            described.push(json!({
                "mediaType": "application/vnd.oci.image.layer.pantala.erofs.data.v1",
                "digest": data.digest, "size": data.bytes,
            }));
            layers.extend([metadata, data]);
        }
        let config = write_json(
            &blobs,
            &json!({"architecture": architecture(), "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}}),
        )?;
        Self::write_index(dir, config, layers, &described, false)
    }

    /// Writes configuration, manifest and index for layers that are there.
    fn assemble(
        dir: &Path,
        layers: Vec<BlobFile>,
        diff_ids: &[String],
        repeats_files: bool,
    ) -> Result<Self> {
        let descriptors: Vec<_> = layers
            .iter()
            .map(|layer| described(layer, "application/vnd.oci.image.layer.v1.tar"))
            .collect();
        Self::describe(dir, layers, &descriptors, diff_ids, repeats_files)
    }

    fn describe(
        dir: &Path,
        layers: Vec<BlobFile>,
        descriptors: &[serde_json::Value],
        diff_ids: &[String],
        repeats_files: bool,
    ) -> Result<Self> {
        let blobs = dir.join("blobs/sha256");
        let config = write_json(
            &blobs,
            &json!({
                "architecture": architecture(), "os": "linux", "created": "2024-01-01T00:00:00Z",
                "config": {"Cmd": [PROGRAM, "hello from the image"], "Env": ["PATH=/usr/bin"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }),
        )?;
        Self::write_index(dir, config, layers, descriptors, repeats_files)
    }

    /// Writes manifest and index; `described` are the layers' descriptors.
    fn write_index(
        dir: &Path,
        config: BlobFile,
        layers: Vec<BlobFile>,
        layers_described: &[serde_json::Value],
        repeats_files: bool,
    ) -> Result<Self> {
        let manifest = write_json(
            &dir.join("blobs/sha256"),
            &json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": described(&config, "application/vnd.oci.image.config.v1+json"),
                "layers": layers_described,
            }),
        )?;
        let mut entry = described(&manifest, "application/vnd.oci.image.manifest.v1+json");
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "v1"});
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        fs::write(
            dir.join("index.json"),
            json!({"schemaVersion": 2, "manifests": [entry]}).to_string(),
        )?;
        Ok(Self {
            layout: dir.to_owned(),
            manifest,
            config,
            layers,
            repeats_files,
        })
    }

    /// The image's layout as skopeo names it.
    pub(crate) fn skopeo_name(&self) -> String {
        format!("oci:{}:v1", self.layout.display())
    }

    /// The blobs that the manifest names: layers and configuration.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &BlobFile> {
        self.layers.iter().chain([&self.config])
    }

    /// Bytes of all blobs that the manifest names.
    pub(crate) fn blob_bytes(&self) -> u64 {
        self.blobs().map(|blob| blob.bytes).sum()
    }

    /// The largest layer.
    pub(crate) fn largest(&self) -> &BlobFile {
        self.layers
            .iter()
            .max_by_key(|layer| layer.bytes)
            .expect("an image is built with at least one layer")
    }

    /// What containerd calls the snapshot of all layers: layers here are what their `diff_ids` say.
    pub(crate) fn chain_id(&self) -> String {
        let mut ids = self.layers.iter().map(|layer| layer.digest.clone());
        let first = ids.next().unwrap_or_default();
        ids.fold(first, |below, id| {
            let hex = hex::encode(Sha256::digest(format!("{below} {id}")));
            format!("sha256:{hex}")
        })
    }

    /// Where a blob of the image lies.
    pub(crate) fn path_of(&self, blob: &BlobFile) -> PathBuf {
        self.layout
            .join("blobs/sha256")
            .join(blob.digest.trim_start_matches("sha256:"))
    }

    /// Frees the disk: the layers' files are needed no more after the push.
    pub(crate) fn forget_files(&self) -> Result<()> {
        fs::remove_dir_all(&self.layout)?;
        Ok(())
    }

    /// Checks that `dir` holds every blob of the image, and the manifest, each with the right sha256.
    pub(crate) fn verify_files(&self, dir: &Path) -> Result<()> {
        for blob in self.blobs().chain([&self.manifest]) {
            let path = dir.join(blob.digest.trim_start_matches("sha256:"));
            let (digest, bytes) = digest_of(&path)?;
            if digest != blob.digest || bytes != blob.bytes {
                bail!(
                    "{} holds {bytes} bytes of {digest}; {} bytes of {} were pushed",
                    path.display(),
                    blob.bytes,
                    blob.digest
                );
            }
        }
        Ok(())
    }
}

/// A layer that is no ordinary one.
pub(crate) struct Described {
    pub(crate) file: PathBuf,
    pub(crate) media_type: &'static str,
    /// Its annotations, given its digest.
    pub(crate) annotations: Box<dyn Fn(&str) -> serde_json::Value>,
}

fn described(blob: &BlobFile, media_type: &str) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": blob.digest, "size": blob.bytes})
}

/// The sha256 (`sha256:...`) and the size of a file.
pub(crate) fn digest_of(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut file, &mut hash)?;
    Ok((format!("sha256:{}", hex::encode(hash.finalize())), bytes))
}

/// The sizes of the layers, from the smallest on.
fn shares(bytes: u64, layers: usize) -> Vec<u64> {
    let layers = layers.max(1);
    let weights: Vec<f64> = (0..layers).map(|n| LAYER_GROWTH.powi(n as i32)).collect();
    let sum: f64 = weights.iter().sum();
    weights
        .iter()
        .map(|weight| (bytes as f64 * weight / sum).ceil() as u64)
        .collect()
}

/// Files, from the beginning again when they are used up.
struct Source {
    files: Vec<RealFile>,
    next: usize,
    round: usize,
}

impl Source {
    fn new(files: Vec<RealFile>) -> Self {
        Self {
            files,
            next: 0,
            round: 0,
        }
    }

    fn next(&mut self) -> (RealFile, usize) {
        if self.next == self.files.len() {
            self.next = 0;
            self.round += 1;
        }
        self.next += 1;
        (self.files[self.next - 1].clone(), self.round)
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// [`PROGRAM`] and the libraries that it is linked with.
pub(crate) fn program_files() -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(PROGRAM)
        .output()
        .context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let libraries = text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from);
    Ok([PathBuf::from(PROGRAM)]
        .into_iter()
        .chain(libraries)
        .collect())
}

fn write_json(blobs: &Path, value: &serde_json::Value) -> Result<BlobFile> {
    let bytes = serde_json::to_vec(value)?;
    let hex = hex::encode(Sha256::digest(&bytes));
    fs::write(blobs.join(&hex), &bytes)?;
    Ok(BlobFile {
        digest: format!("sha256:{hex}"),
        bytes: bytes.len() as u64,
    })
}

/// A tar that is hashed while it is written.
struct LayerWriter {
    tar: tar::Builder<Hashing<BufWriter<File>>>,
    unfinished: PathBuf,
    blobs: PathBuf,
}

impl LayerWriter {
    fn create(blobs: &Path, number: usize) -> Result<Self> {
        let unfinished = blobs.join(format!("layer-{number}.unfinished"));
        let file = BufWriter::with_capacity(1 << 20, File::create(&unfinished)?);
        let mut tar = tar::Builder::new(Hashing {
            inner: file,
            hash: Sha256::new(),
            bytes: 0,
        });
        tar.mode(tar::HeaderMode::Deterministic);
        Ok(Self {
            tar,
            unfinished,
            blobs: blobs.to_owned(),
        })
    }

    fn bytes(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        self.tar.append_data(&mut header, name, content)?;
        Ok(())
    }

    /// Adds the file at `path`; nothing is written where it cannot be read whole.
    fn file(&mut self, path: &Path, name: &Path) -> Result<()> {
        let mut content = Vec::new();
        File::open(path)?.read_to_end(&mut content)?;
        let metadata = fs::metadata(path)?;
        let mut header = tar::Header::new_gnu();
        header.set_metadata_in_mode(&metadata, tar::HeaderMode::Deterministic);
        header.set_size(content.len() as u64);
        let name = name.strip_prefix("/").unwrap_or(name);
        self.tar
            .append_data(&mut header, name, content.as_slice())?;
        Ok(())
    }

    fn finish(self) -> Result<BlobFile> {
        let mut hashing = self.tar.into_inner()?;
        hashing.inner.flush()?;
        let hex = hex::encode(hashing.hash.finalize());
        fs::rename(&self.unfinished, self.blobs.join(&hex))?;
        Ok(BlobFile {
            digest: format!("sha256:{hex}"),
            bytes: hashing.bytes,
        })
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(data)?;
        self.hash.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
