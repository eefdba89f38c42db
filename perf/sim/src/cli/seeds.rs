//! The published benchmark: so many pods pull one image at once, and the figures of the promise.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::compare::{baselines, input_of};
use super::output::{Chart, Figures};
use crate::baseline::{self, Outcome};
use crate::bound::{self, Supply};
use crate::check::Mutation;
use crate::pantala::{Policy, Report};
use crate::published::{
    DRAGONFLY, DRAGONFLY_NODE_GBIT_PER_S, DRAGONFLY_REGISTRY_GBIT_PER_S, KRAKEN, Point,
};
use crate::scenario::Scenario;
use crate::shrink;

/// Pods from which on inputs and rates are taken together, so that a point takes seconds.
const COARSE_FROM: u32 = 200;
/// How coarse it is then: well below the time of a piece, 1.4 ms at 6 Gbit/s.
const COARSE_MS: f64 = 0.5;
/// The peak of the registry that the published benchmark would call one copy's worth of.
const GIB: f64 = (1u64 << 30) as f64;

/// What to run of it.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Points with this many pods only
    #[arg(long)]
    pods: Vec<usize>,
    /// The image of 500 MB only
    #[arg(long)]
    small: bool,
    /// Kraken's benchmark too: 2,600 hosts, 3 GB, 300 MB/s; it takes minutes
    #[arg(long)]
    kraken: bool,
    /// Without the baselines
    #[arg(long)]
    alone: bool,
}

/// One point, all policies.
struct Row {
    name: String,
    bytes: u64,
    ours: Report,
    bound: Duration,
    others: Vec<Outcome>,
}

impl Row {
    fn of(&self, policy: &str) -> Option<Duration> {
        let found = self.others.iter().find(|other| other.policy == policy);
        found.and_then(Outcome::makespan)
    }
    fn vs_bound(&self) -> f64 {
        self.ours.makespan_s / self.bound.as_secs_f64()
    }
    fn vs(&self, policy: &str) -> f64 {
        self.of(policy)
            .map_or(0.0, |theirs| self.ours.makespan_s / theirs.as_secs_f64())
    }
}

/// A point of the published benchmark as a scenario.
pub(super) fn scenario_of(nodes: u32, bytes: u64, node_mbit: f64, registry_mbit: f64) -> Scenario {
    let name = format!("{nodes} pods, {} MB", bytes / 1_000_000);
    let mut scenario = Scenario::uniform(&name, nodes, bytes, node_mbit, registry_mbit);
    if nodes >= COARSE_FROM {
        scenario.quantum_ms = COARSE_MS;
        scenario.share_every_ms = COARSE_MS;
    }
    scenario
}

impl Options {
    fn points(&self) -> Vec<Point> {
        let wanted = |point: &&Point| {
            (self.pods.is_empty() || self.pods.contains(&point.pods))
                && (!self.small || point.image.bytes() < 1_000_000_000)
        };
        DRAGONFLY.iter().filter(wanted).copied().collect()
    }

    fn row(&self, scenario: &Scenario, warm_kraken: bool) -> Option<Row> {
        let policy = Policy::default();
        let ours = match shrink::run(scenario, &policy, Mutation::None) {
            Ok(report) => report,
            Err(violation) => {
                println!("{}: BROKEN {violation}", scenario.name);
                return None;
            }
        };
        let mut input = input_of(scenario, 0);
        let bound = bound::makespan(&input, Supply::ONE_COPY).makespan();
        input.step = Duration::from_millis(1);
        let others = match (self.alone, warm_kraken) {
            (true, _) => Vec::new(),
            (false, false) => baselines(&input),
            (false, true) => {
                let rules = baseline::kraken::Rules {
                    origin_warm: true,
                    ..Default::default()
                };
                vec![baseline::kraken::run(&input, &rules)]
            }
        };
        let bytes = scenario.blobs[0];
        let name = scenario.name.clone();
        let row = Row {
            name,
            bytes,
            ours,
            bound,
            others,
        };
        print_row(&row);
        Some(row)
    }

    pub(super) fn run(&self, figures: &mut Figures) -> ExitCode {
        println!(
            "{:<20}{:>8}{:>8}{:>7}{:>8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "",
            "ours s",
            "bound",
            "ratio",
            "copies",
            "peak Gb",
            "OCIv1",
            "Dragonfly",
            "Kraken",
            "BitTor.",
            "took s"
        );
        let mut rows = Vec::new();
        let mut failed = false;
        let (node, registry) = (
            DRAGONFLY_NODE_GBIT_PER_S * 1000.0,
            DRAGONFLY_REGISTRY_GBIT_PER_S * 1000.0,
        );
        for point in self.points() {
            let scenario = scenario_of(point.pods as u32, point.image.bytes(), node, registry);
            match self.row(&scenario, false) {
                Some(row) => rows.push((row, Some(point))),
                None => failed = true,
            }
        }
        if self.kraken {
            let mbit = KRAKEN.cap_bytes_per_s * 8e-6;
            let scenario = scenario_of(KRAKEN.hosts as u32, KRAKEN.bytes, mbit, registry);
            match self.row(&scenario, true) {
                Some(row) => rows.push((row, None)),
                None => failed = true,
            }
        }
        for (row, _) in &rows {
            figures.set_max("copies_max", row.ours.copies);
            figures.set_max("makespan_vs_bound_max", row.vs_bound());
            if !self.alone {
                figures.set_max("makespan_vs_kraken_max", row.vs("Kraken"));
                figures.set_max("makespan_vs_dragonfly_max", row.vs("Dragonfly"));
            }
        }
        charts(&rows, figures);
        print_published(&rows);
        figures.print();
        match failed || rows.is_empty() {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        }
    }
}

