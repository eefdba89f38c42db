//! How the harness leads a process: one line in, one line of JSON out.
//!
//! A server says `{"ready": "IP:PORT"}` once it listens, answers `used` with its processor time and
//! `warm` after it has read its file. A client answers `connect`, `run` (with a [`Run`]) and `close`. Both end
//! when their input does. An error is the end of the process, with the reason on standard error.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::file::Source;
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

/// What a client can be told to do.
pub(crate) trait Client {
    /// Opens connections and lets them grow warm.
    fn connect(&mut self) -> Result<()>;
    /// Fetches everything into the file; returns the bytes that arrived.
    fn run(&mut self) -> Result<u64>;
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
            "close" => {
                client.close().context("closing")?;
                say(&json!({}))?;
            }
            other => bail!("a client knows no {other:?}"),
        }
    }
    Ok(())
}
