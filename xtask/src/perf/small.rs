//! Random ranges of 64 KiB, as a lazy mount reads them.
//!
//! First from peer to peer, by Pantala's QUIC on either driver and by quinn: a request a stream. Then
//! through whole nodes, over HTTP: ranges that the node holds, and ranges that only a peer of it holds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::Keep;
use super::figures::Figures;
use super::plot::{Bar, Chart, Group};
use super::transfer::network::{Network, NetworkKind};
use super::transfer::side::{Latencies, Pair, Setup};
use super::transfer::{Files, Pin, Stack};
use crate::cargo::{Programs, release_program};
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::control::Control;
use crate::rig::http;
use crate::rig::image::{BlobFile, Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::process::run_to_end;
use crate::rig::registry::{Access, Registry};

/// Bytes of each range.
const RANGE_BYTES: u32 = 64 << 10;
/// Requests at a time, and how many of them in all.
const OUTSTANDING: [(u32, u64); 3] = [(1, 2_000), (8, 6_000), (64, 12_000)];
/// Requests at a time for ranges that the node does not hold.
const COLD_CLIENTS: [u32; 2] = [1, 8];
/// Ranges asked of a node that holds nothing: far apart, so that each is cold.
const COLD_REQUESTS: u64 = 200;
const NAME: &str = "perf/small";
const ANSWER_MAX: Duration = Duration::from_secs(300);

/// Options of `cargo xtask perf small`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures everything; one more warms up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// Size of the file and blob in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=65_536))]
    size: u64,
    /// Network of the peer to peer part
    #[arg(long, value_enum, default_value_t = NetworkKind::Loopback1452)]
    network: NetworkKind,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::value_variants().to_vec())]
    parts: Vec<Part>,
    #[command(flatten)]
    pub(super) keep: Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From peer to peer
    Peers,
    /// Through whole nodes
    Nodes,
}

impl Options {
    /// Whether whole nodes are measured, which are built for it.
    pub(super) fn needs_nodes(&self) -> bool {
        self.parts.contains(&Part::Nodes)
    }

    pub(super) fn space_bytes(&self) -> u64 {
        // The file twice; the blob in the layout, the registry, a node and a cold node.
        (6 * self.size) << 20
    }
}

/// Latencies and other figures, by what was measured.
type Samples = BTreeMap<String, Vec<(Latencies, f64)>>;

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut samples = Samples::new();
    if options.parts.contains(&Part::Peers) {
        peers(rig, options, &mut figures, &mut samples).await?;
    }
    report(&mut figures, &samples, "cpu_us_per_request");
    if options.needs_nodes() {
        let (mut hits, mut colds) = (Samples::new(), Samples::new());
        nodes(rig, programs, options, &mut hits, &mut colds).await?;
        report(&mut figures, &hits, "client_cpu_us_per_request");
        report(&mut figures, &colds, "fetched_bytes_per_range");
        samples.extend(hits);
        samples.extend(colds);
    }
    figures.chart("p50", chart(&samples));
    figures.note(format!(
        "random ranges of {} KiB of {} MiB in the page cache; {} rounds in turn after one that warms up; hit: the node holds the blob; cold: only its peer does, each range asked once, {} of them",
        RANGE_BYTES >> 10,
        options.size,
        options.rounds,
        COLD_REQUESTS
    ));
    Ok(figures)
}

