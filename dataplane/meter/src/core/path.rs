//! A path to one peer: what the kernel counts and what QUIC knows, as one estimate.

use std::time::Duration;

use super::flow::{Demand, Flow, Rate};
use super::{Count, QuicView};

/// A peer that was sent something and has said nothing for this long, or for [`SILENCE_RTTS`] round trips
/// where that is longer, is silent: acknowledgements are held back 25 ms at most.
const SILENCE_MIN: Duration = Duration::from_millis(250);
/// A lost packet is repeated, and its repeat, within this many round trips.
const SILENCE_RTTS: u32 = 6;
/// Sending at this part of what the congestion window allows is sending all that the path takes.
const SATURATED_RATIO: f64 = 0.5;
/// What a new sample of the loss weighs.
const LOSS_WEIGHT: f64 = 0.25;
/// Packets for one sample of the loss: fewer say nothing of a rate of 1 %.
const LOSS_PACKETS_MIN: u64 = 100;

/// A path at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading {
    /// On a monotonic clock.
    pub at: Duration,
    /// From the peer.
    pub received: Count,
    /// To the peer.
    pub sent: Count,
    /// QUIC's view.
    pub quic: QuicView,
    /// A request of ours to the peer has been under way since the reading before, all the time.
    pub is_wanted: bool,
    /// The counts are the kernel's, not QUIC's.
    pub is_kernel: bool,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PathEstimate {
    /// What the peer delivers to this node while more is wanted of it.
    pub inbound: Option<Rate>,
    /// What this node delivers to the peer while there is more to send.
    pub outbound: Option<Rate>,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// The shortest that was seen: the rest of `rtt` is queues.
    pub rtt_min: Duration,
    /// Part of the packets to the peer that are lost.
    pub loss_ratio: f64,
    /// The peer does not answer what it is sent.
    pub is_silent: bool,
    /// Bytes from the peer that reached this machine and not this process: its socket's buffer was full.
    pub dropped_bytes: u64,
}

/// A path to one peer.
#[derive(Debug, Clone, Default)]
pub struct Path {
    last: Option<Reading>,
    inbound: Flow,
    outbound: Flow,
    delivered_bytes: f64,
    rtt_min: Option<Duration>,
    loss_ratio: f64,
    loss_from: QuicView,
    /// Since when what was sent has not been answered.
    unanswered_since: Option<Duration>,
    is_silent: bool,
    dropped_bytes: u64,
}

impl Path {
    /// Takes a reading; they must come in the order of their times. One that does not is passed over.
    pub fn take(&mut self, reading: &Reading) {
        let Some(last) = self.last else {
            self.begin(reading);
            return;
        };
        if reading.at <= last.at {
            return;
        }
        if reading.is_kernel != last.is_kernel {
            // Another counter: what went before does not compare.
            self.inbound.restart();
        }
        self.look_at_loss(reading);
        self.look_for_answers(&last, reading);
        let demand = match reading.is_wanted {
            true => Demand::Full,
            false => Demand::Partial,
        };
        self.inbound
            .take(reading.at, reading.received.wire_bytes, demand);
        self.take_outbound(&last, reading);
        if reading.is_kernel && last.is_kernel {
            let arrived = reading
                .received
                .payload_bytes
                .saturating_sub(last.received.payload_bytes);
            let read = reading
                .quic
                .received_bytes
                .saturating_sub(last.quic.received_bytes);
            self.account_drops(arrived, read);
        }
        if !reading.quic.rtt.is_zero() {
            let shortest = self
                .rtt_min
                .map_or(reading.quic.rtt, |rtt| rtt.min(reading.quic.rtt));
            self.rtt_min = Some(shortest);
        }
        self.last = Some(*reading);
    }

    fn begin(&mut self, reading: &Reading) {
        self.inbound
            .take(reading.at, reading.received.wire_bytes, Demand::Partial);
        self.outbound.take(reading.at, 0, Demand::Partial);
        self.loss_from = reading.quic;
        self.last = Some(*reading);
    }

    fn look_at_loss(&mut self, reading: &Reading) {
        let sent = reading
            .quic
            .sent_packets
            .saturating_sub(self.loss_from.sent_packets);
        if sent < LOSS_PACKETS_MIN {
            return;
        }
        let lost = reading
            .quic
            .lost_packets
            .saturating_sub(self.loss_from.lost_packets);
        let sample = (lost as f64 / sent as f64).min(1.0);
        self.loss_ratio += (sample - self.loss_ratio) * LOSS_WEIGHT;
        self.loss_from = reading.quic;
    }

    fn look_for_answers(&mut self, last: &Reading, reading: &Reading) {
        if reading.received.datagrams != last.received.datagrams {
            self.unanswered_since = None;
        } else if reading.sent.datagrams != last.sent.datagrams {
            self.unanswered_since.get_or_insert(last.at);
        }
        let patience = SILENCE_MIN.max(reading.quic.rtt * SILENCE_RTTS);
        self.is_silent = self
            .unanswered_since
            .is_some_and(|since| reading.at.saturating_sub(since) >= patience);
    }

