//! What to fetch for which fault, and when: the state machine that all backends share. No I/O, no clock.
//!
//! The owner calls [`Faults::add`] for each device, [`Faults::fault`] for each read that waits,
//! [`Faults::filled`] when an [`Action::Fill`] has ended and [`Faults::tick`] about once a second, and
//! after each of them performs what [`Faults::poll`] yields until it yields nothing.
//!
//! - Faults near each other share a fill. One that is covered by an urgent fill under way waits for that.
//! - Fills in flight are bounded; faults that find no place wait in order of arrival, and those of one
//!   device that lie together become one fill when their turn comes.
//! - Where faults follow each other, the bytes after them are fetched before they are asked for: twice as
//!   many each time, up to a limit. A stream that jumps begins small again.
//! - With nothing more urgent, the background fill goes through the device once, from its start.
//!
//! Every fault gets exactly one answer. Answers of a device that is removed are refusals.

use std::collections::{BTreeMap, VecDeque};

use pantala_wire::{ByteRange, GROUP_SIZE, Priority};

/// Names a device; the owner chooses the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u64);

/// Names a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FillId(pub u64);

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<E> {
    /// Make the range present, and report with [`Faults::filled`].
    Fill {
        /// Names it.
        fill: FillId,
        /// Of this device.
        device: DeviceId,
        /// These bytes.
        range: ByteRange,
        /// `Fault` where somebody waits, `Prefetch` where nobody does.
        urgency: Priority,
    },
    /// Let the read go on, or fail.
    Answer {
        /// The fault, as the owner named it.
        event: E,
        /// Its bytes are present.
        ok: bool,
    },
}

/// How much is done at once.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Fills that somebody waits for, in flight.
    pub fills_max: usize,
    /// Fills that nobody waits for yet, in flight: fewer, so that they leave room.
    pub ahead_max: usize,
    /// The most bytes of one urgent fill: what waits longest must not wait for too much.
    pub fill_bytes_max: u64,
    /// The first read-ahead of a stream.
    pub ahead_bytes_min: u64,
    /// The most bytes that are read ahead of a stream.
    pub ahead_bytes_max: u64,
    /// Bytes of one step of the background fill; 0 for none.
    pub background_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // As many as the recipe of a fast remote store needs to hide 2 ms each.
            fills_max: 64,
            ahead_max: 8,
            fill_bytes_max: 4 << 20,
            ahead_bytes_min: 512 << 10,
            ahead_bytes_max: 16 << 20,
            background_bytes: 32 << 20,
        }
    }
}

/// Streams of one device that are told apart: processes that read it in sequence at the same time.
const STREAMS_MAX: usize = 16;
/// A fault this close behind the end of a stream belongs to it: readers skip holes and headers.
const STREAM_GAP_BYTES: u64 = 256 << 10;

/// A sequence of faults that follow each other.
#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Where the next fault is expected.
    next: u64,
    /// What has been asked for in advance ends here.
    ahead_to: u64,
    /// Bytes to read ahead.
    window_bytes: u64,
}

#[derive(Debug)]
struct Device {
    size_bytes: u64,
    streams: VecDeque<Stream>,
    /// Where the background fill is; `None` where it has ended or is not wanted.
    background: Option<u64>,
    /// It failed, and waits for a tick.
    background_waits: bool,
}

#[derive(Debug)]
enum Purpose<E> {
    /// These wait.
    Urgent(Vec<(E, ByteRange)>),
    /// Nobody waits.
    Ahead,
    /// A step of the background fill.
    Background,
}

#[derive(Debug)]
struct Fill<E> {
    device: DeviceId,
    range: ByteRange,
    purpose: Purpose<E>,
}

#[derive(Debug)]
struct Queued<E> {
    device: DeviceId,
    range: ByteRange,
    events: Vec<(E, ByteRange)>,
}

/// The state machine; `E` is what the owner names a fault by.
#[derive(Debug)]
pub struct Faults<E> {
    limits: Limits,
    devices: BTreeMap<DeviceId, Device>,
    fills: BTreeMap<FillId, Fill<E>>,
    /// Urgent ones without a place.
    queue: VecDeque<Queued<E>>,
    /// Those nobody waits for. Bounded: the oldest gives way, a fault asks again.
    ahead: VecDeque<(DeviceId, ByteRange)>,
    actions: VecDeque<Action<E>>,
    next_fill: u64,
}

/// Read-ahead that waits for a place; more is of no use, the reader is elsewhere by then.
const AHEAD_QUEUE_MAX: usize = 64;

