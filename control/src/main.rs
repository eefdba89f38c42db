//! The `pantala-control` program: scheduling and cluster state for clusters that run it on its own
//! instead of inside a node.

#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use pantala_control::authority::join_token_path;
use pantala_control::{JoinToken, Server, ServerConfig};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Largest configuration file read: ours have some lines.
const CONFIG_SIZE_MAX: u64 = 1024 * 1024;

/// Scheduling and cluster state of Pantala.
///
/// Control says which node fetches what from whom, and which pieces each may read from the registry.
/// It also is the cluster's certificate authority: a node joins with the token that `pantala-control
/// token` prints. All but the CA and the token is rebuilt from the nodes after a restart.
#[derive(Parser)]
#[command(name = "pantala-control", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs control until SIGTERM or SIGINT.
    Serve {
        #[command(flatten)]
        place: Place,
        /// Where to listen [default: 127.0.0.1:65004].
        #[arg(long, value_name = "IP:PORT", env = "PANTALA_CONTROL_LISTEN")]
        listen: Option<SocketAddr>,
    },
    /// Prints the token that nodes join with. Whoever has it can join: treat it like a password.
    Token {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
struct Place {
    /// A TOML file with `data_dir`, `listen` and `[log]`; options given here win over it.
    #[arg(long, value_name = "FILE", env = "PANTALA_CONTROL_CONFIG")]
    config: Option<PathBuf>,
    /// Where the CA and the join token are kept [default: /var/lib/pantala].
    #[arg(long, value_name = "DIR", env = "PANTALA_CONTROL_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    data_dir: PathBuf,
    listen: SocketAddr,
    log: Log,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    filter: String,
    format: Format,
}

#[derive(Debug, Clone, Copy, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Format {
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/pantala".into(),
            listen: (Ipv4Addr::LOCALHOST, 65004).into(),
            log: Log::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: Format::Text,
        }
    }
}

impl Place {
    fn config(&self) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => Config::default(),
        };
        if let Some(dir) = &self.data_dir {
            config.data_dir.clone_from(dir);
        }
        Ok(config)
    }
}

fn read_config(path: &Path) -> anyhow::Result<Config> {
    let size = std::fs::metadata(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?
        .len();
    if size > CONFIG_SIZE_MAX {
        bail!("{} is too large for a configuration", path.display());
    }
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    parse_config(&text).with_context(|| format!("in the configuration {}", path.display()))
}

fn parse_config(text: &str) -> anyhow::Result<Config> {
    toml::from_str(text).context("the keys are data_dir, listen, log.filter and log.format")
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Token { place } => print_token(&place.config()?.data_dir),
        Command::Serve { place, listen } => {
            let mut config = place.config()?;
            if let Some(listen) = listen {
                config.listen = listen;
            }
            start_log(&config.log)?;
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("cannot start threads")?
                .block_on(serve(config))
        }
    }
}

fn print_token(dir: &Path) -> anyhow::Result<()> {
    let path = join_token_path(dir);
    let token = JoinToken::from_file(&path)
        .context("there is a token once control has run; --data-dir must be the same for both")?;
    println!("{}", token.reveal());
    Ok(())
}

fn start_log(log: &Log) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&log.filter)
        .with_context(|| format!("log.filter {:?} is no filter, try \"info\"", log.filter))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        Format::Text => builder.init(),
        Format::Json => builder.json().init(),
    }
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let server = Server::start(ServerConfig::new(config.data_dir.clone(), config.listen)).await?;
    tracing::info!(
        token_file = %join_token_path(&config.data_dir).display(),
        "nodes join with the token in this file"
    );
    tokio::select! {
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result.context("cannot listen for SIGINT")?,
    }
    tracing::info!("stopping");
    server.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_key_can_be_set_and_an_unknown_one_is_an_error_with_a_hint() {
        let config = parse_config(
            "data_dir = \"/x\"\nlisten = \"0.0.0.0:1\"\n[log]\nfilter = \"debug\"\nformat = \"json\"\n",
        )
        .unwrap();
        assert_eq!(config.listen.port(), 1);
        assert!(matches!(config.log.format, Format::Json));
        let error = parse_config("listn = \"0.0.0.0:1\"").unwrap_err();
        assert!(format!("{error:#}").contains("listn"));
        assert!(format!("{error:#}").contains("data_dir"));
    }
}
