//! `pantala-control` on a machine of its own.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::machine::Machine;
use super::process::Process;

const PORT: u16 = 65004;
const START_MAX: Duration = Duration::from_secs(30);

/// A running control; it keeps its authority and token over a restart.
#[derive(Debug)]
pub(crate) struct Control {
    machine: Machine,
    program: PathBuf,
    process: Process,
}

impl Control {
    /// Starts `program` (`pantala-control`) and waits for its join token.
    pub(crate) async fn start(machine: &Machine, program: &Path) -> Result<Self> {
        let config = machine.dir().join("control.toml");
        fs::write(
            &config,
            format!(
                "data_dir = {:?}\nlisten = \"{}:{PORT}\"\n",
                machine.dir().join("data"),
                machine.address()
            ),
        )?;
        let process = Self::launch(machine, program).await?;
        Ok(Self {
            machine: machine.clone(),
            program: program.to_owned(),
            process,
        })
    }

    async fn launch(machine: &Machine, program: &Path) -> Result<Process> {
        let mut command = machine.command(program);
        command
            .arg("serve")
            .arg("--config")
            .arg(machine.dir().join("control.toml"));
        command.env("NO_COLOR", "1");
        let log = machine.dir().join("control.log");
        let mut process = Process::start("pantala-control", command, &log)?;
        let token = token_file(machine);
        let address = SocketAddr::new(machine.address().into(), PORT);
        process
            .wait_until(
                "listened and written its join token",
                START_MAX,
                async || token.exists() && tokio::net::TcpStream::connect(address).await.is_ok(),
            )
            .await?;
        Ok(process)
    }

    /// Ends it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again with the data it had.
    pub(crate) async fn start_again(&mut self) -> Result<()> {
        self.process.kill();
        self.process = Self::launch(&self.machine, &self.program).await?;
        Ok(())
    }

    /// `IP:PORT` for nodes to join.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.machine.address().into(), PORT)
    }

    /// The file with the join token.
    pub(crate) fn token_file(&self) -> PathBuf {
        token_file(&self.machine)
    }

    /// The running program.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn token_file(machine: &Machine) -> PathBuf {
    machine.dir().join("data/control/join-token")
}
