//! What happens in one run, drawn from its seed.

use std::time::Duration;

use super::rng::Rng;

/// What the source does to fetches in a span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceFault {
    Slow,
    Cut,
    TooMany,
    Silent,
    Gone,
}

/// How a node behaves towards its children, or as an author.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    Honest,
    /// Accepts requests and goes silent in the midst of some.
    Stalls,
    /// Thirty times slower than others.
    Slow,
    /// Refuses requests as busy, often.
    Busy,
    /// Sends wrong bytes.
    Lies,
    /// Signs wrong pieces.
    Forges,
    /// Says it does not hold what it offered, at times.
    Forgets,
}

#[derive(Debug, Clone)]
pub struct NodePlan {
    pub joins_at: Duration,
    pub habit: Habit,
    pub credential: bool,
    /// `FetchAll`, besides the reader if there is one.
    pub fill: bool,
    /// Pieces a reader reads, first and one past the last, at client or fault priority.
    pub reads: Option<(u32, u32)>,
    pub leaves_after: Option<Duration>,
    pub crashes_at: Option<(Duration, bool)>,
    pub returns_after: Option<Duration>,
    pub loses_at: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct Scenario {
    pub seed: u64,
    /// Nothing goes wrong: then the source is read exactly once.
    pub healthy: bool,
    pub piece_count: u32,
    pub nodes: Vec<NodePlan>,
    pub source_faults: Vec<(Duration, Duration, SourceFault)>,
    /// Time of a quarter of a piece from the source, and between nodes.
    pub source_step: Duration,
    pub peer_step: Duration,
    pub delay_ms_max: u64,
    /// Control is down from, until, and whether nodes notice.
    pub control_down: Vec<(Duration, Duration, bool)>,
    pub lease_pieces_max: u32,
    pub lease_time: Duration,
}

impl Scenario {
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let healthy = rng.chance(25);
        let piece_count_max = if rng.chance(20) { 60 } else { 16 };
        let piece_count = rng.range(1, piece_count_max) as u32;
        let node_count = rng.range(1, 7);
        let spread_ms = if rng.chance(50) { 0 } else { 3000 };
        let nodes = (0..node_count)
            .map(|_| Self::draw_node(&mut rng, healthy, piece_count, spread_ms))
            .collect();
        let mut scenario = Self {
            seed,
            healthy,
            piece_count,
            nodes,
            source_faults: Vec::new(),
            source_step: rng.ms(1, if healthy { 10 } else { 60 }),
            peer_step: rng.ms(1, 8),
            delay_ms_max: rng.range(1, 30),
            control_down: Vec::new(),
            lease_pieces_max: rng.range(1, 20) as u32,
            lease_time: rng.ms(if healthy { 10_000 } else { 300 }, 15_000),
        };
        if !healthy {
            scenario.draw_faults(&mut rng);
        }
        scenario
    }

    fn draw_node(rng: &mut Rng, healthy: bool, piece_count: u32, spread_ms: u64) -> NodePlan {
        let habits = [
            Habit::Stalls,
            Habit::Slow,
            Habit::Busy,
            Habit::Lies,
            Habit::Forges,
            Habit::Forgets,
        ];
        let faulty = !healthy && rng.chance(30);
        let first = rng.range(0, u64::from(piece_count) - 1) as u32;
        let whole = rng.chance(60);
        let reads = (whole || rng.chance(50)).then(|| {
            if whole {
                (0, piece_count)
            } else {
                let last = rng.range(u64::from(first) + 1, u64::from(piece_count));
                (first, last as u32)
            }
        });
        let crashes = !healthy && rng.chance(20);
        NodePlan {
            joins_at: rng.ms(0, spread_ms),
            habit: if faulty {
                habits[rng.range(0, 5) as usize]
            } else {
                Habit::Honest
            },
            credential: healthy || rng.chance(85),
            fill: reads.is_none() || rng.chance(60),
            reads,
            leaves_after: (!healthy && rng.chance(10)).then(|| rng.ms(1, 2000)),
            crashes_at: crashes.then(|| (rng.ms(1, 4000), rng.chance(50))),
            returns_after: rng.chance(50).then(|| rng.ms(10, 3000)),
            loses_at: (!healthy && rng.chance(15)).then(|| rng.ms(100, 5000)),
        }
    }

    fn draw_faults(&mut self, rng: &mut Rng) {
        use SourceFault::{Cut, Gone, Silent, Slow, TooMany};
        for _ in 0..rng.range(0, 2) {
            let from = rng.ms(0, 3000);
            let fault = [Slow, Cut, TooMany, Silent][rng.range(0, 3) as usize];
            self.source_faults
                .push((from, from + rng.ms(100, 6000), fault));
        }
        if rng.chance(15) {
            self.source_faults
                .push((rng.ms(0, 2000), Duration::MAX, Gone));
        }
        let mut at = Duration::ZERO;
        for _ in 0..rng.range(0, 2) {
            let from = at + rng.ms(0, 3000);
            let until = if rng.chance(20) {
                Duration::MAX
            } else {
                from + rng.ms(50, 6000)
            };
            self.control_down.push((from, until, rng.chance(60)));
            if until == Duration::MAX {
                break;
            }
            at = until + Duration::from_millis(1);
        }
    }

    pub fn source_fault(&self, now: Duration) -> Option<SourceFault> {
        let mut faults = self.source_faults.iter().rev();
        faults
            .find(|(from, until, _)| *from <= now && now < *until)
            .map(|(_, _, fault)| *fault)
    }

    /// The source gives everything to whoever is patient.
    pub fn source_recovers(&self) -> bool {
        self.source_faults
            .iter()
            .all(|(_, until, _)| *until < Duration::MAX)
    }
}
