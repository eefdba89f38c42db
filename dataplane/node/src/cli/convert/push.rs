//! The converted image on its way to its registry.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use pantala_source::{Credential, Source, SourceError, Upstream};
use pantala_wire::name::ImageReference;
use tokio::io::AsyncReadExt;

use super::super::failure::{Failure, about_file};
use super::super::get::{Progress, about_source};
use super::document::{MANIFEST_KIND, Made};

/// Bytes of one request: few enough for a slow line within the time allowed, many enough for a fast one.
const CHUNK_BYTES: usize = 4 << 20;

/// A repository that takes the image.
pub(super) struct Target {
    pub(super) source: Source,
    pub(super) upstream: Upstream,
    pub(super) image: ImageReference,
    pub(super) credential: Credential,
}

impl Target {
    /// Pushes the blob in the file `path`, unless the registry has it. Returns the bytes sent.
    pub(super) async fn push_file(
        &self,
        made: &Made,
        path: &Path,
        progress: &Progress,
    ) -> Result<u64, Failure> {
        let fail = |e: std::io::Error| about_file("read", path, &e);
        if self.has(made).await? {
            progress.add(made.size);
            return Ok(0);
        }
        let mut file = tokio::fs::File::open(path).await.map_err(fail)?;
        let about = |e: SourceError| self.about(&e);
        let repository = &self.image.repository;
        let mut push = self
            .source
            .push_blob(&self.upstream, repository, &self.credential)
            .await
            .map_err(about)?;
        let mut left = made.size;
        while left > 0 {
            let len = left.min(CHUNK_BYTES as u64) as usize;
            let mut chunk = BytesMut::zeroed(len);
            file.read_exact(&mut chunk).await.map_err(fail)?;
            push.append(chunk.freeze()).await.map_err(about)?;
            progress.add(len as u64);
            left -= len as u64;
        }
        push.finish(&made.digest).await.map_err(about)?;
        Ok(made.size)
    }

    /// Pushes a blob that is at hand.
    pub(super) async fn push_bytes(&self, made: &Made, bytes: Bytes) -> Result<u64, Failure> {
        if self.has(made).await? {
            return Ok(0);
        }
        let about = |e: SourceError| self.about(&e);
        let repository = &self.image.repository;
        let mut push = self
            .source
            .push_blob(&self.upstream, repository, &self.credential)
            .await
            .map_err(about)?;
        push.append(bytes).await.map_err(about)?;
        push.finish(&made.digest).await.map_err(about)?;
        Ok(made.size)
    }

    /// Pushes the manifest: from then on the image is there.
    pub(super) async fn push_manifest(&self, manifest: Bytes) -> Result<(), Failure> {
        self.source
            .push_manifest(
                &self.upstream,
                &self.image.repository,
                &self.image.reference,
                &HeaderValue::from_static(MANIFEST_KIND),
                manifest,
                &self.credential,
            )
            .await
            .map_err(|e| self.about(&e))
    }

    async fn has(&self, made: &Made) -> Result<bool, Failure> {
        self.source
            .has_blob(
                &self.upstream,
                &self.image.repository,
                &made.digest,
                &self.credential,
            )
            .await
            .map_err(|e| self.about(&e))
    }

    fn about(&self, error: &SourceError) -> Failure {
        about_source(&format!("push to {}", self.image), error, &self.credential)
    }
}
