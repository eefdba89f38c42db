//! The network of a simulation: links with a capacity, flows that cross them, and what each flow gets.
//!
//! The model is fluid: a flow has a rate, not packets, and the rates are the max-min fair ones. That is
//! what many long TCP or QUIC connections over shared links come to, and it has no free parameter. Time
//! is the caller's; nothing here reads a clock or draws a random number, so the same calls give the same
//! answers.
//!
//! Contract: time never goes back. The caller asks [`Network::next_event`], and calls
//! [`Network::advance`] with that instant or an earlier one. At one instant it does all that it wants to
//! start, cancel or change first, and then advances to the same instant: changes of one instant are
//! shared out together, which is what makes a burst of starts cheap.

mod fill;
mod window;

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use fill::Filling;
use window::Window;

/// The most links one flow crosses: an uplink, rack and zone out, rack and zone in, a downlink, and two
/// to spare. A fixed number keeps a flow in one flat record.
pub const PATH_LINKS_MAX: usize = 8;

/// No link, or no instant.
const NO_LINK: u32 = u32::MAX;
const NEVER: u64 = u64::MAX;

/// A hop's number and a flow's slot share 32 bits in the lists of the links.
const HOP_BITS: u32 = 3;

/// A change of a rate by less than this share is rounding: acting on it would only move events about.
const RATE_NOISE: f64 = 1e-9;

const NANOS_PER_S: f64 = 1e9;

/// The most that a link carries, in bytes per second: far above any real link, and small enough that a
/// load is exact to a byte per second beside it. An infinite capacity becomes this.
const CAPACITY_BYTES_PER_S_MAX: f64 = 1e15;

/// A link of a [`Network`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(u32);

impl LinkId {
    /// The number of the link, from zero, in the order in which links were added.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A flow of a [`Network`]: never used twice, ordered by the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    sequence: u64,
    slot: u32,
}

impl FlowId {
    /// A small number that no other flow has while this one runs: an index for the caller's own tables.
    #[must_use]
    pub fn slot(self) -> usize {
        self.slot as usize
    }
}

#[derive(Clone, Debug)]
struct Flow {
    links: [u32; PATH_LINKS_MAX],
    /// Where this flow stands in the list of each of its links.
    places: [u32; PATH_LINKS_MAX],
    hops: u32,
    /// The link that holds this flow down, or none while the rate is a provisional one.
    bottleneck: u32,
    /// Zero: the slot is free.
    sequence: u64,
    bytes: u64,
    /// Bytes per second since `settled_ns`, when `left` bytes were still to come.
    rate: f64,
    left: f64,
    settled_ns: u64,
    finish_ns: u64,
    /// The instant of its entry in the queue: the finish, or earlier where the finish has moved on since.
    queued_ns: u64,
    /// The round of sharing that last took it in, and the rate and bottleneck found there.
    round: u32,
    next_bottleneck: u32,
    next_rate: f64,
}

impl Flow {
    fn path(&self) -> &[u32] {
        &self.links[..self.hops as usize]
    }

    fn left_at(&self, now_ns: u64) -> f64 {
        let passed = now_ns.saturating_sub(self.settled_ns) as f64 / NANOS_PER_S;
        self.rate.mul_add(-passed, self.left).max(0.0)
    }

    fn delivered_at(&self, now_ns: u64) -> u64 {
        (self.bytes as f64 - self.left_at(now_ns)).max(0.0) as u64
    }

    /// Takes a new rate from `now_ns` on, and finds the finish.
    fn run_at(&mut self, now_ns: u64, rate: f64) {
        self.left = self.left_at(now_ns);
        self.settled_ns = now_ns;
        self.rate = rate;
        self.finish_ns = if self.left <= 0.0 || self.hops == 0 {
            now_ns
        } else if rate > 0.0 {
            let nanos = (self.left / rate * NANOS_PER_S).ceil();
            // A finish beyond the range of the clock is no finish: the flow stands.
            if nanos < NEVER as f64 / 2.0 {
                now_ns.saturating_add(nanos as u64)
            } else {
                NEVER
            }
        } else {
            NEVER
        };
    }
}

