//! `cargo xtask test`: everything that must pass, one line a step, nothing hidden.

pub(crate) mod fuzz;
mod sanitizer;
mod steps;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

/// Options of `cargo xtask test`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Leave out the long end-to-end tests
    #[arg(long)]
    quick: bool,
    /// Run the steps, unit tests and end-to-end tests with this in their name only
    filter: Option<String>,
    /// Go on after a step that failed
    #[arg(long)]
    keep_going: bool,
}

/// What came of a step.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Passed,
    /// A part could not be tested here: which, why, and what to do about it.
    Missed(String),
    Failed(String),
}

struct Step {
    name: &'static str,
    run: fn(&Options) -> Result<Outcome>,
}

const STEPS: &[Step] = &[
    Step {
        name: "format",
        run: steps::format,
    },
    Step {
        name: "clippy",
        run: steps::clippy,
    },
    Step {
        name: "docs",
        run: steps::docs,
    },
    Step {
        name: "deny",
        run: steps::deny,
    },
    Step {
        name: "ebpf",
        run: crate::ebpf::check,
    },
    Step {
        name: "unit",
        run: steps::unit,
    },
    Step {
        name: "sanitizer",
        run: sanitizer::address,
    },
    Step {
        name: "simulation",
        run: steps::simulation,
    },
    Step {
        name: "fuzz",
        run: fuzz::briefly,
    },
    Step {
        name: "kernel",
        run: crate::kernel::step,
    },
    Step {
        name: "end-to-end",
        run: steps::end_to_end,
    },
];

/// Runs the steps and prints what came of each; the last line is `N passed, N failed`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let named = options
        .filter
        .as_deref()
        .filter(|name| STEPS.iter().any(|step| step.name == *name));
    // A filter that is no step's name chooses among the tests of the two steps that have names.
    let chosen: Vec<&Step> = STEPS
        .iter()
        .filter(|step| match (&options.filter, named) {
            (None, _) => true,
            (Some(_), Some(name)) => step.name == name,
            (Some(_), None) => matches!(step.name, "unit" | "end-to-end"),
        })
        .collect();
    let options = Options {
        filter: options.filter.clone().filter(|_| named.is_none()),
        ..options.clone()
    };
    if chosen.is_empty() {
        bail!("nothing to run");
    }
    let mut lines = Vec::new();
    let (mut passed, mut failed) = (0, 0);
    for step in chosen {
        println!("== {} ==", step.name);
        let start = Instant::now();
        let outcome =
            (step.run)(&options).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Outcome::Passed => {
                passed += 1;
                lines.push(format!("ok      {} ({took:.0} s)", step.name));
            }
            Outcome::Missed(what) => {
                passed += 1;
                lines.push(format!(
                    "ok      {} ({took:.0} s), but NOT TESTED HERE: {what}",
                    step.name
                ));
            }
            Outcome::Failed(why) => {
                failed += 1;
                println!("{why}");
                lines.push(format!("FAILED  {} ({took:.0} s)", step.name));
                if !options.keep_going && step.name != "end-to-end" {
                    lines.push(
                        "        (the steps after it were not run; --keep-going runs them)".into(),
                    );
                    break;
                }
            }
        }
    }
    println!("== summary ==");
    for line in lines {
        println!("{line}");
    }
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
