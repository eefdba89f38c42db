//! Lazy images through Kubernetes' interface: containerd fetches the manifest and leaves the layers to
//! the snapshotter. The snapshotter here mounts local files, so that all of containerd's side is real.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::lazy_image::{self, LazyImage};
use super::{Outcome, RECONNECT_MAX, Stage, Test, test, tree};
use crate::rig::containerd::{Containerd, Cri, Plugins, REGISTRY_NAME, Route, SNAPSHOTTER};
use crate::rig::cri::NAMESPACE;
use crate::rig::enclosure::rig_name;
use crate::rig::image::PROGRAM;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::process::{Process, run_to_end};
use crate::rig::registry::{Access, Registry};

const START_MAX: Duration = Duration::from_secs(20);
/// mkfs.erofs and hashing of some megabytes, on a busy machine.
const CONVERT_MAX: Duration = Duration::from_secs(60);
const LAZY: &str = "test/lazy:v1";
const PLAIN: &str = "test/plain:v1";

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "snapshotter: containerd starts an EROFS image that the node mounts lazily",
            |stage| by_node(stage, true)
        ),
        test!(
            "snapshotter: the node finds the image of a lazy layer by asking containerd",
            |stage| by_node(stage, false)
        ),
        test!(
            "snapshotter: containerd starts lazily what pantala convert made",
            converted
        ),
        test!(
            "snapshotter: an EROFS image runs and containerd has none of its layers",
            |stage| erofs(stage, true)
        ),
        test!(
            "snapshotter: the image of a lazy layer is found where CRI does not say it",
            |stage| erofs(stage, false)
        ),
        test!(
            "snapshotter: a nydus image runs and containerd has its bootstrap alone",
            |stage| nydus(stage, true)
        ),
        test!(
            "snapshotter: the image of a nydus bootstrap is found where CRI does not say it",
            |stage| nydus(stage, false)
        ),
    ]
}

/// Who mounts.
enum Behind {
    /// A snapshotter over local files.
    Local(Process),
    /// A node, lazily.
    Node(Box<Node>),
}

/// A snapshotter, and a containerd with CRI that uses it.
struct Host {
    containerd: Containerd,
    behind: Behind,
    root: PathBuf,
    route: Route,
    _registry: Registry,
}

impl Host {
    /// Over the layers of `local` as they lie there, or over a node.
    async fn set_up(
        stage: &Stage,
        registry: Registry,
        annotates: bool,
        local: Option<&LazyImage>,
    ) -> Result<Self> {
        let machine = stage.rig.machine("node")?;
        let run = Path::new("/run").join(machine.address().to_string());
        fs::create_dir_all(&run)?;
        let (socket, root) = (
            run.join("snapshotter.sock"),
            machine.dir().join("snapshots"),
        );
        let containerd_socket = run.join("c.sock");
        let behind = if let Some(lazy) = local {
            let blobs = lazy.image.path_of(&lazy.image.manifest);
            let mut command = machine.command(&stage.programs.local_erofs);
            command.args([&socket, &root, &containerd_socket]);
            command.arg(blobs.parent().unwrap_or(&blobs));
            let log = machine.dir().join("snapshotter.log");
            let mut snapshotter = Process::start("the snapshotter", command, &log)?;
            snapshotter
                .wait_until("listened", START_MAX, async || socket.exists())
                .await?;
            Behind::Local(snapshotter)
        } else {
            let lines =
                format!("listen = {socket:?}\nroot = {root:?}\ncontainerd = {containerd_socket:?}");
            let spec = NodeSpec {
                registry: registry.url(),
                ..NodeSpec::default()
            };
            let spec = spec.with("snapshotter", lines);
            let node = Node::start(&machine, &stage.programs.node, &spec).await?;
            Behind::Node(Box::new(node))
        };
        let plugins = Plugins {
            snapshotter: Some(socket),
            cri: Some(Cri { annotates }),
        };
        let containerd = Containerd::start_with(&machine, &plugins).await?;
        let route = Route {
            registry: registry.url(),
            ca_file: None,
            mirror: None,
            login: None,
        };
        Ok(Self {
            containerd,
            behind,
            root,
            route,
            _registry: registry,
        })
    }

    async fn ctr(&self, arguments: &[&str]) -> Result<String> {
        self.containerd.call_in(NAMESPACE, arguments).await
    }

    /// Pulls and runs; containerd must hold `blobs` blobs and no more.
    async fn runs(&self, blobs: usize) -> Result<()> {
        self.containerd.pull_by_cri(LAZY, &self.route).await?;
        let held = fs::read_dir(self.containerd.blobs_dir())?.count();
        ensure!(held == blobs, "containerd holds {held} blobs, not {blobs}");
        let reference = Containerd::reference(LAZY);
        let flag = ["--snapshotter", SNAPSHOTTER];
        // In the rig's own cgroup, by which what is left of it is found.
        let cgroup = format!("/{}/lazy", rig_name());
        let run = [&["run", "--rm", "--cgroup", &cgroup], &flag[..]].concat();
        let program = [reference.as_str(), "lazy", PROGRAM, "from-a-lazy-image"];
        let output = self.ctr(&[&run[..], &program].concat()).await?;
        ensure!(
            output.contains("from-a-lazy-image"),
            "the container printed {output:?}"
        );
        Ok(())
    }

