//! A `pantala node` on a machine of its own.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::containerd::REGISTRY_NAME;
use super::control::Control;
use super::http;
use super::machine::Machine;
use super::process::Process;
use super::status::NodeStatus;

const MIRROR_PORT: u16 = 65001;
const ADMIN_PORT: u16 = 65002;
const PEER_PORT: u16 = 65003;
const START_MAX: Duration = Duration::from_secs(30);
const JOIN_MAX: Duration = Duration::from_secs(20);

/// What a node is told.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodeSpec {
    /// The registry's URL, as the node reaches it.
    pub(crate) registry: String,
    /// The authority of the registry's certificate.
    pub(crate) ca_file: Option<PathBuf>,
    /// URLs besides the registry's that clients may reach through the node: token servers.
    pub(crate) also_allowed: Vec<String>,
    /// Control's address and token file; none for the embedded control.
    pub(crate) join: Option<(SocketAddr, PathBuf)>,
    /// `[store] limit`.
    pub(crate) store_limit: Option<String>,
    /// Another data directory than the machine's own.
    pub(crate) data_dir: Option<PathBuf>,
    /// Further lines of the configuration by table: (`"mirror"`, `"first_byte_timeout_ms = 1500"`).
    pub(crate) extra: Vec<(&'static str, String)>,
}

impl NodeSpec {
    /// A node that pulls from `registry` and joins `control`.
    pub(crate) fn joining(registry: &str, control: &Control) -> Self {
        Self {
            registry: registry.to_owned(),
            join: Some((control.address(), control.token_file())),
            ..Self::default()
        }
    }

    /// Adds a line to the table `table`.
    pub(crate) fn with(mut self, table: &'static str, line: impl Into<String>) -> Self {
        self.extra.push((table, line.into()));
        self
    }

    fn to_toml(&self, machine: &Machine, data_dir: &Path) -> String {
        let mut tables = [
            (
                "mirror",
                format!(
                    "listen = \"{}:{MIRROR_PORT}\"\ndefault_registry = \"{REGISTRY_NAME}\"\n",
                    machine.address()
                ),
            ),
            (
                "admin",
                format!("listen = \"{}:{ADMIN_PORT}\"\n", machine.address()),
            ),
            (
                "peer",
                format!(
                    "listen = \"{0}:{PEER_PORT}\"\nadvertise = \"{0}:{PEER_PORT}\"\n",
                    machine.address()
                ),
            ),
            (
                "control",
                format!("listen = \"{}:65004\"\n", machine.address()),
            ),
            ("store", String::new()),
            ("source", String::new()),
            ("snapshotter", String::new()),
            ("lazy", String::new()),
            ("log", "filter = \"info\"\n".to_owned()),
        ];
        let mut registry = format!(
            "[registries.\"{REGISTRY_NAME}\"]\nurl = {:?}\n",
            self.registry
        );
        if let Some(ca_file) = &self.ca_file {
            registry.push_str(&format!("ca_file = {ca_file:?}\n"));
        }
        for url in &self.also_allowed {
            let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
            registry.push_str(&format!("[registries.{host:?}]\nurl = {url:?}\n"));
        }
        let mut add = |table: &str, line: String| {
            if let Some((_, text)) = tables.iter_mut().find(|(name, _)| *name == table) {
                text.push_str(&line);
                text.push('\n');
            }
        };
        if let Some((address, token_file)) = &self.join {
            add(
                "control",
                format!("join = \"{address}\"\ntoken_file = {token_file:?}"),
            );
        }
        if let Some(limit) = &self.store_limit {
            add("store", format!("limit = {limit:?}"));
        }
        for (table, line) in &self.extra {
            add(table, line.clone());
        }
        let tables: String = tables
            .iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| format!("[{name}]\n{text}"))
            .collect();
        format!("data_dir = {data_dir:?}\n{tables}{registry}")
    }
}

/// A running node.
#[derive(Debug)]
pub(crate) struct Node {
    machine: Machine,
    program: PathBuf,
    data_dir: PathBuf,
    process: Process,
}

impl Node {
    /// Starts `program` (`pantala`) on `machine` and waits until it is healthy and has joined.
    pub(crate) async fn start(machine: &Machine, program: &Path, spec: &NodeSpec) -> Result<Self> {
        let data_dir = spec
            .data_dir
            .clone()
            .unwrap_or_else(|| machine.dir().join("data"));
        fs::write(
            machine.dir().join("node.toml"),
            spec.to_toml(machine, &data_dir),
        )?;
        let process = Self::launch(machine, program)?;
        let mut node = Self {
            machine: machine.clone(),
            program: program.to_owned(),
            data_dir,
            process,
        };
        node.wait_healthy().await?;
        if spec.join.is_some() {
            node.wait_joined().await?;
        }
        Ok(node)
    }

    fn launch(machine: &Machine, program: &Path) -> Result<Process> {
        let mut command = machine.command(program);
        command
            .arg("node")
            .arg("--config")
            .arg(machine.dir().join("node.toml"));
        command.env("RUST_BACKTRACE", "1");
        let log = machine.dir().join("node.log");
        Process::start(&format!("pantala on {}", machine.name()), command, &log)
    }

    async fn wait_healthy(&mut self) -> Result<()> {
        let healthy = self.admin_url("/healthy");
        self.process
            .wait_until("become healthy", START_MAX, async || {
                http::answers(&healthy).await
            })
            .await
    }

    /// Waits until it is connected to control.
    pub(crate) async fn wait_joined(&self) -> Result<()> {
        self.wait_status("connect to control", JOIN_MAX, |status| {
            status.control.connected
        })
        .await
    }

    /// Waits until `/status` satisfies `ready`.
    pub(crate) async fn wait_status(
        &self,
        what: &str,
        limit: Duration,
        ready: impl Fn(&NodeStatus) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.status().await;
            if status.as_ref().is_ok_and(&ready) {
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!(
                    "{} did not {what} within {limit:?}; its status: {status:?}\n{}",
                    self.machine.name(),
                    self.process.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again with the data it had, and waits until it is healthy.
    pub(crate) async fn start_again(&mut self) -> Result<()> {
        self.process.kill();
        self.process = Self::launch(&self.machine, &self.program)?;
        self.wait_healthy().await
    }

    pub(crate) fn name(&self) -> &str {
        self.machine.name()
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The mirror. It listens on the machine's address, not on 127.0.0.1, so that tests reach it too.
    pub(crate) fn mirror_url(&self) -> String {
        format!("http://{}:{MIRROR_PORT}", self.machine.address())
    }

    /// Where its peers reach it.
    pub(crate) fn peer_address(&self) -> SocketAddr {
        SocketAddr::new(self.machine.address().into(), PEER_PORT)
    }

    pub(crate) fn admin_url(&self, path: &str) -> String {
        format!("http://{}:{ADMIN_PORT}{path}", self.machine.address())
    }

    /// Its program as a command line tool, told where the node is.
    pub(crate) fn tool(&self, command: &str) -> std::process::Command {
        let mut tool = self.machine.command(&self.program);
        let config = self.machine.dir().join("node.toml");
        tool.arg(command).arg("--config").arg(config);
        tool
    }

    /// The node's own account.
    pub(crate) async fn status(&self) -> Result<NodeStatus> {
        let text = http::get_text(&self.admin_url("/status"))
            .await
            .with_context(|| format!("asking {} for its status", self.machine.name()))?;
        NodeStatus::parse(&text)
    }

    /// The running program, to look at.
    pub(crate) fn process_ref(&self) -> &Process {
        &self.process
    }

    /// The running program.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The last lines of its log.
    pub(crate) fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}