async fn peers(
    rig: &Rig,
    options: &Options,
    figures: &mut Figures,
    samples: &mut Samples,
) -> Result<()> {
    ensure!(
        rig.has_namespaces(),
        "perf small makes a network of its own, which takes root"
    );
    let files = Files::create(rig, options.size << 20).await?;
    let network = Network::create(rig, options.network)?;
    let mut pairs = Vec::new();
    for stack in [Stack::Ring, Stack::Tokio, Stack::Quinn] {
        let setup = Setup {
            network: &network,
            stack,
            files: &files,
            streams: 1,
            pin: Pin::Sides,
        };
        match Pair::start(&setup).await {
            Ok(pair) => pairs.push(pair),
            Err(error) => figures.fail(format!("{}: {error:#}", stack.name())),
        }
    }
    for round in 0..=options.rounds {
        for (outstanding, requests) in OUTSTANDING {
            let count = pairs.len().max(1);
            for step in 0..count {
                let Some(pair) = pairs.get_mut((step + round as usize) % count) else {
                    continue;
                };
                let sample = pair
                    .small(outstanding, requests, RANGE_BYTES)
                    .await
                    .with_context(|| format!("{}, round {round}", pair.stack.name()))?;
                println!(
                    "round {round}  {:<8}{outstanding:>4} outstanding  {}",
                    pair.stack.name(),
                    shown(&sample.latencies)
                );
                if round > 0 {
                    let name = format!("small_{}_{outstanding}", pair.stack.name());
                    let cpu_us = sample.cpu_s * 1e6 / requests as f64;
                    samples
                        .entry(name)
                        .or_default()
                        .push((sample.latencies, cpu_us));
                }
            }
        }
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
struct Ranges {
    latencies: Latencies,
    cpu_s: f64,
}

async fn nodes(
    rig: &Rig,
    programs: &Programs,
    options: &Options,
    hits: &mut Samples,
    colds: &mut Samples,
) -> Result<()> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let image_spec = ImageSpec {
        bytes: options.size << 20,
        layers: 1,
        label: "small".into(),
    };
    let image = Image::build(&rig.scratch("image")?, &image_spec)?;
    registry.push(&image, &format!("{NAME}:v1")).await?;
    image.forget_files()?;
    let blob = image.largest();
    let control = Control::start(&rig.machine("control")?, &programs.control).await?;
    let spec = NodeSpec::joining(&registry.url(), &control);
    let holder = Node::start(&rig.machine("holder")?, &programs.node, &spec).await?;
    let url = format!("{}{}", holder.mirror_url(), path(blob));
    let download = http::download(&url, &[], ANSWER_MAX).await?;
    ensure!(download.is(&blob.digest), "{}", download.summary());
    for round in 0..=options.rounds {
        for (clients, requests) in OUTSTANDING {
            let sample = ranges(&holder, blob, clients, requests, round, false).await?;
            println!(
                "round {round}  hit {clients:>4} clients  {}",
                shown(&sample.latencies)
            );
            if round > 0 {
                let cpu_us = sample.cpu_s * 1e6 / requests as f64;
                let name = format!("small_node_hit_{clients}");
                hits.entry(name)
                    .or_default()
                    .push((sample.latencies, cpu_us));
            }
        }
        for clients in COLD_CLIENTS {
            let scene = rig.scene(&format!("cold-{round}-{clients}"))?;
            let cold = Node::start(&rig.machine("cold")?, &programs.node, &spec).await?;
            let sample = ranges(&cold, blob, clients, COLD_REQUESTS, round, true).await?;
            let totals = cold.status().await?.totals;
            let fetched = totals.from_peer_bytes + totals.from_registry_bytes;
            println!(
                "round {round}  cold{clients:>4} clients  {}  {} KiB a range ({} KiB from the registry)",
                shown(&sample.latencies),
                fetched / COLD_REQUESTS / 1024,
                totals.from_registry_bytes / COLD_REQUESTS / 1024,
            );
            if round > 0 {
                let name = format!("small_node_cold_{clients}");
                let each = fetched as f64 / COLD_REQUESTS as f64;
                colds
                    .entry(name)
                    .or_default()
                    .push((sample.latencies, each));
            }
            drop(cold);
            drop(scene);
        }
    }
    Ok(())
}

fn path(blob: &BlobFile) -> String {
    format!("/v2/{NAME}/blobs/{}?ns={REGISTRY_NAME}", blob.digest)
}

/// Asks `node` for ranges of `blob` from its own machine.
async fn ranges(
    node: &Node,
    blob: &BlobFile,
    clients: u32,
    requests: u64,
    seed: u32,
    apart: bool,
) -> Result<Ranges> {
    let mirror = node.mirror_url();
    let server: SocketAddr = mirror.trim_start_matches("http://").parse()?;
    let mut command = node.machine().command(release_program("pantala-perf"));
    command.args(["ranges", "--server", &server.to_string()]);
    command.args(["--path", &path(blob)]);
    command.args(["--bytes", &blob.bytes.to_string()]);
    command.args(["--requests", &requests.to_string()]);
    command.args(["--clients", &clients.to_string()]);
    command.args(["--seed", &(seed + 1).to_string()]);
    if apart {
        command.arg("--apart");
    }
    let finished = run_to_end(command, ANSWER_MAX)
        .await?
        .ok("asking for ranges")?;
    serde_json::from_str(finished.output.trim())
        .with_context(|| format!("{:?} is no answer", finished.output))
}

fn shown(latencies: &Latencies) -> String {
    format!(
        "{:>8.0} requests/s  p50 {:>8.3} ms  p99 {:>8.3} ms",
        latencies.requests_per_s, latencies.p50_ms, latencies.p99_ms
    )
}

/// The medians of `samples`; `other` names the figure beside the latencies.
fn report(figures: &mut Figures, samples: &Samples, other: &str) {
    for (name, rounds) in samples {
        let name = name.replace('-', "_");
        let mut set = |what: &str, of: &dyn Fn(&(Latencies, f64)) -> f64| {
            let values: Vec<f64> = rounds.iter().map(of).collect();
            figures.set_median(&format!("{name}_{what}"), &values);
        };
        set("requests_per_s", &|sample| sample.0.requests_per_s);
        set("p50_ms", &|sample| sample.0.p50_ms);
        set("p99_ms", &|sample| sample.0.p99_ms);
        set(other, &|sample| sample.1);
    }
}

fn chart(samples: &Samples) -> Chart {
    let bars = samples
        .iter()
        .map(|(name, rounds)| {
            let p50: Vec<f64> = rounds.iter().map(|sample| sample.0.p50_ms).collect();
            Bar {
                name: name.trim_start_matches("small_").replace('_', " "),
                values: vec![super::figures::median(&p50)],
            }
        })
        .collect();
    Chart {
        title: "Random ranges of 64 KiB".into(),
        unit: "median latency in ms, by requests at a time; less is better".into(),
        parts: Vec::new(),
        groups: vec![Group {
            name: String::new(),
            bars,
        }],
    }
}
