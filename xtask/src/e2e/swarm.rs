//! What a swarm is for: the registry sends each byte once, and late nodes take nothing from it.

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;

use super::stage::{Cluster, REPOSITORY};
use super::{Outcome, Stage, Test, test};
use crate::rig::image::Image;
use crate::rig::proxy::Target;
use crate::rig::serving::{fetch_all, peak_while};

const IMAGE_MB: u64 = 120;
const NODES: u32 = 3;
/// Blob bytes that the registry may send per byte of the image.
const RATIO_MAX: f64 = 1.02;
/// A node that serves a blob to peers and a client must stay below this, mapped files aside.
const MEMORY_MAX: u64 = 256 << 20;

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "swarm: three nodes at once read the registry once, a late one not at all",
            at_once
        ),
        test!(
            "swarm: ten clients of one node read the registry once",
            one_node
        ),
        test!(
            "swarm: a node that serves peers and a client stays small",
            memory
        ),
    ]
}

async fn at_once(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let mut cluster = stage.cluster(NODES, &image).await?;
    let pulls = (0..NODES as usize)
        .flat_map(|node| image.layers.iter().map(move |layer| (node, layer)))
        .map(|(node, layer)| cluster.get_right(node, layer));
    try_join_all(pulls).await?;
    let ratio = check_ratio(&cluster, &image)?;
    let late = cluster.add_node(&stage.rig).await?;
    cluster.proxy.reset_count();
    try_join_all(
        image
            .layers
            .iter()
            .map(|layer| cluster.get_right(late, layer)),
    )
    .await?;
    let sent = cluster.proxy.bytes(Target::Blob);
    ensure!(
        sent == 0,
        "the late node made the registry send {sent} bytes of blobs"
    );
    println!("          registry / image {ratio:.4}");
    Ok(Outcome::Passed)
}

/// Checks the ratio; the message says which ranges went to whom more than once.
fn check_ratio(cluster: &Cluster, image: &Image) -> Result<f64> {
    let expected: u64 = image.layers.iter().map(|layer| layer.bytes).sum();
    let ratio = cluster.proxy.bytes(Target::Blob) as f64 / expected as f64;
    if ratio <= RATIO_MAX {
        return Ok(ratio);
    }
    anyhow::bail!(
        "the registry sent {ratio:.4} x the image:\n      {}",
        cluster.proxy.repeated(20).join("\n      ")
    )
}

async fn one_node(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let cluster = stage.cluster(1, &image).await?;
    for layer in &image.layers {
        try_join_all((0..10).map(|_| cluster.get_right(0, layer))).await?;
    }
    check_ratio(&cluster, &image)?;
    Ok(Outcome::Passed)
}

async fn memory(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(300)?;
    let blob = image.largest();
    let cluster = stage.cluster(4, &image).await?;
    let (server, peers) = cluster.nodes.split_at(1);
    // First the server alone, then everyone from it.
    let fetching = peak_while(&server[0], fetch_all(REPOSITORY, blob, &server[0], &[])).await?;
    let serving = peak_while(&server[0], fetch_all(REPOSITORY, blob, &server[0], peers)).await?;
    let peak = fetching.max(serving);
    println!(
        "          most memory held while serving: {} MiB",
        peak >> 20
    );
    ensure!(peak < MEMORY_MAX, "the node held {} MiB", peak >> 20);
    Ok(Outcome::Passed)
}
