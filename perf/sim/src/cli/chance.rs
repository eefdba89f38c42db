//! Thousands of small scenarios with faults, and the proof that their checks would find something.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::output::Figures;
use crate::check::{Mutation, Violation};
use crate::pantala::Policy;
use crate::scenario::{Habit, Scenario, random};
use crate::shrink;

/// Scenarios that are tried before a mutation counts as not caught.
const MUTATION_TRIES_MAX: u64 = 400;
/// Failing scenarios that are explained before the rest is left.
const FAILURES_MAX: usize = 3;

/// How much to run.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Steps in all
    #[arg(long, default_value_t = 1_000_000)]
    steps: u64,
    /// The seed of the first scenario; the others follow
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after so many seconds, however many steps that were
    #[arg(long)]
    seconds: Option<u64>,
    /// Do not make what fails small
    #[arg(long)]
    no_shrink: bool,
}

/// What is tried on mutations.
#[derive(Debug, Clone, Args)]
pub(super) struct MutationOptions {
    /// The seed of the first scenario
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Says what broke, and in how small a scenario.
pub(super) fn explain(
    scenario: &Scenario,
    policy: &Policy,
    mutation: Mutation,
    violation: Violation,
) {
    println!(
        "{} (seed {}): BROKEN {violation}",
        scenario.name, scenario.seed
    );
    let (small, violation) = shrink::shrink(scenario, policy, mutation, violation);
    println!("the smallest that breaks the same rule: {violation}\n");
    println!("{}", small.to_toml());
}

impl Options {
    pub(super) fn run(&self, figures: &mut Figures) -> ExitCode {
        let policy = Policy::default();
        let started = Instant::now();
        let limit = self.seconds.map(Duration::from_secs);
        let (mut steps, mut count, mut failed) = (0u64, 0u64, Vec::new());
        // A core that panics is reported with its scenario: its own words come on top.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let mut copies_max: f64 = 0.0;
        while steps < self.steps && limit.is_none_or(|limit| started.elapsed() < limit) {
            let scenario = random(self.seed + count);
            count += 1;
            match shrink::run(&scenario, &policy, Mutation::None) {
                Ok(report) => {
                    steps += report.steps;
                    if scenario.is_healthy() {
                        copies_max = copies_max.max(report.copies);
                    }
                }
                Err(violation) => failed.push((scenario, violation)),
            }
            if failed.len() > FAILURES_MAX * 100 {
                break;
            }
        }
        for (scenario, violation) in failed.iter().take(FAILURES_MAX) {
            match self.no_shrink {
                true => println!("seed {}: BROKEN {violation}", scenario.seed),
                false => explain(scenario, &policy, Mutation::None, violation.clone()),
            }
        }
        for (scenario, violation) in failed.iter().skip(FAILURES_MAX) {
            println!("seed {}: BROKEN {violation}", scenario.seed);
        }
        std::panic::set_hook(hook);
        println!(
            "{count} scenarios, {steps} steps, {} broken, {:.1} s; most copies in a healthy one {copies_max:.3}",
            failed.len(),
            started.elapsed().as_secs_f64()
        );
        figures.set("random_scenarios", count as f64);
        figures.set("random_steps", steps as f64);
        figures.set("random_broken", failed.len() as f64);
        match failed.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    }
}

impl MutationOptions {
    pub(super) fn run(&self, figures: &mut Figures) -> ExitCode {
        let policy = Policy::default();
        let mut caught_count = 0;
        for (mutation, rule) in Mutation::ALL {
            let caught = (0..MUTATION_TRIES_MAX).find_map(|try_| {
                let mut scenario = random(self.seed + try_);
                if mutation == Mutation::SkipVerify {
                    for group in &mut scenario.groups {
                        // A forger's bytes are what they claim to be: that is another matter.
                        if group.habit != Habit::Honest {
                            group.habit = Habit::WrongBytes;
                        }
                    }
                }
                let violation = shrink::run(&scenario, &policy, mutation).err()?;
                (violation.rule == rule).then_some((try_ + 1, violation))
            });
            match caught {
                Some((tries, violation)) => {
                    caught_count += 1;
                    println!("{mutation:?}: caught by scenario {tries}: {violation}");
                }
                None => println!("{mutation:?}: NOT CAUGHT in {MUTATION_TRIES_MAX} scenarios"),
            }
        }
        figures.set("mutations_caught", f64::from(caught_count));
        match caught_count as usize == Mutation::ALL.len() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    }
}
