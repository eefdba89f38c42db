//! From `pantala mount` to the last byte that a start reads, against the pull of the whole image through a node.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::images::{self, TREE};
use super::{Scene, blocking, image_bytes, pull, read};
use crate::perf::figures::Figures;
use crate::rig::lazy::{MountPoint, mount, summary, unmount};
use crate::rig::node::Node;
use crate::rig::registry::{Access, Registry};

/// What the slow registry sends at most.
const SLOW_MBIT_PER_S: u32 = 1_000;

/// A registry, and what its figures are called.
struct Origin {
    suffix: &'static str,
    /// `None` is the scene's own, as fast as this machine.
    slow: Option<Registry>,
}

/// Both registries, and what has been measured, by metric.
pub(super) struct Part {
    origins: Vec<Origin>,
    samples: BTreeMap<String, Vec<f64>>,
    read_share: f64,
    files: usize,
}

impl Part {
    pub(super) async fn new(scene: &Scene<'_>) -> Result<Self> {
        let machine = scene.rig.machine("slow-registry")?;
        let slow = Registry::start(&machine, Access::Plain).await?;
        slow.push(&scene.images.tree, TREE).await?;
        machine.limit_rate(SLOW_MBIT_PER_S)?;
        let images = &scene.images;
        Ok(Self {
            origins: vec![
                Origin {
                    suffix: "",
                    slow: None,
                },
                Origin {
                    suffix: "_1gbit",
                    slow: Some(slow),
                },
            ],
            samples: BTreeMap::new(),
            read_share: images.start_bytes as f64 / image_bytes(&images.tree) as f64,
            files: images.start_set.len(),
        })
    }

    pub(super) async fn round(
        &mut self,
        scene: &Scene<'_>,
        round: u32,
        counts: bool,
    ) -> Result<()> {
        for origin in &self.origins {
            let registry = origin.slow.as_ref().unwrap_or(&scene.registry);
            let (mut lazy, mut full) = (None, None);
            for step in 0..2 {
                let place = scene
                    .rig
                    .scene(&format!("start{}-{round}-{step}", origin.suffix))?;
                let node = scene.node("fresh", false, registry).await?;
                if (round + step).is_multiple_of(2) {
                    lazy = Some(start(scene, &node).await.context("a lazy start")?);
                } else {
                    full = Some(pull_whole(scene, &node).await.context("a pull in full")?);
                }
                drop(node);
                drop(place);
            }
            let ((lazy_s, fetched_share), full_s) =
                lazy.zip(full).context("a round has both sides")?;
            println!(
                "round {round}  start{:<8} lazy {lazy_s:.3} s, {fetched_share:.3} of the image fetched; full pull {full_s:.3} s",
                origin.suffix
            );
            if !counts {
                continue;
            }
            let suffix = origin.suffix;
            for (name, value) in [
                (format!("lazy_start{suffix}_s"), lazy_s),
                (format!("full_pull{suffix}_s"), full_s),
                (format!("lazy_start{suffix}_vs_full_pull"), lazy_s / full_s),
                (format!("lazy_start{suffix}_fetched_share"), fetched_share),
            ] {
                self.samples.entry(name).or_default().push(value);
            }
        }
        Ok(())
    }

    pub(super) fn report(&self, figures: &mut Figures) {
        for (name, values) in &self.samples {
            figures.set_median(name, values);
        }
        figures.set("lazy_start_read_share", self.read_share);
        figures.note(format!(
            "lazy_start: from the start of `pantala mount` until {} files of a tree of real files, chosen by a fixed seed, are read from start to end, one after the other, by a node that holds nothing and has no peer, no background fill; full_pull: such a node's mirror delivers all blobs of the same image to curl, all at once, which are then neither unpacked nor read. _1gbit: the registry sends at most {SLOW_MBIT_PER_S} Mbit/s; else it is limited by the processors only. fetched_share and read_share: bytes fetched from the registry, and bytes read, per byte of the image",
            self.files
        ));
    }
}

/// Seconds until all is read, and the part of the image that was fetched for it.
async fn start(scene: &Scene<'_>, node: &Node) -> Result<(f64, f64)> {
    let at = MountPoint::new(scene.rig)?;
    let paths: Vec<_> = scene
        .images
        .start_set
        .iter()
        .map(|path| at.0.join(path))
        .collect();
    let begun = Instant::now();
    mount(node, &images::reference(TREE), &at.0).await?;
    let bytes = blocking(move || {
        paths
            .iter()
            .map(|path| read::whole(&read::open(path)?))
            .sum::<Result<u64>>()
    })
    .await?;
    let took = begun.elapsed().as_secs_f64();
    let totals = node.status().await?.totals;
    ensure!(
        bytes == scene.images.start_bytes,
        "{bytes} bytes read, of {}",
        scene.images.start_bytes
    );
    for path in &scene.images.start_set {
        let (here, original) = (at.0.join(path), scene.images.tree_root.join(path));
        blocking(move || read::compare(&here, &original)).await?;
    }
    let told = summary(node).await?;
    ensure!(told["failed"] == 0, "reads failed: {told}");
    unmount(node, &at.0).await?;
    let fetched = totals.from_registry_bytes + totals.from_peer_bytes;
    let share = fetched as f64 / image_bytes(&scene.images.tree) as f64;
    Ok((took, share))
}

/// Seconds until curl has all blobs.
async fn pull_whole(scene: &Scene<'_>, node: &Node) -> Result<f64> {
    let begun = Instant::now();
    pull(node, TREE, &scene.images.tree).await?;
    Ok(begun.elapsed().as_secs_f64())
}
