//! skopeo, and the configuration that it shares with podman: mirrors, logins, authorities.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::image::Image;
use super::machine::Machine;
use super::process::{Finished, run_to_end};

/// `host:port` of a URL.
fn authority(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, rest)| rest)
}

/// `registries.conf` that sends pulls of `registry` (a URL) to `mirror` (a URL) first.
pub(crate) fn write_registries_conf(dir: &Path, registry: &str, mirror: &str) -> Result<PathBuf> {
    let path = dir.join("registries.conf");
    fs::write(
        &path,
        format!(
            "unqualified-search-registries = []\n[[registry]]\nprefix = {0:?}\nlocation = {0:?}\ninsecure = true\n[[registry.mirror]]\nlocation = {1:?}\ninsecure = true\n",
            authority(registry),
            authority(mirror)
        ),
    )?;
    Ok(path)
}

/// An authentication file with `login` (`user:password`) for the registry and its mirror.
pub(crate) fn write_auth_file(dir: &Path, hosts: &[&str], login: Option<&str>) -> Result<PathBuf> {
    let path = dir.join("auth.json");
    let mut auths = serde_json::Map::new();
    if let Some(login) = login {
        for host in hosts {
            auths.insert(
                authority(host).to_owned(),
                json!({"auth": BASE64_STANDARD.encode(login)}),
            );
        }
    }
    fs::write(&path, json!({"auths": auths}).to_string())?;
    Ok(path)
}

/// `skopeo copy docker://FROM/NAME dir:TO`, through registries.conf where a mirror is to be used,
/// else straight from `from` (a URL).
pub(crate) async fn copy(
    machine: &Machine,
    from: &str,
    mirror: Option<&str>,
    name: &str,
    login: Option<&str>,
    to: &Path,
    limit: Duration,
) -> Result<Finished> {
    let hosts: Vec<&str> = [Some(from), mirror].into_iter().flatten().collect();
    let mut command = machine.command("skopeo");
    command.arg("--insecure-policy");
    if let Some(mirror) = mirror {
        command
            .arg("--registries-conf")
            .arg(write_registries_conf(machine.dir(), from, mirror)?);
    }
    command.args([
        "copy",
        "--src-tls-verify=false",
        "--preserve-digests",
        "--authfile",
    ]);
    command.arg(write_auth_file(machine.dir(), &hosts, login)?);
    command.arg(format!("docker://{}/{name}", authority(from)));
    let mut target = std::ffi::OsString::from("dir:");
    target.push(to);
    command.arg(target);
    run_to_end(command, limit).await
}

/// Checks a `dir:` copy byte by byte.
pub(crate) fn verify(image: &Image, dir: &Path) -> Result<()> {
    // `dir:` keeps the manifest under a name of its own.
    let manifest = dir.join(image.manifest.digest.trim_start_matches("sha256:"));
    fs::copy(dir.join("manifest.json"), manifest)?;
    image.verify_files(dir)
}
