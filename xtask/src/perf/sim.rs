//! `cargo xtask sim`: builds the simulator, runs it, and keeps what it finds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use super::figures::Figures;
use super::plot::{Bar, Chart, Group};
use crate::cargo::{build_release, release_program, target_dir};
use crate::check::Outcome;

const PROGRAM: &str = "pantala-sim";
/// Steps of random scenarios with faults at each change.
const CHECK_STEPS: &str = "2000000";

/// What is handed on to the simulator.
#[derive(Debug, Clone, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// What to simulate; `cargo xtask sim help` lists it. `--json FILE` writes the figures, `--record`
    /// keeps them and their plots in perf/results/
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    arguments: Vec<String>,
}

/// What the simulator writes.
#[derive(Debug, Deserialize)]
struct Found {
    metrics: BTreeMap<String, f64>,
    charts: Vec<Drawn>,
}

#[derive(Debug, Deserialize)]
struct Drawn {
    file: String,
    title: String,
    unit: String,
    groups: Vec<(String, Vec<(String, f64)>)>,
}

impl From<Drawn> for Chart {
    fn from(drawn: Drawn) -> Self {
        let bar = |(name, value)| Bar {
            name,
            values: vec![value],
        };
        let groups = drawn.groups.into_iter().map(|(name, bars)| Group {
            name,
            bars: bars.into_iter().map(bar).collect(),
        });
        Self {
            title: drawn.title,
            unit: drawn.unit,
            parts: Vec::new(),
            groups: groups.collect(),
        }
    }
}

impl Options {
    /// Takes `--record` and `--json FILE` out: the rest is the simulator's.
    fn split(&self) -> Result<(Vec<String>, bool, Option<PathBuf>)> {
        let (mut rest, mut record, mut json) = (Vec::new(), false, None);
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--record" => record = true,
                "--json" => json = Some(arguments.next().context("--json needs a file")?.into()),
                other => rest.push(other.to_owned()),
            }
        }
        Ok((rest, record, json))
    }
}

/// Builds and runs the simulator.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let (arguments, record, json) = options.split()?;
    build_release(&[PROGRAM])?;
    let found = target_dir().join("sim-figures.json");
    // Of a run before this one.
    if found.exists() {
        std::fs::remove_file(&found)?;
    }
    let status = Command::new(release_program(PROGRAM))
        .args(&arguments)
        .arg("--json")
        .arg(&found)
        .status()
        .context("starting the simulator")?;
    let name = arguments.first().map_or("sim", String::as_str);
    if found.is_file() {
        let text = std::fs::read_to_string(&found)?;
        let found: Found = serde_json::from_str(&text).context("the simulator's figures")?;
        let mut figures = Figures::default();
        for (name, value) in &found.metrics {
            figures.set(name, *value);
        }
        for drawn in found.charts {
            let file = drawn.file.clone();
            figures.chart(&file, drawn.into());
        }
        figures.note(format!("simulated: {PROGRAM} {}", arguments.join(" ")));
        if let Some(path) = json {
            std::fs::write(&path, figures.to_json())
                .with_context(|| format!("writing {}", path.display()))?;
        }
        if record {
            for path in figures.record(&format!("sim-{name}"))? {
                println!("kept in {}", path.display());
            }
        }
    } else if record || json.is_some() {
        bail!("the simulator left no figures");
    }
    Ok(match status.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The part that runs at each change: random scenarios, and the proof that their checks find something.
pub(crate) fn check() -> Result<Outcome> {
    build_release(&[PROGRAM])?;
    for arguments in [
        &["mutations"][..],
        &["random", "--steps", CHECK_STEPS][..],
        &["seeds", "--small", "--pods", "50"][..],
    ] {
        let status = Command::new(release_program(PROGRAM))
            .args(arguments)
            .status()?;
        if !status.success() {
            let what = arguments.join(" ");
            return Ok(Outcome::Failed(format!("{PROGRAM} {what}: {status}")));
        }
    }
    Ok(Outcome::Passed)
}
