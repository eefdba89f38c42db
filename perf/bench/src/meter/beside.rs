//! A TCP sender and this one on one link: what each gets alone, together, and when this one gives way.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::end::{Client, Pacing, Server};
use super::{MeterArguments, scavenger};

/// What comes before is not measured: windows open, and the scavenger sees the other.
const SETTLE: Duration = Duration::from_secs(1);

/// Bytes a second.
#[derive(Debug, Serialize)]
struct Report {
    tcp_alone: f64,
    own_alone_free: f64,
    own_alone_yielding: f64,
    tcp_beside_free: f64,
    tcp_beside_yielding: f64,
    own_beside_yielding: f64,
}

pub(super) fn run(arguments: &MeterArguments, capacity: f64) -> Result<()> {
    let free = || scavenger(capacity, false);
    let yielding = || scavenger(capacity, true);
    let (tcp_alone, _) = phase(arguments, true, None)?;
    let (_, own_alone_free) = phase(arguments, false, Some(free()))?;
    let (_, own_alone_yielding) = phase(arguments, false, Some(yielding()))?;
    let (tcp_beside_free, _) = phase(arguments, true, Some(free()))?;
    let (tcp_beside_yielding, own_beside_yielding) = phase(arguments, true, Some(yielding()))?;
    let report = Report {
        tcp_alone,
        own_alone_free,
        own_alone_yielding,
        tcp_beside_free,
        tcp_beside_yielding,
        own_beside_yielding,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// What TCP and this one get, each if it takes part.
fn phase(
    arguments: &MeterArguments,
    with_tcp: bool,
    pacing: Option<Arc<Pacing>>,
) -> Result<(f64, f64)> {
    let own = match pacing {
        None => None,
        Some(pacing) => {
            let server = Server::start(arguments, pacing)?;
            let client = Client::start(arguments, server.address, 0)?;
            client.go()?;
            Some((server, client))
        }
    };
    std::thread::sleep(SETTLE);
    let tcp = match with_tcp {
        true => Some(Tcp::start(arguments)?),
        false => None,
    };
    std::thread::sleep(SETTLE);
    let before = tcp.as_ref().map_or(0, Tcp::received);
    let began = Instant::now();
    let lasts = Duration::from_secs_f64(arguments.seconds).saturating_sub(SETTLE * 3);
    std::thread::sleep(lasts);
    let after = tcp.as_ref().map_or(0, Tcp::received);
    let tcp_rate = (after - before) as f64 / began.elapsed().as_secs_f64();
    if let Some(tcp) = tcp {
        tcp.end()?;
    }
    let Some((server, client)) = own else {
        return Ok((tcp_rate, 0.0));
    };
    let fetched = client.fetched()?;
    client.end()?;
    server.end()?;
    Ok((tcp_rate, fetched as f64 / arguments.seconds))
}

/// A connection that is filled from the server's side.
struct Tcp {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Tcp {
    fn start(arguments: &MeterArguments) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let listen = SocketAddr::new(arguments.listen.ip(), 0);
        let listener = within(arguments.server_netns.clone(), move || {
            Ok(TcpListener::bind(listen)?)
        })?;
        let to = listener.local_addr()?;
        let mut reader = within(arguments.client_netns.clone(), move || {
            Ok(TcpStream::connect(to)?)
        })?;
        let (mut writer, _) = listener.accept()?;
        let (counter, is_over) = (received.clone(), stop.clone());
        let reading = std::thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            loop {
                let bytes = reader.read(&mut buffer)?;
                if bytes == 0 {
                    return Ok(());
                }
                counter.fetch_add(bytes as u64, Ordering::Relaxed);
            }
        });
        let writing = std::thread::spawn(move || {
            let buffer = vec![7; 256 << 10];
            while !is_over.load(Ordering::Relaxed) {
                writer.write_all(&buffer)?;
            }
            Ok(())
        });
        Ok(Self {
            stop,
            received,
            threads: vec![reading, writing],
        })
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    }
}

/// Opens a socket in another network namespace, where it stays.
fn within<T: Send + 'static>(
    namespace: Option<PathBuf>,
    open: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread = std::thread::spawn(move || {
        if let Some(path) = namespace {
            let file = std::fs::File::open(&path).context("opening the namespace")?;
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))?;
        }
        open()
    });
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}
