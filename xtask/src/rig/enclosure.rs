//! Where a rig runs: a directory of its own and, as root, private PID, mount and network namespaces.
//!
//! The command runs twice. The outer process creates the directory, starts itself again inside the
//! namespaces, waits, and removes the directory. The inner process is PID 1 of the PID namespace:
//! when it ends, the kernel ends every process of the rig, and its mounts and network namespaces
//! vanish with them. The inner process dies with the outer one, so nothing outlives even SIGKILL but
//! the directory, which the next run finds by its name and removes.

use std::cell::{Cell, RefCell};
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::machine::{Machine, Network};

/// Set for the inner process: the rig's directory.
const DIR_VARIABLE: &str = "PANTALA_RIG_DIR";
/// Names the directory that rigs are made in, where `/var/tmp` is too small.
const BASE_VARIABLE: &str = "PANTALA_RIG_BASE";
/// Every rig directory starts with this; the rest is its owner's PID.
const DIR_PREFIX: &str = "pantala-rig-";
/// How long the inner process may take to end its programs after a signal.
const INNER_STOP_MAX: Duration = Duration::from_secs(20);

/// What the inner process works with: one directory, one network.
#[derive(Debug)]
pub(crate) struct Rig {
    /// The rig's directory, or the current scene's below it.
    dir: RefCell<PathBuf>,
    network: Network,
    scratches: Cell<u32>,
}

impl Rig {
    /// The rig of this process, where it is an inner process.
    pub(crate) fn enter() -> Result<Option<Self>> {
        let Some(dir) = std::env::var_os(DIR_VARIABLE) else {
            return Ok(None);
        };
        let network = if is_root() {
            Network::namespaces()?
        } else {
            Network::loopback(std::process::id())
        };
        Ok(Some(Self {
            dir: RefCell::new(dir.into()),
            network,
            scratches: Cell::new(0),
        }))
    }

    /// Whether machines have network namespaces (else they are 127.x addresses).
    pub(crate) fn has_namespaces(&self) -> bool {
        self.network.has_namespaces()
    }

    /// The address under which this process reaches, and is reached by, all machines.
    pub(crate) fn own_address(&self) -> Ipv4Addr {
        self.network.own_address()
    }

    /// A new machine. Names need not be unique; addresses are.
    pub(crate) fn machine(&self, name: &str) -> Result<Machine> {
        self.network.machine(name, &self.dir())
    }

    /// The directory that new machines and scratch directories are made in.
    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.borrow().clone()
    }

    /// A new directory, named after its purpose.
    pub(crate) fn scratch(&self, purpose: &str) -> Result<PathBuf> {
        self.scratches.set(self.scratches.get() + 1);
        let dir = self
            .dir()
            .join(format!("{purpose}-{}", self.scratches.get()));
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    }

    /// Begins a scene: a directory of its own for the machines made from now on, until it is dropped.
    /// Its programs must have ended by then.
    pub(crate) fn scene(&self, name: &str) -> Result<Scene<'_>> {
        let outer = self.dir();
        let dir = outer.join(name);
        fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        self.dir.replace(dir);
        Ok(Scene { rig: self, outer })
    }
}

/// A part of a rig's life that cleans up after itself: one test.
#[derive(Debug)]
pub(crate) struct Scene<'a> {
    rig: &'a Rig,
    outer: PathBuf,
}

impl Scene<'_> {
    /// The last lines of every log that was written in this scene.
    pub(crate) fn log_tails(&self) -> String {
        let mut tails = Vec::new();
        for machine in fs::read_dir(self.rig.dir()).into_iter().flatten().flatten() {
            for file in fs::read_dir(machine.path()).into_iter().flatten().flatten() {
                let path = file.path();
                if path.extension().is_some_and(|extension| extension == "log") {
                    tails.push(super::process::log_tail(&path.display().to_string(), &path));
                }
            }
        }
        tails.sort();
        tails.join("\n")
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        self.rig.network.remove_machines();
        let dir = self.rig.dir.replace(self.outer.clone());
        remove_tree(&dir);
    }
}

