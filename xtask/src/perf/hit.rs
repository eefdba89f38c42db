//! A local hit against nginx with sendfile: the very same file, out of the same page cache, in turn, with
//! both ends' processor time; for one client and for many.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use futures_util::future::try_join_all;

use super::Keep;
use super::figures::Figures;
use super::plot::{Bar, Chart, Group};
use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::http;
use crate::rig::image::{BlobFile, Image, ImageSpec};
use crate::rig::machine::Machine;
use crate::rig::nginx::Nginx;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::process::{children_cpu_seconds, run_to_end};
use crate::rig::registry::{Access, Registry};

const NAME: &str = "perf/hit";
const PULL_MAX: Duration = Duration::from_secs(600);
/// Many clients get a smaller blob each, so that a round takes seconds; large enough that starting curl
/// is a small part of it.
const CROWD_SHARE: u64 = 4;
const GIB: f64 = (1_u64 << 30) as f64;

/// Options of `cargo xtask perf hit`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, each of which measures both sides; one more warms up
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    rounds: u32,
    /// Size of the blob in MiB; with more than one client, each gets one of a quarter of that
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(8..=65_536))]
    size: u64,
    /// How many clients pull at the same time; several numbers are measured one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64], value_parser = clap::value_parser!(u16).range(1..=512))]
    clients: Vec<u16>,
    #[command(flatten)]
    pub(super) keep: Keep,
}

impl Options {
    pub(super) const fn space_bytes(&self) -> u64 {
        // In the layout, the registry and the node; the second blob.
        (4 * self.size) << 20
    }

    const fn bytes_of(&self, clients: u16) -> u64 {
        (if clients == 1 {
            self.size
        } else {
            self.size / CROWD_SHARE
        }) << 20
    }
}

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Pantala,
    Nginx,
}

/// What one round of one server took.
struct Sample {
    mib_per_s: f64,
    server_cpu_s_per_gib: f64,
    client_cpu_s_per_gib: f64,
}

/// A node that holds the blob, and nginx that serves the node's own file of it.
struct Scene {
    machine: Machine,
    node: Node,
    nginx: Nginx,
}

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let machine = rig.machine("node")?;
    let spec = NodeSpec {
        registry: registry.url(),
        ..NodeSpec::default()
    };
    let node = Node::start(&machine, &programs.node, &spec).await?;
    let blobs = node.data_dir().join("store/blobs/sha256");
    let nginx = Nginx::start(&machine, &blobs).await?;
    let scene = Scene {
        machine,
        node,
        nginx,
    };
    let mut figures = Figures::default();
    let mut chart = Chart {
        title: "A local hit: processor time of both ends".into(),
        unit: "CPU-seconds per GiB".into(),
        parts: vec!["server".into(), "clients".into()],
        groups: Vec::new(),
    };
    for &clients in &options.clients {
        let image_spec = ImageSpec {
            bytes: options.bytes_of(clients),
            layers: 1,
            label: format!("hit {clients}"),
        };
        let image = Image::build(&rig.scratch("image")?, &image_spec)?;
        registry.push(&image, &format!("{NAME}:c{clients}")).await?;
        image.forget_files()?;
        let bars = scene
            .compare(image.largest(), clients, options.rounds, &mut figures)
            .await?;
        chart.groups.push(Group {
            name: format!("{clients} client{}", if clients == 1 { "" } else { "s" }),
            bars,
        });
    }
    figures.chart("cpu", chart);
    figures.note(
        "from a warm page cache to curl on the same machine, in turn; nginx serves the file that the node has stored, with sendfile on, tcp_nopush on, one worker for each processor, and otherwise its defaults; every client is a curl of its own; processor time of the servers with their workers, and of all clients with their start, in ticks of 10 ms",
    );
    Ok(figures)
}

