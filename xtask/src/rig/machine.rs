//! Machines: as root, network namespaces joined by veth to a bridge; else addresses of 127.0.0.0/8.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The rig's network inside its namespaces. Never configured in the machine's own namespace.
const SUBNET: [u8; 2] = [10, 77];
/// Name of the bridge, in the inner process' namespace.
const BRIDGE: &str = "pantala0";
/// Addresses of machines start here; below are the bridge and room for more.
const FIRST_HOST: u16 = 10;

/// The network that a rig's machines are joined by.
#[derive(Debug)]
pub(crate) struct Network {
    kind: Kind,
    machines: Cell<u16>,
    /// Namespaces made and not removed.
    namespaces: RefCell<Vec<String>>,
}

#[derive(Debug)]
enum Kind {
    Namespaces,
    /// The second byte of the addresses, so that two rigs on one host do not meet.
    Loopback(u8),
}

impl Network {
    /// Sets the bridge up. Must run inside private mount and network namespaces.
    pub(crate) fn namespaces() -> Result<Self> {
        if rustix::process::getpid().as_raw_nonzero().get() != 1 {
            bail!("not PID 1: refusing to configure a network outside private namespaces");
        }
        // An own /run: names of network namespaces and sockets of shims stay inside.
        run("mount", &["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])?;
        std::fs::create_dir("/run/netns").context("creating /run/netns")?;
        run("ip", &["link", "set", "lo", "up"])?;
        run("ip", &["link", "add", BRIDGE, "type", "bridge"])?;
        let own = format!("{}.{}.0.1/16", SUBNET[0], SUBNET[1]);
        run("ip", &["addr", "add", &own, "dev", BRIDGE])?;
        run("ip", &["link", "set", BRIDGE, "up"])?;
        Ok(Self {
            kind: Kind::Namespaces,
            machines: Cell::new(0),
            namespaces: RefCell::default(),
        })
    }

    /// A network of loopback addresses; `seed` chooses which.
    pub(crate) fn loopback(seed: u32) -> Self {
        Self {
            kind: Kind::Loopback((seed % 253) as u8 + 1),
            machines: Cell::new(0),
            namespaces: RefCell::default(),
        }
    }

    pub(crate) fn has_namespaces(&self) -> bool {
        matches!(self.kind, Kind::Namespaces)
    }

    pub(crate) fn own_address(&self) -> Ipv4Addr {
        match self.kind {
            Kind::Namespaces => Ipv4Addr::new(SUBNET[0], SUBNET[1], 0, 1),
            Kind::Loopback(net) => Ipv4Addr::new(127, net, 0, 1),
        }
    }

    pub(crate) fn machine(&self, name: &str, rig_dir: &Path) -> Result<Machine> {
        let number = self.machines.get();
        self.machines.set(number + 1);
        let [high, low] = (number + FIRST_HOST).to_be_bytes();
        let dir = rig_dir.join(format!("{name}-{number}"));
        std::fs::create_dir_all(dir.join("home"))
            .with_context(|| format!("creating {}", dir.display()))?;
        let mut machine = Machine {
            name: name.to_owned(),
            address: match self.kind {
                Kind::Namespaces => Ipv4Addr::new(SUBNET[0], SUBNET[1], high, low),
                Kind::Loopback(net) => Ipv4Addr::new(127, net, high, low),
            },
            namespace: None,
            dir,
        };
        if self.has_namespaces() {
            let namespace = format!("m{number}");
            let veth = format!("v{number}");
            let address = format!("{}/16", machine.address);
            run("ip", &["netns", "add", &namespace])?;
            self.namespaces.borrow_mut().push(namespace.clone());
            run(
                "ip",
                &[
                    "link", "add", &veth, "type", "veth", "peer", "name", "eth0", "netns",
                    &namespace,
                ],
            )?;
            run("ip", &["link", "set", &veth, "master", BRIDGE, "up"])?;
            let inside = |rest: &[&str]| run("ip", &[&["-n", &namespace], rest].concat());
            inside(&["addr", "add", &address, "dev", "eth0"])?;
            inside(&["link", "set", "eth0", "up"])?;
            inside(&["link", "set", "lo", "up"])?;
            machine.namespace = Some(Path::new("/run/netns").join(namespace));
        }
        Ok(machine)
    }

    /// Takes the network of all machines made so far away.
    pub(crate) fn remove_machines(&self) {
        for namespace in self.namespaces.take() {
            if let Err(error) = run("ip", &["netns", "del", &namespace]) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// One machine: an address, a directory and, as root, a network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    name: String,
    address: Ipv4Addr,
    namespace: Option<PathBuf>,
    dir: PathBuf,
}

impl Machine {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
    pub(crate) fn address(&self) -> Ipv4Addr {
        self.address
    }
    /// The machine's own directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
    /// The name of the machine's network namespace, for `ip -n`.
    pub(crate) fn namespace(&self) -> Result<&str> {
        self.namespace
            .as_deref()
            .and_then(Path::file_name)
            .and_then(std::ffi::OsStr::to_str)
            .context("no network namespaces here: that takes root")
    }
    /// Limits what this machine sends to `mbit_per_s`, so that transfers take a known time. Needs a
    /// network namespace.
    pub(crate) fn limit_rate(&self, mbit_per_s: u32) -> Result<()> {
        let name = self.namespace()?;
        let rate = format!("{mbit_per_s}mbit");
        let rest = [
            "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate, "burst", "256kb",
            "latency", "50ms",
        ];
        run("tc", &[&["-n", name][..], &rest].concat())
    }

    /// A command that runs `program` on this machine with an empty environment (but PATH and HOME),
    /// and dies with this process.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // `setpriv` and `nsenter` replace themselves: the child's PID is the program's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(namespace) = &self.namespace {
            let mut net = std::ffi::OsString::from("--net=");
            net.push(namespace);
            command.arg("nsenter").arg(net).arg("--");
        }
        command
            .arg(program)
            .env_clear()
            .env("PATH", search_path())
            .env("HOME", self.dir.join("home"))
            .env("LANG", "C")
            .current_dir(&self.dir);
        command
    }

    /// The same, bound to the processor `core`.
    pub(crate) fn pinned_command(
        &self,
        program: impl AsRef<std::ffi::OsStr>,
        core: usize,
    ) -> Command {
        let mut command = self.command("taskset");
        command.arg("--cpu-list").arg(core.to_string()).arg(program);
        command
    }

    /// A listening socket on this machine that this process serves.
    pub(crate) fn listen(&self, port: u16) -> Result<std::net::TcpListener> {
        let address = SocketAddr::new(IpAddr::V4(self.address), port);
        let Some(namespace) = self.namespace.clone() else {
            return std::net::TcpListener::bind(address)
                .with_context(|| format!("listening on {address}"));
        };
        // A socket stays in the namespace that it was made in; only the thread has to go there.
        std::thread::spawn(move || -> Result<std::net::TcpListener> {
            use std::os::fd::AsFd;
            let file = std::fs::File::open(&namespace)?;
            rustix::thread::move_into_link_name_space(
                file.as_fd(),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )?;
            std::net::TcpListener::bind(address).with_context(|| format!("listening on {address}"))
        })
        .join()
        .map_err(|_| anyhow::anyhow!("the thread that binds {address} panicked"))?
    }
}

/// The search path with the system directories, which a user's may lack.
pub(crate) fn search_path() -> String {
    let own = std::env::var("PATH").unwrap_or_default();
    format!("{own}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

/// Runs a short command to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", search_path())
        .output()
        .with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
