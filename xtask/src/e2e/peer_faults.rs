//! The fault table, peers' and control's side: parents that die, stall or rot, control that vanishes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::stage::{Cluster, REPOSITORY};
use super::{Outcome, Stage, Test, test};
use crate::rig::image::BlobFile;
use crate::rig::node::Node;
use crate::rig::proxy::{Fault, Rule, Target};

/// Large enough that a transfer has a middle.
const IMAGE_MB: u64 = 120;
/// What parents may send, so that the middle lasts a while on any machine.
const PARENT_MBIT: u32 = 160;
/// What the registry may send on one connection, for the same reason.
const REGISTRY_BYTES_PER_S: u64 = 4_000_000;
/// How long a refusal may take.
const REFUSAL_MAX: Duration = Duration::from_secs(10);
/// How long a transfer may take to get to its middle.
const MIDDLE_MAX: Duration = Duration::from_secs(30);

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "peer faults: the only parent is killed in mid-transfer",
            |stage| parent_lost(stage, Loss::Killed)
        ),
        test!(
            "peer faults: the only parent stalls in mid-transfer",
            |stage| parent_lost(stage, Loss::Stalled)
        ),
        test!(
            "peer faults: one of two parents is killed, the registry sends nothing more",
            one_of_two_killed
        ),
        test!(
            "peer faults: a parent serves corrupt pieces",
            corrupt_parent
        ),
        test!(
            "peer faults: with the registry down, hits are served and nobody is let in unasked",
            registry_down
        ),
        test!(
            "control faults: killed in mid-pull, the pull ends well",
            |stage| control_killed(stage, false)
        ),
        test!(
            "control faults: killed in mid-pull and back, nodes announce what they hold",
            |stage| control_killed(stage, true)
        ),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    Killed,
    Stalled,
}

/// Waits until `node` has between a tenth and nine tenths of `blob`.
async fn wait_for_middle(node: &Node, blob: &BlobFile) -> Result<()> {
    let start = Instant::now();
    loop {
        let status = node.status().await?;
        let held = status.task(&blob.digest).map_or(0, |task| task.held_bytes);
        if held * 10 >= blob.bytes * 9 {
            bail!(
                "the transfer was past its middle when it was first seen: the machine is too fast for this test"
            );
        }
        if held * 10 >= blob.bytes {
            return Ok(());
        }
        ensure!(
            start.elapsed() < MIDDLE_MAX,
            "the transfer does not get to its middle: {status:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A cluster whose first node holds the image's largest layer and sends slowly.
async fn with_parent(stage: &Stage, nodes: u32) -> Result<Option<(Cluster, BlobFile)>> {
    if !stage.rig.has_namespaces() {
        return Ok(None);
    }
    let image = stage.image(IMAGE_MB)?;
    let cluster = stage.cluster(nodes, &image).await?;
    let blob = image.largest().clone();
    cluster.get_right(0, &blob).await?;
    cluster.nodes[0].machine().limit_rate(PARENT_MBIT)?;
    Ok(Some((cluster, blob)))
}

fn needs_root() -> Outcome {
    Outcome::Missed("limiting a parent's rate needs network namespaces, so root".into())
}

async fn parent_lost(stage: &Stage, loss: Loss) -> Result<Outcome> {
    let Some((mut cluster, blob)) = with_parent(stage, 2).await? else {
        return Ok(needs_root());
    };
    let (parents, children) = cluster.nodes.split_at_mut(1);
    let (parent, child) = (&mut parents[0], &children[0]);
    let pull = super::stage::get(child, REPOSITORY, &blob.digest, &[], super::stage::PULL_MAX);
    let lose = async {
        wait_for_middle(child, &blob).await?;
        match loss {
            Loss::Killed => parent.kill(),
            Loss::Stalled => parent.process().pause()?,
        }
        anyhow::Ok(())
    };
    let (download, lost) = tokio::join!(pull, lose);
    lost?;
    let download = download?;
    ensure!(
        download.is(&blob.digest),
        "the pull did not survive: {}",
        download.summary()
    );
    let status = child.status().await?;
    ensure!(
        status.totals.from_peer_bytes > 0 && status.totals.from_registry_bytes > 0,
        "the bytes should have come from the parent first and the registry then: {:?}",
        status.totals
    );
    if loss == Loss::Stalled {
        parent.process().resume()?;
    }
    Ok(Outcome::Passed)
}

async fn one_of_two_killed(stage: &Stage) -> Result<Outcome> {
    let Some((mut cluster, blob)) = with_parent(stage, 3).await? else {
        return Ok(needs_root());
    };
    cluster.get_right(1, &blob).await?;
    cluster.nodes[1].machine().limit_rate(PARENT_MBIT)?;
    cluster.proxy.reset_count();
    let (parents, children) = cluster.nodes.split_at_mut(2);
    let child = &children[0];
    let pull = super::stage::get(child, REPOSITORY, &blob.digest, &[], super::stage::PULL_MAX);
    let lose = async {
        wait_for_middle(child, &blob).await?;
        parents[0].kill();
        anyhow::Ok(())
    };
    let (download, lost) = tokio::join!(pull, lose);
    lost?;
    let download = download?;
    ensure!(
        download.is(&blob.digest),
        "the pull did not survive: {}",
        download.summary()
    );
    let sent = cluster.proxy.bytes(Target::Blob);
    ensure!(
        sent == 0,
        "the registry sent {sent} bytes though a parent was left"
    );
    Ok(Outcome::Passed)
}

async fn corrupt_parent(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let cluster = stage.cluster(2, &image).await?;
    cluster.get_right(0, blob).await?;
    // What rots after it was verified is the one thing that a parent does not look at again.
    let file = largest_file(cluster.nodes[0].data_dir())
        .context("the parent's data directory holds no file")?;
    spoil(&file, blob.bytes)?;
    let download = cluster.get_right(1, blob).await?;
    ensure!(download.bytes == blob.bytes, "{}", download.summary());
    let status = cluster.nodes[1].status().await?;
    ensure!(
        status.totals.from_registry_bytes > 0,
        "a spoiled parent cannot have had all the right bytes: {:?}",
        status.totals
    );
    Ok(Outcome::Passed)
}

/// Changes one byte in each 200 KB of `file`.
fn spoil(file: &std::path::Path, bytes: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)?;
    for offset in (100_000..bytes).step_by(200_000) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ 0xff], offset)?;
    }
    Ok(())
}

