//! What the paths to peers deliver and how much this node may send: `pantala_meter`'s cores, fed.
//!
//! One thread of its own reads the kernel's counts, QUIC's view and the interfaces' totals some times a second;
//! no packet and no request waits for it. It ends when the meter is dropped, and so do the programs in the
//! kernel. Where those may not be loaded, QUIC's own counts do, and [`Meter::status`] says why.

mod sample;
mod status;

use std::net::UdpSocket;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pantala_meter::core::{Pace, PathEstimate, Scavenger, ScavengerConfig, Turn};
use pantala_meter::kernel::{Dropped, Interfaces, KernelConfig, KernelMeter, drop_capabilities};
use pantala_wire::NodeId;
use parking_lot::Mutex;

pub use status::{MeterStatus, PathStatus};

use crate::config::{self, MeterKernel};
use crate::metrics::Metrics;
use crate::peer::{Peers, WeakPeers};

/// How often paths are looked at: several times within the shortest window of an estimate, and seldom enough
/// that 256 peers cost a thousandth of a core.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// An estimate that may be off by more than this is not told to control.
const TOLD_ERROR_MAX: f64 = 0.3;
/// Peers that are held to a rate of their own at a time; beyond it they share the whole node's.
const PACED_PEERS_MAX: usize = 1024;

/// The kernel's half, loaded before anything else of the node exists.
#[derive(Debug)]
pub struct Programs {
    kernel: Option<KernelMeter>,
    /// Why there are none.
    why: Option<String>,
}

impl Programs {
    /// Loads them where the configuration and the kernel allow it, and gives up the rights that this takes. To
    /// be called while the process has one thread.
    ///
    /// # Errors
    /// They are required, and cannot be had; or the rights cannot be given up.
    pub fn load(config: &config::Meter) -> anyhow::Result<Self> {
        let loaded = match config.kernel {
            MeterKernel::Off => Err("meter.kernel = \"off\"".to_owned()),
            MeterKernel::Auto | MeterKernel::Required => {
                KernelMeter::load(&KernelConfig::default()).map_err(|error| error.to_string())
            }
        };
        // Whatever came of it: nothing that follows needs the rights.
        let dropped = drop_capabilities()?;
        let loaded = loaded.and_then(|kernel| match kernel.steered() {
            Ok(_) => Ok(kernel),
            // Kernels before 5.19, where unprivileged BPF is disabled.
            Err(error) => Err(format!(
                "this kernel lets nobody without CAP_BPF read the counters: {error}"
            )),
        });
        match loaded {
            Ok(kernel) => {
                tracing::info!(
                    rights_dropped = dropped == Dropped::Yes,
                    "the kernel counts the traffic of peers"
                );
                Ok(Self {
                    kernel: Some(kernel),
                    why: None,
                })
            }
            Err(why) if config.kernel == MeterKernel::Required => {
                anyhow::bail!("meter.kernel = \"required\": {why}")
            }
            Err(why) => {
                tracing::info!(%why, "paths are measured by QUIC's own counts");
                Ok(Self {
                    kernel: None,
                    why: Some(why),
                })
            }
        }
    }

    /// No programs, and no reason to look for them.
    pub fn none() -> Self {
        Self {
            kernel: None,
            why: Some("not loaded".into()),
        }
    }
}

/// Estimates and limits; clones of the `Arc` share them.
#[derive(Debug)]
pub struct Meter {
    started: Instant,
    /// Why the kernel does not count.
    why: Mutex<Option<String>>,
    kernel: Mutex<Option<KernelMeter>>,
    state: Mutex<sample::State>,
    paces: Mutex<Paces>,
    peer_ceiling: Option<f64>,
}

/// The rates that sending keeps to.
#[derive(Debug, Default)]
struct Paces {
    all: Pace,
    peers: std::collections::HashMap<NodeId, Pace>,
}

