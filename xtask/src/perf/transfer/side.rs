//! The two processes of a transfer, and what is asked of them.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::network::{Network, NetworkKind};
use super::{Files, Options, Pin, Sample, Stack};
use crate::rig::Machine;
use crate::rig::nginx::{Nginx, NginxSpec};
use crate::rig::process::{exact_cpu_seconds, log_tail, memory};

/// Longest that any answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(300);
/// Pause between two looks at a process' memory.
const MEMORY_INTERVAL: Duration = Duration::from_millis(50);
/// Servers of one network listen side by side.
const PORT: u16 = 7000;

/// What a pair of processes is started for.
pub(super) struct Setup<'a> {
    pub(super) network: &'a Network,
    pub(super) stack: Stack,
    pub(super) files: &'a Files,
    pub(super) options: &'a Options,
}

impl Setup<'_> {
    fn core(&self, core: usize) -> Option<usize> {
        (self.options.pin == Pin::Sides).then_some(core)
    }

    /// `pantala-perf`, as the server or the client of this stack.
    fn command(&self, machine: &Machine, core: usize, role: &str) -> std::process::Command {
        let program = &self.files.program;
        let mut command = match self.core(core) {
            Some(core) => machine.pinned_command(program, core),
            None => machine.command(program),
        };
        let stack = match self.stack {
            Stack::Nginx => "http",
            Stack::NginxTls => "https",
            other => other.name(),
        };
        command.args([role, "--stack", stack, "--identities"]);
        command.arg(self.files.identities());
        command
    }
}

/// A server and a client.
pub(super) struct Pair {
    pub(super) network: NetworkKind,
    pub(super) stack: Stack,
    server: Server,
    client: Side,
}

enum Server {
    Own(Side),
    Nginx(Nginx),
}

#[derive(Debug, Deserialize)]
struct Ready {
    ready: Option<SocketAddr>,
}

#[derive(Debug, Deserialize)]
struct Used {
    cpu_s: f64,
}

#[derive(Debug, Deserialize)]
struct Run {
    seconds: f64,
    cpu_s: f64,
    bytes: u64,
    mtu: Option<u16>,
}

#[derive(Debug, Deserialize)]
struct Done {}

impl Pair {
    pub(super) async fn start(setup: &Setup<'_>) -> Result<Self> {
        let port = PORT + setup.stack as u16;
        let address = SocketAddr::new(setup.network.address, port);
        let files = setup.files;
        let server = match setup.stack {
            Stack::Nginx | Stack::NginxTls => {
                let identities = files.identities();
                let spec = NginxSpec {
                    address,
                    tls: (setup.stack == Stack::NginxTls).then(|| {
                        (
                            identities.join("nginx.crt.pem"),
                            identities.join("nginx.key.pem"),
                        )
                    }),
                    core: setup.core(0),
                };
                let server = &setup.network.server;
                Server::Nginx(Nginx::start_with(server, &files.root, &spec).await?)
            }
            _ => {
                let mut command = setup.command(&setup.network.server, 0, "serve");
                command.arg("--listen").arg(address.to_string());
                command.arg("--file").arg(files.source());
                let mut side = Side::start(command, &setup.network.server, setup.stack, "server")?;
                side.answer::<Ready>()
                    .await?
                    .ready
                    .context("a server that does not listen")?;
                Server::Own(side)
            }
        };
        let mut command = setup.command(&setup.network.client, 1, "fetch");
        command.arg("--server").arg(address.to_string());
        command.arg("--file").arg(files.sink());
        command.args(["--name", Files::SOURCE]);
        command.args(["--bytes", &files.bytes.to_string()]);
        command.args(["--streams", &setup.options.streams.to_string()]);
        let payload = setup.network.kind.udp_payload_bytes();
        command.args(["--payload", &payload.to_string()]);
        let mut client = Side::start(command, &setup.network.client, setup.stack, "client")?;
        client.answer::<Ready>().await?;
        Ok(Self {
            network: setup.network.kind,
            stack: setup.stack,
            server,
            client,
        })
    }

