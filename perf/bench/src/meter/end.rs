//! One end of the transfer: a thread in a network namespace, with sockets, a runtime and counters of its own.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use pantala_meter::core::{
    Count, HostReading, Pace, Path as MeteredPath, QuicView, Reading, Scavenger, Turn,
};
use pantala_meter::kernel::{Interfaces, KernelConfig, KernelMeter, Steered, Traffic, count};
use pantala_quic::{Connection, DriverChoice, Endpoint, EndpointConfig, Limits, PathStats};
use pantala_wire::Priority;
use parking_lot::Mutex;

use super::{COUNTING_CLIENTS_MAX, MeterArguments};
use crate::identities;
use crate::stack::Stack;

const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// Bytes of one request, as a piece.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes handed over at once, as a node does.
const PART_BYTES: usize = 256 << 10;
/// Requests outstanding.
const STREAMS: u64 = 8;
/// Ethernet's header, which links count and sockets do not.
const ETHERNET_BYTES: u64 = 14;

type Shared = Arc<Mutex<Option<KernelMeter>>>;

/// What was counted of one connection, by both.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) peer: SocketAddr,
    pub(super) own_port: u16,
    pub(super) traffic: Traffic,
    pub(super) quic: PathStats,
}

/// How a server keeps to what it may send.
pub(super) struct Pacing {
    began: Instant,
    state: Mutex<(Pace, Option<Scavenger>)>,
}

impl Pacing {
    /// As fast as it goes.
    pub(super) fn free() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            state: Mutex::default(),
        })
    }

    /// As the scavenger allows.
    pub(super) fn beside(scavenger: Scavenger) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            state: Mutex::new((Pace::default(), Some(scavenger))),
        })
    }

    async fn turn(&self, bytes: u64) {
        loop {
            let turn = self.state.lock().0.take(self.began.elapsed(), bytes);
            let (Turn::After(wait) | Turn::AskAfter(wait)) = turn;
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            if matches!(turn, Turn::After(_)) {
                return;
            }
        }
    }

    fn look(&self, interface_bytes: u64, own: Count) {
        let mut state = self.state.lock();
        let reading = HostReading {
            at: self.began.elapsed(),
            interface_bytes,
            own,
        };
        if let Some(scavenger) = &mut state.1 {
            let allowance = scavenger.take(&reading);
            state.0.set(allowance.bytes_per_s);
        }
    }
}

fn enter(namespace: Option<&PathBuf>) -> Result<()> {
    let Some(path) = namespace else { return Ok(()) };
    let file = std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let kind = rustix::thread::LinkNameSpaceType::Network;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))?;
    Ok(())
}

fn bind(
    arguments: &MeterArguments,
    listen: SocketAddr,
    number: usize,
    threads: usize,
    kernel: &Shared,
) -> Result<Endpoint> {
    let see = |sockets: &[UdpSocket]| -> std::io::Result<()> {
        if let Some(kernel) = &mut *kernel.lock() {
            kernel
                .count_sockets(sockets)
                .map_err(std::io::Error::other)?;
            if sockets.len() > 1 {
                kernel.steer(sockets).map_err(std::io::Error::other)?;
            }
        }
        Ok(())
    };
    let config = EndpointConfig {
        listen,
        identity: identities::read(Path::new(&arguments.identities), number)?,
        limits: Limits {
            threads,
            ..Limits::default()
        },
        driver: match arguments.stack {
            Stack::Ring => DriverChoice::Ring,
            _ => DriverChoice::Tokio,
        },
    };
    Ok(Endpoint::bind_seen(config, Some(&see))?)
}

fn load(bare: bool) -> Result<Shared> {
    let kernel = match bare {
        true => None,
        false => Some(KernelMeter::load(&KernelConfig::default())?),
    };
    Ok(Arc::new(Mutex::new(kernel)))
}

fn traffic(kernel: &Shared, peer: SocketAddr) -> Result<Traffic> {
    let kernel = kernel.lock();
    let traffic = kernel.as_ref().map(|kernel| kernel.traffic(peer));
    Ok(traffic.transpose()?.flatten().unwrap_or_default())
}

fn counted(kernel: &Shared, connection: &Connection, own_port: u16) -> Result<Counted> {
    let peer = connection.remote_addr();
    Ok(Counted {
        peer,
        own_port,
        traffic: traffic(kernel, peer)?,
        quic: connection.stats(),
    })
}

fn in_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

type ServerReport = (Vec<Counted>, Steered);

