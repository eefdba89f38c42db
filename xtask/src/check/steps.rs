//! The steps that call cargo.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Options, Outcome};
use crate::cargo::cargo;

/// Runs `command`; its output is the step's.
pub(super) fn run(command: &mut Command) -> Result<Outcome> {
    let status = command
        .status()
        .with_context(|| format!("starting {command:?}"))?;
    Ok(if status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("{command:?}: {status}"))
    })
}

fn has_cargo_command(name: &str) -> bool {
    cargo()
        .args([name, "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}

pub(super) fn format(_: &Options) -> Result<Outcome> {
    run(cargo().args(["fmt", "--all", "--check"]))
}

pub(super) fn clippy(_: &Options) -> Result<Outcome> {
    run(cargo().args([
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))
}

pub(super) fn docs(_: &Options) -> Result<Outcome> {
    run(cargo()
        .args([
            "doc",
            "--locked",
            "--workspace",
            "--no-deps",
            "--keep-going",
            "--document-private-items",
        ])
        .env("RUSTDOCFLAGS", "-D warnings"))
}

/// Licences, bans and sources always; advisories where their database is at hand.
pub(super) fn deny(_: &Options) -> Result<Outcome> {
    if !has_cargo_command("deny") {
        println!("installing cargo-deny");
        if let Outcome::Failed(why) = run(cargo().args(["install", "--locked", "cargo-deny"]))? {
            return Ok(Outcome::Failed(why));
        }
    }
    // cargo-deny looks at what other platforms would bring in too. Without a network this may fail,
    // and then what is cached has to do.
    let _ = cargo().args(["fetch", "--locked", "--quiet"]).status();
    let database = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        // A try to fetch it without a network leaves the folder with a lock file alone.
        .and_then(|home| std::fs::read_dir(home.join("advisory-dbs")).ok())
        .and_then(|entries| entries.flatten().find(|entry| entry.path().is_dir()));
    let mut command = cargo();
    command.args(["deny", "--offline", "check", "--hide-inclusion-graph"]);
    command.args(["licenses", "bans", "sources"]);
    if database.is_some() {
        command.arg("advisories");
    }
    Ok(match (run(&mut command)?, database) {
        (Outcome::Passed, None) => Outcome::Missed(
            "security advisories: no database here; `cargo deny fetch db` gets it where there is a network".into(),
        ),
        (outcome, _) => outcome,
    })
}

/// All tests of the workspace, the rules of the house (`tidy`) among them.
pub(super) fn unit(options: &Options) -> Result<Outcome> {
    let filter = options.filter.as_deref();
    let nextest = has_cargo_command("nextest");
    let mut command = cargo();
    if nextest {
        command.args([
            "nextest",
            "run",
            "--locked",
            "--workspace",
            "--no-tests=pass",
        ]);
        command.args([
            "--status-level",
            "fail",
            "--final-status-level",
            "slow",
            "--no-fail-fast",
        ]);
    } else {
        command.args([
            "test",
            "--locked",
            "--workspace",
            "--quiet",
            "--no-fail-fast",
        ]);
    }
    command.args(filter);
    let outcome = run(&mut command)?;
    if nextest && matches!(outcome, Outcome::Passed) && filter.is_none() {
        // nextest leaves the examples in the documentation out.
        return run(cargo().args(["test", "--locked", "--workspace", "--doc", "--quiet"]));
    }
    Ok(outcome)
}

/// The cores in virtual time, with faults.
pub(super) fn simulation(_: &Options) -> Result<Outcome> {
    crate::perf::sim::check()
}

/// Real programs, in a rig. A process of its own, as the rig wants to be PID 1.
pub(super) fn end_to_end(options: &Options) -> Result<Outcome> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("e2e");
    if options.quick {
        command.arg("--quick");
    }
    if let Some(filter) = &options.filter {
        // A filter that was meant for the unit tests matches none of these, which is no fault.
        command.args(["--none-is-fine", filter]);
    }
    run(&mut command)
}
