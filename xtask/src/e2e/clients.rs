//! The matrix: real clients, each against a registry that is open, has TLS, a password, or tokens.
//!
//! In each field of it two nodes pull one after the other, so the second proves that authorisation
//! works when the bytes come from a peer.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::stage::{Guard, GuardedRegistry, NAME, PULL_MAX};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::{Containerd, Route};
use crate::rig::control::Control;
use crate::rig::image::Image;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::nydus::{self, Mode, NydusImage};
use crate::rig::podman::Podman;
use crate::rig::skopeo;
use crate::rig::token_server::TokenServer;

/// Size of the image of the matrix: several pieces in each layer, and quickly pulled.
const IMAGE_MB: u64 = 24;

/// A test for each guard.
macro_rules! for_each_guard {
    ($client:literal, $body:path) => {
        [
            test!(concat!("clients: ", $client, ", plain registry"), |stage| {
                $body(stage, Guard::Plain)
            }),
            test!(
                concat!("clients: ", $client, ", registry with TLS"),
                |stage| $body(stage, Guard::Tls)
            ),
            test!(
                concat!("clients: ", $client, ", registry with a password"),
                |stage| $body(stage, Guard::Basic)
            ),
            test!(
                concat!("clients: ", $client, ", registry with tokens"),
                |stage| $body(stage, Guard::Token)
            ),
        ]
    };
}

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(for_each_guard!("containerd", containerd));
    tests.extend(for_each_guard!("skopeo", skopeo_copy));
    tests.extend(for_each_guard!("podman", podman));
    tests.extend(for_each_guard!("nydusd with a mirror", nydusd_mirror));
    tests.extend(for_each_guard!("nydusd with a proxy", nydusd_proxy));
    tests
}

/// A guarded registry with an image, control, and two nodes.
struct Field {
    guarded: GuardedRegistry,
    nodes: [Node; 2],
    _control: Control,
}

impl Field {
    async fn set_up(stage: &Stage, guard: Guard, image: Option<&Image>) -> Result<Self> {
        let guarded = stage.registry(guard).await?;
        if let Some(image) = image {
            guarded.registry.push(image, NAME).await?;
        }
        let control =
            Control::start(&stage.rig.machine("control")?, &stage.programs.control).await?;
        let spec = NodeSpec {
            ca_file: guarded.registry.ca_file.clone(),
            // nydusd sends everything through its proxy, its requests for tokens too.
            also_allowed: guarded.tokens.iter().map(TokenServer::url).collect(),
            ..NodeSpec::joining(&guarded.registry.url(), &control)
        };
        let start =
            async |name| Node::start(&stage.rig.machine(name)?, &stage.programs.node, &spec).await;
        Ok(Self {
            nodes: [start("node-0").await?, start("node-1").await?],
            guarded,
            _control: control,
        })
    }

    fn login(&self) -> Option<&str> {
        self.guarded.login.as_deref()
    }

    /// Checks that the bytes came from where they should: the registry, then the peer.
    async fn check_origins(&self) -> Result<()> {
        let first = self.nodes[0].status().await?;
        let second = self.nodes[1].status().await?;
        ensure!(
            first.totals.from_registry_bytes > 0,
            "the first pull took nothing from the registry, so it went past Pantala: {:?}",
            first.totals
        );
        ensure!(
            second.totals.from_registry_bytes == 0 && second.totals.from_peer_bytes > 0,
            "the second pull should have come from the peer alone: {:?}",
            second.totals
        );
        Ok(())
    }
}

async fn containerd(stage: &Stage, guard: Guard) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let image = stage.image(IMAGE_MB)?;
    let field = Field::set_up(stage, guard, Some(&image)).await?;
    for node in &field.nodes {
        let daemon = Containerd::start(node.machine()).await?;
        let route = Route {
            registry: field.guarded.registry.url(),
            ca_file: field.guarded.registry.ca_file.clone(),
            mirror: Some(node.mirror_url()),
            login: field.guarded.login.clone(),
        };
        daemon
            .pull(NAME, &route, PULL_MAX)
            .await?
            .ok("ctr images pull")?;
        daemon.verify(&image)?;
        daemon.run(NAME, "hello-from-the-swarm").await?;
    }
    field.check_origins().await?;
    Ok(Outcome::Passed)
}

async fn skopeo_copy(stage: &Stage, guard: Guard) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let field = Field::set_up(stage, guard, Some(&image)).await?;
    let registry = field.guarded.registry.url();
    for node in &field.nodes {
        let to = node.machine().dir().join("copy");
        let mirror = node.mirror_url();
        skopeo::copy(
            node.machine(),
            &registry,
            Some(&mirror),
            NAME,
            field.login(),
            &to,
            PULL_MAX,
        )
        .await?
        .ok("skopeo copy")?;
        skopeo::verify(&image, &to)?;
    }
    field.check_origins().await?;
    Ok(Outcome::Passed)
}

async fn podman(stage: &Stage, guard: Guard) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed(
            "podman with a storage of its own needs root".into(),
        ));
    }
    let image = stage.image(IMAGE_MB)?;
    let field = Field::set_up(stage, guard, Some(&image)).await?;
    let registry = field.guarded.registry.url();
    for node in &field.nodes {
        let podman = Podman::new(node.machine());
        let mirror = node.mirror_url();
        // podman checks every blob against the manifest itself, and the manifest against its digest.
        let (_, digest) = podman
            .pull(&registry, &mirror, NAME, field.login(), PULL_MAX)
            .await?;
        ensure!(
            digest == image.manifest.digest,
            "podman pulled {digest}, pushed was {}",
            image.manifest.digest
        );
    }
    field.check_origins().await?;
    Ok(Outcome::Passed)
}

async fn nydusd_mirror(stage: &Stage, guard: Guard) -> Result<Outcome> {
    nydusd(stage, guard, Mode::Mirror).await
}

async fn nydusd_proxy(stage: &Stage, guard: Guard) -> Result<Outcome> {
    nydusd(stage, guard, Mode::Proxy).await
}

async fn nydusd(stage: &Stage, guard: Guard, mode: Mode) -> Result<Outcome> {
    let programs = match nydus::find() {
        Ok(programs) => programs,
        Err(why) => return Ok(Outcome::Missed(why)),
    };
    if !stage.rig.has_namespaces() || !Path::new("/dev/fuse").exists() {
        return Ok(Outcome::Missed("nydusd needs root and /dev/fuse".into()));
    }
    let field = Field::set_up(stage, guard, None).await?;
    let dir = stage.rig.scratch("nydus")?;
    let source = dir.join("source");
    nydus::gather_source(&source, IMAGE_MB * 1_000_000)?;
    let maker = stage.rig.machine("maker")?;
    let image = NydusImage::convert(&programs, &maker, &source, &dir).await?;
    let repository = "test/nydus";
    image
        .push(&field.guarded.registry, repository)
        .await
        .context("uploading the nydus blob")?;
    for node in &field.nodes {
        image
            .mount_and_compare(
                node.machine(),
                &field.guarded.registry.url(),
                repository,
                &node.mirror_url(),
                mode,
                field.login(),
            )
            .await?;
    }
    field.check_origins().await?;
    Ok(Outcome::Passed)
}
