//! `cargo xtask demo`: several machines pull one image at once, and the registry sends each byte once.

mod pull;
mod report;
mod scene;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo::{Profile, Programs};
use crate::packages;
use crate::rig::{Rig, enclosure};

/// Disk for each node and byte of image: Pantala's copy, containerd's content, the unpacked snapshot.
const COPIES_PER_NODE: u64 = 3;
/// Disk besides the nodes' per byte of image: the layout and the registry.
const COPIES_BESIDES: u64 = 2;

/// Options of `cargo xtask demo`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Nodes that pull at the same time; one more joins late
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Size of the image in MB, at least
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    size: u64,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Options {
    fn image_bytes(&self) -> u64 {
        self.size * 1_000_000
    }
}

/// Installs, builds, and runs the demo inside a rig.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    if let Some(rig) = Rig::enter()? {
        return run_inner(&rig, options);
    }
    let mut lists = vec![packages::BASE];
    if enclosure::is_root() {
        lists.push(packages::ROOT);
    }
    packages::ensure(&lists)?;
    println!("building pantala and pantala-control (release)");
    Programs::build(Profile::Release)?;
    let mut arguments = vec!["demo".to_owned()];
    arguments.push(format!("--nodes={}", options.nodes));
    arguments.push(format!("--size={}", options.size));
    if let Some(path) = &options.json {
        let path = std::path::absolute(path)?;
        arguments.push(format!("--json={}", path.display()));
    }
    let copies = COPIES_BESIDES + COPIES_PER_NODE * (u64::from(options.nodes) + 1);
    enclosure::run_inside(&arguments, copies * options.image_bytes())
}

fn run_inner(rig: &Rig, options: &Options) -> Result<ExitCode> {
    crate::rig::enclosure::run_until_signal(async {
        let programs = Programs::locate(Profile::Release);
        let figures = scene::play(rig, &programs, options).await?;
        report::print(&figures);
        if let Some(path) = &options.json {
            std::fs::write(path, serde_json::to_string_pretty(&figures)?)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}
