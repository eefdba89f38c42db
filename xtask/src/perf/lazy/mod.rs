//! Lazy mounts: what is complete against plain local files, what is missing through faults, and a start
//! against a pull in full.
//!
//! All reads are made by this process, one at a time, from files of EROFS images that the kernel has mounted.

mod cold;
mod complete;
mod images;
mod read;
mod start;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures_util::future::try_join_all;

use super::Keep;
use super::figures::Figures;
use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::control::Control;
use crate::rig::image::{BlobFile, Image};
use crate::rig::lazy::{MountPoint, mount, summary};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::process::run_to_end;
use crate::rig::registry::{Access, Registry};
use images::Images;

/// Of what is random here: the same in each run.
const SEED: u64 = 0x9e37_79b9;
/// A mount that is filled in the background has all by then, on a slow machine too.
const COMPLETE_MAX: Duration = Duration::from_secs(300);
/// A background fill whose last piece comes as its reader leaves can leave the blob whole and unverified, until
/// somebody reads it anew; but not before the download, which nobody reads for 30 s, is parked.
const PULL_AFTER: Duration = Duration::from_secs(35);
const PULL_MAX: Duration = Duration::from_secs(300);
/// The node unmarks the file of a complete blob within a second.
const UNMARKED_AFTER: Duration = Duration::from_secs(2);

/// Options of `cargo xtask perf lazy`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures everything; one more warms up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// Size of each file that is read, and of the image that is started, in MB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=16_384))]
    megabytes: u64,
    #[command(flatten)]
    pub(super) keep: Keep,
}

impl Options {
    pub(super) const fn space_bytes(&self) -> u64 {
        // Two files in the source, the layout, the registry, the node that holds them and the one that does not;
        // the started image in source, layout, two registries and a node.
        self.megabytes * 1_000_000 * 16
    }
}

/// The programs that all parts share.
struct Scene<'a> {
    rig: &'a Rig,
    programs: &'a Programs,
    images: Images,
    registry: Registry,
    control: Control,
}

impl Scene<'_> {
    /// A node that fetches what is read and nothing else; one of the cluster, or one by itself.
    async fn node(&self, name: &str, in_cluster: bool, registry: &Registry) -> Result<Node> {
        let spec = if in_cluster {
            NodeSpec::joining(&registry.url(), &self.control)
        } else {
            NodeSpec {
                registry: registry.url(),
                ..NodeSpec::default()
            }
        };
        let spec = spec.with("lazy", "background_fill = false");
        Node::start(&self.rig.machine(name)?, &self.programs.node, &spec).await
    }
}

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    ensure!(rig.has_namespaces(), "mounting takes root");
    let images = Images::make(rig, options.megabytes * 1_000_000)?;
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    for (image, name) in [(&images.files, images::FILES), (&images.tree, images::TREE)] {
        registry.push(image, name).await?;
    }
    let scene = Scene {
        rig,
        programs,
        images,
        registry,
        control: Control::start(&rig.machine("control")?, &programs.control).await?,
    };
    let spec = NodeSpec::joining(&scene.registry.url(), &scene.control)
        .with("lazy", "background_fill = true");
    let holder = Node::start(&rig.machine("holder")?, &programs.node, &spec).await?;
    let held = MountPoint::new(rig)?;
    mount(&holder, &images::reference(images::FILES), &held.0).await?;
    wait_complete(&holder, &scene.images.files).await?;
    println!("the first node's mount is complete");

    let mut figures = Figures::default();
    let mut complete = complete::Part::new(&scene, &held)?;
    let mut cold = cold::Part::default();
    let mut start = start::Part::new(&scene).await?;
    for round in 0..=options.rounds {
        // The first round is for the warm-up.
        let counts = round > 0;
        complete.round(round, counts).await?;
        cold.round(&scene, round, counts).await?;
        start.round(&scene, round, counts).await?;
    }
    complete.report(&mut figures);
    cold.report(&mut figures);
    start.report(&mut figures);
    figures.note(format!(
        "{} MB a file and tree; EROFS with data in chunks of 1 MiB in a device of its own; one reader, no two reads at a time; all machines are namespaces of this one and share its page cache and processors; {} rounds in turn after one that warms up",
        options.megabytes, options.rounds
    ));
    Ok(figures)
}

/// Waits until all that is mounted is on the node's disk, and no mark is on it any more.
async fn wait_complete(node: &Node, image: &Image) -> Result<()> {
    let begun = Instant::now();
    let mut pulled_at = begun;
    loop {
        let told = summary(node).await?;
        if told["state"] == "complete" {
            tokio::time::sleep(UNMARKED_AFTER).await;
            return Ok(());
        }
        if begun.elapsed() > COMPLETE_MAX {
            bail!(
                "not complete within {COMPLETE_MAX:?}: {told}\n{}",
                node.log_tail()
            );
        }
        if pulled_at.elapsed() > PULL_AFTER {
            println!("a background fill left its blob unverified: pulling it through the node");
            pull(node, images::FILES, image).await?;
            pulled_at = Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Has curl download all blobs of an image through a node, all at once.
async fn pull(node: &Node, name: &str, image: &Image) -> Result<()> {
    let (repository, _) = name.split_once(':').context("the name has a tag")?;
    try_join_all(image.blobs().map(|blob| curl(node, repository, blob))).await?;
    Ok(())
}

async fn curl(node: &Node, repository: &str, blob: &BlobFile) -> Result<()> {
    let url = format!(
        "{}/v2/{repository}/blobs/{}?ns={REGISTRY_NAME}",
        node.mirror_url(),
        blob.digest
    );
    let mut command = node.machine().command("curl");
    command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
    command.args(["--output", "/dev/null", "--write-out", "%{size_download}"]);
    command.arg(url);
    let got = run_to_end(command, PULL_MAX).await?.ok("curl")?.output;
    ensure!(
        got.trim() == blob.bytes.to_string(),
        "{got} bytes of {} for {}",
        blob.bytes,
        blob.digest
    );
    Ok(())
}

/// Reads that wait for a node must not hold up this process' other work.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Bytes of all layers, metadata and data.
fn image_bytes(image: &Image) -> u64 {
    image.layers.iter().map(|layer| layer.bytes).sum()
}
