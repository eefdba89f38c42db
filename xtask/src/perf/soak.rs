//! A node under the load of 64 peers that want everything at once.
//!
//! The node is a real one, with a blob in its store; its peers are members of its cluster that speak the
//! peer protocol, all in one process (`pantala-perf soak`).

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;
use serde::Deserialize;

use super::figures::{Figures, median};
use super::led::Led;
use super::{Keep, transfer::Pin};
use crate::cargo::{Programs, release_program};
use crate::rig::Rig;
use crate::rig::control::Control;
use crate::rig::http;
use crate::rig::image::{Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::registry::{Access, Registry};

const NAME: &str = "perf/soak";
/// Pause between two looks at the node's memory.
const INTERVAL: Duration = Duration::from_secs(1);
/// Memory is compared between the end of the first minute, or fifth, and the end.
const SETTLED: Duration = Duration::from_secs(60);
/// Looks of which the median is taken at both.
const LOOKS: usize = 5;
const FETCH_MAX: Duration = Duration::from_secs(600);
/// The last requests end after the time is up.
const END_MAX: Duration = Duration::from_secs(120);

/// Options of `cargo xtask perf soak`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// How long
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..=86_400))]
    duration: u64,
    /// How many peers
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=250))]
    peers: u32,
    /// Requests of 1 MiB that each peer has outstanding
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    outstanding: u32,
    /// Size of the blob in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: u64,
    /// `driver` of the node's `[peer]` table [default: the node's own]
    #[arg(long)]
    driver: Option<String>,
    /// Which processors the node and the load may use
    #[arg(long, value_enum, default_value_t = Pin::None)]
    pin: Pin,
    #[command(flatten)]
    pub(super) keep: Keep,
}

impl Options {
    pub(super) fn space_bytes(&self) -> u64 {
        (3 * self.size) << 20
    }
}

#[derive(Debug, Deserialize)]
struct Ready {
    ready: u32,
}

#[derive(Debug, Deserialize)]
struct Seen {
    seconds: f64,
    bytes: u64,
    pieces: u64,
    hashed: u64,
    busy: u64,
    errors: u64,
    stall_max_ms: f64,
    wait_max_ms: f64,
    peer_bytes_min: u64,
    peer_bytes_max: u64,
}

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let image_spec = ImageSpec {
        bytes: options.size << 20,
        layers: 1,
        label: "soak".into(),
    };
    let image = Image::build(&rig.scratch("image")?, &image_spec)?;
    registry.push(&image, &format!("{NAME}:v1")).await?;
    image.forget_files()?;
    let blob = image.largest();
    let control_machine = rig.machine("control")?;
    let control = Control::start(&control_machine, &programs.control).await?;
    let mut spec = NodeSpec::joining(&registry.url(), &control);
    if let Some(driver) = &options.driver {
        spec = spec.with("peer", format!("driver = {driver:?}"));
    }
    let node = Node::start(&rig.machine("node")?, &programs.node, &spec).await?;
    let url = format!(
        "{}/v2/{NAME}/blobs/{}?ns={}",
        node.mirror_url(),
        blob.digest,
        crate::rig::containerd::REGISTRY_NAME
    );
    let download = http::download(&url, &[], FETCH_MAX).await?;
    ensure!(download.is(&blob.digest), "{}", download.summary());

    let machine = rig.machine("load")?;
    let program = release_program("pantala-perf");
    let mut command = match options.pin {
        Pin::Sides => machine.pinned_command(program, 1),
        Pin::None => machine.command(program),
    };
    command.args(["soak", "--server", &node.peer_address().to_string()]);
    command.args(["--node", &node.status().await?.node]);
    command
        .arg("--authority")
        .arg(control_machine.dir().join("data"));
    command.args(["--blob", &blob.digest]);
    command.args(["--bytes", &blob.bytes.to_string()]);
    command.args(["--peers", &options.peers.to_string()]);
    command.args(["--outstanding", &options.outstanding.to_string()]);
    command.args(["--seconds", &options.duration.to_string()]);
    let mut load = Led::start(command, "load", &machine.dir().join("load.log"))?;
    let ready: Ready = load.answer().await?;
    ensure!(ready.ready == options.peers, "{} peers came", ready.ready);
    println!(
        "{} peers are connected; {} s",
        ready.ready, options.duration
    );

    let limit = Duration::from_secs(options.duration) + END_MAX;
    let start = Instant::now();
    let pid = node.process_ref().pid();
    let cpu_before = crate::rig::process::exact_cpu_seconds(pid)?;
    let mut looks: Vec<(Duration, f64)> = Vec::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    let seen: Seen = {
        let mut end = std::pin::pin!(load.answer_within(limit));
        loop {
            tokio::select! {
                seen = &mut end => break seen?,
                _ = ticks.tick() => {
                    let own = node.process_ref().memory()?.own_bytes();
                    looks.push((start.elapsed(), own as f64 / f64::from(1 << 20)));
                }
            }
        }
    };
    let cpu_s = crate::rig::process::exact_cpu_seconds(pid)? - cpu_before;
    for line in load.log_tail().lines().skip(1) {
        println!("{line}");
    }
    report(options, &looks, &seen, cpu_s)
}

