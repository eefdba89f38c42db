//! The fuzz targets, for some seconds each. `fuzz/README.md` says how to run them for longer.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::Outcome;
use super::steps::run;
use crate::cargo::{cargo, workspace_root};
use crate::packages;

/// Enough to try the seeds and some ten thousand mutations of them.
const SECONDS_PER_TARGET: u32 = 6;

/// cargo in the folder of the fuzz targets, which is a workspace with flags of its own.
fn fuzz_cargo() -> Command {
    let mut command = cargo();
    command.current_dir(workspace_root().join("fuzz"));
    // Flags from outside would replace those that make the coverage, and what is built with them
    // does not belong among the other builds.
    command
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        command.env("CARGO_TARGET_DIR", workspace_root().join(dir).join("fuzz"));
    }
    command
}

/// The step of `cargo xtask test`.
pub(super) fn briefly(_: &super::Options) -> Result<Outcome> {
    run_targets(SECONDS_PER_TARGET, None)
}

/// Options of `cargo xtask fuzz`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// One target only, by the name of its file in fuzz/targets
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// `cargo xtask fuzz`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    match run_targets(options.seconds, options.target.as_deref())? {
        Outcome::Passed => Ok(ExitCode::SUCCESS),
        Outcome::Missed(why) | Outcome::Failed(why) => bail!(why),
    }
}

fn run_targets(seconds: u32, only: Option<&str>) -> Result<Outcome> {
    if let Err(error) = packages::ensure(&[packages::FUZZ]) {
        return Ok(Outcome::Missed(format!("the fuzz targets: {error:#}")));
    }
    let dir = workspace_root().join("fuzz");
    let mut targets: Vec<PathBuf> = fs::read_dir(dir.join("targets"))
        .context("reading fuzz/targets")?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    targets.retain(|target| {
        only.is_none_or(|only| target.file_stem().is_some_and(|stem| stem == only))
    });
    targets.sort();
    if targets.is_empty() {
        bail!("fuzz/targets has no {}", only.unwrap_or("target"));
    }
    if let Outcome::Failed(why) = run(fuzz_cargo().args(["build", "--quiet", "--locked"]))? {
        return Ok(Outcome::Failed(why));
    }
    for target in targets {
        let name = target
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let artifacts = format!("artifacts/{name}/");
        let corpus = format!("corpus/{name}");
        for folder in [&artifacts, &corpus] {
            fs::create_dir_all(dir.join(folder))?;
        }
        let output = fuzz_cargo()
            .args(["run", "--quiet", "--locked", "--bin", &name, "--"])
            .arg(format!("-max_total_time={seconds}"))
            .args(["-max_len=65536", "-rss_limit_mb=512"])
            .arg(format!("-artifact_prefix={artifacts}"))
            .args([&corpus, &format!("seeds/{name}")])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            let lines: Vec<&str> = said.lines().collect();
            let from = lines.len().saturating_sub(30);
            return Ok(Outcome::Failed(format!(
                "fuzz target {name}: {}\n{}",
                output.status,
                lines[from..].join("\n")
            )));
        }
        let last = said
            .lines()
            .rev()
            .find(|line| line.contains("DONE") || line.contains("Done"));
        println!("{name}: {}", last.unwrap_or("done").trim());
    }
    Ok(Outcome::Passed)
}
