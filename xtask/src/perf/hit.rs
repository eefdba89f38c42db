//! A local hit against nginx with sendfile, on the same file, with both ends' processor time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Options;
use super::figures::Figures;
use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::http;
use crate::rig::image::{Image, ImageSpec};
use crate::rig::machine::Machine;
use crate::rig::nginx::Nginx;
use crate::rig::node::{Node, NodeSpec};
use crate::rig::process::{children_cpu_seconds, run_to_end};
use crate::rig::registry::{Access, Registry};

const NAME: &str = "perf/hit";
const PULL_MAX: Duration = Duration::from_secs(600);

/// One transfer.
struct Sample {
    seconds: f64,
    server_cpu_s: f64,
    client_cpu_s: f64,
}

pub(super) async fn measure(rig: &Rig, programs: &Programs, options: &Options) -> Result<Figures> {
    let registry = Registry::start(&rig.machine("registry")?, Access::Plain).await?;
    let image_spec = ImageSpec {
        bytes: options.size_bytes(),
        layers: 1,
        label: "hit".into(),
    };
    let image = Image::build(&rig.scratch("image")?, &image_spec)?;
    registry.push(&image, &format!("{NAME}:v1")).await?;
    let blob = image.largest().clone();
    let file = image.path_of(&blob);
    let root = file.parent().context("a blob lies in a directory")?;
    let file_name = file
        .file_name()
        .context("a blob has a name")?
        .to_string_lossy()
        .into_owned();

    let spec = NodeSpec {
        registry: registry.url(),
        ..NodeSpec::default()
    };
    let machine = rig.machine("node")?;
    let node = Node::start(&machine, &programs.node, &spec).await?;
    let nginx = Nginx::start(&machine, root).await?;
    let node_url = format!(
        "{}/v2/{NAME}/blobs/{}?ns={REGISTRY_NAME}",
        node.mirror_url(),
        blob.digest
    );
    let nginx_url = nginx.url(&file_name);
    for url in [&node_url, &nginx_url] {
        // Fetches it into the node, warms the page cache, and proves that both serve the same bytes.
        let download = http::download(url, &[], PULL_MAX).await?;
        ensure!(download.is(&blob.digest), "{url}: {}", download.summary());
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..=options.rounds {
        let (node_sample, nginx_sample) = if round % 2 == 0 {
            let sample = transfer(&machine, &node_url, node.process_ref().pid()).await?;
            (
                sample,
                transfer(&machine, &nginx_url, nginx.process().pid()).await?,
            )
        } else {
            let sample = transfer(&machine, &nginx_url, nginx.process().pid()).await?;
            (
                transfer(&machine, &node_url, node.process_ref().pid()).await?,
                sample,
            )
        };
        // The first round is for the warm-up.
        if round > 0 {
            ours.push(node_sample);
            theirs.push(nginx_sample);
        }
    }
    let gib = blob.bytes as f64 / f64::from(1 << 30);
    let mut figures = Figures::default();
    let mut medians = |who: &str, samples: &[Sample]| {
        let of = |pick: fn(&Sample) -> f64| samples.iter().map(pick).collect::<Vec<_>>();
        let rates: Vec<f64> = of(|sample| sample.seconds)
            .iter()
            .map(|seconds| gib * 1024.0 / seconds)
            .collect();
        let per_gib = |values: Vec<f64>| {
            values
                .into_iter()
                .map(|value| value / gib)
                .collect::<Vec<_>>()
        };
        let rate = figures.set_median(&format!("{who}_mib_per_s"), &rates);
        figures.set_median(
            &format!("{who}_server_cpu_s_per_gib"),
            &per_gib(of(|sample| sample.server_cpu_s)),
        );
        figures.set_median(
            &format!("{who}_client_cpu_s_per_gib"),
            &per_gib(of(|sample| sample.client_cpu_s)),
        );
        let both = per_gib(of(|sample| sample.server_cpu_s + sample.client_cpu_s));
        (
            rate,
            figures.set_median(&format!("{who}_cpu_s_per_gib"), &both),
        )
    };
    let (our_rate, our_cpu) = medians("pantala", &ours);
    let (their_rate, their_cpu) = medians("nginx", &theirs);
    figures.set("goodput_ratio", our_rate / their_rate);
    figures.set("cpu_ratio", our_cpu / their_cpu);
    figures.note(format!(
        "{} MiB from a warm page cache to curl on the same machine, in turn, one connection; nginx: one process, sendfile; processor time in ticks of 10 ms",
        blob.bytes >> 20
    ));
    Ok(figures)
}

/// curl downloads `url` to nowhere; the server is the process `server`.
async fn transfer(machine: &Machine, url: &str, server: u32) -> Result<Sample> {
    let mut command = machine.command("curl");
    command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
    command.args(["--output", "/dev/null", url]);
    let server_before = crate::rig::process::cpu_seconds(server)?;
    let client_before = children_cpu_seconds()?;
    let finished = run_to_end(command, PULL_MAX).await?.ok("curl")?;
    Ok(Sample {
        seconds: finished.took.as_secs_f64(),
        server_cpu_s: crate::rig::process::cpu_seconds(server)? - server_before,
        client_cpu_s: children_cpu_seconds()? - client_before,
    })
}
