//! The course of the demo: registry, control, nodes, and three acts of pulling.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Options;
use super::pull::{Names, Station};
use super::report::{Figures, FreePull};
use crate::cargo::Programs;
use crate::rig::control::Control;
use crate::rig::http;
use crate::rig::image::{Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::proxy::{RegistryProxy, Target};
use crate::rig::registry::{Access, Registry};
use crate::rig::status::NodeStatus;
use crate::rig::{Machine, Rig};

/// The repository and tag that is pulled.
const NAME: &str = "demo/image:v1";
/// Layers of the image.
const LAYERS: usize = 6;
/// Port of docker-registry behind the counting proxy.
const REGISTRY_BEHIND_PORT: u16 = 5001;
/// Port that the world sees.
const REGISTRY_PORT: u16 = 5000;
/// Blob bytes from the registry per byte of the image; above this the demo says which were repeated.
const RATIO_EXPECTED_MAX: f64 = 1.02;
/// Lines of that.
const REPEATED_SHOWN_MAX: usize = 30;
/// How often the bars move.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
/// How often a line is printed where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// Plays the demo and returns what it measured; an error where any pull was not verified.
pub(crate) async fn play(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let client = if rig.has_namespaces() {
        "containerd"
    } else {
        "skopeo"
    };
    if rig.has_namespaces() {
        println!("machines: network namespaces joined by veth; client: containerd");
    } else {
        println!("machines: addresses of 127.0.0.0/8, as this is not root; client: skopeo");
    }
    let registry_machine = rig.machine("registry")?;
    let registry =
        Registry::start_at(&registry_machine, Access::Plain, REGISTRY_BEHIND_PORT).await?;
    let counter = RegistryProxy::start(&registry_machine, REGISTRY_PORT, registry.address())?;
    println!(
        "making an image of {} MB from files of this machine",
        options.size
    );
    let spec = ImageSpec {
        bytes: options.image_bytes(),
        layers: LAYERS,
        label: "demo".into(),
    };
    let image = Image::build(&rig.scratch("image")?, &spec)?;
    if image.repeats_files {
        println!(
            "(this machine has fewer files than that: they stand in it several times, under different names)"
        );
    }
    registry.push(&image, NAME).await?;
    image.forget_files()?;
    println!(
        "registry at {}: {NAME}, {} layers, {:.1} MB",
        counter.address(),
        image.layers.len(),
        image.blob_bytes() as f64 / 1e6
    );

    let control = Control::start(&rig.machine("control")?, &programs.control).await?;
    println!("control at {}", control.address());
    let registry_url = counter.url();
    let node_spec = NodeSpec::joining(&registry_url, &control);
    let set_up = async |number: u32| -> Result<Station> {
        let machine: Machine = rig.machine(&format!("node-{number}"))?;
        let node = Node::start(&machine, &programs.node, &node_spec).await?;
        Station::set_up(node, rig.has_namespaces()).await
    };
    let mut stations = Vec::new();
    let mut names = Names::new();
    for number in 1..=options.nodes {
        let station = set_up(number).await?;
        names.insert(
            station.node.status().await?.node,
            station.node.name().to_owned(),
        );
        println!(
            "{} at {}",
            station.node.name(),
            station.node.machine().address()
        );
        stations.push(station);
    }
    let late_name = format!("node-{}", options.nodes + 1);

    println!("\nall {} nodes pull at the same time", options.nodes);
    counter.reset_count();
    let image_bytes = image.blob_bytes();
    let watched: Vec<(String, String)> = stations
        .iter()
        .map(|station| {
            (
                station.node.name().to_owned(),
                station.node.admin_url("/status"),
            )
        })
        .collect();
    let pulls = stations
        .iter_mut()
        .map(|station| station.pull(&registry_url, NAME, &image, &names));
    let nodes = watch(watched, image_bytes, try_join_all(pulls)).await?;
    let registry_blob_bytes = counter.bytes(Target::Blob);
    let registry_manifest_bytes = counter.bytes(Target::Manifest);
    if registry_blob_bytes as f64 > RATIO_EXPECTED_MAX * image_bytes as f64 {
        println!("the registry sent more than it should have; asked for more than once:");
        for line in counter.repeated(REPEATED_SHOWN_MAX) {
            println!("  {line}");
        }
    }

    let first = &mut stations[0];
    println!(
        "{} forgets the image in {client} and pulls it again",
        first.node.name()
    );
    first.forget(NAME).await?;
    counter.reset_count();
    let pull = first.pull(&registry_url, NAME, &image, &names).await?;
    let local_hit = FreePull {
        pull,
        registry_blob_bytes: counter.bytes(Target::Blob),
        registry_manifest_bytes: counter.bytes(Target::Manifest),
    };

    println!("{late_name} joins late and pulls");
    let mut late = set_up(options.nodes + 1).await?;
    names.insert(late.node.status().await?.node, late_name);
    counter.reset_count();
    let watched = vec![(late.node.name().to_owned(), late.node.admin_url("/status"))];
    let pull = late.pull(&registry_url, NAME, &image, &names);
    let pull = watch(watched, image_bytes, pull).await?;
    let late = FreePull {
        pull,
        registry_blob_bytes: counter.bytes(Target::Blob),
        registry_manifest_bytes: counter.bytes(Target::Manifest),
    };
    ensure!(image_bytes > 0, "the image is empty");
    Ok(Figures {
        registry_ratio: registry_blob_bytes as f64 / image_bytes as f64,
        image_bytes,
        registry_blob_bytes,
        registry_manifest_bytes,
        client,
        nodes,
        local_hit,
        late,
    })
}

/// Shows how far the nodes (name, URL of `/status`) are until `work` is done.
async fn watch<T>(
    nodes: Vec<(String, String)>,
    image_bytes: u64,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let terminal = std::io::stderr().is_terminal();
    let bars = MultiProgress::new();
    let style = ProgressStyle::with_template(
        "  {prefix:<8} [{bar:36}] {bytes:>10} {binary_bytes_per_sec:>12}  {msg}",
    )
    .context("the template of the bars")?
    .progress_chars("=> ");
    let shown: Vec<(String, String, ProgressBar)> = nodes
        .into_iter()
        .map(|(name, url)| {
            let bar = ProgressBar::new(image_bytes)
                .with_style(style.clone())
                .with_prefix(name.clone());
            (name, url, if terminal { bars.add(bar) } else { bar })
        })
        .collect();
    let show = async {
        let mut line_at = Instant::now() + LINE_INTERVAL;
        loop {
            tokio::time::sleep(BAR_INTERVAL).await;
            let print = !terminal && Instant::now() >= line_at;
            for (name, url, bar) in &shown {
                let Ok(text) = http::get_text(url).await else {
                    continue;
                };
                let Ok(status) = NodeStatus::parse(&text) else {
                    continue;
                };
                let held: u64 = status.tasks.iter().map(|task| task.held_bytes).sum();
                let origin = format!(
                    "registry {:.0} MB, peers {:.0} MB",
                    status.totals.from_registry_bytes as f64 / 1e6,
                    status.totals.from_peer_bytes as f64 / 1e6
                );
                if print {
                    println!(
                        "  {name}: {:.0} of {:.0} MB; {origin}",
                        held as f64 / 1e6,
                        image_bytes as f64 / 1e6
                    );
                }
                bar.set_position(held);
                bar.set_message(origin);
            }
            if print {
                line_at = Instant::now() + LINE_INTERVAL;
            }
        }
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = show => unreachable!("showing progress has no end"),
    };
    for (_, _, bar) in &shown {
        bar.abandon();
    }
    outcome
}
