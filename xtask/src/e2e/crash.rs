//! Nodes that end with SIGKILL in mid-write, again and again, and disks that are too small.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::stage::{REPOSITORY, get};
use super::{Outcome, Stage, Test, test};
use crate::rig::machine::run;
use crate::rig::proxy::{Fault, Rule, Target};

/// Large enough to be interrupted many times.
const IMAGE_MB: u64 = 120;
/// Kills of one run of the test.
const KILLS: u32 = 12;
/// The registry is slowed to this, so that the blob does not arrive before the last kill.
const REGISTRY_BYTES_PER_S: u64 = 12_000_000;
/// The longest that a node lives between two kills.
const LIFE_MAX: Duration = Duration::from_millis(900);
/// The disk of the node whose disk is too small.
const SMALL_DISK_MB: u64 = 48;

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "crash: killed in mid-write at seeded moments, right bytes after each restart",
            slow,
            killed
        ),
        test!(
            "crash: a restarted node serves what it held without asking for a byte",
            restarted
        ),
        test!(
            "disk: too small for the blob, bytes pass through",
            full_disk
        ),
        test!(
            "disk: the limit of the store is kept, old blobs make room",
            limit
        ),
    ]
}

/// xorshift64*: a test needs reproducible numbers, no more.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % limit
    }
}

async fn killed(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let mut cluster = stage.cluster(1, &image).await?;
    let mut numbers = Numbers(stage.seed | 1);
    cluster.proxy.set_rules(vec![Rule::always(
        Target::Blob,
        Fault::Slow(REGISTRY_BYTES_PER_S),
    )]);
    let node = &mut cluster.nodes[0];
    for number in 0..KILLS {
        let life = Duration::from_millis(50 + numbers.below(LIFE_MAX.as_millis() as u64 - 50));
        let pull = get(node, REPOSITORY, &blob.digest, &[], super::stage::PULL_MAX);
        let ended = tokio::time::timeout(life, pull).await;
        if let Ok(download) = ended {
            let download = download?;
            ensure!(
                download.is(&blob.digest) || download.cut.is_some() || download.status >= 400,
                "wrong bytes after {number} kills: {}",
                download.summary()
            );
        }
        node.kill();
        node.start_again()
            .await
            .with_context(|| format!("after kill {number} at {life:?}"))?;
    }
    cluster.proxy.set_rules(Vec::new());
    let download = cluster.get_right(0, blob).await?;
    ensure!(download.bytes == blob.bytes, "{}", download.summary());
    let ratio = cluster.proxy.bytes(Target::Blob) as f64 / blob.bytes as f64;
    println!("          {KILLS} kills; the registry sent {ratio:.2} x the blob");
    Ok(Outcome::Passed)
}

async fn restarted(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let mut cluster = stage.cluster(1, &image).await?;
    cluster.get_right(0, blob).await?;
    cluster.nodes[0]
        .wait_status("complete the blob", Duration::from_secs(30), |status| {
            status
                .task(&blob.digest)
                .is_none_or(|task| task.state == "complete")
        })
        .await?;
    cluster.nodes[0].process().stop()?;
    cluster.nodes[0].start_again().await?;
    cluster.proxy.reset_count();
    cluster.get_right(0, blob).await?;
    let sent = cluster.proxy.bytes(Target::Blob);
    ensure!(
        sent == 0,
        "the registry sent {sent} bytes of a blob that lay on the disk"
    );
    Ok(Outcome::Passed)
}

/// A small file system that is unmounted with its test.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(dir: std::path::PathBuf, megabytes: u64) -> Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let size = format!("size={megabytes}m");
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &size,
                "tmpfs",
                &dir.display().to_string(),
            ],
        )?;
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &["-l", &self.0.display().to_string()]) {
            eprintln!("{error:#}");
        }
    }
}

async fn full_disk(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("mounting a small disk needs root".into()));
    }
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    ensure!(
        blob.bytes > SMALL_DISK_MB << 20,
        "the blob is smaller than the disk"
    );
    let disk = SmallDisk::mount(stage.rig.scratch("disk")?.join("small"), SMALL_DISK_MB)?;
    // A limit above what the disk has, so that the disk itself says no.
    let mut cluster = stage
        .cluster_with(1, &image, |mut spec| {
            spec.data_dir = Some(disk.0.clone());
            spec.store_limit = Some("10GiB".into());
            spec
        })
        .await?;
    cluster.get_right(0, blob).await?;
    let small = image
        .layers
        .iter()
        .min_by_key(|layer| layer.bytes)
        .context("an image has layers")?;
    cluster.get_right(0, small).await?;
    ensure!(
        cluster.nodes[0].process().is_running(),
        "the node has ended"
    );
    drop(cluster);
    Ok(Outcome::Passed)
}

async fn limit(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let total: u64 = image.layers.iter().map(|layer| layer.bytes).sum();
    let limit = image.largest().bytes + image.largest().bytes / 4;
    ensure!(limit < total, "the image fits into the limit");
    let cluster = stage
        .cluster_with(1, &image, |mut spec| {
            spec.store_limit = Some(format!("{}MiB", limit >> 20));
            spec
        })
        .await?;
    for _ in 0..2 {
        for layer in &image.layers {
            cluster.get_right(0, layer).await?;
            let store = cluster.nodes[0].status().await?.store;
            ensure!(
                store.used_bytes <= store.limit_bytes && store.limit_bytes <= limit,
                "the store holds {} bytes; its limit is {}, told were {limit}",
                store.used_bytes,
                store.limit_bytes
            );
        }
    }
    Ok(Outcome::Passed)
}