impl<E> Faults<E> {
    /// No device yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            devices: BTreeMap::new(),
            fills: BTreeMap::new(),
            queue: VecDeque::new(),
            ahead: VecDeque::new(),
            actions: VecDeque::new(),
            next_fill: 0,
        }
    }

    /// A device of so many bytes; `background` has all of it fetched.
    pub fn add(&mut self, device: DeviceId, size_bytes: u64, background: bool) {
        let background = background && self.limits.background_bytes > 0 && size_bytes > 0;
        let new = Device {
            size_bytes,
            streams: VecDeque::new(),
            background: background.then_some(0),
            background_waits: false,
        };
        self.devices.entry(device).or_insert(new);
        self.schedule();
    }

    /// The device is gone: whoever waits for it is refused.
    pub fn remove(&mut self, device: DeviceId) {
        self.devices.remove(&device);
        self.ahead.retain(|(of, _)| *of != device);
        let mut refused = Vec::new();
        for fill in self.fills.values_mut().filter(|f| f.device == device) {
            if let Purpose::Urgent(events) = &mut fill.purpose {
                refused.append(events);
            }
        }
        let (gone, kept): (VecDeque<_>, VecDeque<_>) =
            self.queue.drain(..).partition(|q| q.device == device);
        self.queue = kept;
        refused.extend(gone.into_iter().flat_map(|queued| queued.events));
        for (event, _) in refused {
            self.actions.push_back(Action::Answer { event, ok: false });
        }
        self.schedule();
    }

    /// A read of `count` bytes from `offset` on waits.
    pub fn fault(&mut self, event: E, device: DeviceId, offset: u64, count: u64) {
        let Some(known) = self.devices.get(&device) else {
            self.actions.push_back(Action::Answer { event, ok: false });
            return;
        };
        let end = offset.saturating_add(count).min(known.size_bytes);
        // Past the end there is nothing that could be missing.
        let Some(range) = ByteRange::new(offset, end) else {
            self.actions.push_back(Action::Answer { event, ok: true });
            return;
        };
        let ahead = self.follow(device, range);
        let aligned = self.aligned(device, range);
        self.place(event, device, range, aligned);
        if let Some(ahead) = ahead {
            if self.ahead.len() >= AHEAD_QUEUE_MAX {
                self.ahead.pop_front();
            }
            self.ahead.push_back((device, ahead));
        }
        self.schedule();
    }

    /// A fill has ended.
    pub fn filled(&mut self, fill: FillId, ok: bool) {
        let Some(done) = self.fills.remove(&fill) else {
            return;
        };
        match done.purpose {
            Purpose::Urgent(events) => {
                for (event, _) in events {
                    self.actions.push_back(Action::Answer { event, ok });
                }
            }
            Purpose::Ahead => {}
            Purpose::Background => {
                if let Some(device) = self.devices.get_mut(&done.device) {
                    match ok {
                        true => {
                            let end = done.range.end();
                            device.background = (end < device.size_bytes).then_some(end);
                        }
                        false => device.background_waits = true,
                    }
                }
            }
        }
        self.schedule();
    }

    /// Time passed: what failed in the background is tried again.
    pub fn tick(&mut self) {
        for device in self.devices.values_mut() {
            device.background_waits = false;
        }
        self.schedule();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Action<E>> {
        self.actions.pop_front()
    }

    /// Faults that have no answer yet.
    pub fn waiting(&self) -> usize {
        let in_flight = self.fills.values().map(|fill| match &fill.purpose {
            Purpose::Urgent(events) => events.len(),
            _ => 0,
        });
        in_flight.sum::<usize>() + self.queue.iter().map(|q| q.events.len()).sum::<usize>()
    }

    /// Whole groups: less is verified by nobody.
    fn aligned(&self, device: DeviceId, range: ByteRange) -> ByteRange {
        let size = self.devices.get(&device).map_or(0, |d| d.size_bytes);
        let start = range.start() / GROUP_SIZE * GROUP_SIZE;
        let end = range.end().div_ceil(GROUP_SIZE).saturating_mul(GROUP_SIZE);
        ByteRange::new(start, end.min(size)).unwrap_or(range)
    }

    /// Where the fault waits: in a fill under way, in the queue with a neighbour, or alone.
    fn place(&mut self, event: E, device: DeviceId, exact: ByteRange, range: ByteRange) {
        let covers =
            |outer: &ByteRange| outer.start() <= range.start() && range.end() <= outer.end();
        let under_way = self
            .fills
            .values_mut()
            .find_map(|fill| match &mut fill.purpose {
                Purpose::Urgent(events) if fill.device == device && covers(&fill.range) => {
                    Some(events)
                }
                _ => None,
            });
        if let Some(events) = under_way {
            events.push((event, exact));
            return;
        }
        let max = self.limits.fill_bytes_max;
        let neighbour = self.queue.iter_mut().find_map(|queued| {
            let touches = queued.device == device
                && queued.range.start() <= range.end()
                && range.start() <= queued.range.end();
            let start = queued.range.start().min(range.start());
            let end = queued.range.end().max(range.end());
            let joined = ByteRange::new(start, end)?;
            (touches && joined.len() <= max).then_some((queued, joined))
        });
        match neighbour {
            Some((queued, joined)) => {
                queued.range = joined;
                queued.events.push((event, exact));
            }
            None => self.queue.push_back(Queued {
                device,
                range,
                events: vec![(event, exact)],
            }),
        }
    }

    /// Notes where the device is read; what to read ahead, if its reader goes straight on.
    fn follow(&mut self, device: DeviceId, range: ByteRange) -> Option<ByteRange> {
        let (min, max) = (self.limits.ahead_bytes_min, self.limits.ahead_bytes_max);
        let known = self.devices.get_mut(&device)?;
        let belongs = |stream: &Stream| {
            let reach = stream.next.saturating_add(STREAM_GAP_BYTES);
            (stream.next.saturating_sub(GROUP_SIZE)..=reach).contains(&range.start())
        };
        let Some(at) = known.streams.iter().position(belongs) else {
            known.streams.truncate(STREAMS_MAX - 1);
            known.streams.push_front(Stream {
                next: range.end(),
                ahead_to: range.end(),
                window_bytes: 0,
            });
            return None;
        };
        let mut stream = known.streams.remove(at)?;
        stream.next = stream.next.max(range.end());
        // Half of what was fetched in advance is left: time for more.
        let left = stream.ahead_to.saturating_sub(stream.next);
        let ahead = if left <= stream.window_bytes / 2 {
            stream.window_bytes = (stream.window_bytes * 2).clamp(min, max);
            let start = stream.ahead_to.max(stream.next).div_ceil(GROUP_SIZE) * GROUP_SIZE;
            let end = stream.next.saturating_add(stream.window_bytes);
            let ahead = ByteRange::new(start, end.min(known.size_bytes));
            stream.ahead_to = ahead.map_or(stream.ahead_to, |ahead| ahead.end());
            ahead
        } else {
            None
        };
        known.streams.push_front(stream);
        ahead
    }

    fn schedule(&mut self) {
        while self.count(true) < self.limits.fills_max
            && let Some(queued) = self.queue.pop_front()
        {
            let purpose = Purpose::Urgent(queued.events);
            self.start(queued.device, queued.range, purpose);
        }
        while self.count(false) < self.limits.ahead_max
            && let Some((device, range)) = self.ahead.pop_front()
        {
            self.start(device, range, Purpose::Ahead);
        }
        self.schedule_background();
    }

    /// One step of one device at a time, and none while somebody waits for a place.
    fn schedule_background(&mut self) {
        let busy = self
            .fills
            .values()
            .any(|fill| matches!(fill.purpose, Purpose::Background));
        if busy || !self.queue.is_empty() {
            return;
        }
        let step = self.limits.background_bytes;
        let next = self.devices.iter().find_map(|(id, device)| {
            let at = device.background.filter(|_| !device.background_waits)?;
            let end = at.saturating_add(step).min(device.size_bytes);
            Some((*id, ByteRange::new(at, end)?))
        });
        if let Some((device, range)) = next {
            self.start(device, range, Purpose::Background);
        }
    }

    fn count(&self, urgent: bool) -> usize {
        let counted = self.fills.values().filter(|fill| match fill.purpose {
            Purpose::Urgent(_) => urgent,
            Purpose::Ahead => !urgent,
            Purpose::Background => false,
        });
        counted.count()
    }

    fn start(&mut self, device: DeviceId, range: ByteRange, purpose: Purpose<E>) {
        let fill = FillId(self.next_fill);
        self.next_fill += 1;
        let urgency = match purpose {
            Purpose::Urgent(_) => Priority::Fault,
            Purpose::Ahead | Purpose::Background => Priority::Prefetch,
        };
        self.actions.push_back(Action::Fill {
            fill,
            device,
            range,
            urgency,
        });
        let new = Fill {
            device,
            range,
            purpose,
        };
        self.fills.insert(fill, new);
    }
}

#[cfg(test)]
mod tests;
