//! The command line of `pantala-sim`.

mod chance;
mod compare;
mod large;
mod output;
mod seeds;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::check::Mutation;
use crate::pantala::{Policy, World};
use crate::scenario::{Scenario, random};
use crate::shrink;

pub use output::Figures;

/// Runs scenarios in virtual time.
#[derive(Debug, Parser)]
#[command(name = "pantala-sim")]
pub struct Arguments {
    #[command(subcommand)]
    task: Task,
    /// Write the figures to this file as `{"metrics": {name: number}, "charts": [...]}`
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a scenario file; one that breaks a rule is made small and printed
    Run {
        /// The scenario
        file: PathBuf,
    },
    /// The published benchmark: one image to 50 to 500 pods at once, and Kraken's to 2,600 hosts
    Seeds(seeds::Options),
    /// Random small scenarios with faults, until so many steps are done
    Random(chance::Options),
    /// Every deliberate fault of the cores must be caught
    Mutations(chance::MutationOptions),
    /// Unequal links, some of which degrade, and racks behind oversubscribed ones
    Hetero(large::Options),
    /// Nodes die and lie, and control is away
    Churn(large::Options),
    /// 100,000 nodes and 200 blobs
    Scale(large::ScaleOptions),
    /// Print the random scenario of a seed
    Show {
        /// The seed
        seed: u64,
    },
    /// One point, with the cores set otherwise: for experiments
    Point(Point),
}

/// Everybody of one kind pulls one blob at once.
#[derive(Debug, clap::Args)]
struct Point {
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
    /// Milliseconds to the registry's first byte
    #[arg(long, default_value_t = 5.0)]
    first_byte_ms: f64,
    /// One-way delay of messages in milliseconds
    #[arg(long, default_value_t = 0.2)]
    delay_ms: f64,
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
    /// Requests outstanding at one parent
    #[arg(long)]
    per_parent: Option<u32>,
    /// Requests outstanding at all parents
    #[arg(long)]
    in_flight: Option<u32>,
    /// Bulk requests outstanding, shared out
    #[arg(long)]
    bulk: Option<u32>,
    /// Pieces fetched in order ahead of a reader
    #[arg(long)]
    lookahead: Option<u32>,
    /// Parents subscribed to
    #[arg(long)]
    parents: Option<u32>,
    /// Leased fetches at once
    #[arg(long)]
    source_fetches: Option<u32>,
}

impl Point {
    fn policy(&self) -> Policy {
        let mut policy = Policy::default();
        let it = &mut policy.download;
        let set = |to: &mut u32, from: Option<u32>| *to = from.unwrap_or(*to);
        set(&mut it.requests_per_parent_max, self.per_parent);
        set(&mut it.requests_in_flight_max, self.in_flight);
        set(&mut it.bulk_in_flight_target, self.bulk);
        set(&mut it.lookahead_pieces, self.lookahead);
        set(&mut it.parents_max, self.parents);
        set(&mut it.source_fetches_max, self.source_fetches);
        policy
    }

    fn run(&self) -> ExitCode {
        let bytes = self.megabytes * 1_000_000;
        let (node, registry) = (self.node_mbit, self.registry_mbit);
        let mut scenario = Scenario::uniform("point", self.nodes, bytes, node, registry);
        scenario.quantum_ms = self.quantum_ms;
        scenario.share_every_ms = self.share_ms;
        scenario.registry.first_byte_ms = self.first_byte_ms;
        scenario.messages.delay_ms = self.delay_ms;
        scenario.groups[0].pulls[0].prefetch = self.prefetch;
        let report = World::new(scenario, self.policy(), Mutation::None).run();
        if self.timeline {
            println!("{:?}", report.timeline);
        }
        output::show(&report)
    }
}

impl Arguments {
    /// Does what was asked.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn run(self) -> Result<ExitCode> {
        let mut figures = Figures::default();
        let code = match self.task {
            Task::Run { file } => run_file(&Scenario::read(&file)?),
            Task::Seeds(options) => options.run(&mut figures),
            Task::Random(options) => options.run(&mut figures),
            Task::Mutations(options) => options.run(&mut figures),
            Task::Hetero(options) => large::hetero(&options, &mut figures),
            Task::Churn(options) => large::churn(&options, &mut figures),
            Task::Scale(options) => options.run(&mut figures),
            Task::Show { seed } => {
                print!("{}", random(seed).to_toml());
                ExitCode::SUCCESS
            }
            Task::Point(point) => point.run(),
        };
        if let Some(path) = &self.json {
            figures.write(path)?;
        }
        Ok(code)
    }
}

fn run_file(scenario: &Scenario) -> ExitCode {
    let policy = Policy::default();
    match shrink::run(scenario, &policy, Mutation::None) {
        Ok(report) => output::show(&report),
        Err(violation) => {
            chance::explain(scenario, &policy, Mutation::None, violation);
            ExitCode::FAILURE
        }
    }
}
