//! nydusd: an image converted with nydus-image, mounted through a mirror or a forward proxy.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::files::gather;
use super::image::{BlobFile, Image, digest_of};
use super::machine::{Machine, run, search_path};
use super::process::{Process, run_to_end};
use super::registry::Registry;

/// Names the nydusd to use; `nydus-image` is looked for beside it.
const VARIABLE: &str = "PANTALA_NYDUSD";
/// Where a build is kept: `cargo install --root /var/cache/pantala/nydus nydus-rs --version 2.2.0`.
const CACHE: &str = "/var/cache/pantala/nydus/bin";
const CONVERT_MAX: Duration = Duration::from_secs(120);
const MOUNT_MAX: Duration = Duration::from_secs(30);

/// The two programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    nydusd: PathBuf,
    image: PathBuf,
}

/// Finds nydusd, or says what to do about it.
pub(crate) fn find() -> Result<Programs, String> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    let path = search_path();
    let candidates = named
        .into_iter()
        .chain(path.split(':').map(|dir| Path::new(dir).join("nydusd")))
        .chain([Path::new(CACHE).join("nydusd")]);
    for nydusd in candidates {
        let image = nydusd.with_file_name("nydus-image");
        if nydusd.is_file() && image.is_file() {
            return Ok(Programs { nydusd, image });
        }
    }
    Err(format!(
        "nydusd and nydus-image are not in ${VARIABLE}, PATH or {CACHE}; build them with \
         `cargo install --locked --root /var/cache/pantala/nydus nydus-rs --version 2.2.0` (needs cmake)"
    ))
}

/// How nydusd is to reach the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// `mirrors`, up to 2.3.4: the mirror stands in for the registry.
    Mirror,
    /// `proxy`, since 2.3.5 the only one: a plain HTTP forward proxy.
    Proxy,
}

/// An image in nydus' format.
#[derive(Debug, Clone)]
pub(crate) struct NydusImage {
    programs: Programs,
    source: PathBuf,
    bootstrap: PathBuf,
    blob: PathBuf,
    /// `sha256:...` of the blob.
    pub(crate) digest: String,
}

impl NydusImage {
    /// Converts the directory `source` (of some MB of files) with `nydus-image`.
    pub(crate) async fn convert(
        programs: &Programs,
        machine: &Machine,
        source: &Path,
        dir: &Path,
    ) -> Result<Self> {
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs)?;
        let bootstrap = dir.join("boot");
        let mut command = machine.command(&programs.image);
        command
            .args(["create", "-t", "directory", "-v", "6", "-B"])
            .arg(&bootstrap);
        command.arg("-D").arg(&blobs).arg(source);
        run_to_end(command, CONVERT_MAX)
            .await?
            .ok("nydus-image create")?;
        let blob = fs::read_dir(&blobs)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.is_file())
            .context("nydus-image made no blob")?;
        let (digest, _) = digest_of(&blob)?;
        Ok(Self {
            programs: programs.clone(),
            source: source.to_owned(),
            bootstrap,
            blob,
            digest,
        })
    }

    /// Puts the blob into `repository`, wrapped into an image, with skopeo.
    pub(crate) async fn push(&self, guarded: &Registry, repository: &str) -> Result<()> {
        let layer = BlobFile {
            digest: self.digest.clone(),
            bytes: fs::metadata(&self.blob)?.len(),
        };
        let dir = self.blob.with_file_name("layout");
        let image = Image::wrap(&dir, &self.blob, layer)?;
        guarded.push(&image, &format!("{repository}:v1")).await
    }

    /// Mounts the image on `machine` through `mirror` (a URL) and compares every file with the
    /// source's. `header` is the registry's URL as the mirror's configuration names it.
    pub(crate) async fn mount_and_compare(
        &self,
        machine: &Machine,
        registry: &str,
        repository: &str,
        mirror: &str,
        mode: Mode,
        login: Option<&str>,
    ) -> Result<()> {
        let dir = machine.dir().join(format!("nydus-{mode:?}").to_lowercase());
        let mount_point = dir.join("mnt");
        fs::create_dir_all(&mount_point)?;
        fs::create_dir_all(dir.join("cache"))?;
        let (scheme, host) = registry
            .split_once("://")
            .context("the registry is a URL")?;
        let mut backend = json!({
            "scheme": scheme, "host": host, "repo": repository, "skip_verify": true,
            "timeout": 5, "connect_timeout": 5, "retry_limit": 0,
        });
        match login {
            Some(login) => backend["auth"] = BASE64_STANDARD.encode(login).into(),
            // Without credentials, 2.2 goes past its mirrors.
            None => backend["registry_token"] = "dummy".into(),
        }
        match mode {
            Mode::Mirror => {
                backend["mirrors"] = json!([{
                    "host": mirror, "headers": {"X-Dragonfly-Registry": registry},
                    "ping_url": format!("{mirror}/server/ping"),
                    "health_check_interval": 5, "auth_through": false,
                }]);
            }
            Mode::Proxy => {
                backend["proxy"] = json!({
                    "url": mirror, "ping_url": format!("{mirror}/server/ping"),
                    "fallback": false, "check_interval": 5, "use_http": true,
                });
            }
        }
        let config = json!({
            "device": {
                "backend": {"type": "registry", "config": backend},
                "cache": {"type": "blobcache", "config": {"work_dir": dir.join("cache")}},
            },
            "mode": "direct", "digest_validate": false, "iostats_files": false,
            "enable_xattr": true, "fs_prefetch": {"enable": false},
        });
        let config_file = dir.join("nydusd.json");
        fs::write(&config_file, config.to_string())?;
        let mut command = machine.command(&self.programs.nydusd);
        command.arg("--config").arg(&config_file);
        command.arg("--bootstrap").arg(&self.bootstrap);
        command.arg("--mountpoint").arg(&mount_point);
        // In the rig's private /run (nydusd mounts, so this runs as root): a socket's path has at
        // most 107 bytes, and those of the rig's directory grow with process numbers.
        let run = Path::new("/run").join(machine.address().to_string());
        fs::create_dir_all(&run)?;
        command.arg("--apisock").arg(run.join("nydusd.sock"));
        command.args(["--rlimit-nofile", "0", "--log-level", "info"]);
        let mut process = Process::start("nydusd", command, &dir.join("nydusd.log"))?;
        let mounted = mount_point.clone();
        let _unmount = Unmount(mount_point.clone());
        process
            .wait_until("mounted the image", MOUNT_MAX, async || {
                fs::read_dir(&mounted).is_ok_and(|mut entries| entries.next().is_some())
            })
            .await?;
        let mut compare = machine.command("diff");
        compare
            .args(["-r", "--no-dereference"])
            .arg(&self.source)
            .arg(&mount_point);
        run_to_end(compare, CONVERT_MAX)
            .await?
            .ok("comparing the mounted files with the originals")
            .with_context(|| process.log_tail())?;
        Ok(())
    }
}

/// Copies `bytes` of real files below `dir`, as the content of an image.
pub(crate) fn gather_source(dir: &Path, bytes: u64) -> Result<()> {
    for file in gather(bytes) {
        let target = dir.join(file.path.strip_prefix("/").unwrap_or(&file.path));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(&file.path, &target)
            .with_context(|| format!("copying {}", file.path.display()))?;
    }
    Ok(())
}

/// Unmounts before nydusd is killed, so that the mount point can be removed.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &["-l", &self.0.display().to_string()]) {
            eprintln!("{error:#}");
        }
    }
}
