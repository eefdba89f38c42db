//! containerd and `ctr`, one daemon to a machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cri;
use super::enclosure::rig_name;
use super::image::Image;
use super::machine::{Machine, run};
use super::process::{Finished, Process, run_to_end};

const START_MAX: Duration = Duration::from_secs(30);
const CTR_MAX: Duration = Duration::from_secs(60);
/// The registry's name in image references: `?ns=` of every request.
pub(crate) const REGISTRY_NAME: &str = "registry.test:5000";

/// What a snapshotter of ours is called.
pub(crate) const SNAPSHOTTER: &str = "pantala";

/// What a containerd is started with besides the usual.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plugins {
    /// The socket of a snapshotter, which is called [`SNAPSHOTTER`].
    pub(crate) snapshotter: Option<PathBuf>,
    /// Kubernetes' interface, with that snapshotter.
    pub(crate) cri: Option<Cri>,
}

/// How CRI is set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cri {
    /// Whether it tells the snapshotter which image it pulls.
    pub(crate) annotates: bool,
}

impl Plugins {
    fn disabled(&self) -> String {
        let cri = match self.cri {
            Some(_) => "",
            None => "\"io.containerd.grpc.v1.cri\", ",
        };
        format!("disabled_plugins = [{cri}\"io.containerd.internal.v1.opt\"]\n")
    }

    fn tables(&self, dir: &Path) -> String {
        let mut text = String::new();
        if let Some(socket) = &self.snapshotter {
            text.push_str(&format!(
                "[proxy_plugins.{SNAPSHOTTER}]\ntype = \"snapshot\"\naddress = {socket:?}\n"
            ));
        }
        if let Some(cri) = self.cri {
            let table = "[plugins.\"io.containerd.grpc.v1.cri\"";
            // Directories of its own, because it makes those that it does not find.
            text.push_str(&format!(
                "{table}]\nstream_server_address = \"127.0.0.1\"\n{table}.cni]\nconf_dir = {0:?}\nbin_dir = {0:?}\n\
                 {table}.containerd]\nsnapshotter = \"{SNAPSHOTTER}\"\ndisable_snapshot_annotations = {1}\n\
                 {table}.registry]\nconfig_path = {2:?}\n",
                dir.join("cni"),
                !cri.annotates,
                dir.join("certs.d"),
            ));
        }
        text
    }
}

/// Where a pull goes.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// The registry itself, `http[s]://IP:PORT`.
    pub(crate) registry: String,
    /// The authority of the registry's certificate.
    pub(crate) ca_file: Option<PathBuf>,
    /// The mirror of the node on the same machine; none for a pull past Pantala.
    pub(crate) mirror: Option<String>,
    /// `user:password` for `ctr -u`.
    pub(crate) login: Option<String>,
}

/// A running containerd with root, state and socket of its own.
#[derive(Debug)]
pub(crate) struct Containerd {
    machine: Machine,
    root: PathBuf,
    socket: PathBuf,
    process: Process,
}

impl Containerd {
    /// Starts containerd on `machine`. Needs root.
    pub(crate) async fn start(machine: &Machine) -> Result<Self> {
        Self::start_with(machine, &Plugins::default()).await
    }

