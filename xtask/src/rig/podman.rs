//! `podman pull` into a storage of its own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::machine::Machine;
use super::process::{Finished, run_to_end};
use super::skopeo::{write_auth_file, write_registries_conf};

const INSPECT_MAX: Duration = Duration::from_secs(60);

/// podman on one machine.
#[derive(Debug)]
pub(crate) struct Podman {
    machine: Machine,
    root: PathBuf,
}

impl Podman {
    /// Needs the rig's private `/run`, so root.
    pub(crate) fn new(machine: &Machine) -> Self {
        Self {
            machine: machine.clone(),
            root: machine.dir().join("podman"),
        }
    }

    fn command(&self) -> Command {
        let mut command = self.machine.command("podman");
        command.arg("--root").arg(self.root.join("root"));
        // podman takes no path of more than 50 characters here.
        command
            .arg("--runroot")
            .arg(format!("/run/{}/podman", self.machine.address()));
        command.arg("--tmpdir").arg(self.root.join("tmp"));
        // vfs works on every file system; cgroupfs needs no systemd.
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
        command.args(["--events-backend", "none"]);
        command
    }

    /// `podman pull` of `repository:tag` of `registry` (a URL) through `mirror` (a URL). Returns the
    /// run, and the digest that podman says the manifest has.
    pub(crate) async fn pull(
        &self,
        registry: &str,
        mirror: &str,
        name: &str,
        login: Option<&str>,
        limit: Duration,
    ) -> Result<(Finished, String)> {
        std::fs::create_dir_all(self.root.join("tmp"))?;
        let dir = self.machine.dir();
        let conf = write_registries_conf(dir, registry, mirror)?;
        let policy = dir.join("policy.json");
        std::fs::write(
            &policy,
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        )?;
        let authority = registry
            .split_once("://")
            .map_or(registry, |(_, rest)| rest);
        let reference = format!("{authority}/{name}");
        let mut command = self.command();
        command.env("CONTAINERS_REGISTRIES_CONF", &conf);
        command
            .args(["pull", "--tls-verify=false", "--signature-policy"])
            .arg(&policy);
        command
            .arg("--authfile")
            .arg(write_auth_file(dir, &[registry, mirror], login)?);
        command.arg(&reference);
        let finished = run_to_end(command, limit).await?.ok("podman pull")?;
        let mut inspect = self.command();
        inspect.args(["image", "inspect", "--format", "{{.Digest}}", &reference]);
        let inspected = run_to_end(inspect, INSPECT_MAX)
            .await?
            .ok("podman image inspect")?;
        let digest = inspected
            .output
            .lines()
            .find(|line| line.starts_with("sha256:"))
            .context("podman names no digest")?;
        Ok((finished, digest.trim().to_owned()))
    }
}