/// The end that sends.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    asked: tokio::sync::mpsc::Sender<Sender<ServerReport>>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Server {
    pub(super) fn start(arguments: &MeterArguments, pacing: Arc<Pacing>) -> Result<Self> {
        let arguments = arguments.clone();
        let (tell, address) = channel();
        let (asked, asking) = tokio::sync::mpsc::channel(1);
        let thread = std::thread::spawn(move || {
            enter(arguments.server_netns.as_ref())?;
            in_runtime(serve(arguments, pacing, tell, asking))
        });
        let Ok(address) = address.recv() else {
            let ended = thread.join().map_err(|_| anyhow!("the server panicked"))?;
            return Err(ended.err().unwrap_or_else(|| anyhow!("the server ended")));
        };
        Ok(Self {
            address,
            asked,
            thread,
        })
    }

    /// What has been counted by now.
    pub(super) fn report(&self) -> Result<ServerReport> {
        let (reply, report) = channel();
        let asked = self.asked.blocking_send(reply);
        asked.context("the server ended early")?;
        report.recv().context("the server ended early")
    }

    /// Ends it, and its connections.
    pub(super) fn end(self) -> Result<()> {
        drop(self.asked);
        self.thread
            .join()
            .map_err(|_| anyhow!("the server panicked"))?
    }
}

async fn serve(
    arguments: MeterArguments,
    pacing: Arc<Pacing>,
    tell: Sender<SocketAddr>,
    mut asking: tokio::sync::mpsc::Receiver<Sender<ServerReport>>,
) -> Result<()> {
    let kernel = load(arguments.bare)?;
    let endpoint = bind(&arguments, arguments.listen, 0, arguments.threads, &kernel)?;
    let own_port = endpoint.local_addr().port();
    tell.send(endpoint.local_addr())?;
    let mut connections: Vec<Connection> = Vec::new();
    let mut interfaces = Interfaces::new(Vec::new());
    let mut tick = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        tokio::select! {
            connection = endpoint.accept() => {
                let connection = connection.context("the endpoint is closed")?;
                connections.push(connection.clone());
                tokio::spawn(answer_all(connection, pacing.clone()));
            }
            _ = tick.tick() => {
                let mut own = Count::default();
                for connection in &connections {
                    let peer = connection.remote_addr();
                    let sent = count(peer, &traffic(&kernel, peer)?.sent);
                    own.wire_bytes += sent.wire_bytes;
                    own.datagrams += sent.datagrams;
                }
                pacing.look(interfaces.read()?.sent_bytes, own);
            }
            asked = asking.recv() => {
                let Some(reply) = asked else { return Ok(()) };
                let counted = connections.iter().map(|it| counted(&kernel, it, own_port));
                let counted = counted.collect::<Result<Vec<_>>>()?;
                let steered = kernel.lock().as_ref().map(KernelMeter::steered).transpose()?;
                reply.send((counted, steered.unwrap_or_default()))?;
            }
        }
    }
}

async fn answer_all(connection: Connection, pacing: Arc<Pacing>) {
    while let Ok((mut send, mut recv)) = connection.accept().await {
        let pacing = pacing.clone();
        tokio::spawn(async move {
            // A client that goes away ends its requests.
            let Ok(asked) = recv.read_slices(8).await else {
                return;
            };
            let Ok(asked) = asked.concat().try_into() else {
                return;
            };
            let mut left = u64::from_le_bytes(asked);
            let part = Bytes::from(vec![7; PART_BYTES]);
            while left > 0 {
                let bytes = part.slice(..left.min(PART_BYTES as u64) as usize);
                left -= bytes.len() as u64;
                pacing.turn(bytes.len() as u64).await;
                if send.write_bytes(bytes).await.is_err() {
                    return;
                }
            }
            let _ = send.finish();
        });
    }
}

type Series = Vec<(f64, f64, f64)>;

