//! The meter: what it counts against what was sent, what it estimates against what a link gives, steering, what
//! it costs, and how this node gives way to a TCP sender.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;

use super::Keep;
use super::figures::Figures;
use crate::cargo::release_program;
use crate::rig::Rig;
use crate::rig::machine::{Machine, run};
use crate::rig::process::run_to_end;

const RUN_MAX: Duration = Duration::from_secs(300);
/// Clients of the steering's run, and the threads that they are steered to.
const STEERED_CLIENTS: usize = 64;
const STEERED_THREADS: usize = 4;
/// Links, in Mbit/s. Above these, two cores are the limit and not the link.
const LINKS_MBIT: [u32; 4] = [50, 200, 1000, 5000];
/// An estimate has to be right from here on.
const KNOWN_AFTER_S: f64 = 2.0;
const ESTIMATE_S: f64 = 6.0;
/// The link that is shared with TCP.
const SHARED_MBIT: u32 = 200;
const BESIDE_S: f64 = 9.0;
const MTU: f64 = 1514.0;

/// Options of `cargo xtask perf meter`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds of the comparison of costs, each with the programs and without
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..=101))]
    rounds: u32,
    /// Size of one transfer where counts or costs are compared, in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=65_536))]
    size: u64,
    /// Measure these parts only
    #[arg(long, value_enum)]
    part: Vec<Part>,
    #[command(flatten)]
    pub(super) keep: Keep,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Exactness,
    Estimates,
    Steering,
    Beside,
    Cost,
}

#[derive(Debug, Deserialize)]
struct Run {
    cpu_s: f64,
    took_s: f64,
    bytes: u64,
    error_bytes: u64,
    error_datagrams: u64,
    counted_bytes: u64,
    counted_datagrams: u64,
    batches: u64,
    steered_by_id: u64,
    steered_by_hash: u64,
    steered_refused: u64,
    series: Vec<Vec<(f64, f64, f64)>>,
}

#[derive(Debug, Deserialize)]
struct Beside {
    tcp_alone: f64,
    own_alone_free: f64,
    own_alone_yielding: f64,
    tcp_beside_free: f64,
    tcp_beside_yielding: f64,
    own_beside_yielding: f64,
}

/// Two machines on a link, and where what runs on them lies.
struct Scene {
    server: Machine,
    client: Machine,
    identities: PathBuf,
}

impl Scene {
    async fn create(rig: &Rig) -> Result<Self> {
        let identities = rig.scratch("identities")?;
        let mut command = std::process::Command::new(release_program("pantala-perf"));
        command.arg("identities").arg(&identities);
        command.args(["--count", &(STEERED_CLIENTS + 1).to_string()]);
        run_to_end(command, RUN_MAX).await?.ok("pantala-perf")?;
        let scene = Self {
            server: rig.machine("server")?,
            client: rig.machine("client")?,
            identities,
        };
        for (machine, address) in [(&scene.server, "fd77::1/64"), (&scene.client, "fd77::2/64")] {
            let name = machine.namespace()?;
            let add = ["addr", "add", address, "dev", "eth0", "nodad"];
            run("ip", &[&["-n", name][..], &add].concat())?;
        }
        Ok(scene)
    }

    /// The server's addresses of both families on the link.
    fn addresses(&self) -> [IpAddr; 2] {
        let v6 = [0xfd77, 0, 0, 0, 0, 0, 0, 1];
        [self.server.address().into(), IpAddr::from(v6)]
    }

    fn unlimit(&self) -> Result<()> {
        let name = self.server.namespace()?;
        run("tc", &["-n", name, "qdisc", "del", "dev", "eth0", "root"])
    }

    async fn measure<T: for<'a> Deserialize<'a>>(
        &self,
        stack: &str,
        address: IpAddr,
        more: &[&str],
    ) -> Result<T> {
        let mut command = std::process::Command::new(release_program("pantala-perf"));
        command.args(["meter", "--stack", stack, "--listen"]);
        command.arg(std::net::SocketAddr::new(address, 0).to_string());
        command.arg("--identities").arg(&self.identities);
        let client = match address.is_loopback() {
            true => &self.server,
            false => &self.client,
        };
        for (name, machine) in [("--server-netns", &self.server), ("--client-netns", client)] {
            let path = PathBuf::from("/run/netns").join(machine.namespace()?);
            command.arg(name).arg(path);
        }
        command.args(more);
        let finished = run_to_end(command, RUN_MAX)
            .await?
            .ok("pantala-perf meter")?;
        let line = finished.output.lines().rfind(|line| line.starts_with('{'));
        let line = line.with_context(|| format!("no report in {:?}", finished.output))?;
        serde_json::from_str(line).with_context(|| format!("reading {line:?}"))
    }
}

