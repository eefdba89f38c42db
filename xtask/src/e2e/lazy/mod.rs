//! Lazy mounts on this kernel: right bytes or an error, whoever dies, and the registry read once.

mod tree;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::future::try_join_all;
use rustix::process::Signal;

use super::stage::{Cluster, Guard, NAME};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::control::Control;
use crate::rig::enclosure::signal_process;
use crate::rig::lazy::{self, MountPoint, summary, tool, unmount};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::proxy::{Fault, Rule, Target};
use crate::rig::registry::{PASSWORD, USER};
use tree::{Tree, end, start};

const IMAGE_MB: u64 = 300;
/// For tests that are about something else than size.
const SMALL_MB: u64 = 60;
/// Kills of the daemon under one load.
const KILLS: u64 = 6;
/// The registry's speed meanwhile, on each connection.
const REGISTRY_BYTES_PER_S: u64 = 1_500_000;
const NODES: u32 = 3;
/// Blob bytes that the registry may send per byte of the image.
const RATIO_MAX: f64 = 1.02;
/// How long a read may wait in the test of a lost registry, by the node's configuration.
const FILL_TIMEOUT_MS: u64 = 4_000;
const COMPLETE_MAX: Duration = Duration::from_secs(120);

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "lazy: every file is the source's, by read, mmap and exec, of many processes, cold and warm",
            slow,
            every_file
        ),
        test!(
            "lazy: a daemon killed at seeded moments under load, no reader notices but by waiting",
            slow,
            killed
        ),
        test!(
            "lazy: supervisor killed alone under load, no wrong bytes and another one keeps",
            supervisor_killed
        ),
        test!(
            "lazy: daemon and supervisor killed, the mount is poisoned and taken down",
            poisoned
        ),
        test!(
            "lazy: registry lost in mid-fault, EIO in bounded time, right bytes when it is back",
            registry_lost
        ),
        test!(
            "lazy: private images need a login, which outlives the daemon and lies on no disk",
            private
        ),
        test!(
            "lazy: three nodes mount at once, the registry is read once",
            slow,
            at_once
        ),
        test!(
            "lazy: filled in the background, a mount needs nobody any more",
            background
        ),
    ]
}

/// What cannot be tested without root.
fn missed(stage: &Stage) -> Option<Outcome> {
    let why = "mounting needs root".to_owned();
    (!stage.rig.has_namespaces()).then_some(Outcome::Missed(why))
}

async fn cluster(stage: &Stage, tree: &Tree, nodes: u32, line: &str) -> Result<Cluster> {
    let tell = |spec: NodeSpec| spec.with("lazy", line);
    let cluster = stage.cluster_with(nodes, &tree.image, tell).await?;
    cluster.proxy.reset_count();
    Ok(cluster)
}

async fn mount(node: &Node, at: &Path) -> Result<()> {
    lazy::mount(node, &format!("{REGISTRY_NAME}/{NAME}"), at).await
}

/// The supervisor of the node's mounts, by the file that it has locked.
fn supervisor_of(node: &Node) -> Result<u32> {
    let dir = node.data_dir().join("lazy/supervisor");
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let parts: Vec<&str> = line.split('\0').collect();
        if parts.len() > 1 && parts[0].ends_with("pantala-supervisor") && Path::new(parts[1]) == dir
        {
            return Ok(pid);
        }
    }
    anyhow::bail!("no supervisor serves {}", dir.display())
}

async fn every_file(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, IMAGE_MB, 2)?;
    let cluster = cluster(stage, &tree, 1, "background_fill = false").await?;
    let (node, at) = (&cluster.nodes[0], MountPoint::new(&stage.rig)?);
    mount(node, &at.0).await?;
    let sent = cluster.proxy.bytes(Target::Blob);
    ensure!(
        sent < tree.bytes() / 10,
        "the mount alone made the registry send {sent} of {} bytes",
        tree.bytes()
    );
    tree.verify(&at.0, 3, stage.seed).await.context("cold")?;
    tree.verify(&at.0, 1, stage.seed).await.context("warm")?;
    let cold = summary(node).await?;
    unmount(node, &at.0).await?;
    ensure!(fs::read_dir(&at.0)?.next().is_none(), "still mounted");
    mount(node, &at.0).await?;
    tree.verify(&at.0, 1, stage.seed)
        .await
        .context("mounted again")?;
    unmount(node, &at.0).await?;
    println!("          {} MB; {cold}", tree.bytes() / 1_000_000);
    Ok(Outcome::Passed)
}

