//! The network against a slow reference, and the laws that any sharing must keep: no link above its
//! capacity, each flow held down by a full link on which none is faster, and every byte accounted for.

use std::time::Duration;

use super::{FlowId, LinkId, NO_LINK, Network};
use crate::rng::Rng;

const NOISE: f64 = 1e-6;

/// Textbook progressive filling over all flows: in each turn the tightest link stops all of its flows.
fn reference(capacities: &[f64], paths: &[Vec<usize>]) -> Vec<f64> {
    let mut rates = vec![f64::NAN; paths.len()];
    loop {
        let mut tightest: Option<(f64, usize)> = None;
        for (link, &capacity) in capacities.iter().enumerate() {
            let over = |path: &&usize| paths[**path].contains(&link);
            let (open, stopped): (Vec<usize>, Vec<usize>) = (0..paths.len())
                .collect::<Vec<_>>()
                .iter()
                .filter(over)
                .partition(|&&path| rates[path].is_nan());
            if open.is_empty() {
                continue;
            }
            let level = (capacity - stopped.iter().map(|&path| rates[path]).sum::<f64>()).max(0.0)
                / open.len() as f64;
            if tightest.is_none_or(|(lowest, _)| level < lowest) {
                tightest = Some((level, link));
            }
        }
        let Some((level, link)) = tightest else {
            return rates;
        };
        for (rate, path) in rates.iter_mut().zip(paths) {
            if rate.is_nan() && path.contains(&link) {
                *rate = level;
            }
        }
    }
}

struct Running {
    id: FlowId,
    path: Vec<usize>,
}

struct Case {
    network: Network,
    links: Vec<LinkId>,
    capacities: Vec<f64>,
    running: Vec<Running>,
    random: Rng,
    now: Duration,
}

impl Case {
    fn new(seed: u64, step: Duration) -> Self {
        let mut random = Rng::new(seed);
        let mut network = Network::new(step);
        // Few distinct sizes: ties between links are where a filling goes wrong.
        let capacities: Vec<f64> = (0..2 + random.below(20))
            .map(|_| [1e6, 2e6, 1e7, 3.3e5][random.below(4) as usize])
            .collect();
        let links = capacities
            .iter()
            .map(|&capacity| network.add_link(capacity))
            .collect();
        Self {
            network,
            links,
            capacities,
            running: Vec::new(),
            random,
            now: Duration::ZERO,
        }
    }

    fn start(&mut self) {
        let mut path: Vec<usize> = (0..1 + self.random.below(5))
            .map(|_| self.random.below(self.links.len() as u64) as usize)
            .collect();
        path.sort_unstable();
        path.dedup();
        let links: Vec<LinkId> = path.iter().map(|&link| self.links[link]).collect();
        let bytes = 1 + self.random.below(2_000_000);
        let id = self.network.start(self.now, &links, bytes);
        self.running.push(Running { id, path });
    }

    fn change(&mut self) {
        match self.random.below(8) {
            0 if !self.running.is_empty() => {
                let gone = self.random.below(self.running.len() as u64) as usize;
                let gone = self.running.swap_remove(gone);
                self.network.cancel(self.now, gone.id);
            }
            1 => {
                let link = self.random.below(self.links.len() as u64) as usize;
                self.capacities[link] = [0.0, 1e6, 5e5, 2e7][self.random.below(4) as usize];
                self.network
                    .set_capacity(self.now, self.links[link], self.capacities[link]);
            }
            _ => self.start(),
        }
    }

    fn advance(&mut self, to: Duration) {
        self.now = to;
        let mut finished = Vec::new();
        self.network.advance(to, &mut finished);
        self.running
            .retain(|running| !finished.contains(&running.id));
    }

    /// Advances until all that is due at the present instant is done.
    fn settle(&mut self) {
        self.advance(self.now);
        while self.network.next_event() == Some(self.now) {
            self.advance(self.now);
        }
    }