    /// The same, and compares; the snapshotter must know the image by the name of `registry`.
    async fn runs_and_shows(&self, lazy: &LazyImage, blobs: usize, registry: &str) -> Result<()> {
        self.runs(blobs).await?;
        let chain_id = lazy.image.chain_id();
        let seen = self
            .containerd
            .look_at(NAMESPACE, SNAPSHOTTER, &chain_id, tree::read)
            .await?;
        tree::compare(&tree::read(&lazy.source)?, &seen?)?;
        if let Behind::Local(snapshotter) = &self.behind {
            let log = snapshotter.log();
            ensure!(
                log.contains(&format!("mounted a layer of {registry}/test/lazy")),
                "the snapshotter was not told the image:\n{log}"
            );
        }
        Ok(())
    }

    /// Waits until containerd has noticed that the node is back: it tries again after a pause.
    async fn wait_reconnected(&self) -> Result<()> {
        let start = Instant::now();
        let list = ["snapshots", "--snapshotter", SNAPSHOTTER, "ls"];
        while let Err(error) = self.ctr(&list).await {
            ensure!(
                start.elapsed() < RECONNECT_MAX,
                "after {RECONNECT_MAX:?}: {error:#}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Removes every image and checks that no snapshot, file or mount stays.
    async fn leaves_nothing(&self) -> Result<()> {
        let names = self.ctr(&["images", "ls", "-q"]).await?;
        for name in names.lines() {
            self.ctr(&["images", "rm", "--sync", name]).await?;
        }
        for dir in ["snapshots", "records"] {
            let left = fs::read_dir(self.root.join(dir))?.count();
            ensure!(left == 0, "{left} entries are left in {dir}");
        }
        let root = self.root.display().to_string();
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        ensure!(!mounts.contains(&root), "left mounted:\n{mounts}");
        Ok(())
    }
}

/// What these tests need and do not have here.
fn missing(stage: &Stage) -> Option<String> {
    let is_root = stage.rig.has_namespaces();
    lazy_image::missing().or_else(|| (!is_root).then(|| "containerd needs root".into()))
}

/// A registry that has the image.
async fn pushed(stage: &Stage, lazy: &LazyImage, name: &str) -> Result<Registry> {
    let registry = Registry::start(&stage.rig.machine("registry")?, Access::Plain).await?;
    registry.push(&lazy.image, name).await?;
    Ok(registry)
}

/// containerd's content store, which is asked where CRI does not say it, keeps no port.
const fn registry_known(annotates: bool) -> &'static str {
    if annotates {
        REGISTRY_NAME
    } else {
        "registry.test"
    }
}

async fn erofs(stage: &Stage, annotates: bool) -> Result<Outcome> {
    if let Some(why) = missing(stage) {
        return Ok(Outcome::Missed(why));
    }
    let lazy = lazy_image::erofs(&stage.rig.scratch("erofs")?)?;
    let host = Host::set_up(
        stage,
        pushed(stage, &lazy, LAZY).await?,
        annotates,
        Some(&lazy),
    )
    .await?;
    // The manifest and the configuration.
    host.runs_and_shows(&lazy, 2, registry_known(annotates))
        .await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}

async fn by_node(stage: &Stage, annotates: bool) -> Result<Outcome> {
    if let Some(why) = missing(stage) {
        return Ok(Outcome::Missed(why));
    }
    let lazy = lazy_image::erofs(&stage.rig.scratch("erofs")?)?;
    let mut host = Host::set_up(stage, pushed(stage, &lazy, LAZY).await?, annotates, None).await?;
    host.runs_and_shows(&lazy, 2, "").await?;
    // The mount outlives the node, and the next one takes it up.
    if let Behind::Node(node) = &mut host.behind {
        node.kill();
        node.start_again().await?;
    }
    host.wait_reconnected().await?;
    host.runs_and_shows(&lazy, 2, "").await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}

/// An ordinary image, converted, and started without containerd having any of its layers.
async fn converted(stage: &Stage) -> Result<Outcome> {
    if let Some(why) = missing(stage) {
        return Ok(Outcome::Missed(why));
    }
    let plain = lazy_image::archive(&stage.rig.scratch("plain")?)?;
    let registry = pushed(stage, &plain, PLAIN).await?;
    let url = registry.url();
    let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
    let builder = stage.rig.machine("builder")?;
    let mut command = builder.command(&stage.programs.node);
    command.arg("convert");
    command.args([format!("{host}/{PLAIN}"), format!("{host}/{LAZY}")]);
    command.args([
        "--no-node",
        "--plain-http",
        "--target-plain-http",
        "--work-dir",
    ]);
    command.arg(builder.dir());
    run_to_end(command, CONVERT_MAX)
        .await?
        .ok("pantala convert")?;
    let host = Host::set_up(stage, registry, true, None).await?;
    host.runs(2).await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}

async fn nydus(stage: &Stage, annotates: bool) -> Result<Outcome> {
    if let Some(why) = missing(stage) {
        return Ok(Outcome::Missed(why));
    }
    let lazy = lazy_image::nydus(&stage.rig.scratch("nydus")?)?;
    let host = Host::set_up(
        stage,
        pushed(stage, &lazy, LAZY).await?,
        annotates,
        Some(&lazy),
    )
    .await?;
    // The bootstrap besides.
    host.runs_and_shows(&lazy, 3, registry_known(annotates))
        .await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}