#[derive(Clone, Debug)]
struct Link {
    capacity: f64,
    /// The sum of the rates of its flows.
    load: f64,
    /// What flows that are gone carried over it.
    carried: f64,
    /// Slot and hop of each flow that crosses it.
    flows: Vec<u32>,
    /// How many flows this link holds down.
    holds: u32,
    watch: Option<Box<Window>>,
    // What follows is the scratch of a round of sharing: see `fill`.
    round: u32,
    inside: bool,
    outsiders: bool,
    open: u32,
    rest: f64,
}

impl Link {
    /// Brings the window up to date before the load changes.
    fn settle(&mut self, now_ns: u64) {
        if let Some(watch) = &mut self.watch {
            watch.settle(now_ns, self.load);
        }
    }
}

/// Links, the flows over them, and the instant they have reached.
#[derive(Clone, Debug)]
pub struct Network {
    now_ns: u64,
    step_ns: u64,
    links: Vec<Link>,
    flows: Vec<Flow>,
    free: Vec<u32>,
    live: usize,
    /// Earliest first: instant, sequence, slot. An entry may be out of date; see `prune`.
    finishes: BinaryHeap<Reverse<(u64, u64, u32)>>,
    sequence: u64,
    /// Flows and links that the next sharing starts from.
    started: Vec<u32>,
    dirty: Vec<u32>,
    shared_ns: Option<u64>,
    urgent: bool,
    rounds: u64,
    filling: Filling,
}

impl Network {
    /// A network without links. Rates are shared out again at most once per `step`; zero shares at every
    /// instant that has a change. In between, a flow that starts takes what is free on its path, and
    /// what a finished flow leaves stays free: rates are then late by up to a step, never too high.
    #[must_use]
    pub fn new(step: Duration) -> Self {
        Self {
            now_ns: 0,
            step_ns: nanos(step),
            links: Vec::new(),
            flows: Vec::new(),
            free: Vec::new(),
            live: 0,
            finishes: BinaryHeap::new(),
            sequence: 0,
            started: Vec::new(),
            dirty: Vec::new(),
            shared_ns: None,
            urgent: false,
            rounds: 0,
            filling: Filling::default(),
        }
    }

    /// Adds a link of `bytes_per_s`. An infinite one is a link that never matters.
    pub fn add_link(&mut self, bytes_per_s: f64) -> LinkId {
        let id = LinkId(u32::try_from(self.links.len()).expect("fewer than 2^32 links"));
        self.links.push(Link {
            capacity: bytes_per_s.clamp(0.0, CAPACITY_BYTES_PER_S_MAX),
            load: 0.0,
            carried: 0.0,
            flows: Vec::new(),
            holds: 0,
            watch: None,
            round: 0,
            inside: false,
            outsiders: false,
            open: 0,
            rest: 0.0,
        });
        id
    }

    /// Changes a link's capacity. This is shared out at `now`, whatever the step: a link must not carry
    /// more than it can.
    pub fn set_capacity(&mut self, now: Duration, link: LinkId, bytes_per_s: f64) {
        self.reach(now);
        self.links[link.index()].capacity = bytes_per_s.clamp(0.0, CAPACITY_BYTES_PER_S_MAX);
        self.dirty.push(link.0);
        self.urgent = true;
    }

