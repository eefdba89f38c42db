//! What the machine says about itself. No judgement here; what cannot be read is absent.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pantala_lazy::backend::fanotify::probe;
use pantala_meter::kernel::{KernelConfig, KernelMeter};
use rustix::process::{Resource, getrlimit};

use super::super::setup::containerd::{self, CertsDir};
use crate::config::{Config, MeterKernel};
use crate::lazy::record::Records;

/// containerd's usual directory of registry settings.
pub(super) const CERTS_DIR: &str = "/etc/containerd/certs.d";

/// Everything that the checks judge.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) kernel: String,
    /// Whether the ring driver works here, or why not.
    pub(super) io_uring: Result<(), String>,
    /// What came of trying a lazy mount; only root can try.
    pub(super) lazy: Option<Result<(), String>>,
    /// Directories of lazy mounts that were found poisoned.
    pub(super) poisoned: Vec<String>,
    /// Whether the kernel counts and steers for this user, or why not.
    pub(super) meter: Result<(), String>,
    pub(super) is_root: bool,
    pub(super) capabilities: u64,
    pub(super) rmem_max_bytes: Option<u64>,
    pub(super) wmem_max_bytes: Option<u64>,
    pub(super) disk: Result<Disk, String>,
    pub(super) open_files_max: Option<u64>,
    pub(super) since_1970: Duration,
    pub(super) unreadable_files: Vec<String>,
    pub(super) containerd: Option<String>,
    pub(super) certs_dir: CertsDir,
    pub(super) mirrored: Vec<String>,
}

/// Where the data is or will be.
#[derive(Debug)]
pub(super) struct Disk {
    /// The data directory, or its nearest parent that exists.
    pub(super) path: PathBuf,
    pub(super) file_system: u64,
    pub(super) total_bytes: u64,
    pub(super) free_bytes: u64,
}

impl Facts {
    pub(super) fn collect(config: &Config, containerd_config: &Path) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let of_status = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name))?;
            line.split_whitespace().nth(1).map(str::to_owned)
        };
        let is_root = rustix::process::geteuid().is_root();
        let disk = disk(&config.data_dir);
        Self {
            lazy: disk
                .as_ref()
                .ok()
                .filter(|_| is_root)
                .map(|disk| probe::probe(&disk.path).map_err(|unable| unable.to_string())),
            poisoned: poisoned(&config.data_dir),
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            io_uring: pantala_quic::probe_ring(),
            meter: meter(config),
            is_root,
            capabilities: of_status("CapEff:")
                .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
                .unwrap_or(0),
            rmem_max_bytes: number("/proc/sys/net/core/rmem_max"),
            wmem_max_bytes: number("/proc/sys/net/core/wmem_max"),
            disk,
            open_files_max: getrlimit(Resource::Nofile).current,
            since_1970: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
            unreadable_files: named_files(config)
                .filter_map(|path| {
                    let error = std::fs::File::open(path).err()?;
                    Some(format!("{}: {error}", path.display()))
                })
                .collect(),
            containerd: containerd_version(),
            certs_dir: containerd::check(containerd_config, Path::new(CERTS_DIR)),
            mirrored: mirrored(Path::new(CERTS_DIR)),
        }
    }
}

fn poisoned(data_dir: &Path) -> Vec<String> {
    let records = Records::new(data_dir.join("lazy/mounts")).read();
    // Closed to this user, or none: nothing that can be told of.
    let records = records.unwrap_or_default().into_iter();
    let poisoned = records.filter(|record| record.poisoned);
    poisoned
        .map(|record| record.at.display().to_string())
        .collect()
}

/// Loads the programs as a node would, and takes them away again.
fn meter(config: &Config) -> Result<(), String> {
    if config.meter.kernel == MeterKernel::Off {
        return Err("meter.kernel is \"off\"".into());
    }
    KernelMeter::load(&KernelConfig::default())
        .map(drop)
        .map_err(|error| error.to_string())
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn disk(data_dir: &Path) -> Result<Disk, String> {
    let existing = data_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let fail = |doing: &str, e: &dyn std::fmt::Display| {
        format!("cannot {doing} {}: {e}", existing.display())
    };
    if !existing.is_dir() {
        return Err(format!("{} is not a directory", existing.display()));
    }
    // An anonymous file: it tries what matters (space, rights, a read-only mount) and leaves nothing.
    tempfile::tempfile_in(existing).map_err(|e| fail("write to", &e))?;
    let space = rustix::fs::statvfs(existing).map_err(|e| fail("examine", &e))?;
    let kind = rustix::fs::statfs(existing).map_err(|e| fail("examine", &e))?;
    Ok(Disk {
        path: existing.to_owned(),
        file_system: u64::try_from(kind.f_type).unwrap_or(0),
        total_bytes: space.f_blocks.saturating_mul(space.f_frsize),
        free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
    })
}

/// The files that the configuration names and the node must be able to read.
fn named_files(config: &Config) -> impl Iterator<Item = &Path> {
    let tls = config.mirror.tls.iter();
    tls.flat_map(|tls| [&tls.certificate, &tls.key])
        .chain(config.control.token_file.iter())
        .chain(config.registries.values().flat_map(|r| r.ca_file.iter()))
        .map(PathBuf::as_path)
}

fn containerd_version() -> Option<String> {
    let output = Command::new("containerd").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "containerd github.com/containerd/containerd 1.6.20 <commit>"
    text.split_whitespace().nth(2).map(str::to_owned)
}

/// The registries with a `hosts.toml` of ours.
fn mirrored(certs_dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(certs_dir).into_iter().flatten().flatten();
    let mut hosts: Vec<String> = entries
        .filter(|entry| {
            std::fs::read_to_string(entry.path().join("hosts.toml"))
                .is_ok_and(|text| super::super::setup::is_set_up(&text))
        })
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    hosts.sort();
    hosts
}
