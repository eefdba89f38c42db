//! Private images: a blob on the disk of a node is served only to whom the registry serves it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::stage::{BOB, BOB_PASSWORD, Guard, PULL_MAX, get};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::{Containerd, REGISTRY_NAME, Route};
use crate::rig::control::Control;
use crate::rig::http;
use crate::rig::image::Image;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::registry::{PASSWORD, USER};
use crate::rig::token_server::TokenServer;

const IMAGE_MB: u64 = 24;
/// Only alice may read this.
const PRIVATE: &str = "private/image";
/// Alice and bob may read this.
const PUBLIC: &str = "public/image";

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "private images: two clients of different rights share one node",
            two_clients
        ),
        test!(
            "private images: containerd of another user is refused what lies on the disk",
            containerd
        ),
        test!(
            "private images: a wrong password is refused, and credentials stay nowhere",
            password
        ),
    ]
}

/// A token for `user` to pull `repository`, as a client gets it.
async fn token(
    tokens: &TokenServer,
    user: &str,
    password: &str,
    repository: &str,
) -> Result<String> {
    let url = format!(
        "{}?service=rig-registry&scope=repository:{repository}:pull",
        tokens.realm()
    );
    let basic = format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{user}:{password}"))
    );
    let download = http::client()?
        .get(&url)
        .header("authorization", basic)
        .send()
        .await?;
    let answer: serde_json::Value = serde_json::from_str(&download.text().await?)?;
    let token = answer["token"]
        .as_str()
        .context("the token server gave no token")?;
    Ok(format!("Bearer {token}"))
}

async fn two_clients(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let guarded = stage.registry(Guard::Token).await?;
    let tokens = guarded
        .tokens
        .as_ref()
        .context("tokens guard this registry")?;
    guarded
        .registry
        .push(&image, &format!("{PRIVATE}:v1"))
        .await?;
    let control = Control::start(&stage.rig.machine("control")?, &stage.programs.control).await?;
    let spec = NodeSpec::joining(&guarded.registry.url(), &control);
    let holder = Node::start(&stage.rig.machine("node-0")?, &stage.programs.node, &spec).await?;
    let empty = Node::start(&stage.rig.machine("node-1")?, &stage.programs.node, &spec).await?;
    let digest = &image.largest().digest;
    let alice = token(tokens, USER, PASSWORD, PRIVATE).await?;
    let bob = token(tokens, BOB, BOB_PASSWORD, PRIVATE).await?;

    let download = get(
        &holder,
        PRIVATE,
        digest,
        &[("authorization", &alice)],
        PULL_MAX,
    )
    .await?;
    ensure!(
        download.is(digest),
        "alice may read it: {}",
        download.summary()
    );
    // The blob is on the disk of one node and a peer away from the other: neither is a reason.
    for node in [&holder, &empty] {
        let name = node.name();
        for (who, headers) in [
            ("bob", vec![("authorization", bob.as_str())]),
            ("nobody", Vec::new()),
        ] {
            let download = get(node, PRIVATE, digest, &headers, PULL_MAX).await?;
            let what = download.summary();
            ensure!(
                [401, 403].contains(&download.status),
                "{name} let {who} in: {what}"
            );
            ensure!(
                download.headers.contains_key("www-authenticate"),
                "{name} does not pass on where {who} could get a token: {what}"
            );
            let range = [headers.clone(), vec![("range", "bytes=0-99")]].concat();
            let download = get(node, PRIVATE, digest, &range, PULL_MAX).await?;
            ensure!(
                [401, 403].contains(&download.status),
                "{name} let {who} in for a range"
            );
        }
        // A made-up repository in the path is no way around.
        let download = get(node, PUBLIC, digest, &[("authorization", &bob)], PULL_MAX).await?;
        ensure!(
            download.status >= 400,
            "{name} served a blob through a repository that does not have it: {}",
            download.summary()
        );
    }
    // Alice is still served after all that, from the disk and from the peer.
    for node in [&holder, &empty] {
        let download = get(
            node,
            PRIVATE,
            digest,
            &[("authorization", &alice)],
            PULL_MAX,
        )
        .await?;
        ensure!(
            download.is(digest),
            "{}: {}",
            node.name(),
            download.summary()
        );
    }
    // Once the registry has it in a repository that bob may read, he gets it, from the disk.
    guarded
        .registry
        .push(&image, &format!("{PUBLIC}:v1"))
        .await?;
    let bob = token(tokens, BOB, BOB_PASSWORD, PUBLIC).await?;
    let download = get(
        &holder,
        PUBLIC,
        digest,
        &[("authorization", &bob)],
        PULL_MAX,
    )
    .await?;
    ensure!(
        download.is(digest),
        "bob may read public/: {}",
        download.summary()
    );
    nothing_secret_is_kept(
        &[&holder, &empty],
        &[PASSWORD, BOB_PASSWORD, &alice[7..], &bob[7..]],
    )?;
    Ok(Outcome::Passed)
}

