//! `cargo xtask ebpf`: builds the kernel programs, and the step that compares them with what is committed.
//!
//! The compiler is Debian's, which has a `core` for the kernel's virtual machine, so that nobody needs a nightly
//! one; the linker is built against the same LLVM, once, below `target/ebpf`. The result depends on neither the
//! folder nor the machine, so it is committed, and every build embeds the same bytes.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo::{cargo, target_dir, workspace_root};
use crate::check::Outcome;
use crate::packages;

/// Debian's compiler: the one with `core` for the target.
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
const LINKER_VERSION: &str = "0.13.0";
/// What is committed.
const OBJECT: &str = "ebpf/pantala.bpf.o";
/// Crates that may use what this target lacks in the stable language: inline assembly and its helpers.
const UNSTABLE_CRATES: &str = "aya_ebpf,pantala_ebpf";

/// Options of `cargo xtask ebpf`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Compare with the committed object and change nothing
    #[arg(long)]
    check: bool,
}

/// `cargo xtask ebpf`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let built = build()?;
    let committed = workspace_root().join(OBJECT);
    if options.check {
        compare(&built, &committed)?;
        println!("{OBJECT} is what ebpf/ builds");
        return Ok(ExitCode::SUCCESS);
    }
    let bytes =
        fs::copy(&built, &committed).with_context(|| format!("writing {}", committed.display()))?;
    println!("{OBJECT}: {bytes} bytes");
    Ok(ExitCode::SUCCESS)
}

/// The step of `cargo xtask test`.
pub(crate) fn check(_: &crate::check::Options) -> Result<Outcome> {
    if let Err(error) = packages::ensure(&[packages::EBPF]).and_then(|()| linker().map(drop)) {
        return Ok(Outcome::Missed(format!(
            "whether {OBJECT} is what ebpf/ builds: {error:#}"
        )));
    }
    for arguments in [
        &["fmt", "--all", "--check"][..],
        &[
            "test",
            "--locked",
            "--quiet",
            "--package",
            "pantala-ebpf-common",
            "--target",
            host(),
        ],
    ] {
        let status = ebpf_cargo().args(arguments).status()?;
        if !status.success() {
            return Ok(Outcome::Failed(format!(
                "cargo {} in ebpf: {status}",
                arguments.join(" ")
            )));
        }
    }
    let built = build()?;
    Ok(match compare(&built, &workspace_root().join(OBJECT)) {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    })
}

/// The target that this program was built for, which the shared types are tested on.
fn host() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "aarch64-unknown-linux-gnu"
    } else {
        "x86_64-unknown-linux-gnu"
    }
}

fn compare(built: &Path, committed: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    if read(built)? != read(committed)? {
        bail!("{OBJECT} is not what ebpf/ builds: run `cargo xtask ebpf` and commit the result");
    }
    Ok(())
}

fn dir() -> PathBuf {
    target_dir().join("ebpf")
}

/// cargo in the folder of the programs, which is a workspace with a target of its own.
fn ebpf_cargo() -> Command {
    let mut command = cargo();
    command
        .current_dir(workspace_root().join("ebpf"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", dir().join("programs"));
    command
}

/// Builds the programs; where they lie.
fn build() -> Result<PathBuf> {
    packages::ensure(&[packages::EBPF])?;
    let linker = linker()?;
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    // No path of this machine shall be in the object, nor any debugging information.
    let flags = [
        format!("--remap-path-prefix={}=.", workspace_root().display()),
        format!("--remap-path-prefix={}=cargo", home.display()),
        format!("-Clinker={}", linker.display()),
        "-Cdebuginfo=0".into(),
        "-Cstrip=debuginfo".into(),
    ];
    let status = ebpf_cargo()
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--package", "pantala-ebpf", "--target", TARGET])
        .env("RUSTC", RUSTC)
        .env("RUSTC_BOOTSTRAP", UNSTABLE_CRATES)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building the kernel programs failed ({status})");
    }
    Ok(dir()
        .join("programs")
        .join(TARGET)
        .join("release/pantala-ebpf"))
}

/// The linker, built against the LLVM of the compiler.
fn linker() -> Result<PathBuf> {
    let root = dir();
    let linker = root.join("bin/bpf-linker");
    let version = Command::new(&linker).arg("--version").output();
    if version.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains(LINKER_VERSION)) {
        return Ok(linker);
    }
    let llvm = llvm_major()?;
    let library = find_llvm(&llvm)?;
    let prefix = root.join("llvm");
    let lib = prefix.join("lib");
    fs::create_dir_all(&lib)?;
    let own_name = library.file_name().context("a library has a name")?;
    for name in ["libLLVM.so".as_ref(), own_name] {
        let link = lib.join(name);
        // Left by an earlier attempt, maybe to another version.
        let _ = fs::remove_file(&link);
        symlink(&library, &link).with_context(|| format!("linking {}", link.display()))?;
    }
    println!("building bpf-linker {LINKER_VERSION}, once");
    let status = cargo()
        .args([
            "install",
            "bpf-linker",
            "--quiet",
            "--locked",
            "--version",
            LINKER_VERSION,
        ])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ])
        .arg("--root")
        .arg(&root)
        .arg("--target-dir")
        .arg(root.join("build"))
        .env("LLVM_PREFIX", &prefix)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building bpf-linker {LINKER_VERSION} failed ({status})");
    }
    Ok(linker)
}

/// The version of LLVM in the compiler.
fn llvm_major() -> Result<String> {
    let output = Command::new(RUSTC).arg("-vV").output();
    let output = output.with_context(|| format!("starting {RUSTC}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .with_context(|| format!("{RUSTC} does not say which LLVM it has"))?;
    Ok(version.split('.').next().unwrap_or_default().to_owned())
}

fn find_llvm(major: &str) -> Result<PathBuf> {
    let prefix = format!("libLLVM.so.{major}");
    for place in ["x86_64-linux-gnu", "aarch64-linux-gnu"] {
        let found = fs::read_dir(Path::new("/usr/lib").join(place))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            });
        if let Some(found) = found {
            return Ok(found);
        }
    }
    bail!("no {prefix} in /usr/lib: the package libllvm{major} has it");
}
