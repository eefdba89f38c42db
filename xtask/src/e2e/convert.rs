//! `pantala convert` against real registries, and what the kernel makes of the result.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use super::stage::{Guard, GuardedRegistry, NAME, PULL_MAX};
use super::{Outcome, Stage, Test, test};
use crate::rig::enclosure;
use crate::rig::image::digest_of;
use crate::rig::machine::Machine;
use crate::rig::process::run_to_end;
use crate::rig::skopeo;

/// Several layers of some thousand files.
const IMAGE_MB: u64 = 24;
/// mkfs.erofs and hashing of that, on a busy machine.
const CONVERT_MAX: Duration = Duration::from_secs(120);
/// The annotation that names a metadata layer's devices.
const DEVICES: &str = "containerd.io/snapshot/pantala.erofs.devices";
/// The converted image's name in the registry.
const TARGET: &str = "team/lazy:v1";

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!(
            "convert: plain registry, and the same digests again",
            |stage| convert(stage, Guard::Plain)
        ),
        test!("convert: registry with a password", |stage| convert(
            stage,
            Guard::Basic
        )),
        test!("convert: registry with tokens", |stage| convert(
            stage,
            Guard::Token
        )),
        test!("convert: registry with TLS", |stage| convert(
            stage,
            Guard::Tls
        )),
    ]
}

async fn convert(stage: &Stage, guard: Guard) -> Result<Outcome> {
    if !enclosure::is_root() {
        return Ok(Outcome::Missed(
            "only root can keep owners and mount".into(),
        ));
    }
    if std::process::Command::new("mkfs.erofs")
        .arg("--help")
        .output()
        .is_err()
    {
        return Ok(Outcome::Missed("mkfs.erofs (erofs-utils)".into()));
    }
    let image = stage.image(IMAGE_MB)?;
    let guarded = stage.registry(guard).await?;
    guarded.registry.push(&image, NAME).await?;
    let machine = stage.rig.machine("builder")?;
    let first = run_convert(stage, &machine, &guarded).await?;
    let second = run_convert(stage, &machine, &guarded).await?;
    ensure!(
        first["digest"] == second["digest"],
        "{first} and then {second}"
    );
    ensure!(second["pushed_bytes"] == 0, "pushed again: {second}");

    let copy = machine.dir().join("copy");
    let url = guarded.registry.url();
    skopeo::copy(
        &machine,
        &url,
        None,
        TARGET,
        guarded.login.as_deref(),
        &copy,
        PULL_MAX,
    )
    .await?
    .ok("skopeo copy")?;
    let (digest, _) = digest_of(&copy.join("manifest.json"))?;
    ensure!(
        first["digest"] == digest.as_str(),
        "{first}, and the registry has {digest}"
    );
    let manifest: Value = serde_json::from_slice(&fs::read(copy.join("manifest.json"))?)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let metadata = layers
        .iter()
        .filter(|layer| !layer["annotations"][DEVICES].is_null());
    ensure!(metadata.clone().count() == image.layers.len(), "{manifest}");
    for (index, (layer, source)) in metadata.zip(&image.layers).enumerate() {
        let file = |digest: &Value| {
            digest
                .as_str()
                .map(|digest| copy.join(digest.trim_start_matches("sha256:")))
        };
        let image_file = file(&layer["digest"]).context("no digest")?;
        let device = file(&layer["annotations"][DEVICES]).context("no device")?;
        let at = machine.dir().join(format!("mnt-{index}"));
        let mounted = Mounted::new(&image_file, &device, at)?;
        let plain = machine.dir().join(format!("plain-{index}"));
        fs::create_dir(&plain)?;
        let mut tar = std::process::Command::new("tar");
        tar.arg("-xpf")
            .arg(image.path_of(source))
            .arg("-C")
            .arg(&plain);
        run_to_end(tar, PULL_MAX).await?.ok("tar")?;
        let files = same_trees(&plain, &mounted.0)?;
        ensure!(files > 0, "layer {index} is empty");
        fs::remove_dir_all(&plain)?;
    }
    Ok(Outcome::Passed)
}

/// Runs the command on `machine`, and returns what it prints.
async fn run_convert(stage: &Stage, machine: &Machine, guarded: &GuardedRegistry) -> Result<Value> {
    let url = guarded.registry.url();
    let host = url
        .split_once("://")
        .map_or(url.as_str(), |(_, host)| host)
        .to_owned();
    let mut command = machine.command(&stage.programs.node);
    command
        .arg("convert")
        .arg(format!("{host}/{NAME}"))
        .arg(format!("{host}/{TARGET}"));
    command
        .args(["--no-node", "--json", "--work-dir"])
        .arg(machine.dir());
    command.arg("--auth-file");
    command.arg(skopeo::write_auth_file(
        machine.dir(),
        &[&url],
        guarded.login.as_deref(),
    )?);
    match &guarded.registry.ca_file {
        Some(ca_file) => {
            let config = machine.dir().join("convert.toml");
            let text = format!(
                "[registries.\"{host}\"]\nca_file = \"{}\"\n",
                ca_file.display()
            );
            fs::write(&config, text)?;
            command.arg("--config").arg(config);
        }
        None => {
            command.args(["--plain-http", "--target-plain-http"]);
        }
    }
    let finished = run_to_end(command, CONVERT_MAX)
        .await?
        .ok("pantala convert")?;
    serde_json::from_str(&finished.output).with_context(|| finished.output.clone())
}

/// A mount of an EROFS image with its device, by mount(2) itself.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, device: &Path, at: PathBuf) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let options = CString::new(format!("device={}", device.display()))?;
        mount(
            image,
            &at,
            "erofs",
            MountFlags::RDONLY,
            Some(options.as_c_str()),
        )
        .with_context(|| format!("mounting {} with {options:?}", image.display()))?;
        Ok(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Nothing can be done about a mount that stays, and the rig's end takes its namespace along.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Compares two trees, and returns how many files they have.
fn same_trees(one: &Path, other: &Path) -> Result<usize> {
    let mut files = 0;
    let names = |dir: &Path| -> Result<Vec<_>> {
        let mut names: Vec<_> = fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    };
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let here = names(&one.join(&dir))?;
        ensure!(
            here == names(&other.join(&dir))?,
            "{} differs",
            dir.display()
        );
        for name in here {
            let path = dir.join(name);
            let (a, b) = (one.join(&path), other.join(&path));
            let (meta, meta_b) = (fs::symlink_metadata(&a)?, fs::symlink_metadata(&b)?);
            let told = |meta: &fs::Metadata| (meta.mode(), meta.uid(), meta.gid(), meta.mtime());
            // A directory that the archive takes for granted has the time at which tar made it.
            let is_dir = meta.is_dir();
            let told_b = told(&meta_b);
            ensure!(
                is_dir || told(&meta) == told_b,
                "{}: {:?}, {told_b:?}",
                path.display(),
                told(&meta)
            );
            if is_dir {
                dirs.push(path);
            } else if meta.is_symlink() {
                ensure!(
                    fs::read_link(&a)? == fs::read_link(&b)?,
                    "{}",
                    path.display()
                );
            } else if meta.is_file() {
                files += 1;
                ensure!(digest_of(&a)? == digest_of(&b)?, "{}", path.display());
            }
        }
    }
    Ok(files)
}
