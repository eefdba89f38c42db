//! Lazy images through Kubernetes' interface: containerd fetches the manifest and leaves the layers to
//! the snapshotter. The snapshotter here mounts local files, so that all of containerd's side is real.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::lazy_image::{self, LazyImage};
use super::{Outcome, Stage, Test, test, tree};
use crate::rig::containerd::{Containerd, Cri, Plugins, REGISTRY_NAME, Route, SNAPSHOTTER};
use crate::rig::cri::NAMESPACE;
use crate::rig::enclosure::rig_name;
use crate::rig::image::PROGRAM;
use crate::rig::process::Process;
use crate::rig::registry::{Access, Registry};

const START_MAX: Duration = Duration::from_secs(20);
const LAZY: &str = "test/lazy:v1";

pub(super) fn tests() -> Vec<Test> {
    vec![
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

/// A snapshotter over local files, and a containerd with CRI that uses it.
struct Host {
    containerd: Containerd,
    snapshotter: Process,
    root: PathBuf,
    route: Route,
    _registry: Registry,
}

impl Host {
    async fn set_up(stage: &Stage, lazy: &LazyImage, annotates: bool) -> Result<Self> {
        let registry = Registry::start(&stage.rig.machine("registry")?, Access::Plain).await?;
        registry.push(&lazy.image, LAZY).await?;
        let machine = stage.rig.machine("node")?;
        let run = Path::new("/run").join(machine.address().to_string());
        fs::create_dir_all(&run)?;
        let (socket, root) = (
            run.join("snapshotter.sock"),
            machine.dir().join("snapshots"),
        );
        let blobs = lazy.image.path_of(&lazy.image.manifest);
        let mut command = machine.command(&stage.programs.local_erofs);
        command.args([&socket, &root, &run.join("c.sock")]);
        command.arg(blobs.parent().unwrap_or(&blobs));
        let log = machine.dir().join("snapshotter.log");
        let mut snapshotter = Process::start("the snapshotter", command, &log)?;
        snapshotter
            .wait_until("listened", START_MAX, async || socket.exists())
            .await?;
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
            snapshotter,
            root,
            route,
            _registry: registry,
        })
    }

    async fn ctr(&self, arguments: &[&str]) -> Result<String> {
        self.containerd.call_in(NAMESPACE, arguments).await
    }

    /// Pulls, runs and compares; containerd must hold `blobs` blobs and no more, and the snapshotter
    /// must know the image by the name of `registry`.
    async fn runs(&self, lazy: &LazyImage, blobs: usize, registry: &str) -> Result<()> {
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

        let chain_id = lazy.image.chain_id();
        let seen = self
            .containerd
            .look_at(NAMESPACE, SNAPSHOTTER, &chain_id, tree::read)
            .await?;
        tree::compare(&tree::read(&lazy.source)?, &seen?)?;
        let log = self.snapshotter.log();
        ensure!(
            log.contains(&format!("mounted a layer of {registry}/test/lazy")),
            "the snapshotter was not told the image:\n{log}"
        );
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

/// containerd's content store, which is asked where CRI does not say it, keeps no port.
const fn registry_known(annotates: bool) -> &'static str {
    if annotates {
        REGISTRY_NAME
    } else {
        "registry.test"
    }
}

async fn erofs(stage: &Stage, annotates: bool) -> Result<Outcome> {
    if let Some(why) = lazy_image::missing() {
        return Ok(Outcome::Missed(why));
    }
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let lazy = lazy_image::erofs(&stage.rig.scratch("erofs")?)?;
    let host = Host::set_up(stage, &lazy, annotates).await?;
    // The manifest and the configuration.
    host.runs(&lazy, 2, registry_known(annotates)).await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}

async fn nydus(stage: &Stage, annotates: bool) -> Result<Outcome> {
    if let Some(why) = lazy_image::missing() {
        return Ok(Outcome::Missed(why));
    }
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let lazy = lazy_image::nydus(&stage.rig.scratch("nydus")?)?;
    let host = Host::set_up(stage, &lazy, annotates).await?;
    // The bootstrap besides.
    host.runs(&lazy, 3, registry_known(annotates)).await?;
    host.leaves_nothing().await?;
    Ok(Outcome::Passed)
}
