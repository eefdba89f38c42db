//! docker-registry: plain, with TLS, with basic and with token authentication.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::image::Image;
use super::machine::Machine;
use super::process::{Process, run_to_end};
use super::tls::Authority;

const PORT: u16 = 5000;
const START_MAX: Duration = Duration::from_secs(20);
/// A push of gigabytes takes its time on a slow disk.
const PUSH_MAX: Duration = Duration::from_secs(900);

/// The user that basic authentication knows.
pub(crate) const USER: &str = "alice";
/// That user's password.
pub(crate) const PASSWORD: &str = "wonderland-7Qx4";
/// `htpasswd -Bbn alice wonderland-7Qx4`: only bcrypt is understood, and nothing here need compute it.
const HTPASSWD: &str = "alice:$2y$05$/44c7E5l35PghbESxweSAeNtxhGl6QVfXi9CoQrzSz4tEgagu1YR2\n";

/// How a registry is guarded.
#[derive(Debug, Clone)]
pub(crate) enum Access {
    /// HTTP, open to all.
    Plain,
    /// HTTPS with a certificate of a private authority, open to all.
    Tls,
    /// HTTP with a password ([`USER`], [`PASSWORD`]).
    Basic,
    /// HTTP with tokens of the server at `realm`, whose signing certificate is in `bundle`.
    Token {
        /// URL of the token server.
        realm: String,
        /// PEM file of its certificate.
        bundle: PathBuf,
    },
}

/// A running docker-registry.
#[derive(Debug)]
pub(crate) struct Registry {
    machine: Machine,
    address: SocketAddr,
    access: Access,
    /// The private authority's certificate, where there is TLS.
    pub(crate) ca_file: Option<PathBuf>,
    process: Process,
}

impl Registry {
    /// Starts docker-registry on `machine` and waits until it answers.
    pub(crate) async fn start(machine: &Machine, access: Access) -> Result<Self> {
        Self::start_at(machine, access, PORT).await
    }

    /// The same on another port, for what stands in front of it.
    pub(crate) async fn start_at(machine: &Machine, access: Access, port: u16) -> Result<Self> {
        let dir = machine.dir();
        let data = dir.join("registry");
        fs::create_dir_all(&data)?;
        let address = SocketAddr::new(machine.address().into(), port);
        let mut tls = String::new();
        let mut auth = String::new();
        let mut ca_file = None;
        match &access {
            Access::Plain => {}
            Access::Tls => {
                let authority = Authority::create("Pantala rig")?;
                let files = authority.issue(dir, "registry", machine.address().into())?;
                tls = format!(
                    "  tls:\n    certificate: {}\n    key: {}\n",
                    files.certificate.display(),
                    files.key.display()
                );
                ca_file = Some(files.authority);
            }
            Access::Basic => {
                let path = dir.join("htpasswd");
                fs::write(&path, HTPASSWD)?;
                auth = format!(
                    "auth:\n  htpasswd:\n    realm: rig\n    path: {}\n",
                    path.display()
                );
            }
            Access::Token { realm, bundle } => {
                auth = format!(
                    "auth:\n  token:\n    realm: {realm}\n    service: {}\n    issuer: {}\n    rootcertbundle: {}\n",
                    super::token_server::SERVICE,
                    super::token_server::ISSUER,
                    bundle.display()
                );
            }
        }
        let config = dir.join("registry.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: \"{address}\"\n{tls}{auth}",
                data.display()
            ),
        )?;
        let mut command = machine.command("docker-registry");
        command.arg("serve").arg(&config);
        // Go's telemetry exporter of newer registries would look for a collector.
        command.env("OTEL_TRACES_EXPORTER", "none");
        let mut process = Process::start("docker-registry", command, &dir.join("registry.log"))?;
        process
            .wait_until("listened", START_MAX, async || {
                tokio::net::TcpStream::connect(address).await.is_ok()
            })
            .await?;
        Ok(Self {
            machine: machine.clone(),
            address,
            access,
            ca_file,
            process,
        })
    }

    /// `IP:PORT`.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://IP:PORT` or `https://IP:PORT`.
    pub(crate) fn url(&self) -> String {
        let scheme = if matches!(self.access, Access::Tls) {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.address())
    }

    /// Pushes `image` as `repository:tag` with skopeo, past anything that stands in front.
    pub(crate) async fn push(&self, image: &Image, name: &str) -> Result<()> {
        let mut command = self.machine.command("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"]);
        command.arg("--dest-tls-verify=false");
        if matches!(self.access, Access::Basic | Access::Token { .. }) {
            command.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        command.arg(image.skopeo_name());
        command.arg(format!("docker://{}/{name}", self.address()));
        run_to_end(command, PUSH_MAX)
            .await?
            .ok(&format!("pushing {name}"))
            .with_context(|| self.process.log_tail())?;
        Ok(())
    }
}