fn report(
    options: &Options,
    looks: &[(Duration, f64)],
    seen: &Seen,
    cpu_s: f64,
) -> Result<Figures> {
    let duration = Duration::from_secs(options.duration);
    let settled = SETTLED.min(duration / 5);
    // Up to the end of the load, not after it.
    let under_load: Vec<&(Duration, f64)> = looks.iter().filter(|look| look.0 < duration).collect();
    let after = under_load.iter().position(|look| look.0 >= settled);
    let Some(after) = after.filter(|after| after + LOOKS < under_load.len()) else {
        bail!("too short to say anything about memory");
    };
    let of =
        |looks: &[&(Duration, f64)]| median(&looks.iter().map(|look| look.1).collect::<Vec<_>>());
    let early = of(&under_load[after..after + LOOKS]);
    let late = of(&under_load[under_load.len() - LOOKS..]);
    let peak = under_load.iter().map(|look| look.1).fold(0.0, f64::max);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let gib = mib(seen.bytes) / 1024.0;
    let mut figures = Figures::default();
    figures.set("soak_rss_growth_mib", late - early);
    figures.set("soak_rss_early_mib", early);
    figures.set("soak_rss_late_mib", late);
    figures.set("soak_rss_peak_mib", peak);
    figures.set("soak_errors", seen.errors as f64);
    figures.set("soak_stall_max_ms", seen.stall_max_ms);
    figures.set("soak_request_wait_max_ms", seen.wait_max_ms);
    figures.set("soak_busy_answers", seen.busy as f64);
    figures.set("soak_mib_per_s", mib(seen.bytes) / seen.seconds);
    figures.set(
        "soak_peer_mib_per_s_min",
        mib(seen.peer_bytes_min) / seen.seconds,
    );
    figures.set(
        "soak_peer_mib_per_s_max",
        mib(seen.peer_bytes_max) / seen.seconds,
    );
    figures.set("soak_node_cpu_s_per_gib", cpu_s / gib);
    figures.note(format!(
        "{} peers with {} requests of 1 MiB outstanding each, {} s; {} pieces arrived, {} of them hashed; memory: VmRSS less RssFile, medians of {LOOKS} looks from {} s and at the end; stall: the longest that nothing came for a peer; wait: the longest that a request waited for its next 64 KiB",
        options.peers,
        options.outstanding,
        options.duration,
        seen.pieces,
        seen.hashed,
        settled.as_secs()
    ));
    if seen.errors > 0 {
        figures.fail(format!("{} requests failed", seen.errors));
    }
    if seen.bytes == 0 {
        bail!("nothing arrived");
    }
    Ok(figures)
}
