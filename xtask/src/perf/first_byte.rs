//! How much later a cold pull's first byte comes through Pantala than from the registry itself.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Options;
use super::figures::Figures;
use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::http;
use crate::rig::image::{Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::registry::{Access, Registry};

/// Pulls before the first that counts: processes, connections and memory are cold no more.
pub(super) const WARM_UP_ROUNDS: u32 = 3;
const NAME: &str = "perf/first-byte";
const PULL_MAX: Duration = Duration::from_secs(120);

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let spec = NodeSpec {
        registry: registry.url(),
        ..NodeSpec::default()
    };
    let node = Node::start(&rig.machine("node")?, &programs.node, &spec).await?;
    let mut direct_ms = Vec::new();
    let mut through_ms = Vec::new();
    let (mut added_ms, mut added_total_ms) = (Vec::new(), Vec::new());
    let (mut direct_total_ms, mut through_total_ms) = (Vec::new(), Vec::new());
    for round in 0..options.rounds + WARM_UP_ROUNDS {
        // A blob that the node has never seen, in each round.
        let image_spec = ImageSpec {
            bytes: options.size_bytes(),
            layers: 1,
            label: format!("first byte, round {round}"),
        };
        let image = Image::build(&rig.scratch("image")?, &image_spec)?;
        registry.push(&image, &format!("{NAME}:r{round}")).await?;
        let digest = &image.largest().digest;
        let path = format!("/v2/{NAME}/blobs/{digest}");
        let direct_url = format!("{}{path}", registry.url());
        let through_url = format!("{}{path}?ns={REGISTRY_NAME}", node.mirror_url());
        // The registry's page cache is warm for both.
        ensure!(
            http::download(&direct_url, &[], PULL_MAX).await?.is(digest),
            "not the blob"
        );
        let (direct, through) = if round % 2 == 0 {
            let direct = http::download(&direct_url, &[], PULL_MAX).await?;
            (direct, http::download(&through_url, &[], PULL_MAX).await?)
        } else {
            let through = http::download(&through_url, &[], PULL_MAX).await?;
            (http::download(&direct_url, &[], PULL_MAX).await?, through)
        };
        ensure!(
            direct.is(digest) && through.is(digest),
            "round {round}: {}",
            through.summary()
        );
        image.forget_files()?;
        if round < WARM_UP_ROUNDS {
            continue;
        }
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        direct_ms.push(ms(direct.first_byte));
        through_ms.push(ms(through.first_byte));
        added_ms.push(ms(through.first_byte) - ms(direct.first_byte));
        added_total_ms.push(ms(through.took) - ms(direct.took));
        direct_total_ms.push(ms(direct.took));
        through_total_ms.push(ms(through.took));
    }
    let mut figures = Figures::default();
    let direct = figures.set_median("registry_first_byte_ms", &direct_ms);
    let through = figures.set_median("pantala_first_byte_ms", &through_ms);
    figures.set_median("first_byte_added_ms", &added_ms);
    figures.set("first_byte_ratio", through / direct);
    let direct = figures.set_median("registry_whole_blob_ms", &direct_total_ms);
    let through = figures.set_median("pantala_whole_blob_ms", &through_total_ms);
    figures.set_median("whole_blob_added_ms", &added_total_ms);
    figures.set("whole_blob_ratio", through / direct);
    figures.note(format!(
        "cold pulls of {} MiB blobs from docker-registry, a new connection each, in turn, of which the node has seen neither blob nor manifest; {WARM_UP_ROUNDS} rounds of warm-up; a round's added time is its pull through the node less its pull straight from the registry",
        options.size_bytes() >> 20
    ));
    Ok(figures)
}
