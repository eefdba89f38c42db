//! What is simulated: a file, or drawn from a seed.
//!
//! A scenario says everything; the world adds nothing of its own but the numbers that follow from the
//! seed. Nodes come in groups, so that a thousand of them are a line, and a failing run can be printed.

mod random;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use random::random;

/// Bytes per second of a megabit per second.
pub const BYTES_PER_MBIT: f64 = 125_000.0;
/// Nodes in a scenario at most: more than the largest cluster it is asked to show.
pub const NODES_MAX: u32 = 200_000;

/// A whole simulation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// For people.
    pub name: String,
    /// All that is random follows from it.
    pub seed: u64,
    /// Virtual seconds after which a run that has not ended hangs.
    #[serde(default = "default_limit_s")]
    pub limit_s: f64,
    /// Inputs of a download are taken together once in so long: 0 means one by one. It makes large
    /// scenarios cheap, and is added to every delay.
    #[serde(default)]
    pub quantum_ms: f64,
    /// Rates of flows are shared out anew once in so long: 0 means at every change.
    #[serde(default)]
    pub share_every_ms: f64,
    /// The registry.
    pub registry: Registry,
    /// Between nodes, and between nodes and control.
    #[serde(default)]
    pub messages: Messages,
    /// Racks and zones; none means one switch without limits.
    #[serde(default)]
    pub racks: Option<Racks>,
    /// What is pulled, in bytes.
    pub blobs: Vec<u64>,
    /// Who pulls.
    pub groups: Vec<Group>,
    /// When control is away.
    #[serde(default)]
    pub outages: Vec<Outage>,
}

/// Where the bytes come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// What it can send.
    pub mbit: f64,
    /// From a request to the first byte of its answer.
    #[serde(default = "default_first_byte_ms")]
    pub first_byte_ms: f64,
    /// Requests it takes in a second; above, it answers 429. 0: any number.
    #[serde(default)]
    pub requests_per_s: f64,
    /// What it says then in `Retry-After`.
    #[serde(default = "default_retry_after_s")]
    pub retry_after_s: f64,
}

/// How messages travel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Messages {
    /// One way.
    pub delay_ms: f64,
    /// Up to so much more, another each time.
    #[serde(default)]
    pub jitter_ms: f64,
    /// The part of messages to and from control that are lost, each of which costs the session.
    #[serde(default)]
    pub control_loss: f64,
    /// The part of messages between nodes that are lost, each of which costs the connection.
    #[serde(default)]
    pub peer_loss: f64,
}

impl Default for Messages {
    fn default() -> Self {
        Self {
            delay_ms: 0.2,
            jitter_ms: 0.0,
            control_loss: 0.0,
            peer_loss: 0.0,
        }
    }
}

/// Racks behind links that may be oversubscribed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Racks {
    /// Nodes in a rack.
    pub nodes: u32,
    /// What a rack can send and take.
    pub mbit: f64,
    /// Racks in a zone; 0: one zone.
    #[serde(default)]
    pub per_zone: u32,
    /// What a zone can send and take; 0: anything.
    #[serde(default)]
    pub zone_mbit: f64,
    /// Nodes of one group are spread over all racks, not side by side.
    #[serde(default)]
    pub mixed: bool,
}

/// Nodes that are alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// How many.
    pub count: u32,
    /// What each can send.
    pub up_mbit: f64,
    /// What each can take.
    pub down_mbit: f64,
    /// What each pulls.
    #[serde(default)]
    pub pulls: Vec<Pull>,
    /// Each pulls so many of the blobs, drawn at random, hot ones more often, in the manner of `pull`.
    #[serde(default)]
    pub draws: Option<Draws>,
    /// How it behaves.
    #[serde(default)]
    pub habit: Habit,
    /// What happens to it.
    #[serde(default)]
    pub fault: Option<Fault>,
    /// It can ask the registry.
    #[serde(default = "yes")]
    pub has_source: bool,
}

/// One blob that a node pulls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pull {
    /// Which.
    pub blob: u32,
    /// When.
    #[serde(default)]
    pub at_s: f64,
    /// Up to so much later, another for each node.
    #[serde(default)]
    pub spread_s: f64,
    /// Nobody reads it: it is only fetched.
    #[serde(default)]
    pub prefetch: bool,
}

/// Blobs drawn at random.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draws {
    /// How many blobs.
    pub count: u32,
    /// When.
    pub pull: Pull,
}

/// How a node behaves towards others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Habit {
    /// As it should.
    #[default]
    Honest,
    /// What it sends does not match the digests.
    WrongBytes,
    /// It signs wrong digests for what it fetches from the source.
    Forges,
    /// It says that it holds everything.
    Boasts,
    /// It takes requests and sends nothing.
    Stalls,
}

