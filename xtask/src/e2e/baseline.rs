//! The rig itself: clients pull straight from each kind of registry. When these fail, no other test
//! says anything about Pantala.

use anyhow::{Result, ensure};

use super::stage::{Guard, NAME, PULL_MAX};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::{Containerd, Route};
use crate::rig::proxy::{RegistryProxy, Target};
use crate::rig::skopeo;

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!("baseline: containerd pulls past Pantala", containerd),
        test!(
            "baseline: skopeo pulls past Pantala, and every byte is counted",
            counted
        ),
    ]
}

async fn containerd(stage: &Stage) -> Result<Outcome> {
    if !stage.rig.has_namespaces() {
        return Ok(Outcome::Missed("containerd needs root".into()));
    }
    let image = stage.image(20)?;
    let machine = stage.rig.machine("client")?;
    let daemon = Containerd::start(&machine).await?;
    for guard in [Guard::Plain, Guard::Tls, Guard::Basic, Guard::Token] {
        let guarded = stage.registry(guard).await?;
        guarded.registry.push(&image, NAME).await?;
        let route = Route {
            registry: guarded.registry.url(),
            ca_file: guarded.registry.ca_file.clone(),
            mirror: None,
            login: guarded.login.clone(),
        };
        daemon
            .pull(NAME, &route, PULL_MAX)
            .await?
            .ok(&format!("{guard:?}: ctr images pull"))?;
        daemon.verify(&image)?;
        daemon.run(NAME, "hello").await?;
        daemon.remove(NAME).await?;
        if let Some(tokens) = &guarded.tokens {
            ensure!(tokens.issued() > 1, "the token server has not been asked");
        }
    }
    Ok(Outcome::Passed)
}

async fn counted(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(20)?;
    let guarded = stage.registry(Guard::Plain).await?;
    guarded.registry.push(&image, NAME).await?;
    let front = stage.rig.machine("front")?;
    let proxy = RegistryProxy::start(&front, 5000, guarded.registry.address())?;
    let client = stage.rig.machine("client")?;
    let to = client.dir().join("copy");
    skopeo::copy(&client, &proxy.url(), None, NAME, None, &to, PULL_MAX)
        .await?
        .ok("skopeo copy")?;
    skopeo::verify(&image, &to)?;
    let counted = proxy.bytes(Target::Blob);
    ensure!(
        counted == image.blob_bytes(),
        "the proxy counted {counted} bytes of blobs, the image has {}",
        image.blob_bytes()
    );
    ensure!(
        proxy.bytes(Target::Manifest) >= image.manifest.bytes,
        "the manifest was not counted"
    );
    Ok(Outcome::Passed)
}