async fn containerd(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let image = stage.image(IMAGE_MB)?;
    let guarded = stage.registry(Guard::Token).await?;
    let name = format!("{PRIVATE}:v1");
    guarded.registry.push(&image, &name).await?;
    let spec = NodeSpec {
        registry: guarded.registry.url(),
        ..NodeSpec::default()
    };
    let node = Node::start(&stage.rig.machine("node")?, &stage.programs.node, &spec).await?;
    let pull = async |user: &str, password: &str| -> Result<bool> {
        // Each user has a containerd of their own; they share the node.
        let machine = stage.rig.machine(user)?;
        let daemon = Containerd::start(&machine).await?;
        let route = Route {
            registry: guarded.registry.url(),
            ca_file: None,
            mirror: Some(node.mirror_url()),
            login: Some(format!("{user}:{password}")),
        };
        let finished = daemon.pull(&name, &route, PULL_MAX).await?;
        if finished.success {
            daemon.verify(&image as &Image)?;
        }
        Ok(finished.success)
    };
    ensure!(
        pull(USER, PASSWORD).await?,
        "alice's containerd must be able to pull"
    );
    ensure!(!pull(BOB, BOB_PASSWORD).await?, "bob's containerd must not");
    ensure!(
        pull(USER, PASSWORD).await?,
        "alice's containerd must still be able to"
    );
    Ok(Outcome::Passed)
}

async fn password(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let guarded = stage.registry(Guard::Basic).await?;
    guarded
        .registry
        .push(&image, &format!("{PRIVATE}:v1"))
        .await?;
    let spec = NodeSpec {
        registry: guarded.registry.url(),
        ..NodeSpec::default()
    }
    .with("log", "format = \"json\"");
    let node = Node::start(&stage.rig.machine("node")?, &stage.programs.node, &spec).await?;
    let digest = &image.largest().digest;
    let basic = |password: &str| {
        format!(
            "Basic {}",
            BASE64_STANDARD.encode(format!("{USER}:{password}"))
        )
    };
    let right = basic(PASSWORD);
    let wrong = basic("looking-glass");
    let download = get(
        &node,
        PRIVATE,
        digest,
        &[("authorization", &right)],
        PULL_MAX,
    )
    .await?;
    ensure!(
        download.is(digest),
        "the right password: {}",
        download.summary()
    );
    let download = get(
        &node,
        PRIVATE,
        digest,
        &[("authorization", &wrong)],
        PULL_MAX,
    )
    .await?;
    ensure!(
        download.status == 401,
        "a wrong password: {}",
        download.summary()
    );
    let download = get(&node, PRIVATE, digest, &[], PULL_MAX).await?;
    ensure!(
        download.status == 401,
        "no password: {}",
        download.summary()
    );
    let manifest = format!(
        "{}/v2/{PRIVATE}/manifests/{}?ns={REGISTRY_NAME}",
        node.mirror_url(),
        image.manifest.digest
    );
    let accept = ("accept", "application/vnd.oci.image.manifest.v1+json");
    let download =
        http::download(&manifest, &[("authorization", &right), accept], PULL_MAX).await?;
    ensure!(
        download.status == 200,
        "the manifest: {}",
        download.summary()
    );
    let download = http::download(&manifest, &[accept], PULL_MAX).await?;
    ensure!(
        download.status == 401,
        "a cached manifest without password: {}",
        download.summary()
    );
    nothing_secret_is_kept(&[&node], &[PASSWORD, &right[6..], &wrong[6..]])?;
    Ok(Outcome::Passed)
}

/// Neither logs nor files of the nodes hold any of `secrets`.
fn nothing_secret_is_kept(nodes: &[&Node], secrets: &[&str]) -> Result<()> {
    for node in nodes {
        let mut dirs = vec![node.machine().dir().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir)?.flatten() {
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    dirs.push(entry.path());
                } else if kind.is_file() {
                    search(&entry.path(), secrets)?;
                }
            }
        }
    }
    Ok(())
}

fn search(file: &Path, secrets: &[&str]) -> Result<()> {
    let content = std::fs::read(file)?;
    for secret in secrets {
        let found = content
            .windows(secret.len())
            .any(|window| window == secret.as_bytes());
        ensure!(!found, "{} holds a credential", file.display());
    }
    Ok(())
}