fn print_row(row: &Row) {
    let seconds = |policy: &str| {
        row.of(policy).map_or_else(
            || "-".to_owned(),
            |time| format!("{:.2}", time.as_secs_f64()),
        )
    };
    let names: Vec<&str> = row.others.iter().map(|other| other.policy).collect();
    let others: Vec<String> = match names.len() {
        4 => names.iter().map(|name| seconds(name)).collect(),
        _ => vec!["-".into(), "-".into(), seconds("Kraken"), "-".into()],
    };
    println!(
        "{:<20}{:>8.3}{:>8.3}{:>7.3}{:>8.4}{:>9.2}{:>9}{:>9}{:>9}{:>9}{:>9.1}",
        row.name,
        row.ours.makespan_s,
        row.bound.as_secs_f64(),
        row.vs_bound(),
        row.ours.copies,
        row.ours.registry_peak_bytes_per_s * 8e-9,
        others[0],
        others[1],
        others[2],
        others[3],
        row.ours.took.as_secs_f64(),
    );
}

fn print_published(rows: &[(Row, Option<Point>)]) {
    println!("\npublished, with the start of the containers: seconds, GiB from the registry");
    for (row, point) in rows {
        let gib = row.bytes as f64 * row.ours.copies / GIB;
        match point {
            Some(point) => println!(
                "{:<20} registry only {:>7.0} s {:>8.2}; Dragonfly {:>4.0} s {:>6.2}; simulated ours {:>7.2} s {:>6.2}",
                row.name,
                point.registry_only_s,
                point.registry_only_gib,
                point.dragonfly_s,
                point.dragonfly_gib,
                row.ours.makespan_s,
                gib
            ),
            None => println!(
                "{:<20} Kraken p50 {:.0} s, p99 {:.0} s, p99.9 {:.0} s; simulated ours {:.2} s, {:.2} s, {:.2} s",
                row.name,
                KRAKEN.p50_s,
                KRAKEN.p99_s,
                KRAKEN.p999_s,
                row.ours.quantile_s(0.5),
                row.ours.quantile_s(0.99),
                row.ours.quantile_s(0.999)
            ),
        }
    }
}

fn charts(rows: &[(Row, Option<Point>)], figures: &mut Figures) {
    let chart =
        |file: &str, title: &str, unit: &str, of: &dyn Fn(&Row) -> Vec<(String, f64)>| Chart {
            file: file.to_owned(),
            title: title.to_owned(),
            unit: unit.to_owned(),
            groups: rows
                .iter()
                .map(|(row, _)| (row.name.clone(), of(row)))
                .collect(),
        };
    figures.chart(chart(
        "makespan",
        "From the first request to the last node that has the image",
        "seconds, simulated",
        &|row| {
            let mut bars = vec![
                ("lower bound".to_owned(), row.bound.as_secs_f64()),
                ("Pantala".to_owned(), row.ours.makespan_s),
            ];
            // The registry alone takes so long that nothing else could be seen beside it.
            let others = row.others.iter().filter(|other| other.policy != "OCIv1");
            bars.extend(others.filter_map(|other| {
                let time = other.makespan()?.as_secs_f64();
                Some((other.policy.to_owned(), time))
            }));
            bars
        },
    ));
    figures.chart(chart(
        "copies",
        "Bytes that left the registry",
        "copies of the image, simulated",
        &|row| {
            let mut bars = vec![("Pantala".to_owned(), row.ours.copies)];
            let others = row.others.iter().filter(|other| other.policy != "OCIv1");
            bars.extend(others.map(|other| (other.policy.to_owned(), other.copies(row.bytes))));
            bars
        },
    ));
    figures.chart(chart(
        "registry-peak",
        "The highest rate out of the registry over a tenth of a second",
        "Gbit/s, simulated",
        &|row| {
            let gbit = |bytes_per_s: f64| bytes_per_s * 8e-9;
            let mut bars = vec![(
                "Pantala".to_owned(),
                gbit(row.ours.registry_peak_bytes_per_s),
            )];
            bars.extend(row.others.iter().map(|other| {
                (
                    other.policy.to_owned(),
                    gbit(other.registry_peak_bytes_per_s),
                )
            }));
            bars
        },
    ));
}
