//! How much this node may send beside the traffic of others on the same interfaces.
//!
//! Images can wait; what else runs on the machine often cannot. While others send, this node takes what they
//! leave, with room for them to grow, and never less than its floor. When they stop, so does the limit.

use std::time::Duration;

use super::Count;

/// Others that send less than this part of the capacity are the small change of any machine.
const NOISE_RATIO: f64 = 0.02;
/// What others send is thought to want to grow by this much: a sender that is being squeezed shows less than
/// it wants.
const GROWTH: f64 = 1.3;
/// Part of the capacity that is never filled while others send: queues stay short for them.
const FILL: f64 = 0.95;
/// While the link is this full and others send, they are being squeezed: what is allowed is halved.
const FULL_RATIO: f64 = 0.9;
/// How long others must have been quiet before the limit goes.
const QUIET: Duration = Duration::from_millis(500);
/// Readings closer to each other than this are passed over: a batch more or less would count too much.
const READING_MIN: Duration = Duration::from_millis(50);
/// What the newest reading of others weighs when they send less than before. When they send more it counts whole.
const FALL_WEIGHT: f64 = 0.3;
/// Bytes of an Ethernet header, which interfaces count and sockets do not.
const ETHERNET_BYTES: f64 = 14.0;

/// What is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScavengerConfig {
    /// Bytes a second that this node never exceeds; nothing for no limit.
    pub ceiling: Option<f64>,
    /// Bytes a second that it may always send.
    pub floor: f64,
    /// Bytes a second that the interfaces carry. Nothing for unknown: the most that was seen stands in.
    pub capacity: Option<f64>,
    /// Give way to others; without this only the ceiling counts.
    pub yields: bool,
}

/// What the interfaces and this node have sent in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostReading {
    /// On a monotonic clock.
    pub at: Duration,
    /// Bytes that the interfaces have sent, this node's among them.
    pub interface_bytes: u64,
    /// What this node has sent to peers.
    pub own: Count,
}

/// What this node may send.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Allowance {
    /// Bytes a second; nothing for no limit.
    pub bytes_per_s: Option<f64>,
    /// What others send, bytes a second.
    pub others_bytes_per_s: f64,
    /// What this node sends, bytes a second.
    pub own_bytes_per_s: f64,
    /// It is others that limit this node, not its ceiling.
    pub is_yielding: bool,
}

/// The state of giving way.
#[derive(Debug, Clone)]
pub struct Scavenger {
    config: ScavengerConfig,
    last: Option<HostReading>,
    others: f64,
    most_seen: f64,
    yielding: Option<f64>,
    others_at: Duration,
    allowance: Allowance,
}

impl Scavenger {
    /// With no limit but the ceiling, until others are seen.
    pub fn new(config: ScavengerConfig) -> Self {
        Self {
            last: None,
            others: 0.0,
            most_seen: 0.0,
            yielding: None,
            others_at: Duration::ZERO,
            allowance: Allowance {
                bytes_per_s: config.ceiling,
                ..Allowance::default()
            },
            config,
        }
    }

    /// Takes a reading; what is allowed from now on. Counters that went back (an interface that vanished, one
    /// that came anew) and times that did are passed over.
    pub fn take(&mut self, reading: &HostReading) -> Allowance {
        let Some(last) = self.last else {
            self.last = Some(*reading);
            return self.allowance;
        };
        let took = reading.at.saturating_sub(last.at);
        if took < READING_MIN {
            return self.allowance;
        }
        self.last = Some(*reading);
        let (Some(interfaces), Some(own_wire)) = (
            reading.interface_bytes.checked_sub(last.interface_bytes),
            reading.own.wire_bytes.checked_sub(last.own.wire_bytes),
        ) else {
            return self.allowance;
        };
        let datagrams = reading.own.datagrams.saturating_sub(last.own.datagrams) as f64;
        let took_s = took.as_secs_f64();
        let own = (own_wire as f64 + datagrams * ETHERNET_BYTES) / took_s;
        let total = interfaces as f64 / took_s;
        let others = (total - own).max(0.0);
        self.others = if others > self.others {
            others
        } else {
            self.others + (others - self.others) * FALL_WEIGHT
        };
        self.most_seen = self.most_seen.max(total);
        self.decide(reading.at, total);
        self.allowance.others_bytes_per_s = self.others;
        self.allowance.own_bytes_per_s = own;
        self.allowance
    }

