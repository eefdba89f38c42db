//! How the harness leads a process: one line in, one line of JSON out.
//!
//! A server says `{"ready": "IP:PORT"}` once it listens, answers `used` with its processor time and
//! `warm` after it has read its file. A client answers `connect`, `run` (with a [`Run`]), `small` (with
//! latencies), `discard` (no file from then on) and `close`. Both end when their input does. An error is the end of the process, with the reason on standard error.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::file::{Sink, Source};
use crate::latency::Latencies;
use crate::resources::Used;

/// One transfer, as its client saw it.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    seconds: f64,
    #[serde(flatten)]
    used: Used,
    bytes: u64,
    /// The UDP payload that the stack found the path to take, where it knows.
    mtu: Option<u16>,
}

fn say(line: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Answers the harness until it hangs up.
pub(crate) fn server(listening: SocketAddr, source: &Source) -> Result<()> {
    say(&json!({"ready": listening}))?;
    for line in std::io::stdin().lock().lines() {
        match line?.trim() {
            "used" => say(&Used::now()?)?,
            "warm" => {
                source.warm()?;
                say(&json!({}))?;
            }
            other => bail!("a server knows no {other:?}"),
        }
    }
    Ok(())
}

/// `small OUTSTANDING REQUESTS LENGTH`
#[derive(Debug, Clone, Copy)]
pub(crate) struct Small {
    /// Requests side by side.
    pub(crate) outstanding: usize,
    /// Requests in all.
    pub(crate) requests: u64,
    /// Bytes of each.
    pub(crate) length: u32,
}

impl Small {
    fn parse(words: &str) -> Result<Self> {
        let mut words = words.split(' ');
        let mut next = || words.next().context("small OUTSTANDING REQUESTS LENGTH");
        Ok(Self {
            outstanding: next()?.parse()?,
            requests: next()?.parse()?,
            length: next()?.parse()?,
        })
    }
}

/// What a client can be told to do.
pub(crate) trait Client {
    /// Opens connections and lets them grow warm.
    fn connect(&mut self) -> Result<()>;
    /// Fetches everything into the file; returns the bytes that arrived.
    fn run(&mut self) -> Result<u64>;
    /// What it writes to.
    fn sink(&mut self) -> &mut Sink;
    /// Asks for random ranges and throws the answers away.
    fn small(&mut self, _: Small) -> Result<Latencies> {
        bail!("this stack is not measured with small requests")
    }
    /// The UDP payload that the path takes, where the stack knows.
    fn mtu(&self) -> Option<u16>;
    /// Closes what [`Self::connect`] opened.
    fn close(&mut self) -> Result<()>;
}

/// Does what the harness says until it hangs up.
pub(crate) fn client(mut client: impl Client) -> Result<()> {
    say(&json!({"ready": null}))?;
    for line in std::io::stdin().lock().lines() {
        match line?.trim() {
            "connect" => {
                client.connect().context("connecting")?;
                say(&json!({}))?;
            }
            "run" => {
                let (before, start) = (Used::now()?, Instant::now());
                let bytes = client.run().context("fetching")?;
                let seconds = start.elapsed().as_secs_f64();
                say(&Run {
                    seconds,
                    used: Used::now()?.since(before),
                    bytes,
                    mtu: client.mtu(),
                })?;
            }
            "discard" => {
                client.sink().discard();
                say(&json!({}))?;
            }
            "close" => {
                client.close().context("closing")?;
                say(&json!({}))?;
            }
            other if other.starts_with("small ") => {
                let small = Small::parse(other.trim_start_matches("small "))?;
                let before = Used::now()?;
                let latencies = client.small(small).context("fetching")?;
                let used = Used::now()?.since(before);
                say(&json!({"latencies": latencies, "cpu_s": used.cpu_s}))?;
            }
            other => bail!("a client knows no {other:?}"),
        }
    }
    Ok(())
}