/// The rig's own name, for what must be named outside its directory: cgroups of containers.
pub(crate) fn rig_name() -> String {
    let dir = std::env::var_os(DIR_VARIABLE).map(PathBuf::from);
    dir.as_deref().and_then(Path::file_name).map_or_else(
        || "pantala-rig".into(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Removes what runc leaves of the rig called `name`: empty cgroups, in each hierarchy.
fn remove_cgroups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
    for hierarchy in hierarchies
        .map(|entry| entry.path())
        .chain([root.to_owned()])
    {
        let group = hierarchy.join(name);
        for container in fs::read_dir(&group).into_iter().flatten().flatten() {
            if container.file_type().is_ok_and(|kind| kind.is_dir()) {
                let _ = fs::remove_dir(container.path());
            }
        }
        // Most hierarchies have none; a group that is still in use cannot be removed by anyone.
        let _ = fs::remove_dir(&group);
    }
}

/// Whether namespaces, mounts and package installation are at hand.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs this program again, with `arguments`, inside a fresh rig, and cleans up after it.
pub(crate) fn run_inside(arguments: &[String], space_needed_bytes: u64) -> Result<ExitCode> {
    let base = std::env::var_os(BASE_VARIABLE).map_or_else(|| "/var/tmp".into(), PathBuf::from);
    remove_leftovers(&base);
    let free = rustix::fs::statvfs(&base)
        .with_context(|| format!("asking for the free space of {}", base.display()))?;
    let free_bytes = free.f_bavail * free.f_frsize;
    if free_bytes < space_needed_bytes {
        bail!(
            "{} has {} MB free and this run needs about {} MB; name a larger place with {BASE_VARIABLE}=DIR",
            base.display(),
            free_bytes / 1_000_000,
            space_needed_bytes / 1_000_000
        );
    }
    let dir = OwnedDir::create(&base)?;

    let program = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if is_root() {
        command.args([
            "unshare",
            "--pid",
            "--mount",
            "--net",
            "--propagation",
            "private",
            "--mount-proc",
            "--fork",
            "--kill-child=KILL",
            "--",
        ]);
    }
    command
        .arg(program)
        .args(arguments)
        .env(DIR_VARIABLE, &dir.0);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let status = runtime.block_on(supervise(command))?;
    drop(dir);
    if let Some(signal) = status.signal() {
        eprintln!("the rig was ended by signal {signal}");
        return Ok(ExitCode::from(128 + signal as u8));
    }
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// Waits for the inner process; passes SIGINT and SIGTERM on and bounds how long it then may take.
async fn supervise(command: Command) -> Result<std::process::ExitStatus> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .context("starting the rig (setpriv and unshare are in the package util-linux)")?;
    tokio::select! {
        status = child.wait() => return Ok(status?),
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    eprintln!("stopping: ending the rig's programs");
    if let Some(pid) = child.id() {
        // As root, the child is `unshare`, which ignores signals while it waits: its child is meant.
        let inner = if is_root() { only_child_of(pid) } else { None };
        let _ = signal_process(inner.unwrap_or(pid), rustix::process::Signal::TERM);
    }
    match tokio::time::timeout(INNER_STOP_MAX, child.wait()).await {
        Ok(status) => Ok(status?),
        Err(_) => {
            child.kill().await?;
            Ok(child.wait().await?)
        }
    }
}

/// Sends `signal` to the process `pid`.
pub(crate) fn signal_process(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid as i32).context("a PID is not 0")?;
    rustix::process::kill_process(pid, signal)?;
    Ok(())
}

fn only_child_of(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// The rig's directory; removed when dropped.
struct OwnedDir(PathBuf);

impl OwnedDir {
    fn create(base: &Path) -> Result<Self> {
        let dir = base.join(format!("{DIR_PREFIX}{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let owner = start_time(std::process::id()).unwrap_or_default();
        fs::write(dir.join("owner"), owner)?;
        Ok(Self(dir))
    }
}

impl Drop for OwnedDir {
    fn drop(&mut self) {
        if let Some(name) = self.0.file_name() {
            remove_cgroups(&name.to_string_lossy());
        }
        remove_tree(&self.0);
    }
}

/// Removes the directories of rigs whose outer process is gone.
fn remove_leftovers(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(DIR_PREFIX)) else {
            continue;
        };
        let Ok(pid) = pid.parse::<u32>() else {
            continue;
        };
        let owner = fs::read_to_string(entry.path().join("owner")).unwrap_or_default();
        if start_time(pid).is_none_or(|start| start != owner) {
            eprintln!(
                "removing {}, left by a run that was killed",
                entry.path().display()
            );
            remove_cgroups(&entry.file_name().to_string_lossy());
            remove_tree(&entry.path());
        }
    }
}

fn remove_tree(dir: &Path) {
    // A program that is still dying may add a file while the tree is walked.
    for _ in 0..20 {
        match fs::remove_dir_all(dir) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    eprintln!(
        "could not remove {}; please remove it by hand",
        dir.display()
    );
}

/// When the process `pid` started, in the kernel's words; tells it from a later one of that number.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(") ")?.1;
    after_name.split(' ').nth(19).map(str::to_owned)
}

/// Runs the inner process' work; on SIGINT or SIGTERM drops it, and with it every program.
pub(crate) fn run_until_signal(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            outcome = work => outcome,
            _ = interrupt.recv() => Ok(ExitCode::from(130)),
            _ = terminate.recv() => Ok(ExitCode::from(143)),
        }
    })
}