/// What happens to nodes of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// When.
    pub at_s: f64,
    /// Up to so much later, another for each node.
    #[serde(default)]
    pub spread_s: f64,
    /// The part of the group that it happens to.
    #[serde(default = "one")]
    pub part: f64,
    /// What.
    pub kind: FaultKind,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FaultKind {
    /// The process ends; its peers notice at once.
    Crash {
        /// When it is back, with what it had on disk; never if absent.
        #[serde(default)]
        back_s: Option<f64>,
    },
    /// The machine goes silent.
    Death,
    /// Its uplink carries that part of what it could.
    Slow {
        /// The part.
        factor: f64,
        /// Its downlink too. The baselines know of uplinks only.
        #[serde(default)]
        down: bool,
    },
    /// It loses its session with control, and comes back.
    SessionLoss,
}

/// A time without control.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// From when.
    pub at_s: f64,
    /// For how long.
    pub for_s: f64,
    /// It starts anew, and knows nothing; else it was only cut off.
    #[serde(default = "yes")]
    pub restart: bool,
}

const fn default_limit_s() -> f64 {
    600.0
}
const fn default_first_byte_ms() -> f64 {
    5.0
}
const fn default_retry_after_s() -> f64 {
    1.0
}
const fn yes() -> bool {
    true
}
const fn one() -> f64 {
    1.0
}

/// A time in seconds or milliseconds that is neither negative nor absurd.
pub(crate) fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, 1e7))
}
pub(crate) fn millis(value: f64) -> Duration {
    seconds(value / 1000.0)
}

impl Scenario {
    /// Everybody of one kind pulls one blob at once: the shape of the published benchmarks.
    pub fn uniform(name: &str, nodes: u32, bytes: u64, node_mbit: f64, registry_mbit: f64) -> Self {
        Self {
            name: name.to_owned(),
            seed: 1,
            limit_s: default_limit_s(),
            quantum_ms: 0.0,
            share_every_ms: 0.0,
            registry: Registry {
                mbit: registry_mbit,
                first_byte_ms: default_first_byte_ms(),
                requests_per_s: 0.0,
                retry_after_s: default_retry_after_s(),
            },
            messages: Messages::default(),
            racks: None,
            blobs: vec![bytes],
            groups: vec![Group {
                count: nodes,
                up_mbit: node_mbit,
                down_mbit: node_mbit,
                pulls: vec![Pull {
                    blob: 0,
                    at_s: 0.0,
                    spread_s: 0.0,
                    prefetch: false,
                }],
                draws: None,
                habit: Habit::Honest,
                fault: None,
                has_source: true,
            }],
            outages: Vec::new(),
        }
    }

    /// Reads a scenario file.
    ///
    /// # Errors
    /// Where the file cannot be read, or is no scenario, or one that cannot be.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let scenario: Self =
            toml::from_str(&text).with_context(|| format!("{} is no scenario", path.display()))?;
        scenario.validate()?;
        Ok(scenario)
    }

    /// As a file that [`Self::read`] takes.
    pub fn to_toml(&self) -> String {
        // A scenario is plain data: it has no form that TOML lacks.
        toml::to_string(self).unwrap_or_else(|error| format!("# {error}\n{self:#?}"))
    }

    /// Nodes in all.
    pub fn node_count(&self) -> u32 {
        self.groups.iter().map(|group| group.count).sum()
    }

    /// Refuses what cannot be.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<()> {
        if self.node_count() == 0 || self.node_count() > NODES_MAX {
            bail!("a scenario has 1 to {NODES_MAX} nodes");
        }
        let blob_count = self.blobs.len() as u32;
        for group in &self.groups {
            if group.pulls.iter().any(|pull| pull.blob >= blob_count) {
                bail!("a group pulls a blob that there is not");
            }
            if group.up_mbit <= 0.0 || group.down_mbit <= 0.0 {
                bail!("a link without capacity");
            }
        }
        if self.registry.mbit <= 0.0 {
            bail!("the registry has no capacity");
        }
        if self.racks.as_ref().is_some_and(|racks| racks.nodes == 0) {
            bail!("a rack without nodes");
        }
        Ok(())
    }

    /// Nobody fails, lies or is cut off: then the promises for a healthy cluster hold.
    pub fn is_healthy(&self) -> bool {
        self.outages.is_empty()
            && self.messages.control_loss == 0.0
            && self.messages.peer_loss == 0.0
            && self.registry.requests_per_s == 0.0
            && self.groups.iter().all(|group| {
                let slow = |f: &Fault| matches!(f.kind, FaultKind::Slow { .. });
                group.habit == Habit::Honest
                    && group.has_source
                    && group.fault.as_ref().is_none_or(slow)
            })
    }
}
