//! `cargo xtask perf profile BENCHMARK ...`: where the time goes, as a flame graph.
//!
//! The whole benchmark runs under `perf record`, with frame pointers in everything that is built for it.

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};

use super::figures::Place;
use super::flame;
use crate::cargo::{self, workspace_root};
use crate::packages;
use crate::rig::machine::search_path;

/// Samples a second: no multiple of the kernel's tick.
const FREQUENCY_HZ: &str = "997";
/// Programs that are drawn.
const PROGRAMS: &[&str] = &["pantala", "pantala-control", "pantala-perf", "nginx"];
/// Functions that are listed on the terminal.
const LISTED_MAX: usize = 25;

/// Options of `cargo xtask perf profile`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// A benchmark and its options: `transfer --stacks ring --networks loopback-1452 --rounds 1`
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true)]
    benchmark: Vec<String>,
}

/// For reading the options of the benchmark that is to run.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask perf profile")]
struct Profiled {
    #[command(subcommand)]
    benchmark: super::Benchmark,
}

impl Options {
    /// What the benchmark builds; an error where its options are wrong.
    fn programs(&self) -> Result<&'static [&'static [&'static str]]> {
        let words = ["profile"]
            .into_iter()
            .chain(self.benchmark.iter().map(String::as_str));
        Ok(Profiled::try_parse_from(words)?.benchmark.programs())
    }
}

pub(super) fn main(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[packages::PROFILE])?;
    let target = cargo::target_dir().join("profile");
    let data = target.join("perf.data");
    std::fs::create_dir_all(&target)?;
    let environment = |command: &mut Command| {
        command
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-C force-frame-pointers=yes")
            .env("PATH", search_path());
    };
    // Built before, so that the compiler is not in the picture.
    for packages in options.programs()? {
        let mut build = cargo::cargo();
        build.args(["build", "--release"]);
        for package in *packages {
            build.args(["--package", package]);
        }
        environment(&mut build);
        if !build.status().context("starting cargo")?.success() {
            bail!("building with frame pointers failed");
        }
    }
    let mut record = Command::new("perf");
    record.args(["record", "--event", "cpu-clock", "--freq", FREQUENCY_HZ]);
    record
        .args(["--call-graph", "fp", "--quiet", "--output"])
        .arg(&data)
        .arg("--");
    record
        .arg(std::env::current_exe()?)
        .arg("perf")
        .args(&options.benchmark);
    environment(&mut record);
    let status = record
        .current_dir(workspace_root())
        .status()
        .context("starting perf")?;
    if !status.success() {
        bail!("the benchmark failed under perf ({status})");
    }
    let root = read(&data)?;
    std::fs::remove_file(&data)?;
    println!(
        "\n{} samples; functions by the time in themselves:",
        root.samples()
    );
    for (name, share) in root.leaves().into_iter().take(LISTED_MAX) {
        println!("{:>6.1} %  {name}", share * 100.0);
    }
    let place = Place::here();
    let name = options.benchmark.first().context("no benchmark")?;
    let path = place.file(&format!("{name}-flame.svg"))?;
    let title = format!("cargo xtask perf {}", options.benchmark.join(" "));
    std::fs::write(&path, flame::to_svg(&root, &title, &place.line()))?;
    println!("\nkept in {}", path.display());
    Ok(ExitCode::SUCCESS)
}

fn read(data: &Path) -> Result<flame::Frame> {
    let mut script = Command::new("perf")
        .args([
            "script",
            "--fields",
            "comm,pid,tid,ip,sym,symoff,dso",
            "--input",
        ])
        .arg(data)
        .env("PATH", search_path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("starting perf script")?;
    let output = script.stdout.take().context("no standard output")?;
    let lines = std::io::BufReader::new(output)
        .split(b'\n')
        .map_while(Result::ok)
        .map(|line| String::from_utf8_lossy(&line).into_owned());
    let root = flame::read(lines, PROGRAMS);
    let status = script.wait()?;
    if !status.success() || root.samples() == 0 {
        bail!("perf script found no samples of {PROGRAMS:?} ({status})");
    }
    Ok(root)
}
