//! An OCI image layout on disk, as the image specification ("Image Layout") has it.

use std::fs::File;
use std::path::{Path, PathBuf};

use pantala_wire::BlobDigest;
use pantala_wire::name::ManifestReference;
use rustix::fs::{FlockOperation, flock};

use super::super::failure::{Failure, about_file};
use super::manifest::BlobName;

/// A layout that is being filled, under a name that nobody takes for a complete one.
pub(super) struct Layout {
    dir: PathBuf,
    /// Keeps a second run out; the lock ends with the file.
    _lock: File,
}

impl Layout {
    /// Creates the directory, or takes up what an interrupted run left.
    pub(super) fn open(dir: PathBuf) -> Result<Self, Failure> {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(|e| about_file("create", &blobs, &e))?;
        let lock = File::open(&dir).map_err(|e| about_file("open", &dir, &e))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Failure::new(format!("another process is writing to {}", dir.display()))
                .hint("wait for it, or choose another path")
        })?;
        Ok(Self { dir, _lock: lock })
    }

    pub(super) fn blob(&self, digest: &BlobDigest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.to_hex())
    }

    /// Writes the manifest and the two files that make a directory a layout, and removes blobs of
    /// another image that an interrupted run may have left.
    pub(super) fn complete(
        &self,
        manifest: &[u8],
        kind: &str,
        reference: &ManifestReference,
        blobs: &[BlobName],
    ) -> Result<BlobDigest, Failure> {
        let digest =
            super::manifest::digest_of(manifest, None).map_err(|e| Failure::new(e.to_string()))?;
        self.keep_only(blobs, &digest)?;
        self.write(&self.blob(&digest), manifest)?;
        let mut descriptor = serde_json::json!({
            "mediaType": kind,
            "digest": digest.to_string(),
            "size": manifest.len(),
        });
        if let ManifestReference::Tag(tag) = reference {
            descriptor["annotations"] =
                serde_json::json!({ "org.opencontainers.image.ref.name": tag });
        }
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [descriptor],
        });
        self.write(&self.dir.join("index.json"), index.to_string().as_bytes())?;
        let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
        self.write(&self.dir.join("oci-layout"), version)?;
        Ok(digest)
    }

    fn keep_only(&self, blobs: &[BlobName], manifest: &BlobDigest) -> Result<(), Failure> {
        let dir = self.dir.join("blobs/sha256");
        let fail = |e: std::io::Error| about_file("read", &dir, &e);
        for entry in std::fs::read_dir(&dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let is_wanted = |digest: &BlobDigest| path.ends_with(digest.to_hex());
            if !is_wanted(manifest) && !blobs.iter().any(|blob| is_wanted(&blob.digest)) {
                std::fs::remove_file(&path).map_err(|e| about_file("remove", &path, &e))?;
            }
        }
        Ok(())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Failure> {
        std::fs::write(path, bytes).map_err(|e| about_file("write", path, &e))
    }

    /// Gives the complete layout its name: at no moment is there half of one at `output`.
    pub(super) fn publish(self, output: &Path) -> Result<(), Failure> {
        if output
            .extension()
            .is_none_or(|extension| extension != "tar")
        {
            return std::fs::rename(&self.dir, output)
                .map_err(|e| about_file("create", output, &e));
        }
        let fail = |e: std::io::Error| about_file("write", output, &e);
        let parent = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let archive = tempfile::NamedTempFile::new_in(parent).map_err(fail)?;
        let mut tar = tar::Builder::new(archive);
        tar.mode(tar::HeaderMode::Deterministic);
        for name in ["oci-layout", "index.json"] {
            tar.append_path_with_name(self.dir.join(name), name)
                .map_err(fail)?;
        }
        tar.append_dir_all("blobs", self.dir.join("blobs"))
            .map_err(fail)?;
        let archive = tar.into_inner().map_err(fail)?;
        archive.as_file().sync_all().map_err(fail)?;
        let persisted = archive
            .persist_noclobber(output)
            .map_err(|e| fail(e.error))?;
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        persisted.set_permissions(readable).map_err(fail)?;
        std::fs::remove_dir_all(&self.dir).map_err(|e| about_file("remove", &self.dir, &e))
    }
}