    /// Starts a flow of `bytes` over all of `links` (a link named twice counts once). A flow without
    /// bytes or links finishes at `now`.
    ///
    /// # Panics
    /// When the path is longer than [`PATH_LINKS_MAX`].
    pub fn start(&mut self, now: Duration, links: &[LinkId], bytes: u64) -> FlowId {
        self.reach(now);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flows.push(Flow::vacant());
            u32::try_from(self.flows.len() - 1).expect("fewer than 2^32 flows")
        });
        assert!(
            slot >> (32 - HOP_BITS) == 0,
            "fewer than 2^29 flows run at once"
        );
        self.sequence += 1;
        let mut flow = Flow {
            sequence: self.sequence,
            bytes,
            left: bytes as f64,
            settled_ns: self.now_ns,
            ..Flow::vacant()
        };
        let mut room = f64::INFINITY;
        for &LinkId(link) in links {
            if flow.path().contains(&link) {
                continue;
            }
            let hop = flow.hops as usize;
            assert!(
                hop < PATH_LINKS_MAX,
                "a path has at most {PATH_LINKS_MAX} links"
            );
            let on = &mut self.links[link as usize];
            flow.links[hop] = link;
            flow.places[hop] = on.flows.len() as u32;
            flow.hops += 1;
            on.flows.push(slot << HOP_BITS | hop as u32);
            room = room.min(on.capacity - on.load);
        }
        // With a step, a flow must not stand still until the next sharing: it takes what nobody has.
        let rate = if self.step_ns == 0 || flow.hops == 0 {
            0.0
        } else {
            room.max(0.0)
        };
        flow.run_at(self.now_ns, rate);
        for &link in flow.path() {
            let on = &mut self.links[link as usize];
            on.settle(self.now_ns);
            on.load += rate;
        }
        if flow.hops > 0 && bytes > 0 {
            self.started.push(slot);
        }
        self.flows[slot as usize] = flow;
        self.live += 1;
        self.queue(slot);
        self.prune();
        FlowId {
            sequence: self.sequence,
            slot,
        }
    }

    /// Ends a flow early and says how many of its bytes have arrived. A flow that is gone gives zero.
    pub fn cancel(&mut self, now: Duration, flow: FlowId) -> u64 {
        self.reach(now);
        let Some(delivered) = self.delivered(flow) else {
            return 0;
        };
        self.remove(flow.slot, delivered);
        self.prune();
        delivered
    }

    /// The next instant at which a flow finishes or rates are to be shared out.
    #[must_use]
    pub fn next_event(&self) -> Option<Duration> {
        self.next_ns().map(Duration::from_nanos)
    }

    /// Goes on to `now` and appends the flows that have finished, earliest first, and at one instant in
    /// the order of their start.
    pub fn advance(&mut self, now: Duration, finished: &mut Vec<FlowId>) {
        let now_ns = nanos(now);
        while let Some(event_ns) = self.next_ns().filter(|&event_ns| event_ns < now_ns) {
            self.now_ns = event_ns;
            self.turn(finished);
        }
        self.now_ns = self.now_ns.max(now_ns);
        self.turn(finished);
    }

    /// How many flows run.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.live
    }

    /// How often rates were shared out: the measure of this simulation's work.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// The present rate of a flow in bytes per second, or none when it is gone.
    #[must_use]
    pub fn rate(&self, flow: FlowId) -> Option<f64> {
        self.running(flow).map(|running| running.rate)
    }

    /// How many bytes of a flow have arrived by now, or none when it is gone.
    #[must_use]
    pub fn delivered(&self, flow: FlowId) -> Option<u64> {
        self.running(flow)
            .map(|running| running.delivered_at(self.now_ns))
    }

    /// A link's capacity in bytes per second.
    #[must_use]
    pub fn capacity(&self, link: LinkId) -> f64 {
        self.links[link.index()].capacity
    }

    /// The sum of the present rates over a link, in bytes per second.
    #[must_use]
    pub fn load(&self, link: LinkId) -> f64 {
        self.links[link.index()].load
    }

    /// All bytes that a link has carried by now, of finished, cancelled and running flows.
    #[must_use]
    pub fn carried_bytes(&self, link: LinkId) -> f64 {
        let link = &self.links[link.index()];
        let running = link.flows.iter().map(|&entry| {
            let flow = &self.flows[(entry >> HOP_BITS) as usize];
            flow.bytes as f64 - flow.left_at(self.now_ns)
        });
        link.carried + running.sum::<f64>()
    }

    /// Measures a link's rate from now on as means over windows of this width, one after the other.
    pub fn watch(&mut self, link: LinkId, width: Duration) {
        self.links[link.index()].watch =
            Some(Box::new(Window::new(self.now_ns, nanos(width).max(1))));
    }

    /// The highest mean rate over one window of a watched link, in bytes per second; zero for a link
    /// that is not watched.
    #[must_use]
    pub fn peak_bytes_per_s(&self, link: LinkId) -> f64 {
        let link = &self.links[link.index()];
        link.watch
            .as_ref()
            .map_or(0.0, |watch| watch.peak(self.now_ns, link.load))
    }

    fn running(&self, flow: FlowId) -> Option<&Flow> {
        self.flows
            .get(flow.slot())
            .filter(|running| running.sequence == flow.sequence)
    }

    /// Moves the clock for a call that changes something. An event that lies before it was not asked for.
    fn reach(&mut self, now: Duration) {
        let now_ns = nanos(now);
        debug_assert!(now_ns >= self.now_ns, "time goes back");
        debug_assert!(
            self.next_ns().is_none_or(|event_ns| event_ns >= now_ns),
            "an event was passed over"
        );
        self.now_ns = self.now_ns.max(now_ns);
    }

    fn due_ns(&self) -> Option<u64> {
        if self.started.is_empty() && self.dirty.is_empty() {
            return None;
        }
        match self.shared_ns {
            Some(shared_ns) if !self.urgent => {
                Some(self.now_ns.max(shared_ns.saturating_add(self.step_ns)))
            }
            _ => Some(self.now_ns),
        }
    }

    fn next_ns(&self) -> Option<u64> {
        let finish = self
            .finishes
            .peek()
            .map(|&Reverse((instant_ns, _, _))| instant_ns);
        match (finish, self.due_ns()) {
            (Some(finish), Some(due)) => Some(finish.min(due)),
            (finish, due) => finish.or(due),
        }
    }

    /// Does what is due at the present instant: the flows that finish, or else the sharing. After a
    /// finish the sharing waits for another call, as the caller will start something in the place.
    fn turn(&mut self, finished: &mut Vec<FlowId>) {
        let mut any = false;
        while let Some(&Reverse((instant_ns, sequence, slot))) = self.finishes.peek() {
            if instant_ns > self.now_ns {
                break;
            }
            self.finishes.pop();
            let bytes = self.flows[slot as usize].bytes;
            self.remove(slot, bytes);
            finished.push(FlowId { sequence, slot });
            any = true;
            self.prune();
        }
        if !any && self.due_ns().is_some_and(|due_ns| due_ns <= self.now_ns) {
            self.share();
            self.prune();
        }
    }

    /// Takes a flow off its links. A link that holds others down has something to give them now.
    fn remove(&mut self, slot: u32, delivered: u64) {
        let flow = std::mem::replace(&mut self.flows[slot as usize], Flow::vacant());
        for (hop, &link) in flow.path().iter().enumerate() {
            let on = &mut self.links[link as usize];
            on.settle(self.now_ns);
            on.load = (on.load - flow.rate).max(0.0);
            on.carried += delivered as f64;
            let place = flow.places[hop] as usize;
            on.flows.swap_remove(place);
            if let Some(&moved) = on.flows.get(place) {
                let moved_hop = (moved & ((1 << HOP_BITS) - 1)) as usize;
                self.flows[(moved >> HOP_BITS) as usize].places[moved_hop] = place as u32;
            }
            if on.flows.is_empty() {
                on.load = 0.0;
            }
            if flow.bottleneck == link {
                on.holds -= 1;
            }
            if on.holds > 0 {
                self.dirty.push(link);
            }
        }
        self.free.push(slot);
        self.live -= 1;
    }

    /// Puts a flow's finish into the queue where it is earlier than its entry. A later finish keeps the
    /// early entry, and moves it when that comes up: rates go up and down much more often than flows end.
    fn queue(&mut self, slot: u32) {
        let flow = &mut self.flows[slot as usize];
        if flow.finish_ns < flow.queued_ns {
            flow.queued_ns = flow.finish_ns;
            self.finishes
                .push(Reverse((flow.finish_ns, flow.sequence, slot)));
        }
    }

    /// Makes the head of the queue true: drops entries of flows that are gone or have an earlier entry,
    /// and moves on those whose finish has moved on.
    fn prune(&mut self) {
        while let Some(&Reverse((instant_ns, sequence, slot))) = self.finishes.peek() {
            let flow = &mut self.flows[slot as usize];
            let current = flow.sequence == sequence && flow.queued_ns == instant_ns;
            if current && flow.finish_ns == instant_ns {
                return;
            }
            self.finishes.pop();
            if current {
                flow.queued_ns = NEVER;
                self.queue(slot);
            }
        }
    }
}

impl Flow {
    fn vacant() -> Self {
        Self {
            links: [NO_LINK; PATH_LINKS_MAX],
            places: [0; PATH_LINKS_MAX],
            hops: 0,
            bottleneck: NO_LINK,
            sequence: 0,
            bytes: 0,
            rate: 0.0,
            left: 0.0,
            settled_ns: 0,
            finish_ns: NEVER,
            queued_ns: NEVER,
            round: 0,
            next_bottleneck: NO_LINK,
            next_rate: 0.0,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER)
}
