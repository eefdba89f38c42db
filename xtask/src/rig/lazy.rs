//! Lazy mounts of a node, and EROFS images for them.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags};

use super::http;
use super::node::Node;
use super::process::run_to_end;
use super::{Rig, machine};

/// A mount is its metadata, which is small; a slow machine may take this long.
const MOUNT_MAX: Duration = Duration::from_secs(60);

/// Unmounts below its directory when it is dropped, so that the rig can remove it.
#[derive(Debug)]
pub(crate) struct MountPoint(pub(crate) PathBuf);

impl MountPoint {
    pub(crate) fn new(rig: &Rig) -> Result<Self> {
        Ok(Self(rig.scratch("mount")?.canonicalize()?))
    }

    /// Has the kernel mount these two files here, without any node.
    pub(crate) fn mount_files(&self, metadata: &Path, data: &Path) -> Result<()> {
        let options = CString::new(format!("device={}", data.display()))?;
        let flags = MountFlags::RDONLY;
        rustix::mount::mount(metadata, &self.0, "erofs", flags, Some(options.as_c_str()))
            .with_context(|| format!("mounting {} with {options:?}", metadata.display()))
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        // Of work that failed, and of work that ends in a mount.
        while rustix::mount::unmount(&self.0, UnmountFlags::DETACH).is_ok() {}
    }
}

/// Runs `pantala COMMAND ARGUMENTS` beside `node`.
pub(crate) async fn tool(node: &Node, command: &str, arguments: &[&str]) -> Result<String> {
    let mut tool = node.tool(command);
    tool.args(arguments);
    let ended = run_to_end(tool, MOUNT_MAX).await?;
    let log = node.log_tail();
    Ok(ended
        .ok(&format!("pantala {command} {arguments:?}"))
        .context(log)?
        .output)
}

/// `pantala mount IMAGE AT`
pub(crate) async fn mount(node: &Node, image: &str, at: &Path) -> Result<()> {
    tool(node, "mount", &[image, &at.display().to_string()]).await?;
    Ok(())
}

/// `pantala umount AT`
pub(crate) async fn unmount(node: &Node, at: &Path) -> Result<()> {
    tool(node, "umount", &[&at.display().to_string()]).await?;
    Ok(())
}

/// What the node says of its one mount.
pub(crate) async fn summary(node: &Node) -> Result<serde_json::Value> {
    let text = http::get_text(&node.admin_url("/mounts")).await?;
    let mounts: serde_json::Value = serde_json::from_str(&text)?;
    Ok(mounts[0].clone())
}

/// Makes an EROFS image of the tree `root`, its data in chunks of `chunk_bytes` in a file of its own: files
/// `metadata-NUMBER` and `data-NUMBER` in `dir`.
pub(crate) fn mkfs(
    dir: &Path,
    number: usize,
    root: &Path,
    chunk_bytes: u32,
) -> Result<(PathBuf, PathBuf)> {
    let metadata = dir.join(format!("metadata-{number}"));
    let data = dir.join(format!("data-{number}"));
    fs::File::create(&data)?;
    let output = Command::new("mkfs.erofs")
        .env("PATH", machine::search_path())
        .arg(format!("--blobdev={}", data.display()))
        .arg(format!("--chunksize={chunk_bytes}"))
        .arg("--quiet")
        .arg(&metadata)
        .arg(root)
        .output()
        .context("starting mkfs.erofs")?;
    if !output.status.success() {
        bail!("mkfs.erofs: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok((metadata, data))
}
