//! The Debian packages with the real programs that demo, tests and benchmarks run.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::rig::enclosure::is_root;
use crate::rig::machine::search_path;

/// A program and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needed {
    program: &'static str,
    package: &'static str,
}

const fn needed(program: &'static str, package: &'static str) -> Needed {
    Needed { program, package }
}

/// What every rig needs.
pub(crate) const BASE: &[Needed] = &[
    needed("docker-registry", "docker-registry"),
    needed("skopeo", "skopeo"),
    needed("setpriv", "util-linux"),
    needed("ldd", "libc-bin"),
];
/// What a rig with namespaces and containerd needs besides.
pub(crate) const ROOT: &[Needed] = &[
    needed("containerd", "containerd"),
    needed("runc", "runc"),
    needed("ip", "iproute2"),
    needed("unshare", "util-linux"),
    needed("nsenter", "util-linux"),
    needed("mount", "mount"),
];
/// What the end-to-end tests need besides.
pub(crate) const TESTS: &[Needed] = &[
    needed("podman", "podman"),
    needed("diff", "diffutils"),
    needed("mkfs.erofs", "erofs-utils"),
    needed("python3", "python3"),
];
/// What the fuzz targets need: libFuzzer comes with its crate, as C++.
pub(crate) const FUZZ: &[Needed] = &[needed("c++", "g++")];
/// What the benchmarks need besides.
pub(crate) const PERF: &[Needed] = &[needed("nginx", "nginx-light"), needed("curl", "curl")];
/// What `perf profile` needs.
pub(crate) const PROFILE: &[Needed] = &[needed("perf", "linux-perf")];
/// What `perf transfer` needs.
pub(crate) const TRANSFER: &[Needed] = &[
    needed("nginx", "nginx-light"),
    needed("ethtool", "ethtool"),
    needed("taskset", "util-linux"),
    needed("setpriv", "util-linux"),
];

fn is_installed(program: &str) -> bool {
    search_path()
        .split(':')
        .any(|dir| Path::new(dir).join(program).is_file())
}

/// Sees to it that all programs are there: installs them as root, else says how.
pub(crate) fn ensure(lists: &[&[Needed]]) -> Result<()> {
    let mut missing: Vec<Needed> = lists
        .iter()
        .copied()
        .flatten()
        .copied()
        .filter(|needed| !is_installed(needed.program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    missing.sort_by_key(|needed| needed.package);
    missing.dedup_by_key(|needed| needed.package);
    let packages: Vec<&str> = missing.iter().map(|needed| needed.package).collect();
    let line = format!(
        "apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    if !is_root() {
        bail!("programs are missing; as root, run:\n\n    {line}\n");
    }
    if !is_installed("apt-get") {
        let programs: Vec<&str> = missing.iter().map(|needed| needed.program).collect();
        bail!(
            "these programs are missing, and this is no Debian machine: {}",
            programs.join(", ")
        );
    }
    println!("installing what is missing: {line}");
    if !apt(&[
        &["install", "-y", "--no-install-recommends"],
        packages.as_slice(),
    ]
    .concat())?
    {
        // A fresh machine has no lists of packages yet.
        apt(&["update"])?;
        if !apt(&[
            &["install", "-y", "--no-install-recommends"],
            packages.as_slice(),
        ]
        .concat())?
        {
            bail!("apt-get could not install the packages; run it by hand:\n\n    {line}\n");
        }
    }
    Ok(())
}

fn apt(arguments: &[&str]) -> Result<bool> {
    // Debian's docker-registry and nginx would start as services otherwise.
    let status = Command::new("apt-get")
        .args(["-q", "-o", "Dpkg::Use-Pty=0"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .status()
        .context("starting apt-get")?;
    Ok(status.success())
}