    /// The same with more plugins.
    pub(crate) async fn start_with(machine: &Machine, plugins: &Plugins) -> Result<Self> {
        let root = machine.dir().join("containerd");
        // In the rig's private /run: the paths of sockets are short there.
        let run = Path::new("/run").join(machine.address().to_string());
        fs::create_dir_all(&run)?;
        fs::create_dir_all(&root)?;
        let socket = run.join("c.sock");
        let config = machine.dir().join("containerd.toml");
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {:?}\n{}[grpc]\naddress = {socket:?}\n{}",
            run.join("state"),
            plugins.disabled(),
            plugins.tables(machine.dir())
        );
        fs::write(&config, text)?;
        let mut command = machine.command("containerd");
        command
            .arg("--config")
            .arg(&config)
            .args(["--log-level", "warn"]);
        let mut process =
            Process::start("containerd", command, &machine.dir().join("containerd.log"))?;
        process
            .wait_until("answered", START_MAX, async || {
                let mut command = machine.command("ctr");
                command.arg("-a").arg(&socket).arg("version");
                socket.exists()
                    && run_to_end(command, CTR_MAX)
                        .await
                        .is_ok_and(|finished| finished.success)
            })
            .await?;
        Ok(Self {
            machine: machine.clone(),
            root,
            socket,
            process,
        })
    }

    /// The `?ns=` reference of `repository:tag`.
    pub(crate) fn reference(name: &str) -> String {
        format!("{REGISTRY_NAME}/{name}")
    }

    /// `ctr images pull --hosts-dir` of `repository:tag`.
    pub(crate) async fn pull(
        &self,
        name: &str,
        route: &Route,
        limit: Duration,
    ) -> Result<Finished> {
        self.pull_into("overlayfs", name, route, limit).await
    }

    /// The same, unpacked by another snapshotter.
    pub(crate) async fn pull_into(
        &self,
        snapshotter: &str,
        name: &str,
        route: &Route,
        limit: Duration,
    ) -> Result<Finished> {
        let hosts = self.write_hosts(route)?;
        let mut command = self.ctr();
        command.args(["images", "pull", "--snapshotter", snapshotter]);
        command.arg("--hosts-dir").arg(hosts);
        if let Some(login) = &route.login {
            command.args(["--user", login]);
        }
        command.arg(Self::reference(name));
        run_to_end(command, limit).await
    }

    /// `ctr run` of a pulled image: its program is given `word`, which it must print.
    pub(crate) async fn run(&self, name: &str, word: &str) -> Result<()> {
        let mut command = self.ctr();
        command.args(["run", "--rm", &Self::reference(name)]);
        command.args([&format!("run-{word}"), super::image::PROGRAM, word]);
        let finished = run_to_end(command, CTR_MAX).await?.ok("ctr run")?;
        if !finished.output.contains(word) {
            bail!("the container printed {:?}, not {word:?}", finished.output);
        }
        Ok(())
    }

    /// Has CRI pull `repository:tag`.
    pub(crate) async fn pull_by_cri(&self, name: &str, route: &Route) -> Result<()> {
        self.write_hosts(route)?;
        cri::pull(&self.socket, &Self::reference(name), CTR_MAX).await
    }

    /// `ctr` with these arguments, which must succeed; what it printed.
    pub(crate) async fn call(&self, arguments: &[&str]) -> Result<String> {
        self.call_in(&rig_name(), arguments).await
    }

    /// The same in another namespace of containerd's.
    pub(crate) async fn call_in(&self, namespace: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.machine.command("ctr");
        command.arg("-a").arg(&self.socket).args(["-n", namespace]);
        command.args(arguments);
        let what = format!("ctr {}", arguments.join(" "));
        Ok(run_to_end(command, CTR_MAX).await?.ok(&what)?.output)
    }

    /// Checks that the content store holds the image as it was pushed, byte by byte.
    pub(crate) fn verify(&self, image: &Image) -> Result<()> {
        image
            .verify_files(&self.blobs_dir())
            .with_context(|| format!("the content store of {}", self.machine.name()))
    }

    /// Removes an image with its content and snapshots.
    pub(crate) async fn remove(&self, name: &str) -> Result<()> {
        let mut command = self.ctr();
        command.args(["images", "rm", "--sync", &Self::reference(name)]);
        run_to_end(command, CTR_MAX).await?.ok("ctr images rm")?;
        let left = fs::read_dir(self.blobs_dir())?.count();
        if left != 0 {
            bail!(
                "{left} blobs are left in containerd's content store after `ctr images rm --sync`"
            );
        }
        Ok(())
    }

    /// The running program.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Has `look` look at what the committed snapshot `chain_id` holds, through an active one on it:
    /// a view by `ctr` is garbage from the start.
    pub(crate) async fn look_at<T>(
        &self,
        namespace: &str,
        snapshotter: &str,
        chain_id: &str,
        look: impl FnOnce(&Path) -> T,
    ) -> Result<T> {
        const KEY: &str = "looked-at";
        let at = self.machine.dir().join(KEY);
        fs::create_dir_all(&at)?;
        let path = at.display().to_string();
        let snapshots = async |arguments: &[&str]| {
            let head = ["snapshots", "--snapshotter", snapshotter];
            self.call_in(namespace, &[&head, arguments].concat()).await
        };
        snapshots(&["prepare", KEY, chain_id]).await?;
        // The line that it prints is the command that mounts.
        let mount = snapshots(&["mounts", &path, KEY]).await?;
        run("sh", &["-ec", &mount])?;
        let seen = look(&at);
        run("umount", &[&path])?;
        snapshots(&["rm", KEY]).await?;
        Ok(seen)
    }

    /// Where its content store keeps blobs, each by its digest.
    pub(crate) fn blobs_dir(&self) -> PathBuf {
        self.root
            .join("io.containerd.content.v1.content/blobs/sha256")
    }

    fn ctr(&self) -> Command {
        let mut command = self.machine.command("ctr");
        // The namespace names the cgroup of containers too, by which it is found and removed.
        command
            .arg("-a")
            .arg(&self.socket)
            .args(["-n", &rig_name()]);
        command
    }

    /// `certs.d` for one route.
    fn write_hosts(&self, route: &Route) -> Result<PathBuf> {
        let certs = self.machine.dir().join("certs.d");
        let dir = certs.join(REGISTRY_NAME);
        fs::create_dir_all(&dir)?;
        let mut text = format!("server = {:?}\n", route.registry);
        if let Some(ca_file) = &route.ca_file {
            text.push_str(&format!("ca = {ca_file:?}\n"));
        }
        // Without any host, containerd 1.6 takes the whole file for broken.
        let host = route.mirror.as_ref().unwrap_or(&route.registry);
        text.push_str(&format!(
            "[host.{host:?}]\n  capabilities = [\"pull\", \"resolve\"]\n"
        ));
        if let Some(ca_file) = &route.ca_file {
            text.push_str(&format!("  ca = {ca_file:?}\n"));
        }
        if route.mirror.is_some() {
            text.push_str(&format!(
                "  [host.{host:?}.header]\n    X-Dragonfly-Registry = {:?}\n",
                route.registry
            ));
        }
        fs::write(dir.join("hosts.toml"), text)?;
        Ok(certs)
    }
}
