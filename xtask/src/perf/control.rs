//! What a decision of control costs, and what it keeps in memory, from 1,000 to 100,000 nodes.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;

use super::Keep;
use super::figures::Figures;
use crate::cargo::release_program;
use crate::rig::process::run_to_end;

const RUN_MAX: Duration = Duration::from_secs(600);
/// Cluster sizes, and what they are called in the figures.
const SIZES: [(u32, &str); 3] = [(1_000, "1k"), (10_000, "10k"), (100_000, "100k")];

/// Options of `cargo xtask perf control`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Messages of the steady mix, after all nodes have come
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u32).range(1_000..=100_000_000))]
    messages: u32,
    /// Rounds, each of which measures all sizes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    #[command(flatten)]
    pub(super) keep: Keep,
}

#[derive(Debug, Deserialize)]
struct Run {
    node_bytes: f64,
    membership_bytes: f64,
    kinds: BTreeMap<String, Costs>,
    all: Costs,
}

#[derive(Debug, Deserialize)]
struct Costs {
    count: u64,
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
}

async fn run(nodes: u32, messages: u32) -> Result<Run> {
    let mut command = std::process::Command::new(release_program("pantala-perf"));
    command.arg("control");
    command.args(["--nodes", &nodes.to_string()]);
    command.args(["--messages", &messages.to_string()]);
    let finished = run_to_end(command, RUN_MAX)
        .await?
        .ok("pantala-perf control")?;
    let line = finished.output.trim();
    serde_json::from_str(line).with_context(|| format!("{line:?}"))
}

/// How many times as much the messages of `large` cost there as the same ones cost in `small`.
fn growth(small: &Run, large: &Run) -> f64 {
    let cost = |of: &Run| -> f64 {
        let each = large
            .kinds
            .iter()
            .filter_map(|(kind, costs)| Some(costs.count as f64 * of.kinds.get(kind)?.mean_us));
        each.sum()
    };
    cost(large) / cost(small)
}

pub(super) async fn measure(options: &Options) -> Result<Figures> {
    let mut runs: Vec<Vec<Run>> = SIZES.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.rounds {
        for (place, (nodes, _)) in runs.iter_mut().zip(SIZES) {
            place.push(run(nodes, options.messages).await?);
        }
    }
    let mut figures = Figures::default();
    let of =
        |runs: &[Run], pick: &dyn Fn(&Run) -> f64| -> Vec<f64> { runs.iter().map(pick).collect() };
    for (runs, (_, size)) in runs.iter().zip(SIZES) {
        figures.set_median(
            &format!("decisions_per_s_{size}"),
            &of(runs, &|run| 1e6 / run.all.mean_us),
        );
        figures.set_median(
            &format!("decision_p50_us_{size}"),
            &of(runs, &|run| run.all.p50_us),
        );
        figures.set_median(
            &format!("decision_p99_us_{size}"),
            &of(runs, &|run| run.all.p99_us),
        );
        let kinds = runs
            .first()
            .map(|run| run.kinds.keys())
            .into_iter()
            .flatten();
        for kind in kinds {
            let mean = |run: &Run| run.kinds.get(kind).map_or(0.0, |costs| costs.mean_us);
            figures.set_median(&format!("{kind}_mean_us_{size}"), &of(runs, &mean));
        }
    }
    // Small clusters drown in what a process takes anyway.
    if let [small, .., large] = &runs[..] {
        figures.set_median("bytes_per_node", &of(large, &|run| run.node_bytes));
        figures.set_median(
            "bytes_per_peer_task",
            &of(large, &|run| run.membership_bytes),
        );
        let growths: Vec<f64> = small
            .iter()
            .zip(large)
            .map(|(small, large)| growth(small, large))
            .collect();
        figures.set_median("decision_growth_1k_to_100k", &growths);
    }
    figures.note("the core alone, on one core: no sockets, no encoding; each node in one task that all have and in four others, of 256 pieces; all open all at once, then a mix of 55 % holdings, 20 % lease requests, 15 % fetched, 3 % reports on five paths, 3 % failed parents, 4 % that close and open again");
    Ok(figures)
}