    fn decide(&mut self, now: Duration, total: f64) {
        let capacity = self.config.capacity.unwrap_or(self.most_seen);
        if self.others > capacity * NOISE_RATIO {
            self.others_at = now;
        }
        let is_alone = now.saturating_sub(self.others_at) >= QUIET || self.others_at.is_zero();
        self.yielding = if !self.config.yields || is_alone || capacity <= 0.0 {
            None
        } else {
            let left = capacity * FILL - self.others * GROWTH;
            let before = self.yielding.unwrap_or(f64::INFINITY);
            let squeezed = match total > capacity * FULL_RATIO && before.is_finite() {
                true => before / 2.0,
                false => f64::INFINITY,
            };
            Some(left.min(squeezed).max(self.config.floor))
        };
        let ceiling = self.config.ceiling;
        self.allowance.is_yielding = self.yielding.is_some();
        self.allowance.bytes_per_s = match (self.yielding, ceiling) {
            (Some(left), Some(ceiling)) => Some(left.min(ceiling)),
            (left, ceiling) => left.or(ceiling),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);
    const CAPACITY: f64 = 12.5e6;

    /// A link that both share; a competitor takes what it wants of what is left to it, and reaches for more
    /// only by a fifth in each tick, as a congestion window does.
    struct Link {
        scavenger: Scavenger,
        reading: HostReading,
        competitor: f64,
    }

    impl Link {
        fn new(config: ScavengerConfig) -> Self {
            let mut scavenger = Scavenger::new(config);
            scavenger.take(&HostReading::default());
            Self {
                scavenger,
                reading: HostReading::default(),
                competitor: 0.0,
            }
        }

        /// What each got on average over the last half of `ticks`, as a part of the capacity.
        fn run(&mut self, ticks: u32, wanted: f64) -> (f64, f64) {
            let mut got = (0.0, 0.0);
            let mut allowance = self.scavenger.allowance;
            for tick in 0..ticks {
                let reach = (self.competitor * 1.2).max(CAPACITY * 0.05).min(wanted);
                let own_wanted = allowance.bytes_per_s.unwrap_or(CAPACITY).min(CAPACITY);
                let scale = (CAPACITY / (reach + own_wanted)).min(1.0);
                let own = own_wanted * scale;
                self.competitor = reach * scale;
                self.reading.at += TICK;
                self.reading.own.wire_bytes += (own / 10.0) as u64;
                self.reading.interface_bytes += ((own + self.competitor) / 10.0) as u64;
                allowance = self.scavenger.take(&self.reading);
                if tick >= ticks / 2 {
                    let share = f64::from(ticks - ticks / 2) * CAPACITY;
                    got = (got.0 + own / share, got.1 + self.competitor / share);
                }
            }
            got
        }
    }

    fn config() -> ScavengerConfig {
        ScavengerConfig {
            ceiling: None,
            floor: CAPACITY * 0.02,
            capacity: Some(CAPACITY),
            yields: true,
        }
    }

    #[test]
    fn a_competitor_that_wants_all_gets_95_percent_and_the_floor_is_kept() {
        let mut link = Link::new(config());
        link.run(20, 0.0);
        let (own, competitor) = link.run(100, CAPACITY);
        assert!(competitor >= 0.95, "{competitor}");
        assert!(own >= 0.015, "{own}");
    }

    #[test]
    fn a_competitor_that_wants_a_little_leaves_the_rest_to_this_node() {
        let mut link = Link::new(config());
        let (own, competitor) = link.run(100, CAPACITY * 0.3);
        assert!((competitor - 0.3).abs() < 0.005, "{competitor}");
        assert!(own > 0.5, "{own}");
    }

    #[test]
    fn alone_nothing_is_lost_before_and_after_a_competitor() {
        let mut link = Link::new(config());
        assert!(link.run(20, 0.0).0 > 0.999);
        link.run(50, CAPACITY);
        link.competitor = 0.0;
        assert!(link.run(60, 0.0).0 > 0.999);
    }

    #[test]
    fn a_ceiling_holds_alone_and_a_node_that_does_not_yield_has_no_other_limit() {
        let ceiling = Some(CAPACITY / 4.0);
        let mut link = Link::new(ScavengerConfig {
            ceiling,
            ..config()
        });
        assert!((link.run(20, 0.0).0 - 0.25).abs() < 0.001);
        let mut link = Link::new(ScavengerConfig {
            yields: false,
            ..config()
        });
        assert!(link.run(100, CAPACITY).0 > 0.45);
    }

    #[test]
    fn an_interface_that_vanishes_and_comes_again_is_not_taken_for_traffic() {
        let mut link = Link::new(config());
        link.run(20, 0.0);
        link.reading.interface_bytes = 0;
        link.reading.at += TICK;
        assert_eq!(link.scavenger.take(&link.reading).bytes_per_s, None);
        assert!(link.run(20, 0.0).0 > 0.999);
    }
}
