//! One server and its clients in network namespaces of their own, with what the meter says of them.
//!
//! All are threads of this process: each counts its own sockets only, and the processor time is that of all.

mod beside;
mod end;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use pantala_meter::core::{Scavenger, ScavengerConfig};
use pantala_meter::kernel::Steered;
use serde::Serialize;

use crate::resources::Used;
use crate::stack::Stack;
use end::{Client, Counted, Pacing, Server};

/// After this long without requests, nothing is on its way but what keeps connections alive.
const QUIET: Duration = Duration::from_millis(400);

/// Clients that count for themselves: the kernel takes 64 programs of a kind at a cgroup.
const COUNTING_CLIENTS_MAX: usize = 8;

/// What is measured.
#[derive(Debug, Clone, Args)]
pub(crate) struct MeterArguments {
    #[arg(long)]
    stack: Stack,
    /// Where the server listens; port 0
    #[arg(long)]
    listen: SocketAddr,
    /// The server's network namespace [default: this one]
    #[arg(long)]
    server_netns: Option<PathBuf>,
    /// The clients' [default: this one]
    #[arg(long)]
    client_netns: Option<PathBuf>,
    /// Where the certificates are
    #[arg(long)]
    identities: PathBuf,
    /// Clients, each with a socket of its own
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// The server's threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Bytes for each client
    #[arg(long, default_value_t = u64::MAX)]
    bytes: u64,
    /// Time after which no more is asked for
    #[arg(long, default_value_t = 3600.0)]
    seconds: f64,
    /// Do not load the programs
    #[arg(long)]
    bare: bool,
    /// Measure a TCP sender beside this one instead, on a link of so many bytes a second
    #[arg(long)]
    beside: Option<f64>,
}

/// What one transfer was, and what the meter said.
#[derive(Debug, Serialize)]
struct Report {
    cpu_s: f64,
    took_s: f64,
    bytes: u64,
    /// Counted by the kernel and sent by QUIC, or by the kernel of the other side: differences.
    error_bytes: u64,
    error_datagrams: u64,
    counted_bytes: u64,
    counted_datagrams: u64,
    batches: u64,
    steered_by_id: u64,
    steered_by_hash: u64,
    steered_refused: u64,
    /// For each client: seconds since it began, the estimate in bytes a second of the link, and its error.
    series: Vec<Vec<(f64, f64, f64)>>,
}

pub(crate) fn run(arguments: &MeterArguments) -> Result<()> {
    if let Some(capacity) = arguments.beside {
        return beside::run(arguments, capacity);
    }
    println!("{}", serde_json::to_string(&transfer(arguments)?)?);
    Ok(())
}

fn transfer(arguments: &MeterArguments) -> Result<Report> {
    let pacing = Pacing::free();
    let server = Server::start(arguments, pacing)?;
    let clients: Vec<Client> = (0..arguments.clients)
        .map(|number| Client::start(arguments, server.address, number))
        .collect::<Result<_>>()?;
    let (before, began) = (Used::now()?, Instant::now());
    for client in &clients {
        client.go()?;
    }
    let mut bytes = 0;
    for client in &clients {
        bytes += client.fetched()?;
    }
    let took_s = began.elapsed().as_secs_f64();
    let cpu_s = Used::now()?.since(before).cpu_s;
    std::thread::sleep(QUIET);
    let mut report = Report {
        cpu_s,
        took_s,
        bytes,
        error_bytes: 0,
        error_datagrams: 0,
        counted_bytes: 0,
        counted_datagrams: 0,
        batches: 0,
        steered_by_id: 0,
        steered_by_hash: 0,
        steered_refused: 0,
        series: Vec::new(),
    };
    let (served, steered) = server.report()?;
    report.set_steered(steered);
    for client in &clients {
        let (counted, series) = client.report()?;
        report.series.push(series);
        if !arguments.bare && arguments.clients <= COUNTING_CLIENTS_MAX {
            let of_server = served
                .iter()
                .find(|other| other.peer.port() == counted.own_port);
            report.add(
                &counted,
                of_server.context("the server has no such client")?,
            );
        }
    }
    for client in clients {
        client.end()?;
    }
    server.end()?;
    Ok(report)
}

impl Report {
    fn set_steered(&mut self, steered: Steered) {
        self.steered_by_id = steered.by_id;
        self.steered_by_hash = steered.by_hash;
        self.steered_refused = steered.refused;
    }

    /// Both ends of a connection: what one has sent by QUIC's own account, what its kernel counted of that, and
    /// what the kernel of the other side did.
    fn add(&mut self, one: &Counted, other: &Counted) {
        for (from, to) in [(one, other), (other, one)] {
            let (sent, received) = (&from.traffic.sent, &to.traffic.received);
            self.counted_bytes += sent.payload_bytes;
            self.counted_datagrams += sent.datagrams;
            self.batches += sent.batches;
            self.error_bytes += sent.payload_bytes.abs_diff(from.quic.sent_bytes);
            self.error_bytes += sent.payload_bytes.abs_diff(received.payload_bytes);
            self.error_datagrams += sent.datagrams.abs_diff(from.quic.sent_datagrams);
            self.error_datagrams += sent.datagrams.abs_diff(received.datagrams);
        }
    }
}

/// A scavenger for a link of `capacity` bytes a second, or one that never gives way.
fn scavenger(capacity: f64, yields: bool) -> Arc<Pacing> {
    Pacing::beside(Scavenger::new(ScavengerConfig {
        ceiling: None,
        floor: capacity * 0.01,
        capacity: Some(capacity),
        yields,
    }))
}
