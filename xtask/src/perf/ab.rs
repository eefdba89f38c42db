//! `cargo xtask perf ab A B BENCHMARK ...`: two versions or configurations, in turn, with statistics.
//!
//! A side is a commit, or `.` for the working tree, and options that only it gets:
//! `HEAD~3`, `.`, `.+--streams=1`, `main+--pin=none`. Each commit is checked out and built in a folder of its
//! own below `target/ab`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::figures::median;
use crate::cargo::{self, workspace_root};

/// Shuffles of the permutation test: p is known to about a hundredth.
const SHUFFLES: u32 = 10_000;
/// Above this a difference is called noise.
const SIGNIFICANT_P: f64 = 0.05;

/// Options of `cargo xtask perf ab`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// COMMIT, or `.`, and options of this side: `HEAD~1`, `.+--streams=1`
    a: String,
    /// The other side
    b: String,
    /// How often each side runs
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..=100))]
    runs: u32,
    /// A benchmark and its options: `transfer --stacks ring --rounds 1`
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true)]
    benchmark: Vec<String>,
}

/// One of the two.
struct Side {
    name: String,
    /// Where its sources are.
    tree: PathBuf,
    /// Where it is built.
    target: PathBuf,
    extra: Vec<String>,
    metrics: BTreeMap<String, Vec<f64>>,
}

pub(super) fn main(options: &Options) -> Result<ExitCode> {
    let mut sides = [Side::prepare(&options.a)?, Side::prepare(&options.b)?];
    for run in 0..options.runs {
        for step in 0..2 {
            let side = &mut sides[((run + step) % 2) as usize];
            println!("\n== run {} of {}: {} ==", run + 1, options.runs, side.name);
            side.run(&options.benchmark)?;
        }
    }
    let [a, b] = &sides;
    println!(
        "\n{:<52}{:>12}{:>12}{:>9}{:>8}",
        "",
        a.short(),
        b.short(),
        "B / A",
        "p"
    );
    for (name, of_a) in &a.metrics {
        let Some(of_b) = b.metrics.get(name) else {
            continue;
        };
        let p = p_value(of_a, of_b);
        println!(
            "{name:<52}{:>12.4}{:>12.4}{:>9.3}{p:>8.3}{}",
            median(of_a),
            median(of_b),
            median(of_b) / median(of_a),
            if p < SIGNIFICANT_P { "  *" } else { "" }
        );
    }
    println!(
        "\nMedians of {} runs each, in turn. p: how often a difference of medians at least this large comes of chance (permutation test, {SHUFFLES} shuffles); *: below {SIGNIFICANT_P}.",
        options.runs
    );
    Ok(ExitCode::SUCCESS)
}

impl Side {
    /// Checks the commit out; builds with the first run.
    fn prepare(words: &str) -> Result<Self> {
        let mut parts = words.split('+');
        let commit = parts.next().unwrap_or_default();
        let extra = parts.map(str::to_owned).collect();
        let (tree, target) = if commit == "." {
            (workspace_root().to_owned(), cargo::target_dir())
        } else {
            let id = git(&[
                "rev-parse",
                "--verify",
                "--short",
                &format!("{commit}^{{commit}}"),
            ])?;
            let base = cargo::target_dir().join("ab");
            let tree = base.join(&id);
            if !tree.exists() {
                std::fs::create_dir_all(&base)?;
                git(&["worktree", "prune"])?;
                let path = tree.to_str().context("a path that is no text")?;
                git(&["worktree", "add", "--detach", path, &id])?;
            }
            (tree, base.join(format!("{id}-target")))
        };
        Ok(Self {
            name: words.to_owned(),
            tree,
            target,
            extra,
            metrics: BTreeMap::new(),
        })
    }

    fn short(&self) -> String {
        self.name.chars().take(11).collect()
    }

    fn run(&mut self, benchmark: &[String]) -> Result<()> {
        let figures = self.target.join("ab.json");
        std::fs::create_dir_all(&self.target)?;
        let mut command: Command = cargo::cargo();
        command
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target);
        command
            .args(["xtask", "perf"])
            .args(benchmark)
            .args(&self.extra);
        command.arg("--json").arg(&figures);
        let status = command.status().context("starting cargo")?;
        if !status.success() {
            bail!("{} failed ({status})", self.name);
        }
        let text = std::fs::read_to_string(&figures)?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        let metrics = json["metrics"]
            .as_object()
            .context("no metrics in the figures")?;
        for (name, value) in metrics {
            if let Some(value) = value.as_f64() {
                self.metrics.entry(name.clone()).or_default().push(value);
            }
        }
        Ok(())
    }
}

fn git(arguments: &[&str]) -> Result<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(workspace_root())
        .output()
        .context("starting git")?;
    if !output.status.success() {
        bail!(
            "git {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// How often a difference of means at least as large comes of dealing the samples out at random. Of means,
/// because many ways to deal a few samples out have the same medians.
fn p_value(a: &[f64], b: &[f64]) -> f64 {
    let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len() as f64;
    let observed = (mean(a) - mean(b)).abs();
    let mut all: Vec<f64> = a.iter().chain(b).copied().collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut as_large = 0;
    for _ in 0..SHUFFLES {
        for index in (1..all.len()).rev() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            all.swap(index, (state % (index as u64 + 1)) as usize);
        }
        let (left, right) = all.split_at(a.len());
        if (mean(left) - mean(right)).abs() >= observed {
            as_large += 1;
        }
    }
    // The samples as they are count as one of the ways to deal them.
    f64::from(as_large + 1) / f64::from(SHUFFLES + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_far_beyond_the_noise_is_significant_and_none_is_not() {
        let a = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02];
        let b = [2.0, 2.1, 1.9, 2.05, 1.95, 2.02];
        assert!(p_value(&a, &b) < 0.01);
        assert!(p_value(&a, &a) > 0.9);
    }
}
