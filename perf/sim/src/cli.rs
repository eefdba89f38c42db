//! The command line of `pantala-sim`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::check::Mutation;
use crate::pantala::{Policy, Report, World};
use crate::scenario::Scenario;

/// Runs scenarios in virtual time.
#[derive(Debug, Parser)]
#[command(name = "pantala-sim")]
pub struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a scenario file
    Run {
        /// The scenario
        file: PathBuf,
    },
    /// Run one point: everybody of one kind pulls one blob at once
    Point {
        /// Nodes
        nodes: u32,
        /// Megabytes of the blob
        megabytes: u64,
        /// Megabit per second of each node
        #[arg(long, default_value_t = 6_000.0)]
        node_mbit: f64,
        /// Megabit per second of the registry
        #[arg(long, default_value_t = 10_000.0)]
        registry_mbit: f64,
        /// Inputs are taken together once in so many milliseconds
        #[arg(long, default_value_t = 0.0)]
        quantum_ms: f64,
        /// Rates are shared out once in so many milliseconds
        #[arg(long, default_value_t = 0.0)]
        share_ms: f64,
        /// Show how many pieces arrive in each fiftieth of a second
        #[arg(long)]
        timeline: bool,
        /// Nobody reads: prefetch
        #[arg(long)]
        prefetch: bool,
        #[command(flatten)]
        knobs: Knobs,
    },
}

/// Settings of the cores, for experiments.
#[derive(Debug, Clone, clap::Args)]
struct Knobs {
    #[arg(long)]
    per_parent: Option<u32>,
    #[arg(long)]
    in_flight: Option<u32>,
    #[arg(long)]
    lookahead: Option<u32>,
    #[arg(long)]
    parents: Option<u32>,
    #[arg(long)]
    source_fetches: Option<u32>,
    #[arg(long)]
    source_run: Option<u32>,
}

impl Knobs {
    fn policy(&self) -> Policy {
        let mut policy = Policy::default();
        let it = &mut policy.download;
        it.requests_per_parent_max = self.per_parent.unwrap_or(it.requests_per_parent_max);
        it.requests_in_flight_max = self.in_flight.unwrap_or(it.requests_in_flight_max);
        it.lookahead_pieces = self.lookahead.unwrap_or(it.lookahead_pieces);
        it.parents_max = self.parents.unwrap_or(it.parents_max);
        it.source_fetches_max = self.source_fetches.unwrap_or(it.source_fetches_max);
        it.source_run_pieces_max = self.source_run.unwrap_or(it.source_run_pieces_max);
        policy
    }
}

impl Arguments {
    /// Does what was asked.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn run(self) -> Result<ExitCode> {
        match self.task {
            Task::Run { file } => {
                let scenario = Scenario::read(&file)?;
                let report = World::new(scenario, Policy::default(), Mutation::None).run();
                Ok(show(&report))
            }
            Task::Point {
                nodes,
                megabytes,
                node_mbit,
                registry_mbit,
                quantum_ms,
                share_ms,
                timeline,
                prefetch,
                knobs,
            } => {
                let bytes = megabytes * 1_000_000;
                let mut s = Scenario::uniform("point", nodes, bytes, node_mbit, registry_mbit);
                s.quantum_ms = quantum_ms;
                s.share_every_ms = share_ms;
                s.groups[0].pulls[0].prefetch = prefetch;
                let report = World::new(s, knobs.policy(), Mutation::None).run();
                if timeline {
                    println!("{:?}", report.timeline);
                }
                Ok(show(&report))
            }
        }
    }
}

fn show(report: &Report) -> ExitCode {
    println!(
        "makespan {:.3} s, p50 {:.3} s, p99 {:.3} s, copies {:.4}, registry peak {:.2} Gbit/s",
        report.makespan_s,
        report.quantile_s(0.5),
        report.quantile_s(0.99),
        report.copies,
        report.registry_peak_bytes_per_s * 8e-9,
    );
    println!(
        "pieces from peers {}, from the source {}, alone {}, hedges {}, refusals {}, leases {}, waits {}, wasted {} MiB",
        report.pieces.0,
        report.pieces.1,
        report.alone_fetches,
        report.hedges,
        report.refusals,
        report.leases.0,
        report.leases.1,
        report.wasted_bytes >> 20,
    );
    println!(
        "{} steps, {} inputs, {} messages to control, {:.2} s",
        report.steps,
        report.inputs,
        report.control_messages,
        report.took.as_secs_f64()
    );
    match &report.violation {
        Some(violation) => {
            println!("BROKEN {violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}
