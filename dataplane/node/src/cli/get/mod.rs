//! `pantala get`: an image or a file, verified, at a path; and where its bytes came from.
//!
//! Everything is written to `PATH.partial` first and renamed when it is complete and verified. What
//! an interrupted run left there is verified and taken up by the next.

pub(super) mod auth;
mod blob;
mod file;
mod image;
mod layout;
mod manifest;
mod origins;
mod progress;
mod way;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pantala_source::{Credential, Source, SourceConfig, SourceError};
use serde::Serialize;

use super::args::GetArgs;
use super::failure::Failure;
use super::output::{percent, say};
use crate::config::{ByteSize, Config};
use origins::Origins;

pub(super) fn run(args: &GetArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref())?;
    if std::fs::symlink_metadata(&args.output).is_ok() {
        return Err(
            Failure::usage(format!("{} exists already", args.output.display()))
                .hint("remove it, or choose another path"),
        );
    }
    let login = auth::login_of_arguments(args)?;
    let source = Source::new(source_config(&config)).map_err(|e| Failure::usage(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(blob::TRANSFERS_MAX)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(format!("cannot start: {e}")))?;
    let started = Instant::now();
    let result = match args.what.contains("://") {
        true => runtime.block_on(file::get(args, &source, login)),
        false => runtime.block_on(image::get(args, &config, &source, login)),
    };
    let done = result?;
    let seconds = started.elapsed().as_secs_f64();
    match args.json {
        true => say(&done.json(seconds)?),
        false => say(&done.render(seconds)),
    }
}

fn source_config(config: &Config) -> SourceConfig {
    let ca_files = config.registries.iter().filter_map(|(host, registry)| {
        let authority = match (registry.url.host_str(), registry.url.port()) {
            (Some(name), Some(port)) => format!("{name}:{port}"),
            (Some(name), None) => name.to_owned(),
            (None, _) => host.clone(),
        };
        Some((authority, vec![registry.ca_file.clone()?]))
    });
    SourceConfig {
        host_ca_files: ca_files.collect(),
        connect_timeout: config.source.connect_timeout,
        first_byte_timeout: config.source.first_byte_timeout,
        stall_timeout: config.source.stall_timeout,
        retries_max: config.source.retries_max,
        transfers_per_host_max: config.source.connections_per_host_max,
        ..SourceConfig::default()
    }
}

/// What was got.
#[derive(Debug, Serialize)]
struct Done {
    /// The image reference or URL.
    what: String,
    /// The manifest's digest, or that of the file.
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<String>,
    path: PathBuf,
    bytes: u64,
    /// The node asked, if one was.
    node: Option<String>,
    /// Where the node had the bytes from; absent where no node was asked or none told.
    origins: Option<Origins>,
    /// Why no node was asked.
    #[serde(skip)]
    direct_because: Option<String>,
}

impl Done {
    fn json(&self, seconds: f64) -> Result<String, Failure> {
        let fail = |e: serde_json::Error| Failure::new(format!("cannot write the result: {e}"));
        let mut value = serde_json::to_value(self).map_err(fail)?;
        value["seconds"] = serde_json::json!(seconds);
        Ok(format!("{value:#}\n"))
    }

    fn render(&self, seconds: f64) -> String {
        // A rate for a person: three digits are right, whatever the rounding.
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let rate = ByteSize((self.bytes as f64 / seconds.max(0.001)) as u64);
        let platform = match &self.platform {
            Some(platform) => format!(" ({platform})"),
            None => String::new(),
        };
        let from = match (&self.node, &self.origins) {
            (Some(node), Some(origins)) => {
                let part = |bytes| {
                    let percent = percent(bytes, origins.sum());
                    format!("{} ({percent} %)", ByteSize(bytes))
                };
                format!(
                    "through the node at {node}: from the registry {}, from peers {}, from its disk {}",
                    part(origins.registry_bytes),
                    part(origins.peer_bytes),
                    part(origins.local_bytes),
                )
            }
            (Some(node), None) => {
                format!("through the node at {node}, whose status cannot be read")
            }
            (None, _) => format!(
                "directly from the source: {}",
                self.direct_because
                    .as_deref()
                    .unwrap_or("no node was asked")
            ),
        };
        format!(
            "{}{platform}\n{}\n{} in {seconds:.1} s ({rate}/s) to {}\n{from}\n",
            self.what,
            self.digest,
            ByteSize(self.bytes),
            self.path.display(),
        )
    }
}

/// Where something is kept until it is complete.
fn partial_path(output: &Path) -> PathBuf {
    let mut name = OsString::from(output.as_os_str());
    name.push(".partial");
    PathBuf::from(name)
}

/// A failure of a registry or another origin, with what usually helps.
fn about_source(doing: &str, error: &SourceError, credential: &Credential) -> Failure {
    let failure = Failure::new(format!("cannot {doing}: {error}"));
    match error {
        SourceError::Refused { .. } | SourceError::Token { .. } => {
            failure.hint(login_hint(credential))
        }
        SourceError::NotFound { .. } => {
            failure.hint("check the name; some registries say this of what a user may not read")
        }
        SourceError::Untrusted { .. } => failure.hint(
            "name its CA as ca_file in [registries.\"HOST\"] of the configuration, or use \
             --plain-http if it speaks no TLS",
        ),
        SourceError::Unavailable { .. } | SourceError::TimedOut { .. } => {
            failure.hint("check the address; use --plain-http if it speaks no TLS")
        }
        SourceError::Cut { .. } | SourceError::RateLimited { .. } => {
            failure.hint("run the command again: it goes on where it stopped")
        }
        _ => failure,
    }
}

fn login_hint(credential: &Credential) -> &'static str {
    match credential.is_anonymous() {
        true => "give --user and --password-stdin, or log in with podman, skopeo or docker first",
        false => "check user, password and the name",
    }
}