pub(super) async fn measure(rig: &Rig, options: &Options) -> Result<Figures> {
    let scene = Scene::create(rig).await?;
    let mut figures = Figures::default();
    let has = |part| options.part.is_empty() || options.part.contains(&part);
    if has(Part::Exactness) {
        exactness(&scene, options, &mut figures).await?;
    }
    if has(Part::Estimates) {
        estimates(&scene, &mut figures).await?;
    }
    if has(Part::Steering) {
        steering(&scene, options, &mut figures).await?;
    }
    if has(Part::Beside) {
        beside(&scene, &mut figures).await?;
    }
    if has(Part::Cost) {
        cost(&scene, options, &mut figures).await?;
    }
    figures.note(
        "choice of parents against self-reported load and random parents is not measured here",
    );
    Ok(figures)
}

/// Both drivers, both families, loopback and veth.
async fn exactness(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let bytes = (options.size << 20).to_string();
    let loopback = [
        IpAddr::from([127, 0, 0, 1]),
        IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    ];
    let (mut errors, mut counted) = ((0, 0), (0, 0));
    for stack in ["ring", "tokio"] {
        for address in loopback.into_iter().chain(scene.addresses()) {
            let run: Run = scene.measure(stack, address, &["--bytes", &bytes]).await?;
            println!(
                "{stack:6} {address:12} {} bytes in {} datagrams and {} batches counted, off by {} and {}",
                run.counted_bytes,
                run.counted_datagrams,
                run.batches,
                run.error_bytes,
                run.error_datagrams
            );
            errors = (errors.0 + run.error_bytes, errors.1 + run.error_datagrams);
            counted = (
                counted.0 + run.counted_bytes,
                counted.1 + run.counted_datagrams,
            );
        }
    }
    figures.set(
        "meter_bytes_error_ratio",
        errors.0 as f64 / counted.0 as f64,
    );
    figures.set(
        "meter_datagrams_error_ratio",
        errors.1 as f64 / counted.1 as f64,
    );
    figures.note("exactness: UDP payload and datagrams that the kernel counted as sent, against what QUIC handed over and what the kernel of the other side counted as received; both drivers, v4 and v6, loopback and veth, both ways");
    Ok(())
}

/// How far `series` is off `rate` at each look from two seconds on.
fn errors(series: &[(f64, f64)], rate: f64) -> impl Iterator<Item = f64> {
    let known = series.iter().filter(|(at_s, _)| *at_s >= KNOWN_AFTER_S);
    known.map(move |(_, found)| (found / rate - 1.0).abs())
}

fn p90(errors: &mut [f64]) -> f64 {
    errors.sort_by(f64::total_cmp);
    let at = (errors.len() * 9).div_ceil(10).saturating_sub(1);
    errors.get(at).copied().unwrap_or(f64::NAN)
}

async fn estimates(scene: &Scene, figures: &mut Figures) -> Result<()> {
    let seconds = ESTIMATE_S.to_string();
    let address = scene.addresses()[0];
    let (mut alone, mut shared) = (Vec::new(), Vec::new());
    for mbit in LINKS_MBIT {
        scene.server.limit_rate(mbit)?;
        let rate = f64::from(mbit) * 125_000.0;
        let run: Run = scene
            .measure("ring", address, &["--seconds", &seconds])
            .await?;
        let used = run.bytes as f64 / run.took_s / rate;
        if used < 0.8 {
            figures.fail(format!(
                "the estimate at {mbit} Mbit/s: the transfer filled {:.0} % of the link, so the machine was the limit",
                used * 100.0
            ));
            continue;
        }
        let one: Vec<(f64, f64)> = run.series.concat().iter().map(|s| (s.0, s.1)).collect();
        let mut found: Vec<f64> = errors(&one, rate).collect();
        figures.set(
            &format!("meter_estimate_error_p90_{mbit}_mbit"),
            p90(&mut found),
        );
        alone.append(&mut found);
        println!("{mbit} Mbit/s: {:.1} % of the link used", used * 100.0);
        let two = ["--seconds", &seconds, "--clients", "2"];
        let run: Run = scene.measure("ring", address, &two).await?;
        if let [one, other] = &run.series[..] {
            // Both look at the same moments, but for milliseconds.
            let sum: Vec<(f64, f64)> = one
                .iter()
                .zip(other)
                .map(|(one, other)| (one.0.min(other.0), one.1 + other.1))
                .collect();
            shared.extend(errors(&sum, rate));
        }
    }
    scene.unlimit()?;
    figures.set("meter_estimate_error_p90", p90(&mut alone));
    figures.set("meter_estimate_error_competing_p90", p90(&mut shared));
    figures.note(format!("estimates: what one child is thought to get over a link shaped by tbf, at each look from 2 s to 6 s; competing: the sum of what two children are thought to get over the same link. Ethernet's header of 14 bytes a datagram is added, as the shaper counts it ({MTU:.0} bytes a frame)"));
    Ok(())
}