/// An end that receives.
pub(super) struct Client {
    go: Sender<()>,
    fetched: Receiver<u64>,
    report: Receiver<(Counted, Series)>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Client {
    pub(super) fn start(
        arguments: &MeterArguments,
        server: SocketAddr,
        number: usize,
    ) -> Result<Self> {
        let arguments = arguments.clone();
        let (go, begin) = channel();
        let (tell, fetched) = channel();
        let (ready, connected) = channel();
        let (hand_in, report) = channel();
        let thread = std::thread::spawn(move || {
            enter(arguments.client_netns.as_ref())?;
            in_runtime(fetch(
                arguments,
                server,
                number,
                (ready, begin, tell, hand_in),
            ))
        });
        if connected.recv().is_err() {
            let ended = thread.join().map_err(|_| anyhow!("a client panicked"))?;
            return Err(ended.err().unwrap_or_else(|| anyhow!("a client ended")));
        }
        Ok(Self {
            go,
            fetched,
            report,
            thread,
        })
    }

    pub(super) fn go(&self) -> Result<()> {
        self.go.send(()).context("a client ended early")
    }

    pub(super) fn fetched(&self) -> Result<u64> {
        self.fetched.recv().context("a client ended early")
    }

    /// What has been counted by now; to be asked for once.
    pub(super) fn report(&self) -> Result<(Counted, Series)> {
        self.go()?;
        self.report.recv().context("a client ended early")
    }

    /// Ends it, and its connection.
    pub(super) fn end(self) -> Result<()> {
        drop(self.go);
        self.thread
            .join()
            .map_err(|_| anyhow!("a client panicked"))?
    }
}

/// To say that it is connected, to be told to begin, to say what it has fetched, to hand its report in.
type Led = (
    Sender<()>,
    Receiver<()>,
    Sender<u64>,
    Sender<(Counted, Series)>,
);

async fn fetch(
    arguments: MeterArguments,
    server: SocketAddr,
    number: usize,
    (ready, begin, tell, hand_in): Led,
) -> Result<()> {
    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0_u16; 8], 0)),
    };
    let kernel = load(arguments.bare || arguments.clients > COUNTING_CLIENTS_MAX)?;
    let endpoint = bind(&arguments, any, number + 1, 1, &kernel)?;
    let node = identities::node_id(&arguments.identities, 0)?;
    let connection = endpoint.connect(server, node).await?;
    ready.send(())?;
    let begin = tokio::task::spawn_blocking(move || (begin.recv(), begin)).await?;
    begin.0?;
    let began = Instant::now();
    let deadline = began + Duration::from_secs_f64(arguments.seconds);
    let asked = Arc::new(Mutex::new(arguments.bytes));
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        streams.spawn(ask_all(connection.clone(), asked.clone(), deadline));
    }
    let mut path = MeteredPath::default();
    let (mut series, mut fetched) = (Series::new(), 0);
    let mut tick = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        tokio::select! {
            done = streams.join_next() => match done {
                Some(bytes) => fetched += bytes??,
                None => break,
            },
            _ = tick.tick() => {
                let (reading, on_link) = look(&kernel, &connection, began)?;
                path.take(&reading);
                if let Some(rate) = path.estimate(reading.at).inbound {
                    series.push((reading.at.as_secs_f64(), rate.bytes_per_s * on_link, rate.error_ratio));
                }
            }
        }
    }
    tell.send(fetched)?;
    // Until everybody is quiet, and then until all have handed theirs in.
    let begin = tokio::task::spawn_blocking(move || (begin.1.recv(), begin.1)).await?;
    if begin.0.is_err() {
        // Nobody wants a report.
        return Ok(());
    }
    let own_port = endpoint.local_addr().port();
    hand_in.send((counted(&kernel, &connection, own_port)?, series))?;
    // An error is the end that is waited for.
    let _ = tokio::task::spawn_blocking(move || begin.1.recv()).await?;
    Ok(())
}

/// The path now, and how much more a link carries than is counted.
fn look(kernel: &Shared, connection: &Connection, began: Instant) -> Result<(Reading, f64)> {
    let peer = connection.remote_addr();
    let counted = traffic(kernel, peer)?;
    let stats = connection.stats();
    let received = count(peer, &counted.received);
    let on_link = (received.wire_bytes + received.datagrams * ETHERNET_BYTES) as f64
        / received.wire_bytes.max(1) as f64;
    let reading = Reading {
        at: began.elapsed(),
        received,
        sent: count(peer, &counted.sent),
        quic: QuicView {
            rtt: stats.rtt,
            cwnd_bytes: stats.cwnd,
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
            received_bytes: stats.received_bytes,
        },
        is_wanted: true,
        is_kernel: true,
    };
    Ok((reading, on_link))
}

async fn ask_all(connection: Connection, asked: Arc<Mutex<u64>>, deadline: Instant) -> Result<u64> {
    let mut fetched = 0;
    while Instant::now() < deadline {
        let bytes = {
            let mut left = asked.lock();
            let bytes = PIECE_BYTES.min(*left);
            *left -= bytes;
            bytes
        };
        if bytes == 0 {
            break;
        }
        let (mut send, mut recv) = connection.open(Priority::Bulk).await?;
        send.write_bytes(Bytes::copy_from_slice(&bytes.to_le_bytes()))
            .await?;
        send.finish()?;
        let mut got = 0;
        while got < bytes {
            let slices = recv
                .read_slices((bytes - got).min(PART_BYTES as u64) as usize)
                .await?;
            let more: usize = slices.iter().map(Bytes::len).sum();
            anyhow::ensure!(more > 0, "the answer ended early");
            got += more as u64;
        }
        fetched += got;
    }
    Ok(fetched)
}