    /// Moves the file once.
    pub(super) async fn transfer(&mut self, bytes: u64) -> Result<Sample> {
        if let Server::Own(server) = &mut self.server {
            server.ask::<Done>("warm").await?;
        }
        self.client
            .ask::<Done>("connect")
            .await
            .map_err(|error| self.explained(error))?;
        let before = self.server.cpu_seconds().await?;
        let server_pid = self.server.pid()?;
        let client_pid = self.client.pid()?;
        let mut peaks = (0, 0);
        let result = {
            let look = async {
                loop {
                    for (pid, peak) in [(server_pid, &mut peaks.0), (client_pid, &mut peaks.1)] {
                        // A process that has ended is found out by what it does not answer.
                        let own = memory(pid).map(|memory| memory.own_bytes());
                        *peak = own.unwrap_or_default().max(*peak);
                    }
                    tokio::time::sleep(MEMORY_INTERVAL).await;
                }
            };
            tokio::select! {
                result = self.client.ask::<Run>("run") => result,
                () = look => unreachable!("looking has no end"),
            }
        };
        let run = result.map_err(|error| self.explained(error))?;
        let server_cpu_s = self.server.cpu_seconds().await? - before;
        self.client.ask::<Done>("close").await?;
        if run.bytes != bytes {
            bail!("{} bytes arrived of {bytes}", run.bytes);
        }
        Ok(Sample {
            seconds: run.seconds,
            server_cpu_s,
            client_cpu_s: run.cpu_s,
            server_peak_bytes: peaks.0,
            client_peak_bytes: peaks.1,
            mtu: run.mtu,
        })
    }

    /// With the server's last words, which often say more than the client's.
    fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        match &self.server {
            Server::Own(server) => error.context(server.log_tail()),
            Server::Nginx(nginx) => error.context(nginx.process().log_tail()),
        }
    }
}

impl Server {
    fn pid(&self) -> Result<u32> {
        match self {
            Self::Own(side) => side.pid(),
            Self::Nginx(nginx) => Ok(nginx.process().pid()),
        }
    }

    async fn cpu_seconds(&mut self) -> Result<f64> {
        match self {
            Self::Own(side) => Ok(side.ask::<Used>("used").await?.cpu_s),
            Self::Nginx(nginx) => exact_cpu_seconds(nginx.process().pid()),
        }
    }
}

/// One process of `pantala-perf`, led by lines.
#[derive(Debug)]
struct Side {
    name: String,
    log: std::path::PathBuf,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Side {
    fn start(
        command: std::process::Command,
        machine: &Machine,
        stack: Stack,
        role: &str,
    ) -> Result<Self> {
        let name = format!("{} {role}", stack.name());
        let log = machine.dir().join(format!("{}-{role}.log", stack.name()));
        let mut child = Command::from(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting the {name}"))?;
        let input = child.stdin.take().context("no standard input")?;
        let output = child.stdout.take().context("no standard output")?;
        Ok(Self {
            name,
            log,
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    fn pid(&self) -> Result<u32> {
        self.child
            .id()
            .with_context(|| format!("the {} has ended", self.name))
    }

    fn log_tail(&self) -> String {
        log_tail(&self.name, &self.log)
    }

    async fn ask<A: DeserializeOwned>(&mut self, what: &str) -> Result<A> {
        self.input
            .write_all(format!("{what}\n").as_bytes())
            .await
            .with_context(|| format!("the {} has ended\n{}", self.name, self.log_tail()))?;
        self.answer()
            .await
            .with_context(|| format!("asking the {} to {what}", self.name))
    }

    async fn answer<A: DeserializeOwned>(&mut self) -> Result<A> {
        let line = tokio::time::timeout(ANSWER_MAX, self.output.next_line())
            .await
            .with_context(|| format!("no answer within {ANSWER_MAX:?}\n{}", self.log_tail()))??;
        let Some(line) = line else {
            bail!("the {} has ended\n{}", self.name, self.log_tail());
        };
        serde_json::from_str(&line).with_context(|| format!("the {} says {line:?}", self.name))
    }
}