async fn killed(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, IMAGE_MB, 1)?;
    let mut cluster = cluster(stage, &tree, 1, "background_fill = false").await?;
    let at = MountPoint::new(&stage.rig)?;
    mount(&cluster.nodes[0], &at.0).await?;
    let supervisor = supervisor_of(&cluster.nodes[0])?;
    // So that data is missing until after the last kill.
    cluster.proxy.set_rules(vec![Rule::always(
        Target::Blob,
        Fault::Slow(REGISTRY_BYTES_PER_S),
    )]);
    let mut readers = Vec::new();
    for number in 0..3 {
        readers.push(start(tree.reader(&at.0, stage.seed + number)?)?);
        readers.push(start(
            tree.mapping_reader(&at.0, stage.seed + 10 + number)?,
        )?);
    }
    for number in 0..KILLS {
        let life = 100 + (stage.seed.rotate_left(number as u32 * 7) ^ number) % 900;
        tokio::time::sleep(Duration::from_millis(life)).await;
        let node = &mut cluster.nodes[0];
        // Every second end is one that the daemon is told of, as in an upgrade.
        match number % 2 {
            0 => node.kill(),
            _ => node.process().stop()?,
        }
        node.start_again().await?;
    }
    let told = summary(&cluster.nodes[0]).await?;
    ensure!(
        told["state"] == "lazy",
        "nothing was missing any more: {told}"
    );
    cluster.proxy.set_rules(Vec::new());
    for (number, reader) in readers.into_iter().enumerate() {
        let ended = end(reader, "a reader").await?;
        ensure!(
            ended.is_ok(),
            "reader {number} failed: {ended:?}\n{}",
            cluster.nodes[0].log_tail()
        );
    }
    ensure!(
        supervisor_of(&cluster.nodes[0])? == supervisor,
        "another supervisor than before"
    );
    tree.verify(&at.0, 1, stage.seed).await?;
    unmount(&cluster.nodes[0], &at.0).await?;
    Ok(Outcome::Passed)
}

async fn supervisor_killed(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, SMALL_MB, 1)?;
    let mut cluster = cluster(stage, &tree, 1, "background_fill = false").await?;
    let at = MountPoint::new(&stage.rig)?;
    mount(&cluster.nodes[0], &at.0).await?;
    let mut readers = Vec::new();
    for number in 0..4 {
        readers.push(start(tree.reader(&at.0, stage.seed + number)?)?);
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        if let Ok(supervisor) = supervisor_of(&cluster.nodes[0]) {
            signal_process(supervisor, Signal::KILL)?;
        }
    }
    let mut refused = 0;
    for reader in readers {
        let Err(why) = end(reader, "a reader").await? else {
            continue;
        };
        // A read that only the dead one knew of fails; none gets other bytes.
        ensure!(!why.contains("did NOT match"), "wrong bytes: {why}");
        ensure!(why.contains("could not be read"), "{why}");
        refused += 1;
    }
    println!("          readers with a read that failed: {refused} of 4");
    tree.verify(&at.0, 2, stage.seed).await?;
    // The one that took its place keeps as well.
    let other = supervisor_of(&cluster.nodes[0])?;
    cluster.nodes[0].kill();
    cluster.nodes[0].start_again().await?;
    ensure!(supervisor_of(&cluster.nodes[0])? == other, "yet another");
    tree.verify(&at.0, 1, stage.seed).await?;
    unmount(&cluster.nodes[0], &at.0).await?;
    Ok(Outcome::Passed)
}

async fn poisoned(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, SMALL_MB, 1)?;
    let mut cluster = cluster(stage, &tree, 1, "background_fill = false").await?;
    let at = MountPoint::new(&stage.rig)?;
    mount(&cluster.nodes[0], &at.0).await?;
    let supervisor = supervisor_of(&cluster.nodes[0])?;
    cluster.nodes[0].kill();
    signal_process(supervisor, Signal::KILL)?;
    cluster.nodes[0].start_again().await?;
    let told = summary(&cluster.nodes[0]).await?;
    ensure!(told["state"] == "poisoned", "the node says {told}");
    ensure!(fs::read_dir(&at.0)?.next().is_none(), "still mounted");
    let again = mount(&cluster.nodes[0], &at.0).await;
    ensure!(again.is_err(), "mounted over a poisoned mount");
    unmount(&cluster.nodes[0], &at.0).await?;
    mount(&cluster.nodes[0], &at.0).await?;
    tree.verify(&at.0, 1, stage.seed).await?;
    unmount(&cluster.nodes[0], &at.0).await?;
    Ok(Outcome::Passed)
}

async fn registry_lost(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, SMALL_MB, 1)?;
    let lines = format!("background_fill = false\nfill_timeout_ms = {FILL_TIMEOUT_MS}");
    let mut cluster = cluster(stage, &tree, 1, &lines).await?;
    let at = MountPoint::new(&stage.rig)?;
    mount(&cluster.nodes[0], &at.0).await?;
    cluster.proxy.refuse(true)?;
    // One file: a program that is read from its start.
    let mut read = std::process::Command::new("sha256sum");
    read.arg(at.0.join("usr/bin/tar"));
    let begun = Instant::now();
    let ended = end(start(read)?, "a read without registry").await?;
    let took = begun.elapsed();
    let why = ended
        .err()
        .context("a read without registry has ended well")?;
    ensure!(why.contains("Input/output error"), "{why}");
    // Read-ahead of the kernel may ask in parts, each of which has its time.
    let limit = Duration::from_millis(FILL_TIMEOUT_MS) * 4;
    ensure!(took < limit, "the error took {took:?}");
    cluster.proxy.refuse(false)?;
    tree.verify(&at.0, 1, stage.seed)
        .await
        .context("it is back")?;
    unmount(&cluster.nodes[0], &at.0).await?;
    println!("          EIO after {took:.1?}");
    Ok(Outcome::Passed)
}

