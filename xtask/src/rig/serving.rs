//! A node that serves one blob to clients and peers, and the memory that it holds meanwhile.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;

use super::containerd::REGISTRY_NAME;
use super::http::{self, Download};
use super::image::BlobFile;
use super::node::Node;

/// Pause between two looks at a node's memory.
pub(crate) const INTERVAL: Duration = Duration::from_millis(20);
/// Gigabytes on a slow machine take a while; a hang must still end.
const DOWNLOAD_MAX: Duration = Duration::from_secs(1200);

/// Downloads a blob of `repository` through `node`.
pub(crate) async fn get(
    node: &Node,
    repository: &str,
    digest: &str,
    headers: &[(&str, &str)],
    limit: Duration,
) -> Result<Download> {
    let url = format!(
        "{}/v2/{repository}/blobs/{digest}?ns={REGISTRY_NAME}",
        node.mirror_url()
    );
    http::download(&url, headers, limit).await
}

/// Downloads `blob` through `server` and through all `peers` at the same time.
pub(crate) async fn fetch_all(
    repository: &str,
    blob: &BlobFile,
    server: &Node,
    peers: &[Node],
) -> Result<()> {
    let nodes = peers.iter().chain([server]);
    let downloads =
        try_join_all(nodes.map(|node| get(node, repository, &blob.digest, &[], DOWNLOAD_MAX)))
            .await?;
    for download in downloads {
        ensure!(download.is(&blob.digest), "{}", download.summary());
    }
    Ok(())
}

/// The most memory, mapped files aside, that `node` held while `work` went on.
pub(crate) async fn peak_while(node: &Node, work: impl Future<Output = Result<()>>) -> Result<u64> {
    let mut peak = 0;
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                done?;
                return Ok(peak);
            }
            () = tokio::time::sleep(INTERVAL) => {
                peak = peak.max(node.process_ref().memory()?.own_bytes());
            }
        }
    }
}
