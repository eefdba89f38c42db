//! The snapshotter behind a real containerd: images come out as they do from containerd's own, live
//! through crashes of the node, and leave nothing behind.

mod lazy;
mod lazy_image;
mod tree;
mod tricky;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::stage::{NAME, PULL_MAX};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::{Containerd, Plugins, Route, SNAPSHOTTER};
use crate::rig::enclosure::rig_name;
use crate::rig::image::{Image, PROGRAM};
use crate::rig::machine::run;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::registry::{Access, Registry};

/// The name of the image that has everything layers can do to each other.
const TRICKY: &str = "test/tricky:v1";
/// containerd's longest pause between two attempts to connect is 3 s.
const RECONNECT_MAX: Duration = Duration::from_secs(20);
/// Size of the image with programs in it.
const IMAGE_MB: u64 = 24;

pub(super) fn tests() -> Vec<Test> {
    let mut tests = lazy::tests();
    tests.extend([
        test!(
            "snapshotter: images come out as from containerd's own",
            same_as_overlayfs
        ),
        test!(
            "snapshotter: containers and their images outlive a killed node",
            outlives_a_kill
        ),
        test!(
            "snapshotter: ctr's commands work and nothing is left behind",
            commands
        ),
    ]);
    tests
}

/// A node with a snapshotter and a containerd that uses it.
struct Host {
    node: Node,
    containerd: Containerd,
    route: Route,
    _registry: Registry,
}

impl Host {
    async fn set_up(stage: &Stage, images: &[(&str, &Image)]) -> Result<Self> {
        let registry = Registry::start(&stage.rig.machine("registry")?, Access::Plain).await?;
        for (name, image) in images {
            registry.push(image, name).await?;
        }
        let machine = stage.rig.machine("node")?;
        let socket = Path::new("/run")
            .join(machine.address().to_string())
            .join("snapshotter.sock");
        let spec = NodeSpec {
            registry: registry.url(),
            ..NodeSpec::default()
        };
        let spec = spec.with("snapshotter", format!("listen = {socket:?}"));
        let plugins = Plugins {
            snapshotter: Some(socket),
            cri: None,
        };
        let node = Node::start(&machine, &stage.programs.node, &spec).await?;
        let containerd = Containerd::start_with(&machine, &plugins).await?;
        let route = Route {
            registry: registry.url(),
            ca_file: None,
            mirror: Some(node.mirror_url()),
            login: None,
        };
        Ok(Self {
            node,
            containerd,
            route,
            _registry: registry,
        })
    }

    async fn pull(&self, snapshotter: &str, name: &str) -> Result<()> {
        let pull = self
            .containerd
            .pull_into(snapshotter, name, &self.route, PULL_MAX);
        pull.await?.ok("ctr images pull")?;
        Ok(())
    }

    /// `ctr snapshots --snapshotter pantala` with these arguments.
    async fn snapshots(&self, arguments: &[&str]) -> Result<String> {
        let head = ["snapshots", "--snapshotter", SNAPSHOTTER];
        self.containerd.call(&[&head, arguments].concat()).await
    }