/// Whether any file below `dir` holds `text`.
fn lies_in(dir: &Path, text: &str) -> Result<bool> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = match entry.file_type()? {
            kind if kind.is_dir() => lies_in(&entry.path(), text)?,
            kind if kind.is_file() && entry.metadata()?.len() < 1 << 20 => {
                let content = fs::read(entry.path())?;
                content
                    .windows(text.len())
                    .any(|part| part == text.as_bytes())
            }
            _ => false,
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn private(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, SMALL_MB, 1)?;
    let guarded = stage.registry(Guard::Basic).await?;
    guarded.registry.push(&tree.image, NAME).await?;
    let control = Control::start(&stage.rig.machine("control")?, &stage.programs.control).await?;
    let spec = NodeSpec::joining(&guarded.registry.url(), &control)
        .with("lazy", "background_fill = false");
    let machine = stage.rig.machine("node-0")?;
    let mut node = Node::start(&machine, &stage.programs.node, &spec).await?;
    let at = MountPoint::new(&stage.rig)?;
    ensure!(
        mount(&node, &at.0).await.is_err(),
        "mounted without a login"
    );
    let login = BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let auth_file = stage.rig.scratch("login")?.join("auth.json");
    let logins = serde_json::json!({"auths": {REGISTRY_NAME: {"auth": login}}});
    fs::write(&auth_file, logins.to_string())?;
    let image = format!("{REGISTRY_NAME}/{NAME}");
    let (at_text, file) = (at.0.display().to_string(), auth_file.display().to_string());
    tool(&node, "mount", &[&image, &at_text, "--auth-file", &file]).await?;
    node.kill();
    node.start_again().await?;
    tree.verify(&at.0, 1, stage.seed).await?;
    for text in [login.as_str(), PASSWORD] {
        ensure!(
            !lies_in(machine.dir(), text)?,
            "a credential lies on the disk"
        );
    }
    unmount(&node, &at.0).await?;
    Ok(Outcome::Passed)
}

async fn at_once(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, IMAGE_MB, 1)?;
    let cluster = cluster(stage, &tree, NODES, "background_fill = true").await?;
    let points: Vec<MountPoint> = (0..NODES)
        .map(|_| MountPoint::new(&stage.rig))
        .collect::<Result<_>>()?;
    let nodes = || cluster.nodes.iter().zip(&points);
    let work = nodes().map(|(node, at)| async {
        mount(node, &at.0).await?;
        tree.verify(&at.0, 1, stage.seed).await
    });
    try_join_all(work).await?;
    for (node, _) in nodes() {
        wait_complete(node).await?;
    }
    let ratio = cluster.proxy.bytes(Target::Blob) as f64 / tree.bytes() as f64;
    ensure!(
        ratio <= RATIO_MAX,
        "the registry sent {ratio:.4} x the image:\n      {}",
        cluster.proxy.repeated(20).join("\n      ")
    );
    for (node, at) in nodes() {
        unmount(node, &at.0).await?;
    }
    println!("          registry / image {ratio:.4}");
    Ok(Outcome::Passed)
}

async fn wait_complete(node: &Node) -> Result<()> {
    let begun = Instant::now();
    loop {
        let told = summary(node).await?;
        if told["state"] == "complete" {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < COMPLETE_MAX,
            "not complete within {COMPLETE_MAX:?}: {told}\n{}",
            node.log_tail()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn background(stage: &Stage) -> Result<Outcome> {
    if let Some(missed) = missed(stage) {
        return Ok(missed);
    }
    let tree = Tree::build(stage, SMALL_MB, 2)?;
    let mut cluster = cluster(stage, &tree, 1, "background_fill = true").await?;
    let at = MountPoint::new(&stage.rig)?;
    mount(&cluster.nodes[0], &at.0).await?;
    wait_complete(&cluster.nodes[0]).await?;
    // Marks are taken away within a second of the end.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let supervisor = supervisor_of(&cluster.nodes[0])?;
    cluster.nodes[0].kill();
    signal_process(supervisor, Signal::KILL)?;
    tree.verify(&at.0, 1, stage.seed).await.context("alone")?;
    cluster.nodes[0].start_again().await?;
    let told = summary(&cluster.nodes[0]).await?;
    ensure!(told["state"] == "complete", "the node says {told}");
    tree.verify(&at.0, 1, stage.seed).await?;
    unmount(&cluster.nodes[0], &at.0).await?;
    Ok(Outcome::Passed)
}
