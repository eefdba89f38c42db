//! `[snapshotter]`

use std::path::{Path, PathBuf};

use super::check::absolute;
use super::document::Document;
use super::error::ConfigError;
use super::raw::RawSnapshotter;

/// What the kernel takes as the path of a unix socket, and the `.new` that it is made under.
const SOCKET_PATH_MAX_BYTES: usize = 103;

/// `[snapshotter]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshotter {
    /// The unix socket that containerd calls.
    pub listen: PathBuf,
    /// Where snapshots are kept.
    pub root: PathBuf,
    /// containerd's own socket, which says what image a lazy layer belongs to.
    pub containerd: Option<PathBuf>,
}

impl RawSnapshotter {
    pub(super) fn check(
        &self,
        file: &Document<'_>,
        data_dir: &Path,
    ) -> Result<Option<Snapshotter>, ConfigError> {
        let path = |key, value| absolute(file, &["snapshotter", key], value);
        let root = path("root", &self.root)?.unwrap_or_else(|| data_dir.join("snapshotter"));
        let containerd = path("containerd", &self.containerd)?;
        let Some(listen) = path("listen", &self.listen)? else {
            return Ok(None);
        };
        if self.listen.len() > SOCKET_PATH_MAX_BYTES {
            return Err(file.invalid(
                &["snapshotter", "listen"],
                format!("{} bytes are too long for a socket", self.listen.len()),
                "write a path of at most 103 bytes, such as \"/run/pantala/snapshotter.sock\"",
            ));
        }
        if !pantala_snapshotter::core::mounts::is_mountable(&root) {
            return Err(file.invalid(
                &["snapshotter", "root"],
                format!("overlayfs cannot be told of {root:?}"),
                "write a path without comma, colon, quote and backslash",
            ));
        }
        Ok(Some(Snapshotter {
            listen,
            root,
            containerd,
        }))
    }
}
