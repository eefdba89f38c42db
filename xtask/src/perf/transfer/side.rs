//! The two processes of a transfer, and what is asked of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::network::{Network, NetworkKind};
use super::{Files, Pin, Sample, Stack};
use crate::perf::led::Led;
use crate::rig::Machine;
use crate::rig::nginx::{Nginx, NginxSpec};
use crate::rig::process::{exact_cpu_seconds, memory};

/// Pause between two looks at a process' memory.
const MEMORY_INTERVAL: Duration = Duration::from_millis(50);
/// Servers of one network listen side by side.
const PORT: u16 = 7000;

/// What a pair of processes is started for.
pub(in crate::perf) struct Setup<'a> {
    pub(in crate::perf) network: &'a Network,
    pub(in crate::perf) stack: Stack,
    pub(in crate::perf) files: &'a Files,
    /// Requests outstanding.
    pub(in crate::perf) streams: u32,
    pub(in crate::perf) pin: Pin,
}

impl Setup<'_> {
    fn core(&self, core: usize) -> Option<usize> {
        (self.pin == Pin::Sides).then_some(core)
    }

    fn log(&self, machine: &Machine, role: &str) -> PathBuf {
        machine
            .dir()
            .join(format!("{}-{role}.log", self.stack.name()))
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
pub(in crate::perf) struct Pair {
    pub(in crate::perf) network: NetworkKind,
    pub(in crate::perf) stack: Stack,
    server: Server,
    client: Led,
}

enum Server {
    Own(Box<Led>),
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
struct Small {
    latencies: Latencies,
    cpu_s: f64,
}

/// How long many small requests took.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(in crate::perf) struct Latencies {
    pub(in crate::perf) requests_per_s: f64,
    pub(in crate::perf) p50_ms: f64,
    pub(in crate::perf) p99_ms: f64,
}

/// Small requests, and what they cost both sides.
#[derive(Debug, Clone, Copy)]
pub(in crate::perf) struct SmallSample {
    pub(in crate::perf) latencies: Latencies,
    pub(in crate::perf) cpu_s: f64,
}

#[derive(Debug, Deserialize)]
struct Done {}

impl Pair {
    pub(in crate::perf) async fn start(setup: &Setup<'_>) -> Result<Self> {
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
                let mut side = Led::start(
                    command,
                    &format!("{} server", setup.stack.name()),
                    &setup.log(&setup.network.server, "server"),
                )?;
                side.answer::<Ready>()
                    .await?
                    .ready
                    .context("a server that does not listen")?;
                Server::Own(Box::new(side))
            }
        };
        let mut command = setup.command(&setup.network.client, 1, "fetch");
        command.arg("--server").arg(address.to_string());
        command.arg("--file").arg(files.sink());
        command.args(["--name", Files::SOURCE]);
        command.args(["--bytes", &files.bytes.to_string()]);
        command.args(["--streams", &setup.streams.to_string()]);
        let payload = setup.network.kind.udp_payload_bytes();
        command.args(["--payload", &payload.to_string()]);
        let mut client = Led::start(
            command,
            &format!("{} client", setup.stack.name()),
            &setup.log(&setup.network.client, "client"),
        )?;
        client.answer::<Ready>().await?;
        Ok(Self {
            network: setup.network.kind,
            stack: setup.stack,
            server,
            client,
        })
    }

    /// Lets the client throw away what arrives from now on.
    pub(super) async fn discard(&mut self) -> Result<()> {
        self.client.ask::<Done>("discard").await.map(drop)
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

    /// Asks for `requests` random ranges of `length` bytes, `outstanding` at a time.
    pub(in crate::perf) async fn small(
        &mut self,
        outstanding: u32,
        requests: u64,
        length: u32,
    ) -> Result<SmallSample> {
        if let Server::Own(server) = &mut self.server {
            server.ask::<Done>("warm").await?;
        }
        self.client.ask::<Done>("connect").await?;
        let before = self.server.cpu_seconds().await?;
        let words = format!("small {outstanding} {requests} {length}");
        let small: Small = self
            .client
            .ask(&words)
            .await
            .map_err(|error| self.explained(error))?;
        let server_cpu_s = self.server.cpu_seconds().await? - before;
        self.client.ask::<Done>("close").await?;
        Ok(SmallSample {
            latencies: small.latencies,
            cpu_s: server_cpu_s + small.cpu_s,
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