    fn check_capacities(&self) {
        for (link, &capacity) in self.capacities.iter().enumerate() {
            let over = self
                .running
                .iter()
                .filter(|running| running.path.contains(&link));
            let sum: f64 = over
                .map(|running| self.network.rate(running.id).unwrap())
                .sum();
            assert!(
                sum <= capacity * (1.0 + NOISE),
                "link {link} carries {sum} of {capacity}"
            );
            let load = self.network.load(self.links[link]);
            assert!(
                (load - sum).abs() <= capacity * NOISE + 1.0,
                "load {load}, but the rates are {sum}"
            );
        }
    }

    fn check_fair(&self) {
        for running in &self.running {
            let rate = self.network.rate(running.id).unwrap();
            let held = running.path.iter().any(|&link| {
                let over = self
                    .running
                    .iter()
                    .filter(|other| other.path.contains(&link));
                let rates: Vec<f64> = over
                    .map(|other| self.network.rate(other.id).unwrap())
                    .collect();
                let fastest = rates.iter().copied().fold(0.0, f64::max);
                rates.iter().sum::<f64>() >= self.capacities[link] * (1.0 - NOISE)
                    && rate >= fastest * (1.0 - NOISE)
            });
            assert!(
                held,
                "a flow over {:?} has no bottleneck at {rate}",
                running.path
            );
        }
        let paths: Vec<Vec<usize>> = self
            .running
            .iter()
            .map(|running| running.path.clone())
            .collect();
        for (running, expected) in self.running.iter().zip(reference(&self.capacities, &paths)) {
            let rate = self.network.rate(running.id).unwrap();
            assert!(
                (rate - expected).abs() <= expected * NOISE + NOISE,
                "{rate} is not {expected}"
            );
        }
    }
}

#[test]
fn rates_are_those_of_the_reference_after_every_change() {
    for seed in 0..300 {
        println!("seed {seed}");
        let mut case = Case::new(seed, Duration::ZERO);
        for _ in 0..60 {
            for _ in 0..1 + case.random.below(3) {
                case.change();
            }
            case.settle();
            case.check_capacities();
            case.check_fair();
            let Some(next) = case.network.next_event() else {
                continue;
            };
            // Sometimes to the next event, sometimes to a part of the way.
            let part = [1.0, 0.3][case.random.below(2) as usize];
            case.advance(case.now + (next - case.now).mul_f64(part));
            case.settle();
            case.check_capacities();
            case.check_fair();
        }
    }
}

#[test]
fn with_a_step_no_link_is_overloaded_and_sharing_is_rare() {
    for seed in 0..200 {
        println!("seed {seed}");
        let step = Duration::from_millis(100);
        let mut case = Case::new(seed, step);
        let mut changed_capacities = 0;
        for _ in 0..100 {
            let before = case.capacities.clone();
            case.change();
            changed_capacities += u64::from(before != case.capacities);
            if before != case.capacities {
                case.settle();
            }
            case.check_capacities();
            let pause = Duration::from_micros(case.random.below(30_000));
            case.advance(case.now + pause);
            case.check_capacities();
        }
        let rounds_max = 2 + 100 + case.now.as_millis() as u64 / 100;
        assert!(case.network.rounds() <= rounds_max + changed_capacities);
        // Half a step after the last change all is shared out.
        case.advance(case.now + step);
        case.settle();
        if case.network.started.is_empty() && case.network.dirty.is_empty() {
            case.check_fair();
        }
    }
}

