//! End-to-end tests: real clients, a real registry, real nodes, and everything that can go wrong.

mod baseline;
mod clients;
mod convert;
mod crash;
mod lazy;
mod mirror;
mod peer_faults;
mod private;
mod snapshotter;
mod source_faults;
mod stage;
mod swarm;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use futures_util::future::LocalBoxFuture;

use crate::cargo::{self, Profile, Programs};
use crate::packages;
use crate::rig::{Rig, enclosure};
pub(crate) use stage::Stage;

/// Disk that the tests use at most at one time.
const SPACE_BYTES: u64 = 8_000_000_000;

/// Options of `cargo xtask e2e`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Leave out what takes longer than a few seconds
    #[arg(long)]
    pub(crate) quick: bool,
    /// Run the tests with this in their name only
    pub(crate) filter: Option<String>,
    /// List the tests
    #[arg(long)]
    pub(crate) list: bool,
    /// Test the release build
    #[arg(long)]
    pub(crate) release: bool,
    /// Seed of the randomised tests; printed by each run
    #[arg(long, env = "PANTALA_SEED")]
    pub(crate) seed: Option<u64>,
    /// Succeed where no test has the filter in its name
    #[arg(long)]
    pub(crate) none_is_fine: bool,
}

/// What came of a test that found no fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    /// Something that the test needs is absent.
    Missed(String),
}

type Body = fn(&Stage) -> LocalBoxFuture<'_, Result<Outcome>>;

/// One test.
pub(crate) struct Test {
    pub(crate) name: &'static str,
    /// Left out by `--quick`.
    pub(crate) slow: bool,
    pub(crate) body: Body,
}

/// Makes a [`Test`] of an `async fn(&Stage) -> Result<Outcome>`.
macro_rules! test {
    ($name:expr, slow, $body:expr) => {
        $crate::e2e::Test {
            name: $name,
            slow: true,
            body: |stage| Box::pin(($body)(stage)),
        }
    };
    ($name:expr, $body:expr) => {
        $crate::e2e::Test {
            name: $name,
            slow: false,
            body: |stage| Box::pin(($body)(stage)),
        }
    };
}
pub(crate) use test;

fn all() -> Vec<Test> {
    let mut tests = Vec::new();
    tests.extend(baseline::tests());
    tests.extend(swarm::tests());
    tests.extend(mirror::tests());
    tests.extend(clients::tests());
    tests.extend(convert::tests());
    tests.extend(private::tests());
    tests.extend(source_faults::tests());
    tests.extend(peer_faults::tests());
    tests.extend(crash::tests());
    tests.extend(snapshotter::tests());
    tests.extend(lazy::tests());
    tests
}

/// Builds what is tested and runs the tests inside a rig.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    if options.list {
        for test in all() {
            println!("{}{}", test.name, if test.slow { "  (slow)" } else { "" });
        }
        return Ok(ExitCode::SUCCESS);
    }
    let profile = if options.release {
        Profile::Release
    } else {
        Profile::Debug
    };
    if let Some(rig) = Rig::enter()? {
        let programs = Programs::locate(profile);
        return enclosure::run_until_signal(run_all(rig, programs, options.clone()));
    }
    let mut lists = vec![packages::BASE, packages::TESTS];
    if enclosure::is_root() {
        lists.push(packages::ROOT);
    }
    packages::ensure(&lists)?;
    Programs::build(profile)?;
    cargo::build_example("pantala-snapshotter", "local_erofs", profile)?;
    let mut arguments = vec!["e2e".to_owned()];
    if options.quick {
        arguments.push("--quick".into());
    }
    if options.release {
        arguments.push("--release".into());
    }
    if let Some(seed) = options.seed {
        arguments.push(format!("--seed={seed}"));
    }
    if options.none_is_fine {
        arguments.push("--none-is-fine".into());
    }
    arguments.extend(options.filter.clone());
    enclosure::run_inside(&arguments, SPACE_BYTES)
}

async fn run_all(rig: Rig, programs: Programs, options: Options) -> Result<ExitCode> {
    let seed = options
        .seed
        .unwrap_or_else(|| u64::from(std::process::id()) ^ clock_seed());
    println!("seed {seed} (repeat with --seed {seed})");
    let stage = Stage::new(rig, programs, seed)?;
    let (mut passed, mut missed, mut failed) = (0, Vec::new(), Vec::new());
    let chosen = all().into_iter().filter(|test| {
        let wanted = options
            .filter
            .as_ref()
            .is_none_or(|filter| test.name.contains(filter.as_str()));
        wanted && !(options.quick && test.slow)
    });
    for test in chosen {
        let start = Instant::now();
        let name = test.name;
        let scene_name = name.replace([' ', ',', ':', '/', '\''], "-");
        let scene = stage.rig.scene(&scene_name)?;
        let outcome = (test.body)(&stage).await;
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("  ok      {name} ({took:.1} s)");
            }
            Ok(Outcome::Missed(why)) => {
                println!("  MISSED  {name}: {why}");
                missed.push(format!("{name}: {why}"));
            }
            Err(error) => {
                println!("  FAILED  {name} ({took:.1} s)");
                for cause in error.chain() {
                    println!("    {cause}");
                }
                println!("{}", scene.log_tails());
                failed.push(name);
            }
        }
        drop(scene);
    }
    if passed + missed.len() + failed.len() == 0 && !options.none_is_fine {
        bail!("no end-to-end test has that in its name; `cargo xtask e2e --list` lists them");
    }
    for line in &missed {
        println!("NOT TESTED HERE  {line}");
    }
    for name in &failed {
        println!("FAILED  {name}");
    }
    println!(
        "end-to-end: {passed} passed, {} failed, {} missed",
        failed.len(),
        missed.len()
    );
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn clock_seed() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