async fn steering(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let clients = STEERED_CLIENTS.to_string();
    let threads = STEERED_THREADS.to_string();
    let bytes = ((options.size << 20) / STEERED_CLIENTS as u64).to_string();
    let more = [
        "--clients",
        &clients,
        "--threads",
        &threads,
        "--bytes",
        &bytes,
    ];
    let run: Run = scene.measure("ring", scene.addresses()[0], &more).await?;
    let all = run.steered_by_id + run.steered_by_hash + run.steered_refused;
    let with_id = run.steered_by_id + run.steered_refused;
    figures.set("steered_share", run.steered_by_id as f64 / with_id as f64);
    figures.set(
        "steered_by_hash_share",
        run.steered_by_hash as f64 / all as f64,
    );
    let bare: Run = scene
        .measure(
            "ring",
            scene.addresses()[0],
            &[&more[..], &["--bare"]].concat(),
        )
        .await?;
    figures.set(
        "steered_cpu_ratio",
        (run.cpu_s / run.bytes as f64) / (bare.cpu_s / bare.bytes as f64),
    );
    figures.note(format!("steering: {STEERED_CLIENTS} connections to {STEERED_THREADS} threads; the share of batches with an ID of the node that went to its thread's socket. The ratio is against the classic filter that steers without privilege"));
    Ok(())
}

async fn beside(scene: &Scene, figures: &mut Figures) -> Result<()> {
    scene.server.limit_rate(SHARED_MBIT)?;
    let capacity = (f64::from(SHARED_MBIT) * 125_000.0).to_string();
    let seconds = BESIDE_S.to_string();
    let more = ["--beside", &capacity, "--seconds", &seconds];
    let found: Beside = scene.measure("ring", scene.addresses()[0], &more).await?;
    scene.unlimit()?;
    figures.set(
        "scavenger_competitor_ratio",
        found.tcp_beside_yielding / found.tcp_alone,
    );
    figures.set(
        "scavenger_off_competitor_ratio",
        found.tcp_beside_free / found.tcp_alone,
    );
    figures.set(
        "scavenger_alone_ratio",
        found.own_alone_yielding / found.own_alone_free,
    );
    figures.set(
        "scavenger_own_beside_ratio",
        found.own_beside_yielding / found.own_alone_free,
    );
    figures.note(format!("scavenger: a TCP sender (cubic) on the same machine over a link of {SHARED_MBIT} Mbit/s, from two seconds after both have begun; floor 1 % of the link"));
    Ok(())
}

/// The programs' share of the processor time, in turns, over loopback: where a byte costs least otherwise.
async fn cost(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let bytes = (options.size << 20).to_string();
    let mut ratios = Vec::new();
    for round in 0..options.rounds {
        let (with, bare) = (&["--bytes", &bytes][..], &["--bytes", &bytes, "--bare"][..]);
        let order = if round % 2 == 0 {
            [with, bare]
        } else {
            [bare, with]
        };
        let mut cpu = [0.0; 2];
        for more in order {
            let run: Run = scene.measure("ring", scene.addresses()[0], more).await?;
            cpu[usize::from(more.len() == bare.len())] = run.cpu_s / run.bytes as f64;
        }
        ratios.push(cpu[0] / cpu[1] - 1.0);
    }
    figures.set_median("meter_cpu_overhead_ratio", &ratios);
    figures.note("cost: processor time of both ends with both counters loaded at each, less the same without, by the same; over veth");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_after_two_seconds_is_judged() {
        let series = [(0.5, 9.0), (2.0, 110.0), (3.0, 95.0)];
        let mut found: Vec<f64> = errors(&series, 100.0).collect();
        assert!((p90(&mut found) - 0.1).abs() < 1e-9);
        assert_eq!(found.len(), 2);
        assert!(p90(&mut []).is_nan());
    }
}
