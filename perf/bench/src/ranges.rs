//! Range requests over HTTP, as a lazy mount makes them: what a node's mirror is asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::latency::{Latencies, Noise};
use crate::resources::Used;

/// Longest that an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Debug, Clone, Args)]
pub(crate) struct RangesArguments {
    #[arg(long)]
    server: SocketAddr,
    /// Path and query of the blob
    #[arg(long)]
    path: String,
    /// Size of the blob
    #[arg(long)]
    bytes: u64,
    /// Bytes of each range
    #[arg(long, default_value_t = 64 << 10)]
    range: u64,
    #[arg(long)]
    requests: usize,
    /// Connections, each with one request at a time
    #[arg(long)]
    clients: usize,
    /// Ask for ranges far apart, each once, so that none is a hit because of another
    #[arg(long)]
    apart: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Asks, and prints the latencies.
pub(crate) fn run(arguments: &RangesArguments) -> Result<()> {
    let offsets = offsets(arguments)?;
    let next = AtomicUsize::new(0);
    let before = Used::now()?;
    let start = Instant::now();
    let took = std::thread::scope(|scope| -> Result<Vec<Duration>> {
        let clients: Vec<_> = (0..arguments.clients)
            .map(|_| scope.spawn(|| client(arguments, &offsets, &next)))
            .collect();
        let mut all = Vec::new();
        for client in clients {
            let took = client.join();
            all.extend(took.map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok(all)
    })?;
    let latencies = Latencies::of(took, start.elapsed());
    let used = Used::now()?.since(before);
    println!("{}", json!({"latencies": latencies, "cpu_s": used.cpu_s}));
    Ok(())
}

/// Where the ranges begin.
fn offsets(arguments: &RangesArguments) -> Result<Vec<u64>> {
    let mut noise = Noise::new(arguments.seed);
    let places = arguments.bytes / arguments.range;
    ensure!(places > 0, "the blob is smaller than a range");
    if !arguments.apart {
        let random = (0..arguments.requests).map(|_| noise.below(places) * arguments.range);
        return Ok(random.collect());
    }
    // One in each of as many equal parts of the blob, in no order.
    let part = places / arguments.requests as u64;
    ensure!(part > 0, "the blob has too few ranges");
    let mut offsets: Vec<u64> = (0..arguments.requests as u64)
        .map(|index| (index * part + noise.below(part)) * arguments.range)
        .collect();
    for index in (1..offsets.len()).rev() {
        offsets.swap(index, noise.below(index as u64 + 1) as usize);
    }
    Ok(offsets)
}

fn client(
    arguments: &RangesArguments,
    offsets: &[u64],
    next: &AtomicUsize,
) -> Result<Vec<Duration>> {
    let socket = TcpStream::connect(arguments.server)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(ANSWER_MAX))?;
    let mut stream = BufReader::with_capacity(arguments.range as usize, socket);
    let mut body = vec![0; arguments.range as usize];
    let mut took = Vec::new();
    while let Some(offset) = offsets.get(next.fetch_add(1, Ordering::Relaxed)) {
        let start = Instant::now();
        let head = format!(
            "GET {} HTTP/1.1\r\nHost: node\r\nRange: bytes={}-{}\r\n\r\n",
            arguments.path,
            offset,
            offset + arguments.range - 1
        );
        stream.get_mut().write_all(head.as_bytes())?;
        let mut status = String::new();
        stream
            .read_line(&mut status)
            .context("reading the answer")?;
        ensure!(
            status.starts_with("HTTP/1.1 206 "),
            "the node says {:?} to the range at {offset}",
            status.trim()
        );
        let mut length = None;
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = Some(value.trim().parse::<u64>()?);
            }
        }
        ensure!(
            length == Some(arguments.range),
            "a range of {length:?} bytes"
        );
        stream.read_exact(&mut body)?;
        took.push(start.elapsed());
    }
    Ok(took)
}
