//! Unsafe code under AddressSanitizer: the ring's tests, over a kernel that gives memory back late or never, and over the
//! real one.

use std::process::Command;

use anyhow::{Context, Result};

use super::steps::run;
use super::{Options, Outcome};
use crate::cargo::{cargo, workspace_root};

/// Where the compiler has its sanitizers, and they are told of by an option that is not stable yet.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The step of `cargo xtask test`.
pub(super) fn address(_: &Options) -> Result<Outcome> {
    if !has_runtime()? {
        return Ok(Outcome::Missed(format!(
            "unsafe code under AddressSanitizer: this compiler has none for {TARGET}"
        )));
    }
    let target_dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(
            || workspace_root().join("target"),
            |dir| workspace_root().join(dir),
        )
        .join("sanitizer");
    run(cargo()
        .args(["test", "--locked", "--quiet", "--package", "pantala-uring"])
        .args(["--target", TARGET, "--lib", "--tests"])
        .env("CARGO_TARGET_DIR", target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // Memory that a kernel keeps for ever is leaked on purpose.
        .env("ASAN_OPTIONS", "detect_leaks=0"))
}

/// Whether the compiler came with the sanitizer's library; those of some distributions do not.
fn has_runtime() -> Result<bool> {
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .context("starting rustc")?;
    let folder = String::from_utf8_lossy(&output.stdout);
    let files = std::fs::read_dir(folder.trim());
    Ok(cfg!(target_arch = "x86_64")
        && files.is_ok_and(|files| {
            files
                .flatten()
                .any(|file| file.file_name().to_string_lossy().contains("_rt.asan"))
        }))
}
