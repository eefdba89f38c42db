//! Reads whose bytes are missing: faults, filled from a peer that has them or from the registry.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::images::{self, RANDOM, SEQUENTIAL};
use super::{SEED, Scene, blocking, read};
use crate::perf::figures::Figures;
use crate::rig::lazy::{MountPoint, mount, summary, unmount};
use crate::rig::node::Node;
use crate::rig::status::Totals;

/// Bytes of a random read, and how many of them at most.
const RANDOM_BYTES: usize = 64 << 10;
const RANDOM_READS: usize = 200;
/// One read in each piece: a node fetches and keeps more than is asked for, and no read is to find it there.
const PIECE_BYTES: u64 = 1 << 20;

/// Where missing bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Peer,
    Registry,
}

impl Source {
    const fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Registry => "registry",
        }
    }
}

/// What has been measured, by metric.
#[derive(Default)]
pub(super) struct Part {
    samples: BTreeMap<String, Vec<f64>>,
}

impl Part {
    /// A node that holds nothing, by each source in turn.
    pub(super) async fn round(
        &mut self,
        scene: &Scene<'_>,
        round: u32,
        counts: bool,
    ) -> Result<()> {
        let mut order = [Source::Peer, Source::Registry];
        if round % 2 == 1 {
            order.reverse();
        }
        for source in order {
            let place = scene
                .rig
                .scene(&format!("cold-{}-{round}", source.name()))?;
            let in_cluster = source == Source::Peer;
            let node = scene.node("cold", in_cluster, &scene.registry).await?;
            let figures = faults(scene, &node, source, round)
                .await
                .with_context(|| format!("cold reads from the {}, round {round}", source.name()))?;
            for (what, value) in figures {
                println!(
                    "round {round}  cold {:<9}{what:<24}{value:>12.3}",
                    source.name()
                );
                if counts {
                    let name = format!("lazy_{}_{what}", source.name());
                    self.samples.entry(name).or_default().push(value);
                }
            }
            drop(node);
            drop(place);
        }
        Ok(())
    }

    pub(super) fn report(&self, figures: &mut Figures) {
        for (name, values) in &self.samples {
            figures.set_median(name, values);
        }
        figures.note(format!(
            "lazy_peer_*, lazy_registry_*: reads of a node that holds nothing, no background fill. fault_64k: {RANDOM_READS} reads of 64 KiB, or as many as the file has MiB, each in another MiB, at random, one at a time, each from the call to its return; fetched_kib_per_read: what the node fetched meanwhile. cold_read: the other file from its start to its end, 128 KiB a read. The peer, or the registry, has all of it in its page cache, and is a network namespace away; every byte read was compared afterwards. registry_share is the part of the fetched bytes that came from the registry"
        ));
    }
}

async fn faults(
    scene: &Scene<'_>,
    node: &Node,
    source: Source,
    round: u32,
) -> Result<Vec<(&'static str, f64)>> {
    let at = MountPoint::new(scene.rig)?;
    mount(node, &images::reference(images::FILES), &at.0).await?;
    let random = at.0.join(RANDOM);
    let seed = SEED + u64::from(round);
    let took = blocking(move || {
        let file = read::open(&random)?;
        let size = file.metadata()?.len();
        let offsets =
            read::places_apart(size, PIECE_BYTES, RANDOM_BYTES as u64, RANDOM_READS, seed);
        read::random(&file, RANDOM_BYTES, &offsets)
    })
    .await?;
    let faults = summary(node).await?["faults"].as_f64().unwrap_or(f64::NAN);
    let for_random = node.status().await?.totals;
    let sequential = at.0.join(SEQUENTIAL);
    let rate = blocking(move || read::sequential(&read::open(&sequential)?)).await?;
    let totals = node.status().await?.totals;
    // What has not been read yet is fetched for this; it was counted before.
    for name in [SEQUENTIAL, RANDOM] {
        let (here, original) = (at.0.join(name), scene.images.files_root.join(name));
        blocking(move || read::compare(&here, &original)).await?;
    }
    let told = summary(node).await?;
    ensure!(told["failed"] == 0, "reads failed: {told}");
    unmount(node, &at.0).await?;
    let mut figures = vec![
        ("fault_64k_p50_ms", read::percentile_ms(&took, 0.5)),
        ("fault_64k_p99_ms", read::percentile_ms(&took, 0.99)),
        ("fault_64k_per_s", read::rate(&took)),
        ("faults_per_read", faults / took.len() as f64),
        (
            "fetched_kib_per_read",
            fetched_bytes(&for_random) as f64 / 1024.0 / took.len() as f64,
        ),
        ("cold_read_mib_per_s", rate),
    ];
    if source == Source::Peer {
        let share = totals.from_registry_bytes as f64 / fetched_bytes(&totals) as f64;
        figures.push(("registry_share", share));
    }
    Ok(figures)
}

fn fetched_bytes(totals: &Totals) -> u64 {
    totals.from_registry_bytes + totals.from_peer_bytes
}
