//! The scenarios that are judged beside the baselines, and the largest one.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::compare::{baselines, input_of};
use super::output::{Chart, Figures, show};
use crate::bound::{self, Supply, crossing_bytes_min};
use crate::check::Mutation;
use crate::pantala::Policy;
use crate::scenario::{
    Draws, Fault, FaultKind, Group, Habit, Messages, Outage, Pull, Racks, Registry, Scenario,
};
use crate::shrink;

const MB: u64 = 1_000_000;

/// How large.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Nodes
    #[arg(long, default_value_t = 200)]
    nodes: u32,
    /// Megabytes of the blob
    #[arg(long, default_value_t = 500)]
    megabytes: u64,
    /// The seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the scenario and do not run it
    #[arg(long)]
    print: bool,
}

fn at_once() -> Vec<Pull> {
    vec![Pull {
        blob: 0,
        at_s: 0.0,
        spread_s: 0.0,
        prefetch: false,
    }]
}

fn group(count: u32, mbit: f64, fault: Option<Fault>) -> Group {
    Group {
        count,
        up_mbit: mbit,
        down_mbit: mbit,
        pulls: at_once(),
        draws: None,
        habit: Habit::Honest,
        fault,
        has_source: true,
    }
}

fn base(options: &Options, name: &str) -> Scenario {
    let bytes = options.megabytes * MB;
    let mut scenario = Scenario::uniform(name, 1, bytes, 10_000.0, 10_000.0);
    scenario.seed = options.seed;
    scenario.quantum_ms = 0.5;
    scenario.share_every_ms = 0.5;
    scenario
}

/// Links of 1, 10, 25 and 100 Gbit/s, a tenth degraded in mid-transfer, racks four times oversubscribed.
fn hetero_scenario(options: &Options) -> Scenario {
    let mut scenario = base(options, "hetero");
    let slow = Some(Fault {
        at_s: 0.5,
        spread_s: 1.0,
        part: 0.1,
        kind: FaultKind::Slow {
            factor: 0.1,
            down: false,
        },
    });
    let part = |share: f64| (f64::from(options.nodes) * share).round() as u32;
    scenario.groups = vec![
        group(part(0.1), 1_000.0, slow.clone()),
        group(part(0.5), 10_000.0, slow.clone()),
        group(part(0.3), 25_000.0, slow.clone()),
        group(part(0.1), 100_000.0, slow),
    ];
    scenario.racks = Some(Racks {
        nodes: 20,
        mbit: 100_000.0,
        per_zone: 5,
        zone_mbit: 200_000.0,
        mixed: true,
    });
    scenario
}

/// A tenth die at random, one in a hundred lies, control is away for 30 s and comes back empty.
fn churn_scenario(options: &Options) -> Scenario {
    let mut scenario = base(options, "churn");
    let die = Some(Fault {
        at_s: 0.1,
        spread_s: 5.0,
        part: 0.1,
        kind: FaultKind::Crash { back_s: None },
    });
    let liars = (options.nodes / 100).max(1);
    let mut wrong = group(liars.div_ceil(2), 1_000.0, None);
    wrong.habit = Habit::WrongBytes;
    let mut forgers = group(liars / 2, 1_000.0, None);
    forgers.habit = Habit::Forges;
    scenario.groups = vec![group(options.nodes - liars, 1_000.0, die), wrong, forgers];
    scenario.groups.retain(|group| group.count > 0);
    scenario.registry.mbit = 2_000.0;
    scenario.outages = vec![Outage {
        at_s: 1.5,
        for_s: 30.0,
        restart: true,
    }];
    scenario
}

pub(super) fn hetero(options: &Options, figures: &mut Figures) -> ExitCode {
    beside_baselines(&hetero_scenario(options), options, figures)
}

pub(super) fn churn(options: &Options, figures: &mut Figures) -> ExitCode {
    beside_baselines(&churn_scenario(options), options, figures)
}

