//! The emulated machine's kernel, built from Debian's source package and kept under `target/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{target_dir, workspace_root};
use crate::packages;

/// Where Debian's package puts the source.
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

fn folder() -> PathBuf {
    target_dir().join("guest-kernel")
}

/// The kernel that was built earlier, if it was.
pub(super) fn kept() -> PathBuf {
    folder().join("bzImage")
}

/// Builds it: about 11 minutes of CPU, and some 2 GB of disk that are given back at the end.
pub(super) fn kernel() -> Result<PathBuf> {
    packages::ensure(&[packages::GUEST_KERNEL])?;
    if !Path::new(SOURCE).is_file() {
        packages::install(&["linux-source-6.12", "libelf-dev"])?;
    }
    let work = folder().join("work");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    let (source, output) = (work.join("source"), work.join("output"));
    for dir in [&source, &output] {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    println!(
        "building the guest's kernel in {} (once, some minutes)",
        work.display()
    );
    let unpack = ["--strip-components=1", "--extract", "--file", SOURCE];
    packages::run(
        Command::new("tar")
            .args(unpack)
            .arg("--directory")
            .arg(&source),
    )?;
    let make = |arguments: &[&str]| {
        let mut command = Command::new("make");
        command.arg("-s").arg("-C").arg(&source);
        command
            .arg(format!("O={}", output.display()))
            .args(arguments);
        packages::run(&mut command)
    };
    make(&["tinyconfig"])?;
    let mut merge = Command::new(source.join("scripts/kconfig/merge_config.sh"));
    merge.current_dir(&source).arg("-m").arg("-O").arg(&output);
    merge.arg(output.join(".config")).arg(fragment());
    packages::run(&mut merge)?;
    make(&["olddefconfig"])?;
    check_options(&output.join(".config"))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make(&[&format!("-j{jobs}"), "bzImage"])?;
    fs::copy(output.join("arch/x86/boot/bzImage"), kept()).context("keeping the kernel")?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    Ok(kept())
}

fn fragment() -> PathBuf {
    workspace_root().join("xtask/kernel/ondemand.config")
}

/// kconfig drops options without a word when what they need is missing.
fn check_options(config: &Path) -> Result<()> {
    let config = fs::read_to_string(config).context("reading the kernel's configuration")?;
    let wanted = fs::read_to_string(fragment()).context("reading the fragment")?;
    let lost: Vec<&str> = wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !config.lines().any(|have| have == *line))
        .collect();
    if !lost.is_empty() {
        bail!(
            "the kernel's source has no such options any more: {}",
            lost.join(" ")
        );
    }
    Ok(())
}
