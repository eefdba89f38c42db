//! nginx with sendfile: the baseline for serving a file that lies on the disk.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::machine::Machine;
use super::process::{Process, children, cpu_seconds};

const PORT: u16 = 8080;
const START_MAX: Duration = Duration::from_secs(10);

/// A running nginx.
#[derive(Debug)]
pub(crate) struct Nginx {
    address: SocketAddr,
    process: Process,
}

/// Where and how nginx serves.
#[derive(Debug)]
pub(crate) struct NginxSpec {
    /// Its address.
    pub(crate) address: SocketAddr,
    /// PEM files of a certificate and its key, for TLS.
    pub(crate) tls: Option<(PathBuf, PathBuf)>,
    /// The processor that it is bound to.
    pub(crate) core: Option<usize>,
}

/// The settings of the processes and of sending.
struct Style {
    processes: &'static str,
    sending: &'static str,
}

/// One process, so that its processor time is in one place and it can be bound to a core.
/// sendfile_max_chunk off: the whole file in as few calls as the socket takes.
const ONE_PROCESS: Style = Style {
    processes: "master_process off; worker_processes 1;",
    sending: "sendfile on; sendfile_max_chunk 0; tcp_nopush on; output_buffers 2 512k;",
};

/// As people run it, and as its packages configure it.
const AS_PACKAGED: Style = Style {
    processes: "worker_processes auto;",
    sending: "sendfile on; tcp_nopush on;",
};

impl Nginx {
    /// Serves the files of `root`, as people run it: sendfile, and a worker for each processor.
    pub(crate) async fn start(machine: &Machine, root: &Path) -> Result<Self> {
        let spec = NginxSpec {
            address: SocketAddr::new(machine.address().into(), PORT),
            tls: None,
            core: None,
        };
        Self::launch(machine, root, &spec, &AS_PACKAGED).await
    }

    /// Serves the files of `root` as `spec` says, in one process.
    pub(crate) async fn start_with(
        machine: &Machine,
        root: &Path,
        spec: &NginxSpec,
    ) -> Result<Self> {
        Self::launch(machine, root, spec, &ONE_PROCESS).await
    }

    async fn launch(
        machine: &Machine,
        root: &Path,
        spec: &NginxSpec,
        style: &Style,
    ) -> Result<Self> {
        let address = spec.address;
        let dir = machine.dir().join(format!("nginx-{}", address.port()));
        fs::create_dir_all(&dir)?;
        let config = dir.join("nginx.conf");
        let (listen, tls) = match &spec.tls {
            None => (address.to_string(), String::new()),
            // The cipher that everything else here uses too.
            Some((certificate, key)) => (
                format!("{address} ssl"),
                format!(
                    "  ssl_certificate {}; ssl_certificate_key {};\n  ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\n",
                    certificate.display(),
                    key.display()
                ),
            ),
        };
        // Its workers may read what this user may.
        let user = if super::enclosure::is_root() {
            "user root; "
        } else {
            ""
        };
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("  {kind}_temp_path {};\n", dir.join(kind).display()))
            .concat();
        let Style { processes, sending } = style;
        fs::write(
            &config,
            format!(
                "{user}daemon off; {processes} pid {0}/pid; error_log stderr warn;\nevents {{}}\nhttp {{\n  access_log off; {sending}\n{temporary}  {tls}  server {{ listen {listen}; root {1}; }}\n}}\n",
                dir.display(),
                root.display()
            ),
        )?;
        let mut command = match spec.core {
            None => machine.command("nginx"),
            Some(core) => machine.pinned_command("nginx", core),
        };
        command.arg("-c").arg(&config).arg("-p").arg(&dir);
        let mut process = Process::start("nginx", command, &dir.join("nginx.log"))?;
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

    /// Seconds of processor time of all its processes.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let pid = self.process.pid();
        let children = children(pid)?;
        children
            .into_iter()
            .chain([pid])
            .map(cpu_seconds)
            .sum::<Result<f64>>()
    }
}
