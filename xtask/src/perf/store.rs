//! What the store adds to the file below it: verified writes against bare ones, and lending.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;

use super::Keep;
use super::figures::Figures;
use crate::cargo::release_program;
use crate::rig::Rig;
use crate::rig::process::run_to_end;

const RUN_MAX: Duration = Duration::from_secs(900);

/// Options of `cargo xtask perf store`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds; one more warms up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// MiB written in each
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    size: u64,
    #[command(flatten)]
    pub(super) keep: Keep,
}

impl Options {
    pub(super) fn space_bytes(&self) -> u64 {
        (2 * self.size) << 20
    }
}

#[derive(Debug, Deserialize)]
struct Round {
    bytes: u64,
    passes: BTreeMap<String, Pass>,
}

#[derive(Debug, Deserialize)]
struct Pass {
    seconds: f64,
    cpu_s: f64,
}

pub(super) async fn measure(rig: &Rig, options: &Options) -> Result<Figures> {
    let dir = rig.scratch("store")?;
    let mut command = std::process::Command::new(release_program("pantala-perf"));
    command.arg("store").arg(&dir);
    command.args(["--bytes", &(options.size << 20).to_string()]);
    command.args(["--rounds", &options.rounds.to_string()]);
    let finished = run_to_end(command, RUN_MAX)
        .await?
        .ok("pantala-perf store")?;
    let rounds = finished
        .output
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?}")))
        .collect::<Result<Vec<Round>>>()?;
    let mut figures = Figures::default();
    let names: Vec<String> = rounds
        .first()
        .context("no rounds")?
        .passes
        .keys()
        .cloned()
        .collect();
    for name in &names {
        let of = |pick: &dyn Fn(&Pass, f64) -> f64| -> Vec<f64> {
            rounds
                .iter()
                .map(|round| pick(&round.passes[name], round.bytes as f64 / f64::from(1 << 30)))
                .collect()
        };
        figures.set_median(
            &format!("store_{name}_mib_per_s"),
            &of(&|pass, gib| gib * 1024.0 / pass.seconds),
        );
        figures.set_median(
            &format!("store_{name}_cpu_s_per_gib"),
            &of(&|pass, gib| pass.cpu_s / gib),
        );
    }
    let ratio = |figures: &mut Figures, name: &str, of: [&str; 2]| {
        let cpu = |round: &Round, name: &str| round.passes[name].cpu_s;
        let ratios: Vec<f64> = rounds
            .iter()
            .map(|round| cpu(round, of[0]) / cpu(round, of[1]))
            .collect();
        figures.set_median(name, &ratios);
    };
    ratio(
        &mut figures,
        "store_write_cpu_vs_plain",
        ["verified_write", "plain_write"],
    );
    ratio(&mut figures, "store_lend_cpu_vs_read", ["lend", "read"]);
    figures.note(format!(
        "{} MiB in writes of 256 KiB, each of slices of 1,411 bytes as QUIC decrypts them, into files that are overwritten each round; hash: BLAKE3 of the groups alone; bare: the slices by vectored writes, nothing else; plain: copied, hashed and written without a store; read: 256 KiB into fresh memory; lend: pieces of 1 MiB; both with one byte of each page looked at",
        options.size
    ));
    Ok(figures)
}
