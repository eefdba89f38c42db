//! nginx with sendfile: the baseline for serving a file that lies on the disk.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::machine::Machine;
use super::process::Process;

const PORT: u16 = 8080;
const START_MAX: Duration = Duration::from_secs(10);

/// A running nginx of one process.
#[derive(Debug)]
pub(crate) struct Nginx {
    address: SocketAddr,
    process: Process,
}

impl Nginx {
    /// Serves the files of `root`.
    pub(crate) async fn start(machine: &Machine, root: &Path) -> Result<Self> {
        let dir = machine.dir().join("nginx");
        fs::create_dir_all(&dir)?;
        let address = SocketAddr::new(machine.address().into(), PORT);
        let config = dir.join("nginx.conf");
        // One process, so that its processor time is in one place. sendfile_max_chunk off: the whole
        // file in as few calls as the socket takes.
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("  {kind}_temp_path {};\n", dir.join(kind).display()))
            .concat();
        fs::write(
            &config,
            format!(
                "daemon off; master_process off; worker_processes 1; pid {0}/pid; error_log stderr warn;\nevents {{}}\nhttp {{\n  access_log off; sendfile on; sendfile_max_chunk 0; tcp_nopush on; output_buffers 2 512k;\n{temporary}  server {{ listen {address}; root {1}; }}\n}}\n",
                dir.display(),
                root.display()
            ),
        )?;
        let mut command = machine.command("nginx");
        command.arg("-c").arg(&config).arg("-p").arg(&dir);
        let mut process = Process::start("nginx", command, &machine.dir().join("nginx.log"))?;
        process
            .wait_until("listened", START_MAX, async || {
                // The address may be reachable from its own machine only; the PID file says enough.
                dir.join("pid").exists()
            })
            .await?;
        Ok(Self { address, process })
    }

    pub(crate) fn url(&self, file: &str) -> String {
        format!("http://{}/{file}", self.address)
    }

    /// The running program.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }
}
