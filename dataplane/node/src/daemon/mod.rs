//! `pantala node`: builds the node from its configuration, runs it, takes it down again.
//!
//! Order matters both ways. Control (where it is embedded) comes first, then the identity that it
//! certifies, then store, peers and engine, and the mirror last: a client is only let in once
//! everything behind it works. Down goes the mirror first, so that no request meets half a node.

mod build;

use std::time::Instant;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};
use build::Node;

/// Threads that read, write and hash: enough to keep a disk's queue filled. Each has buffers in
/// flight and a heap of its own, so their number is part of the bound on memory.
const BLOCKING_THREADS_MAX: usize = 16;

/// Runs a node until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever keeps it from starting: a port in use, a data directory without rights, a control that
/// refuses the token.
pub fn run(config: Config) -> anyhow::Result<()> {
    let started = Instant::now();
    start_log(&config)?;
    raise_descriptor_limit();
    // Before the runtime's threads exist: each thread has rights of its own to give up.
    let programs = crate::meter::Programs::load(&config.meter)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("pantala")
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()
        .context("cannot start the runtime's threads")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: shutting down"),
                _ = interrupt.recv() => tracing::info!("SIGINT: shutting down"),
            }
        };
        tokio::pin!(stop);
        let node = tokio::select! {
            node = Node::start(&config, programs, started) => node?,
            () = &mut stop => return Ok(()),
        };
        node.run(stop).await
    })
}

/// Each connection and each open blob takes descriptors; the usual soft limit of 1024 is for
/// programs that use `select`.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "the limit of open files stays low");
    }
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log.filter)
        .with_context(|| format!("log.filter = {:?} is no filter", config.log.filter))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = match config.log.format {
        LogFormat::Text => log.with_ansi(false).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}