    /// Waits until containerd has noticed that the node is back: it tries again after a pause.
    async fn wait_reconnected(&self) -> Result<()> {
        let start = Instant::now();
        while let Err(error) = self.snapshots(&["ls"]).await {
            ensure!(
                start.elapsed() < RECONNECT_MAX,
                "after {RECONNECT_MAX:?}: {error:#}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Starts a program of the image and checks what it prints.
    async fn run(&self, container: &str, word: &str) -> Result<()> {
        let reference = Containerd::reference(NAME);
        let head = ["run", "--rm", "--snapshotter", SNAPSHOTTER, &reference];
        let output = self
            .containerd
            .call(&[&head, &[container, PROGRAM, word][..]].concat())
            .await?;
        ensure!(output.contains(word), "the container printed {output:?}");
        Ok(())
    }

    /// What the unpacked `image` shows when it is mounted read-only.
    async fn tree(&self, snapshotter: &str, image: &Image) -> Result<tree::Tree> {
        let chain_id = image.chain_id();
        self.containerd
            .look_at(&rig_name(), snapshotter, &chain_id, tree::read)
            .await?
    }

    fn root(&self) -> PathBuf {
        self.node.data_dir().join("snapshotter")
    }

    /// Removes the images and checks that neither snapshots nor files stay.
    async fn leaves_nothing(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let reference = Containerd::reference(name);
            self.containerd
                .call(&["images", "rm", "--sync", &reference])
                .await?;
        }
        let listed = self.snapshots(&["ls"]).await?;
        ensure!(listed.lines().count() == 1, "snapshots are left:\n{listed}");
        for dir in ["snapshots", "records"] {
            let left: Vec<_> = fs::read_dir(self.root().join(dir))?
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            ensure!(left.is_empty(), "left in {dir}: {left:?}");
        }
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let root = self.root().display().to_string();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(&root)).collect();
        ensure!(left.is_empty(), "left mounted: {left:?}");
        Ok(())
    }
}

async fn same_as_overlayfs(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let tricky = tricky::image(&stage.rig.scratch("tricky")?)?;
    let ordinary = stage.image(IMAGE_MB)?;
    let images = [(TRICKY, &tricky), (NAME, &*ordinary)];
    let host = Host::set_up(stage, &images).await?;
    for (name, image) in images {
        let mut trees = Vec::new();
        let mut usages = Vec::new();
        for snapshotter in ["overlayfs", SNAPSHOTTER] {
            host.pull(snapshotter, name).await?;
            trees.push(host.tree(snapshotter, image).await?);
            let usage = ["snapshots", "--snapshotter", snapshotter, "usage", "-b"];
            usages.push(sorted(&host.containerd.call(&usage).await?));
        }
        tree::compare(&trees[0], &trees[1]).context(name)?;
        ensure!(
            trees[0].len() > 10,
            "{name} has {} files only",
            trees[0].len()
        );
        ensure!(
            usages[0] == usages[1],
            "{name}: usage differs:\n{}\n{}",
            usages[0].join("\n"),
            usages[1].join("\n")
        );
    }
    host.leaves_nothing(&[TRICKY, NAME]).await?;
    Ok(Outcome::Passed)
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    lines.sort();
    lines
}

async fn outlives_a_kill(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let image = stage.image(IMAGE_MB)?;
    let mut host = Host::set_up(stage, &[(NAME, &image)]).await?;
    host.pull(SNAPSHOTTER, NAME).await?;
    host.run("first", "before-the-kill").await?;
    let before = host.tree(SNAPSHOTTER, &image).await?;
    let reference = Containerd::reference(NAME);
    // A container that exists while the node is down, with a file of its own.
    let create = ["containers", "create", "--snapshotter", SNAPSHOTTER];
    let program = [reference.as_str(), "kept", PROGRAM, "after-the-kill"];
    host.containerd
        .call(&[&create[..], &program].concat())
        .await?;

    host.node.kill();
    host.node.start_again().await?;
    host.wait_reconnected().await?;
    let output = host.containerd.call(&["tasks", "start", "kept"]).await?;
    ensure!(
        output.contains("after-the-kill"),
        "the container printed {output:?}"
    );
    tree::compare(&before, &host.tree(SNAPSHOTTER, &image).await?)?;
    host.run("second", "a-new-one").await?;
    host.containerd.call(&["containers", "rm", "kept"]).await?;
    host.leaves_nothing(&[NAME]).await?;
    Ok(Outcome::Passed)
}

async fn commands(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let tricky = tricky::image(&stage.rig.scratch("tricky")?)?;
    let host = Host::set_up(stage, &[(TRICKY, &tricky)]).await?;
    host.pull(SNAPSHOTTER, TRICKY).await?;
    let listed = host.snapshots(&["ls"]).await?;
    ensure!(
        listed.matches("Committed").count() == tricky.layers.len(),
        "not one snapshot a layer:\n{listed}"
    );
    let last = last_layer(&listed)?;
    let info = host.snapshots(&["info", &last]).await?;
    ensure!(info.contains("\"Kind\": \"Committed\""), "{info}");
    let tree = host.snapshots(&["tree"]).await?;
    ensure!(tree.contains("\\_"), "no layer stands on another:\n{tree}");

    // A layer by hand: prepared, written, committed, seen, removed.
    host.snapshots(&["prepare", "by-hand", &last]).await?;
    let at = host.node.machine().dir().join("by-hand");
    fs::create_dir_all(&at)?;
    let mount = host
        .snapshots(&["mounts", &at.display().to_string(), "by-hand"])
        .await?;
    run("sh", &["-ec", &mount])?;
    fs::write(at.join("made-by-hand"), "yes")?;
    run("umount", &[&at.display().to_string()])?;
    host.snapshots(&["commit", "committed-by-hand", "by-hand"])
        .await?;
    let listed = host.snapshots(&["ls"]).await?;
    ensure!(listed.contains("committed-by-hand"), "{listed}");
    let labelled = host
        .snapshots(&["label", "committed-by-hand", "made=by-hand"])
        .await?;
    let info = host.snapshots(&["info", "committed-by-hand"]).await?;
    ensure!(info.contains("by-hand"), "{labelled}\n{info}");
    let usage = host.snapshots(&["usage", "committed-by-hand"]).await?;
    ensure!(usage.lines().count() == 2, "{usage}");
    host.snapshots(&["rm", "committed-by-hand"]).await?;
    host.leaves_nothing(&[TRICKY]).await?;
    Ok(Outcome::Passed)
}

/// The layer that no other stands on, from what `ctr snapshots ls` prints.
fn last_layer(listed: &str) -> Result<String> {
    let rows: Vec<Vec<&str>> = listed
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    let is_parent = |name: &str| rows.iter().any(|row| row.len() == 3 && row[1] == name);
    rows.iter()
        .map(|row| row[0])
        .find(|name| !is_parent(name))
        .map(str::to_owned)
        .with_context(|| format!("no last layer in:\n{listed}"))
}