fn largest_file(dir: &std::path::Path) -> Option<std::path::PathBuf> {
    let mut largest = None;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else if largest
                .as_ref()
                .is_none_or(|(bytes, _)| metadata.len() > *bytes)
            {
                largest = Some((metadata.len(), entry.path()));
            }
        }
    }
    largest.map(|(_, path)| path)
}

async fn registry_down(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let mut cluster = stage.cluster(2, &image).await?;
    for layer in &image.layers {
        cluster.get_right(0, layer).await?;
    }
    // The second node has the registry's word that the caller may read this repository.
    let small = image
        .layers
        .iter()
        .min_by_key(|layer| layer.bytes)
        .context("an image has layers")?;
    cluster.get_right(1, small).await?;
    cluster.proxy.refuse(true)?;
    let largest = image.largest().clone();
    cluster
        .get_right(0, &largest)
        .await
        .context("a hit, with the registry down")?;
    // Whether this caller may read that blob through this repository, only the registry knows: a peer
    // that holds it does not make it public. The answer is a clear and early no, until it is back.
    let began = Instant::now();
    let refused = cluster.get(1, &largest).await?;
    ensure!(
        refused.status >= 500 && !refused.is(&largest.digest),
        "a caller whose right nobody could confirm got {}",
        refused.summary()
    );
    ensure!(
        began.elapsed() < REFUSAL_MAX,
        "the refusal took {:?}",
        began.elapsed()
    );
    cluster.proxy.refuse(false)?;
    cluster
        .get_right(1, &largest)
        .await
        .context("with the registry back")?;
    Ok(Outcome::Passed)
}

async fn control_killed(stage: &Stage, comes_back: bool) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest().clone();
    let mut cluster = stage.cluster(2, &image).await?;
    cluster.proxy.set_rules(vec![Rule::always(
        Target::Blob,
        Fault::Slow(REGISTRY_BYTES_PER_S),
    )]);
    let Cluster { nodes, control, .. } = &mut cluster;
    let pulls = async {
        tokio::join!(
            super::stage::get(
                &nodes[0],
                REPOSITORY,
                &blob.digest,
                &[],
                super::stage::PULL_MAX
            ),
            super::stage::get(
                &nodes[1],
                REPOSITORY,
                &blob.digest,
                &[],
                super::stage::PULL_MAX
            ),
        )
    };
    let lose = async {
        wait_for_middle(&nodes[0], &blob).await?;
        control.kill();
        if comes_back {
            tokio::time::sleep(Duration::from_millis(500)).await;
            control.start_again().await?;
        }
        anyhow::Ok(())
    };
    let ((first, second), lost) = tokio::join!(pulls, lose);
    lost?;
    for download in [first?, second?] {
        ensure!(
            download.is(&blob.digest),
            "the pull did not survive: {}",
            download.summary()
        );
    }
    if comes_back {
        for node in nodes.iter() {
            node.wait_joined().await?;
        }
        // Control knows only what it was told after its restart.
        cluster.proxy.set_rules(Vec::new());
        let late = cluster.add_node(&stage.rig).await?;
        cluster.proxy.reset_count();
        cluster.get_right(late, &blob).await?;
        let sent = cluster.proxy.bytes(Target::Blob);
        ensure!(
            sent == 0,
            "the late node made the registry send {sent} bytes"
        );
    }
    Ok(Outcome::Passed)
}