#[test]
fn every_byte_is_carried_once() {
    for seed in 0..200 {
        println!("seed {seed}");
        let step = Duration::from_millis([0, 5][seed as usize % 2]);
        let mut random = Rng::new(seed);
        let mut network = Network::new(step);
        let links: Vec<LinkId> = (0..8).map(|_| network.add_link(1e6)).collect();
        let mut expected = [0u64; 8];
        let mut open: Vec<(FlowId, Vec<usize>, u64)> = Vec::new();
        let mut now = Duration::ZERO;
        for _ in 0..200 {
            let path = vec![random.below(4) as usize, 4 + random.below(4) as usize];
            let bytes = random.below(400_000);
            let over: Vec<LinkId> = path.iter().map(|&link| links[link]).collect();
            open.push((network.start(now, &over, bytes), path, bytes));
            if random.below(5) == 0 {
                let (id, path, bytes) = open.swap_remove(random.below(open.len() as u64) as usize);
                let delivered = network.cancel(now, id);
                assert!(delivered <= bytes);
                path.iter().for_each(|&link| expected[link] += delivered);
            }
            now += Duration::from_millis(random.below(100));
            let mut finished = Vec::new();
            network.advance(now, &mut finished);
            open.retain(|(id, path, bytes)| {
                let over = finished.contains(id);
                path.iter()
                    .for_each(|&link| expected[link] += u64::from(over) * bytes);
                !over
            });
        }
        let mut finished = Vec::new();
        while let Some(next) = network.next_event() {
            network.advance(next, &mut finished);
        }
        for (id, path, bytes) in open {
            assert!(finished.contains(&id), "a flow over working links ends");
            path.iter().for_each(|&link| expected[link] += bytes);
        }
        for (link, &bytes) in links.iter().zip(&expected) {
            assert!((network.carried_bytes(*link) - bytes as f64).abs() < 1.0);
        }
        assert_eq!(network.flows(), 0);
        assert!(
            network
                .flows
                .iter()
                .all(|flow| flow.sequence == 0 && flow.bottleneck == NO_LINK)
        );
        assert!(
            network
                .links
                .iter()
                .all(|link| link.holds == 0 && link.flows.is_empty())
        );
    }
}

#[test]
fn a_flow_takes_as_long_as_its_share_says() {
    let mut network = Network::new(Duration::ZERO);
    let link = network.add_link(1000.0);
    let first = network.start(Duration::ZERO, &[link], 1000);
    let second = network.start(Duration::ZERO, &[link], 500);
    let mut finished = Vec::new();
    network.advance(Duration::ZERO, &mut finished);
    assert_eq!(network.next_event(), Some(Duration::from_secs(1)));
    network.advance(Duration::from_secs(1), &mut finished);
    assert_eq!(finished, [second]);
    assert_eq!(network.delivered(first), Some(500));
    while let Some(next) = network.next_event() {
        network.advance(next, &mut finished);
    }
    assert_eq!(finished, [second, first]);
    assert_eq!(network.now_ns, 1_500_000_000);
}

#[test]
fn a_flow_over_a_dead_link_waits_for_it() {
    let mut network = Network::new(Duration::ZERO);
    let link = network.add_link(0.0);
    let flow = network.start(Duration::ZERO, &[link], 1000);
    let mut finished = Vec::new();
    network.advance(Duration::from_secs(10), &mut finished);
    assert!(finished.is_empty());
    assert_eq!(network.next_event(), None);
    network.set_capacity(Duration::from_secs(10), link, 1000.0);
    network.advance(Duration::from_secs(11), &mut finished);
    assert_eq!(finished, [flow]);
}

#[test]
fn the_peak_is_the_mean_of_the_fullest_window() {
    let mut network = Network::new(Duration::ZERO);
    let link = network.add_link(1000.0);
    let slow = network.add_link(100.0);
    network.watch(link, Duration::from_secs(1));
    let mut finished = Vec::new();
    network.start(Duration::ZERO, &[link, slow], 1000);
    network.advance(Duration::from_millis(2500), &mut finished);
    assert!((network.peak_bytes_per_s(link) - 100.0).abs() < NOISE);
    // 500 bytes in half a window, beside the slow flow.
    network.start(Duration::from_millis(2500), &[link], 450);
    network.advance(Duration::from_secs(20), &mut finished);
    assert!(
        (network.peak_bytes_per_s(link) - 550.0).abs() < 1.0,
        "{}",
        network.peak_bytes_per_s(link)
    );
}
