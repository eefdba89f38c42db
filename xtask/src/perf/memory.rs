//! The memory of a node that serves a large blob to three peers and a client at full speed.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Options;
use super::figures::Figures;
use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::control::Control;
use crate::rig::image::{Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::registry::{Access, Registry};
use crate::rig::serving::{fetch_all, peak_while};

const NAME: &str = "perf/memory";
const PEERS: usize = 3;

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let image_spec = ImageSpec {
        bytes: options.size_bytes(),
        layers: 1,
        label: "memory".into(),
    };
    let image = Image::build(&rig.scratch("image")?, &image_spec)?;
    registry.push(&image, &format!("{NAME}:v1")).await?;
    image.forget_files()?;
    let blob = image.largest();
    let control = Control::start(&rig.machine("control")?, &programs.control).await?;
    let spec = NodeSpec::joining(&registry.url(), &control);
    let mut nodes = Vec::new();
    for number in 0..=PEERS {
        nodes.push(
            Node::start(
                &rig.machine(&format!("node-{number}"))?,
                &programs.node,
                &spec,
            )
            .await?,
        );
    }
    let (server, peers) = nodes.split_at(1);
    let server = &server[0];
    let idle = server.process_ref().memory()?.own_bytes();
    let start = Instant::now();
    let fetching = peak_while(server, fetch_all(NAME, blob, server, &[])).await?;
    let fetch_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let serving = peak_while(server, fetch_all(NAME, blob, server, peers)).await?;
    let serve_s = start.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = server.process_ref().memory()?.own_bytes();
    let status = server.status().await?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut figures = Figures::default();
    figures.set("idle_mib", mib(idle));
    figures.set("fetching_peak_mib", mib(fetching));
    figures.set("serving_peak_mib", mib(serving));
    figures.set("after_mib", mib(after));
    figures.set("fetch_s", fetch_s);
    figures.set("serve_s", serve_s);
    figures.set(
        "served_to_peers_mib",
        mib(status.totals.served_to_peers_bytes),
    );
    figures.note(format!(
        "a blob of {} MiB; VmRSS less RssFile, looked at every {} ms; the promise is less than 256 MiB",
        blob.bytes >> 20,
        crate::rig::serving::INTERVAL.as_millis()
    ));
    Ok(figures)
}