impl Meter {
    /// Nothing is known yet.
    pub fn new(programs: Programs, config: &config::Config) -> Arc<Self> {
        let own = &config.meter;
        let interfaces = Interfaces::new(own.interfaces.clone());
        let scavenger = ScavengerConfig {
            ceiling: own.ceiling_bytes_per_s.map(|rate| rate as f64),
            floor: own.floor_bytes_per_s as f64,
            capacity: config.peer.uplink_bytes_per_s.map(|rate| rate as f64),
            yields: own.yields,
        };
        let mut paces = Paces::default();
        paces.all.set(scavenger.ceiling);
        Arc::new(Self {
            started: Instant::now(),
            why: Mutex::new(programs.why),
            kernel: Mutex::new(programs.kernel),
            state: Mutex::new(sample::State::new(interfaces, Scavenger::new(scavenger))),
            paces: Mutex::new(paces),
            peer_ceiling: own.peer_ceiling_bytes_per_s.map(|rate| rate as f64),
        })
    }

    /// Counts what goes through these sockets, and steers datagrams to that of their thread where there are
    /// several. Without the programs, or where they are refused, QUIC's counts and its own steering do.
    pub fn see_sockets(&self, sockets: &[UdpSocket]) {
        let mut place = self.kernel.lock();
        let Some(kernel) = &mut *place else { return };
        if let Err(error) = kernel.count_sockets(sockets) {
            tracing::warn!(%error, "paths are measured by QUIC's own counts");
            *self.why.lock() = Some(error.to_string());
            *place = None;
            return;
        }
        if sockets.len() > 1
            && let Err(error) = kernel.steer(sockets)
        {
            tracing::warn!(%error, "datagrams are steered as without a meter");
        }
    }

    /// Whether the programs are loaded.
    pub fn has_kernel(&self) -> bool {
        self.kernel.lock().is_some()
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Starts to look at `peers`, on a thread that ends when this is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(self: &Arc<Self>, peers: &Peers, metrics: Arc<Metrics>) -> std::io::Result<()> {
        metrics.meter_kernel.set(i64::from(self.has_kernel()));
        let (weak, peers) = (Arc::downgrade(self), peers.downgrade());
        std::thread::Builder::new()
            .name("meter".into())
            .spawn(move || run(&weak, &peers, &metrics))?;
        Ok(())
    }

    /// What is known of the path to `node`.
    pub fn estimate(&self, node: &NodeId) -> Option<PathEstimate> {
        self.state.lock().estimate(node, self.now())
    }

    /// Bytes a second that `node` is measured to deliver, where that is known well enough to be told.
    pub fn deliverable(&self, node: &NodeId) -> Option<f64> {
        let rate = self.estimate(node)?.inbound?;
        (rate.error_ratio <= TOLD_ERROR_MAX).then_some(rate.bytes_per_s)
    }

    /// Waits until `bytes` more may be sent to `peer`.
    pub async fn turn(&self, peer: NodeId, bytes: u64) {
        loop {
            let turn = self.take_turn(peer, bytes);
            let (Turn::After(wait) | Turn::AskAfter(wait)) = turn;
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            if matches!(turn, Turn::After(_)) {
                return;
            }
        }
    }

    fn take_turn(&self, peer: NodeId, bytes: u64) -> Turn {
        let now = self.now();
        let mut paces = self.paces.lock();
        let of_all = paces.all.take(now, bytes);
        let (Some(ceiling), Turn::After(wait)) = (self.peer_ceiling, of_all) else {
            return of_all;
        };
        if paces.peers.len() >= PACED_PEERS_MAX && !paces.peers.contains_key(&peer) {
            return of_all;
        }
        let pace = paces.peers.entry(peer).or_default();
        pace.set(Some(ceiling));
        match pace.take(now, bytes) {
            Turn::After(own) => Turn::After(own.max(wait)),
            ask => ask,
        }
    }
}

fn run(meter: &Weak<Meter>, peers: &WeakPeers, metrics: &Metrics) {
    loop {
        std::thread::sleep(SAMPLE_INTERVAL);
        let (Some(meter), Some(peers)) = (meter.upgrade(), peers.upgrade()) else {
            return;
        };
        meter.sample(&peers, metrics);
    }
}