    /// What arrives at the peer is what is sent less what is lost, which is sent again.
    fn take_outbound(&mut self, last: &Reading, reading: &Reading) {
        let sent = reading.sent.wire_bytes.saturating_sub(last.sent.wire_bytes) as f64;
        let lost = reading
            .quic
            .lost_packets
            .saturating_sub(last.quic.lost_packets) as f64;
        let packets = reading
            .quic
            .sent_packets
            .saturating_sub(last.quic.sent_packets) as f64;
        let arrived = (1.0 - lost / packets.max(1.0)).clamp(0.0, 1.0);
        let is_comparable = reading.is_kernel == last.is_kernel;
        self.delivered_bytes += if is_comparable { sent * arrived } else { 0.0 };
        let took_s = reading.at.saturating_sub(last.at).as_secs_f64();
        let allowed = reading.quic.cwnd_bytes as f64 / reading.quic.rtt.as_secs_f64().max(1e-6);
        let is_saturated = sent / took_s >= allowed * SATURATED_RATIO || lost > 0.0;
        let demand = match is_saturated && is_comparable && sent > 0.0 {
            true => Demand::Full,
            false => Demand::Partial,
        };
        self.outbound
            .take(reading.at, self.delivered_bytes as u64, demand);
    }

    /// What is under way between the kernel and the process comes and goes; only what never arrives stays.
    fn account_drops(&mut self, arrived: u64, read: u64) {
        self.dropped_bytes = self
            .dropped_bytes
            .saturating_add(arrived)
            .saturating_sub(read);
    }

    /// What is known at `now`.
    pub fn estimate(&self, now: Duration) -> PathEstimate {
        let rtt = self.last.map_or(Duration::ZERO, |last| last.quic.rtt);
        PathEstimate {
            inbound: self.inbound.rate(now),
            outbound: self.outbound.rate(now),
            rtt,
            rtt_min: self.rtt_min.unwrap_or(rtt),
            loss_ratio: self.loss_ratio,
            is_silent: self.is_silent,
            dropped_bytes: self.dropped_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// A path that is saturated both ways at `rate` bytes a second.
    struct Link {
        path: Path,
        now: Reading,
    }

    impl Link {
        fn new() -> Self {
            let quic = QuicView {
                rtt: Duration::from_millis(2),
                ..QuicView::default()
            };
            let now = Reading {
                quic,
                is_kernel: true,
                ..Reading::default()
            };
            let mut path = Path::default();
            path.take(&now);
            Self { path, now }
        }

        fn run(&mut self, rate: u64, loss_per_mille: u64, ticks: u32) -> PathEstimate {
            for _ in 0..ticks {
                let now = &mut self.now;
                now.at += TICK;
                now.is_wanted = true;
                let bytes = rate / 10;
                for count in [&mut now.received, &mut now.sent] {
                    count.wire_bytes += bytes;
                    count.payload_bytes += bytes * 1400 / 1428;
                    count.datagrams += bytes / 1428;
                }
                now.quic.received_bytes = now.received.payload_bytes;
                now.quic.sent_packets += bytes / 1428;
                now.quic.lost_packets += bytes / 1428 * loss_per_mille / 1000;
                now.quic.cwnd_bytes = (rate as f64 * now.quic.rtt.as_secs_f64()) as u64;
                self.path.take(now);
            }
            self.path.estimate(self.now.at)
        }
    }

    #[test]
    fn both_directions_are_measured_and_loss_is_taken_off_what_is_delivered() {
        let mut link = Link::new();
        let found = link.run(100_000_000, 100, 30);
        let (inbound, outbound) = (found.inbound.expect("in"), found.outbound.expect("out"));
        assert!(
            (inbound.bytes_per_s / 100e6 - 1.0).abs() < 0.02,
            "{found:?}"
        );
        assert!(
            (outbound.bytes_per_s / 90e6 - 1.0).abs() < 0.02,
            "{found:?}"
        );
        assert!((found.loss_ratio - 0.1).abs() < 0.01, "{found:?}");
        assert!(!found.is_silent);
        assert_eq!(found.dropped_bytes, 0);
    }

    #[test]
    fn a_peer_that_stops_answering_is_silent_and_speaks_again() {
        let mut link = Link::new();
        link.run(10_000_000, 0, 10);
        let mut silent_after = None;
        for tick in 1..=10 {
            link.now.at += TICK;
            link.now.sent.datagrams += 3;
            link.path.take(&link.now);
            if link.path.estimate(link.now.at).is_silent && silent_after.is_none() {
                silent_after = Some(TICK * tick);
            }
        }
        assert_eq!(silent_after, Some(Duration::from_millis(300)));
        assert!(!link.run(10_000_000, 0, 1).is_silent);
    }

    #[test]
    fn a_quiet_path_is_not_silent() {
        let mut link = Link::new();
        link.run(10_000_000, 0, 10);
        for _ in 0..100 {
            link.now.at += TICK;
            link.path.take(&link.now);
        }
        assert!(!link.path.estimate(link.now.at).is_silent);
    }

    #[test]
    fn what_the_kernel_had_and_the_process_never_got_is_counted_as_dropped() {
        let mut link = Link::new();
        link.run(10_000_000, 0, 10);
        link.now.at += TICK;
        link.now.received.payload_bytes += 5000;
        link.now.quic.received_bytes += 3600;
        link.path.take(&link.now);
        assert_eq!(link.path.estimate(link.now.at).dropped_bytes, 1400);
    }

    #[test]
    fn counts_that_begin_anew_leave_the_estimate_as_it_was() {
        let mut link = Link::new();
        let before = link.run(50_000_000, 0, 30).inbound.expect("in").bytes_per_s;
        link.now.received = Count::default();
        link.now.sent = Count::default();
        let after = link.run(50_000_000, 0, 1).inbound.expect("in").bytes_per_s;
        assert!((after / before - 1.0).abs() < 0.05, "{before} {after}");
        let after = link.run(50_000_000, 0, 30).inbound.expect("in").bytes_per_s;
        assert!((after / before - 1.0).abs() < 0.05, "{before} {after}");
    }
}
