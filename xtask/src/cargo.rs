//! Building the programs that the rig runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Which build of the programs to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// What `cargo test` has built already, mostly.
    Debug,
    /// What users run; for everything that is timed.
    Release,
}

/// The two programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    /// `pantala`
    pub(crate) node: PathBuf,
    /// `pantala-control`
    pub(crate) control: PathBuf,
    /// The snapshotter with lazy layers in local files; there after [`build_example`].
    pub(crate) local_erofs: PathBuf,
}

/// The root of the workspace.
pub(crate) fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in a folder of the workspace")
}

/// The cargo that runs this, or the one on the path.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace_root());
    // What cargo tells the program that it runs is not meant for another cargo: build scripts look at
    // it (ring's does), and would have everything built again that is built already.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds programs of this workspace as users run them.
pub(crate) fn build_release(packages: &[&str]) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--release"]);
    for package in packages {
        command.args(["--package", package]);
    }
    let status = command.status().context("starting cargo")?;
    if !status.success() {
        bail!("building {} failed ({status})", packages.join(" and "));
    }
    Ok(())
}

/// Builds the example `name` of `package`.
pub(crate) fn build_example(package: &str, name: &str, profile: Profile) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--package", package, "--example", name]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    let status = command.status().context("starting cargo")?;
    if !status.success() {
        bail!("building the example {name} failed ({status})");
    }
    Ok(())
}

/// Where the program `name` lies after [`build_release`].
pub(crate) fn release_program(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}

/// Where cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace_root().join("target"),
        |dir| workspace_root().join(dir),
    )
}

impl Programs {
    /// Where the programs of `profile` lie.
    pub(crate) fn locate(profile: Profile) -> Self {
        let dir = target_dir().join(match profile {
            Profile::Debug => "debug",
            Profile::Release => "release",
        });
        Self {
            node: dir.join("pantala"),
            control: dir.join("pantala-control"),
            local_erofs: dir.join("examples/local_erofs"),
        }
    }

    /// Builds them and says where they lie.
    pub(crate) fn build(profile: Profile) -> Result<Self> {
        let mut command = cargo();
        command.args([
            "build",
            "--package",
            "pantala-node",
            "--package",
            "pantala-control",
            "--package",
            "pantala-supervisor",
        ]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        let status = command.status().context("starting cargo")?;
        if !status.success() {
            bail!("building pantala and pantala-control failed ({status})");
        }
        let programs = Self::locate(profile);
        for program in [&programs.node, &programs.control] {
            if !program.is_file() {
                bail!("cargo has built no {}", program.display());
            }
        }
        Ok(programs)
    }
}
