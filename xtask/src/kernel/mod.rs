//! `cargo xtask kernel-test`: the kernel backends of lazy mounts, on this machine's kernel and in an emulated machine with
//! a kernel that has cachefiles' on-demand mode, which distributions leave out.
//!
//! The emulated machine has one program, `dataplane/lazy/examples/guest`, linked statically: its init, which runs the tests
//! and prints what came of them.

mod archive;
mod build;
mod machine;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo::{cargo, target_dir};
use crate::check::Outcome;
use crate::packages;
use crate::rig::enclosure::is_root;

/// The variable with the path of a kernel image to use.
const KERNEL_VARIABLE: &str = "PANTALA_GUEST_KERNEL";
/// Data in the image that the tests mount.
const IMAGE_BYTES: u64 = 24 << 20;
/// The disk that the tests write to: devices, and the kernel's cache.
const SCRATCH_BYTES: u64 = 1 << 30;

/// Options of `cargo xtask kernel-test`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Run the tests with this in their name only
    filter: Option<String>,
    /// Run the tests on this machine's kernel only
    #[arg(long)]
    host_only: bool,
    /// Run the tests in the emulated machine only
    #[arg(long)]
    guest_only: bool,
}

/// `cargo xtask kernel-test`: builds a kernel if there is none.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let mut outcomes = Vec::new();
    if !options.guest_only {
        outcomes.push(host(options.filter.as_deref())?);
    }
    if !options.host_only {
        let kernel = match find_kernel()? {
            Some(kernel) => kernel,
            None => build::kernel()?,
        };
        outcomes.push(guest(&kernel, options.filter.as_deref())?);
    }
    for outcome in outcomes {
        match outcome {
            Outcome::Passed => {}
            Outcome::Missed(why) | Outcome::Failed(why) => bail!(why),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The step of `cargo xtask test`: says what it could not test. It builds no kernel, which takes many minutes.
pub(crate) fn step(_: &crate::check::Options) -> Result<Outcome> {
    let mut missed = Vec::new();
    match host(None)? {
        Outcome::Passed => {}
        Outcome::Missed(why) => missed.push(why),
        failed @ Outcome::Failed(_) => return Ok(failed),
    }
    match find_kernel()? {
        Some(kernel) => match guest(&kernel, None)? {
            Outcome::Passed => {}
            Outcome::Missed(why) => missed.push(why),
            failed @ Outcome::Failed(_) => return Ok(failed),
        },
        None => missed.push(format!(
            "the cachefiles backend: there is no kernel for the emulated machine. Set {KERNEL_VARIABLE} to one that was \
             built with xtask/kernel/ondemand.config, or run `cargo xtask kernel-test` once, which builds it (about 11 \
             minutes of CPU) and keeps it"
        )),
    }
    Ok(if missed.is_empty() {
        Outcome::Passed
    } else {
        Outcome::Missed(missed.join("; "))
    })
}

/// The kernel that the variable names, or the one that was built earlier.
fn find_kernel() -> Result<Option<PathBuf>> {
    if let Some(path) = std::env::var_os(KERNEL_VARIABLE).map(PathBuf::from) {
        if !path.is_file() {
            bail!(
                "{KERNEL_VARIABLE} is {}, which is no file; unset it or name a kernel image",
                path.display()
            );
        }
        return Ok(Some(path));
    }
    Ok(Some(build::kept()).filter(|path| path.is_file()))
}

/// The backends that this machine's kernel has.
fn host(filter: Option<&str>) -> Result<Outcome> {
    if !is_root() {
        return Ok(Outcome::Missed(
            "lazy mounts on this kernel: mounting needs root".into(),
        ));
    }
    if let Err(error) = packages::ensure(&[packages::MOUNTS]) {
        return Ok(Outcome::Missed(format!("lazy mounts: {error:#}")));
    }
    if !has_file_backed_erofs()? {
        return Ok(Outcome::Missed(
            "lazy mounts on this kernel: it has no EROFS, or one before 6.12 without file-backed mounts".into(),
        ));
    }
    let status = cargo()
        .args(["test", "--locked", "--package", "pantala-lazy"])
        .args(["--test", "fuse", "--", "--test-threads=1"])
        .args(filter)
        .env("PANTALA_REQUIRE_MOUNTS", "1")
        .status()
        .context("starting cargo")?;
    Ok(if status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("the mount tests on this kernel: {status}"))
    })
}

/// Asks the kernel: mounts an image that is a file, and unmounts it.
fn has_file_backed_erofs() -> Result<bool> {
    let dir = tempfile::tempdir()?;
    let (tree, image, at) = (
        dir.path().join("tree"),
        dir.path().join("image"),
        dir.path().join("at"),
    );
    std::fs::create_dir(&tree)?;
    std::fs::create_dir(&at)?;
    packages::run(
        Command::new("mkfs.erofs")
            .arg("--quiet")
            .args([&image, &tree]),
    )?;
    let flags = rustix::mount::MountFlags::RDONLY;
    // Without the module loaded, the kernel loads it by itself.
    let mounted = rustix::mount::mount(&image, &at, "erofs", flags, None);
    if mounted.is_ok() {
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH)?;
    }
    Ok(mounted.is_ok())
}

/// The tests in the emulated machine.
fn guest(kernel: &Path, filter: Option<&str>) -> Result<Outcome> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Outcome::Missed(
            "the cachefiles backend: the emulated machine is x86_64 only".into(),
        ));
    }
    if let Err(error) = packages::ensure(&[packages::MOUNTS, packages::GUEST]) {
        return Ok(Outcome::Missed(format!(
            "the cachefiles backend: {error:#}"
        )));
    }
    let program = build_program()?;
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("image");
    std::fs::create_dir(&image)?;
    packages::run(
        Command::new(&program)
            .arg("image")
            .arg(&image)
            .arg(IMAGE_BYTES.to_string()),
    )?;
    let disks = [
        dir.path().join("scratch.ext4"),
        dir.path().join("image.ext4"),
    ];
    make_disk(&disks[0], "scratch", SCRATCH_BYTES, None)?;
    make_disk(&disks[1], "image", 4 * IMAGE_BYTES, Some(&image))?;
    let initramfs = dir.path().join("initramfs.cpio");
    archive::write_initramfs(&initramfs, &program)?;
    machine::run(kernel, &initramfs, &disks, filter)
}

/// The guest's program, without anything that must be loaded.
fn build_program() -> Result<PathBuf> {
    let status = cargo()
        .args(["rustc", "--locked", "--quiet", "--package", "pantala-lazy"])
        .args(["--example", "guest", "--"])
        .args(["-Ctarget-feature=+crt-static", "-Cstrip=debuginfo"])
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building the guest's program failed ({status})");
    }
    Ok(target_dir().join("debug/examples/guest"))
}

/// A file with an ext4 file system, mounted by its label in the guest, of what lies in `content`.
fn make_disk(path: &Path, label: &str, size_bytes: u64, content: Option<&Path>) -> Result<()> {
    std::fs::File::create(path)?.set_len(size_bytes)?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F", "-L", label]);
    if let Some(content) = content {
        command.arg("-d").arg(content);
    }
    packages::run(command.arg(path))
}