fn beside_baselines(scenario: &Scenario, options: &Options, figures: &mut Figures) -> ExitCode {
    if options.print {
        print!("{}", scenario.to_toml());
        return ExitCode::SUCCESS;
    }
    let ours = match shrink::run(scenario, &Policy::default(), Mutation::None) {
        Ok(report) => report,
        Err(violation) => {
            println!("{}: BROKEN {violation}", scenario.name);
            return ExitCode::FAILURE;
        }
    };
    show(&ours);
    let mut input = input_of(scenario, 0);
    let bound = bound::makespan(&input, Supply::ONE_COPY).makespan();
    input.step = Duration::from_millis(1);
    println!(
        "\n{:<16}{:>9}{:>9}{:>10}{:>9}{:>12}{:>12}",
        scenario.name, "p50 s", "p99 s", "makespan", "copies", "racks GB", "zones GB"
    );
    println!("{:<16}{:>28.3}", "lower bound", bound.as_secs_f64());
    let line = |name: &str, times: [f64; 3], copies: f64, racks: f64, zones: f64| {
        println!(
            "{name:<16}{:>9.3}{:>9.3}{:>10.3}{copies:>9.3}{:>12.2}{:>12.2}",
            times[0],
            times[1],
            times[2],
            racks * 1e-9,
            zones * 1e-9
        );
    };
    let times = [ours.quantile_s(0.5), ours.quantile_s(0.99), ours.makespan_s];
    line(
        "Pantala",
        times,
        ours.copies,
        ours.rack_bytes,
        ours.zone_bytes,
    );
    let mut bars = vec![
        ("lower bound".to_owned(), bound.as_secs_f64()),
        ("Pantala".to_owned(), ours.makespan_s),
    ];
    for other in baselines(&input) {
        let seconds = |time: Option<Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64());
        let times = [
            seconds(other.quantile(0.5)),
            seconds(other.quantile(0.99)),
            seconds(other.makespan()),
        ];
        let (racks, zones) = (other.rack_crossing_bytes, other.zone_crossing_bytes);
        let copies = other.copies(input.blob_bytes);
        line(other.policy, times, copies, racks as f64, zones as f64);
        if times[2].is_finite() {
            bars.push((other.policy.to_owned(), times[2]));
        }
    }
    let least = |of: &dyn Fn(usize) -> u32| crossing_bytes_min(&input, of) as f64 * 1e-9;
    println!(
        "least across racks {:.2} GB, across zones {:.2} GB",
        least(&|node| input.nodes[node].rack),
        least(&|node| input.nodes[node].zone)
    );
    let name = &scenario.name;
    figures.set(format!("{name}_makespan_s"), ours.makespan_s);
    figures.set(format!("{name}_p50_s"), ours.quantile_s(0.5));
    figures.set(format!("{name}_p99_s"), ours.quantile_s(0.99));
    figures.set(format!("{name}_copies"), ours.copies);
    figures.set(
        format!("{name}_makespan_vs_bound_ratio"),
        ours.makespan_s / bound.as_secs_f64(),
    );
    figures.chart(Chart {
        file: name.clone(),
        title: format!("From the first request to the last node: {name}"),
        unit: "seconds, simulated".to_owned(),
        groups: vec![(format!("{} nodes", options.nodes), bars)],
    });
    ExitCode::SUCCESS
}

/// How large the largest is.
#[derive(Debug, Clone, Args)]
pub(super) struct ScaleOptions {
    /// Nodes
    #[arg(long, default_value_t = 100_000)]
    nodes: u32,
    /// Blobs, of 4 to 64 MiB
    #[arg(long, default_value_t = 200)]
    blobs: u32,
    /// Blobs that each node pulls
    #[arg(long, default_value_t = 2)]
    pulls: u32,
}

impl ScaleOptions {
    pub(super) fn run(&self, figures: &mut Figures) -> ExitCode {
        let sizes = [4, 8, 8, 16, 16, 32, 64];
        let pull = Pull {
            blob: 0,
            at_s: 0.0,
            spread_s: 10.0,
            prefetch: false,
        };
        let scenario = Scenario {
            name: "scale".to_owned(),
            seed: 1,
            limit_s: 600.0,
            quantum_ms: 20.0,
            share_every_ms: 20.0,
            registry: Registry {
                mbit: 100_000.0,
                first_byte_ms: 5.0,
                requests_per_s: 0.0,
                retry_after_s: 1.0,
            },
            messages: Messages::default(),
            racks: None,
            blobs: (0..self.blobs as usize)
                .map(|n| sizes[n % sizes.len()] << 20)
                .collect(),
            groups: vec![Group {
                pulls: Vec::new(),
                draws: Some(Draws {
                    count: self.pulls,
                    pull,
                }),
                ..group(self.nodes, 10_000.0, None)
            }],
            outages: Vec::new(),
        };
        let mut policy = Policy::default();
        policy.core.nodes_max = self.nodes as usize;
        match shrink::run(&scenario, &policy, Mutation::None) {
            Ok(report) => {
                show(&report);
                let memory = peak_memory_bytes() as f64;
                println!("peak memory {:.2} GiB", memory / (1u64 << 30) as f64);
                figures.set("scale_took_s", report.took.as_secs_f64());
                figures.set("scale_copies", report.copies);
                figures.set("scale_p99_s", report.quantile_s(0.99));
                figures.set("scale_steps", report.steps as f64);
                figures.set("scale_memory_bytes", memory);
                ExitCode::SUCCESS
            }
            Err(violation) => {
                println!("scale: BROKEN {violation}");
                ExitCode::FAILURE
            }
        }
    }
}

/// The most memory that this process has had.
fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| {
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}