impl Scene {
    async fn compare(
        &self,
        blob: &BlobFile,
        clients: u16,
        rounds: u32,
        figures: &mut Figures,
    ) -> Result<Vec<Bar>> {
        for server in [Server::Pantala, Server::Nginx] {
            // Brings it into the node, warms the page cache, and proves that both serve the same bytes.
            let url = self.url(server, blob)?;
            let download = http::download(&url, &[], PULL_MAX).await?;
            ensure!(download.is(&blob.digest), "{url}: {}", download.summary());
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let mut order = [Server::Pantala, Server::Nginx];
            if round % 2 == 1 {
                order.reverse();
            }
            for server in order {
                let sample = self.pull(server, blob, clients).await?;
                match server {
                    // The first round is for the warm-up.
                    _ if round == 0 => {}
                    Server::Pantala => ours.push(sample),
                    Server::Nginx => theirs.push(sample),
                }
            }
        }
        let of = |who: &str| match clients {
            1 => who.to_owned(),
            _ => format!("{who}{clients}"),
        };
        let mut medians = |who: &str, samples: &[Sample]| {
            let all = |pick: fn(&Sample) -> f64| samples.iter().map(pick).collect::<Vec<_>>();
            let rate = figures.set_median(&format!("{who}_mib_per_s"), &all(|s| s.mib_per_s));
            let server = figures.set_median(
                &format!("{who}_server_cpu_s_per_gib"),
                &all(|s| s.server_cpu_s_per_gib),
            );
            let client = figures.set_median(
                &format!("{who}_client_cpu_s_per_gib"),
                &all(|s| s.client_cpu_s_per_gib),
            );
            let both = figures.set_median(
                &format!("{who}_cpu_s_per_gib"),
                &all(|s| s.server_cpu_s_per_gib + s.client_cpu_s_per_gib),
            );
            (rate, both, [server, client])
        };
        let (our_rate, our_cpu, our_parts) = medians(&of("pantala"), &ours);
        let (their_rate, their_cpu, their_parts) = medians(&of("nginx"), &theirs);
        let hit = of("hit");
        figures.set(&format!("{hit}_rate_vs_nginx"), our_rate / their_rate);
        figures.set(&format!("{hit}_cpu_vs_nginx"), our_cpu / their_cpu);
        figures.note(format!(
            "{clients} at a time: {} MiB for each",
            blob.bytes >> 20
        ));
        let bar = |name: &str, parts: [f64; 2]| Bar {
            name: name.into(),
            values: parts.to_vec(),
        };
        Ok(vec![bar("Pantala", our_parts), bar("nginx", their_parts)])
    }

    fn url(&self, server: Server, blob: &BlobFile) -> Result<String> {
        let digest = &blob.digest;
        if server == Server::Pantala {
            let mirror = self.node.mirror_url();
            return Ok(format!(
                "{mirror}/v2/{NAME}/blobs/{digest}?ns={REGISTRY_NAME}"
            ));
        }
        let hex = digest
            .strip_prefix("sha256:")
            .context("a digest names its algorithm")?;
        let file = PathBuf::from(&hex[..2]).join(hex).join("data");
        Ok(self.nginx.url(&file.to_string_lossy()))
    }

    fn server_cpu_seconds(&self, server: Server) -> Result<f64> {
        match server {
            Server::Pantala => crate::rig::process::cpu_seconds(self.node.process_ref().pid()),
            Server::Nginx => self.nginx.cpu_seconds(),
        }
    }

    /// `clients` of curl download the blob to nowhere, all at once.
    async fn pull(&self, server: Server, blob: &BlobFile, clients: u16) -> Result<Sample> {
        let url = self.url(server, blob)?;
        let server_before = self.server_cpu_seconds(server)?;
        let client_before = children_cpu_seconds()?;
        let start = Instant::now();
        let curls = (0..clients).map(|_| {
            let mut command = self.machine.command("curl");
            command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
            command.args(["--output", "/dev/null", &url]);
            async { run_to_end(command, PULL_MAX).await?.ok("curl") }
        });
        try_join_all(curls).await?;
        let seconds = start.elapsed().as_secs_f64();
        let gib = blob.bytes as f64 * f64::from(clients) / GIB;
        Ok(Sample {
            mib_per_s: gib * 1024.0 / seconds,
            server_cpu_s_per_gib: (self.server_cpu_seconds(server)? - server_before) / gib,
            client_cpu_s_per_gib: (children_cpu_seconds()? - client_before) / gib,
        })
    }
}
